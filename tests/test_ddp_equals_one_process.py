"""The same training by each script at any number of ranks: losses, weights, batches, validation."""

import itertools
import json

import numpy as np
import pytest
import torch

from tests.edit import calls, is_class, put_before, replace_call
from tests.ranks import (
    DDP,
    RESILIENT,
    SINGLE,
    assert_same,
    data_gen,
    losses,
    result,
    save_data,
    start_ranks,
    torchrun,
    train,
)

# 96 divides among 1, 2, 3 and 4 ranks. 1,055 samples do not, and leave a part of a batch over: to which a sampler that
# pads the shares would add the last sample, for one step more.
FLAGS = ("--batch-size", 96, "--epochs", 5)
# The ranks add the same float32 gradients in another order. That moves a sum by some units of 1.2e-7; 50 steps
# of a convex problem at a stable learning rate do not amplify it. Measured: below 1e-6. A wrong batch, a gradient
# not averaged or a sample counted twice moves the losses by 1e-3 and more.
CLOSE = {"rtol": 1e-5, "atol": 5e-6}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uneven")
    assert data_gen("gaussian", "--out", folder, "--n-train", 1055, "--n-val", 1003) == 0
    return folder


@pytest.fixture(scope="module")
def one_process(data, tmp_path_factory):
    """What the script of one process makes."""
    return train(0, SINGLE, data, tmp_path_factory.mktemp("one"), *FLAGS)


def cases(quick, slow):
    """Parameters of both lanes."""
    return [*quick, *(pytest.param(*case, marks=pytest.mark.slow) for case in slow)]


def name(value):
    return getattr(value, "stem", value)


@pytest.mark.parametrize("path", [DDP, RESILIENT], ids=name)
def test_alone_each_script_has_the_bits_of_the_first(path, data, one_process, tmp_path):
    run = train(0, path, data, tmp_path, *FLAGS)
    assert run.history == one_process.history
    assert_same(run.model, one_process.model)


def assert_equal_training(run, expected, n):
    assert [line["world_size"] for line in run.history] == [n] * 5
    torch.testing.assert_close(losses(run.history), losses(expected.history), **CLOSE)
    torch.testing.assert_close(run.model, expected.model, **CLOSE)


RANKS = cases(
    [(2, DDP), (4, DDP), (3, RESILIENT)], [(1, DDP), (3, DDP), (1, RESILIENT), (2, RESILIENT), (4, RESILIENT)]
)


@pytest.mark.parametrize("n, path", RANKS, ids=name)
def test_ranks_train_as_one_process(n, path, data, one_process, tmp_path):
    assert_equal_training(train(n, path, data, tmp_path, *FLAGS), one_process, n)


@pytest.mark.parametrize("n, path", cases([(2, DDP)], [(2, RESILIENT), (4, RESILIENT), (4, DDP)]), ids=name)
def test_torchrun_trains_as_one_process(n, path, data, one_process, tmp_path):
    done = torchrun(n, path, "--data-dir", data, "--out", tmp_path, *FLAGS)
    assert (done.returncode, done.stderr) == (0, "")
    assert_equal_training(result(tmp_path), one_process, n)


def test_ranks_of_two_machines_train_as_one_process(data, one_process, tmp_path):
    """One rank on each: the first of its machine is not the first of all. Each has an --out of its own."""
    apart = put_before(DDP, calls("load_splits"), "args.out /= str(rank)", tmp_path / DDP.name)
    alone_on_its_machine = {rank: {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1} for rank in range(2)}
    ranks = start_ranks(2, apart, "--data-dir", data, "--out", tmp_path, *FLAGS, rank_env=alone_on_its_machine)
    assert [rank.code for rank in ranks] == [0, 0], ranks
    assert_equal_training(result(tmp_path / "0"), one_process, 2)
    assert list((tmp_path / "1").iterdir()) == []


def test_the_runs_compared_do_train(one_process):
    first, *_, last = one_process.history
    assert last["train_loss"] < 0.7 * first["train_loss"]


FEW, OTHERS = (1, 6), (2, 3, 4, 5, *range(7, 18))  # ranks without a sample; unequal shares
VALIDATIONS = cases(
    [*((RESILIENT, n_val) for n_val in FEW), (DDP, 3)],
    [*((RESILIENT, n_val) for n_val in OTHERS), *((DDP, n_val) for n_val in FEW)],
)


@pytest.mark.parametrize("path, n_val", VALIDATIONS, ids=name)
def test_validation_is_exact(path, n_val, small, tmp_path):
    data = save_data(
        tmp_path / "data",
        **{path.stem: np.load(path)[: n_val if "val" in path.stem else None] for path in small.iterdir()},
    )
    flags = ("--batch-size", 20, "--epochs", 1)
    ranks, one = (train(n, path, data, tmp_path / f"{n}", *flags) for n in (4, 0))
    assert ranks.history[0]["val_accuracy"] == one.history[0]["val_accuracy"]
    torch.testing.assert_close(losses(ranks.history), losses(one.history), **CLOSE)
    model = ranks.model  # and by hand, from the weights that were validated
    x = (torch.from_numpy(np.load(data / "X_val.npy")) - model["0.mean"]) / model["0.scale"]
    log_p = (x @ model["1.linear.weight"].T + model["1.linear.bias"]).log_softmax(1)
    y = torch.from_numpy(np.load(data / "y_val.npy"))
    assert ranks.history[0]["val_accuracy"] == (log_p.argmax(1) == y).double().mean().item()
    assert ranks.history[0]["val_loss"] == pytest.approx(-log_p[range(n_val), y].double().mean().item(), rel=1e-6)


REPORT_READS = """
import json, sys
def report(self, indices, gather=NpyDataset.__getitems__):
    print(json.dumps([self.X_path.stem, [int(i) for i in indices]]), file=sys.stderr)
    return gather(self, indices)
NpyDataset.__getitems__ = report
"""
EPOCHS, STEPS, N_TRAIN, N_VAL = 3, 4, 48, 18


def of_length(array, n):
    return np.resize(array, (n, *array.shape[1:]))


@pytest.fixture
def reads(script, small, tmp_path):
    """A function: which samples each rank of a run reads, {split: [rank][batch][sample]}."""
    data = save_data(
        tmp_path / "data",
        **{path.stem: of_length(np.load(path), N_TRAIN if "train" in path.stem else N_VAL) for path in small.iterdir()},
    )
    copies = {path: put_before(path, is_class, REPORT_READS, tmp_path / path.name) for path in (SINGLE, DDP, RESILIENT)}

    def run(n, script):
        script = copies.get(script, script)
        flags = ("--data-dir", data, "--out", tmp_path / "out", "--epochs", EPOCHS, "--batch-size", N_TRAIN // STEPS)
        ranks = start_ranks(n, script, *flags)
        assert {rank.code for rank in ranks} == {0}, ranks
        lines = [[json.loads(line) for line in rank.stderr.splitlines() if line[0] == "["] for rank in ranks]
        splits = ("X_train", "X_val")
        return {split: [[read for name, read in rank if name == split] for rank in lines] for split in splits}

    run.copies = copies
    return run


def global_batches(ranks):
    """[epoch][step]: what all ranks read for it, in ascending order."""
    steps = [sorted(itertools.chain(*shares)) for shares in zip(*ranks, strict=True)]
    return [steps[i : i + STEPS] for i in range(0, EPOCHS * STEPS, STEPS)]


def test_the_samples_are_dealt_out(reads):
    alone = global_batches(reads(0, SINGLE)["X_train"])
    runs = {(n, path.stem): reads(n, path) for n, path in ((2, RESILIENT), (4, DDP))}
    batches = {case: global_batches(run["X_train"]) for case, run in runs.items()}
    assert all(found == alone for found in batches.values())
    for case, run in runs.items():
        n = case[0]
        for rank in run["X_train"]:
            assert [len(share) for share in rank] == [N_TRAIN // STEPS // n] * EPOCHS * STEPS
        for epoch in batches[case]:
            assert sorted(itertools.chain(*epoch)) == list(range(N_TRAIN))
        for epoch in range(EPOCHS):  # a rank may have none of a small validation set; 18 is enough for 4
            assert sorted(itertools.chain(*(rank[epoch] for rank in run["X_val"]))) == list(range(N_VAL))
    orders = [runs[4, DDP.stem]["X_train"][0][epoch * STEPS : (epoch + 1) * STEPS] for epoch in range(EPOCHS)]
    assert all(a != b for a, b in itertools.combinations(orders, 2))


def test_without_set_epoch_the_order_repeats(reads, tmp_path):
    forgetful = replace_call(reads.copies[DDP], "sampler.set_epoch", "None", tmp_path / "forgetful.py")
    for rank in reads(4, forgetful)["X_train"]:
        first, *others = (rank[i : i + STEPS] for i in range(0, EPOCHS * STEPS, STEPS))
        assert others == [first] * (EPOCHS - 1)
