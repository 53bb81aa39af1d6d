"""Each mistake: one line that says what, where and what to do; exit code 2 on every rank; no hang.

What the line says is tested in this process, with the functions that the scripts call. How a program ends is tested
with one mistake of each kind; in the slow lane every mistake ends a program.
"""

import itertools
import os
import re
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ddp_tutorial import flags
from ddp_tutorial.console import UserError
from ddp_tutorial.data import load_splits
from ddp_tutorial.process import per_rank_batch_size
from ddp_tutorial.ranks import check_environment, check_flags, check_shares, parse
from tests.edit import calls, is_class, put_before, replace_call
from tests.ranks import DDP, RESILIENT, SINGLE, free_port, save_data, start, start_ranks, torchrun, train

PROGRAMS = {
    "single": (SINGLE, 0),
    "ddp_one_process": (DDP, 0),
    "ddp_four_ranks": (DDP, 4),
    "resilient_one_process": (RESILIENT, 0),
    "resilient_four_ranks": (RESILIENT, 4),
}
SLOW = pytest.mark.slow
EVERY_DDP_SCRIPT = pytest.mark.parametrize("path", [DDP, RESILIENT], ids=["ddp", "resilient"])
ONE_PROCESS_AND_FOUR_RANKS = pytest.mark.parametrize("n", [0, 4], ids=["one_process", "four_ranks"])
FOUR_RANKS_ARE_SLOW = pytest.mark.parametrize("n", [0, pytest.param(4, marks=SLOW)], ids=["one_process", "four_ranks"])


def each_program(*quick):
    """All programs, of which those named are in the quick lane."""
    programs = PROGRAMS.items()
    return pytest.mark.parametrize(
        "path, n", [pytest.param(*program, marks=[SLOW] * (name not in quick), id=name) for name, program in programs]
    )


ALONE_AND_IN_GROUPS = each_program("single", "ddp_four_ranks", "resilient_four_ranks")


def rewrite(name, change):
    """Damage of an array."""

    def damage(folder: Path):
        save_data(folder, **{name: change(np.load(folder / f"{name}.npy"))})

    return damage


def cut(name, size):
    """Damage of a file's length."""

    def damage(folder: Path):
        path = folder / f"{name}.npy"
        path.write_bytes(path.read_bytes()[:size])

    return damage


def put(row, value):
    """A change of an array: row `row` becomes `value`."""

    def change(array):
        array = array.astype(type(value)) if isinstance(value, float) else array
        array[row] = value
        return array

    return change


def remove_all(folder):
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def archive(folder):
    np.savez(folder / "y_train.npz", np.arange(40))
    (folder / "y_train.npz").rename(folder / "y_train.npy")


def text(folder):
    (folder / "X_val.npy").write_text("1,2,3\n")


def directory(folder):
    (folder / "X_val.npy").unlink()
    (folder / "X_val.npy").mkdir()


# The damage, what the line must name, and a word of its remedy.
DATA = {
    "missing folder": (remove_all, "", "--data-dir"),
    "missing file": (lambda folder: (folder / "y_val.npy").unlink(), "y_val.npy", "--data-dir"),
    "a folder for a file": (directory, "X_val.npy", "readable"),
    "not npy": (text, "X_val.npy", "numpy.save"),
    "empty file": (cut("y_train", 0), "y_train.npy", "numpy.save"),
    "cut in the header": (cut("X_train", 50), "X_train.npy", "numpy.save"),
    "cut in the values": (cut("X_train", -40), "X_train.npy", "numpy.save"),
    "pickled objects": (rewrite("y_train", lambda y: y.astype(object)), "y_train.npy", "numpy.save"),
    "npz archive": (archive, "y_train.npy", "numpy.save"),
    "X of one dimension": (rewrite("X_train", np.ravel), "X_train.npy", "X.reshape(-1, 1)"),
    "images": (rewrite("X_train", lambda X: X[:, :, None].repeat(3, 2)), "X_train.npy", "X.reshape(len(X), -1)"),
    "X without features": (rewrite("X_val", lambda X: X[:, :0]), "X_val.npy", "at least one"),
    "y of one column": (rewrite("y_val", lambda y: y[:, None]), "y_val.npy", "y.ravel()"),
    "one-hot labels": (rewrite("y_train", lambda y: np.eye(3)[y]), "y_train.npy", "y.argmax(axis=1)"),
    "lengths differ": (rewrite("y_train", lambda y: y[1:]), "y_train.npy", "one label"),
    "labels not whole": (rewrite("y_val", put(7, 1.5)), "y_val.npy", "0, 1, 2"),
    "label nan": (rewrite("y_train", put(39, np.nan)), "y_train.npy", "0, 1, 2"),
    "label infinite": (rewrite("y_train", put(39, np.inf)), "y_train.npy", "0, 1, 2"),
    "label negative": (rewrite("y_train", put(39, -1)), "y_train.npy", "0, 1, 2"),
    "one class": (rewrite("y_train", np.zeros_like), "y_train.npy", "at least two classes"),
    "features differ": (rewrite("X_val", lambda X: X[:, :2]), "X_val.npy", "the same features"),
    "label unseen": (rewrite("y_val", put(19, 3)), "y_val.npy", "add training samples"),
    "text values": (rewrite("X_train", lambda X: X.astype(str)), "X_train.npy", "real numbers"),
    "complex values": (rewrite("X_train", lambda X: X.astype(complex)), "X_train.npy", "real numbers"),
    "nan in X_train": (rewrite("X_train", put((39, 2), np.nan)), "X_train.npy", "replace"),
    "inf in X_val": (rewrite("X_val", put((0, 1), -np.inf)), "X_val.npy", "replace"),
    "no training samples": (lambda folder: empty(folder, "train"), "X_train.npy", "at least one"),
    "no validation samples": (lambda folder: empty(folder, "val"), "X_val.npy", "at least one"),
}


def empty(folder, split):
    for name in (f"X_{split}", f"y_{split}"):
        rewrite(name, lambda array: array[:0])(folder)


def assert_refused(ranks, names, remedy, path=RESILIENT):
    assert [rank.code for rank in ranks] == [2] * len(ranks), ranks
    (line,) = "".join(rank.stderr for rank in ranks).splitlines()
    assert ranks[0].stderr  # the first rank speaks
    assert_good_line(line, names, remedy, path)


def assert_good_line(line, names, remedy, path=RESILIENT):
    prefix = f"{path.name}: error: "
    assert line.startswith(prefix)
    assert_good(line.removeprefix(prefix), names, remedy)


def assert_good(message, names, remedy):
    assert message.isprintable()  # one line
    what, do = message.rsplit(": ", 1)
    assert names in what and len(what) > len(names) + 10  # it says more than the name
    assert remedy in do


@pytest.mark.parametrize("case", DATA)
def test_bad_data(case, small):
    damage, name, remedy = DATA[case]
    damage(small)
    with pytest.raises(UserError) as mistake:
        load_splits(small)
    assert_good(str(mistake.value), str(small / name) if name else str(small), remedy)


def assert_bad_data_end_every_rank(case, path, n, data, out):
    damage, name, remedy = DATA[case]
    damage(data)
    ranks = start_ranks(n, path, "--data-dir", data, "--out", out)
    assert_refused(ranks, str(data / name) if name else str(data), remedy, path)
    assert not out.exists()


@each_program(*PROGRAMS)
def test_bad_data_end_every_rank(path, n, small, tmp_path):
    assert_bad_data_end_every_rank("cut in the values", path, n, small, tmp_path / "out")


FLAGS = {
    "unknown": (["--frobnicate"], "--frobnicate", "--help"),
    "shortened": (["--epoch", "3"], "--epoch", "--help"),
    "epochs 0": (["--epochs", "0"], "--epochs: 0", "--help"),
    "epochs text": (["--epochs", "ten"], "--epochs: ten", "--help"),
    "batch negative": (["--batch-size", "-4"], "--batch-size", "--help"),
    "lr 0": (["--lr", "0"], "--lr: 0", "--help"),
    "lr nan": (["--lr", "nan"], "--lr: nan", "--help"),
    "lr beyond float32": (["--lr", "1e300"], "--lr: 1e300", "--help"),
    "seed": (["--seed", "-1"], "--seed", "--help"),
    "device": (["--device", "tpu"], "--device", "--help"),
    "no value": (["--out"], "--out", "--help"),
}
if not torch.cuda.is_available():
    FLAGS["no gpu"] = (["--device", "cuda"], "--device cuda", "--device auto")
    FLAGS["no gpu for the data"] = (["--data-on", "gpu"], "--data-on gpu", "--data-on auto")


@pytest.mark.parametrize("case", FLAGS)
def test_bad_flags(case, monkeypatch):
    words, names, remedy = FLAGS[case]
    monkeypatch.setattr(sys, "argv", ["script.py", *words])
    with pytest.raises(UserError) as mistake:
        flags.parse("What it does.")
    assert_good(str(mistake.value), names, remedy)
    kept = parse("What it does.")  # ddp_resilient.py raises it where the ranks have met
    with pytest.raises(UserError, match=re.escape(str(mistake.value))):
        check_flags(kept)


def assert_bad_flags_end_every_rank(case, path, n, data, out):
    words, names, remedy = FLAGS[case]
    assert_refused(start_ranks(n, path, "--data-dir", data, "--out", out, *words), names, remedy, path)


@each_program(*PROGRAMS)
def test_bad_flags_end_every_rank(path, n, small, tmp_path):
    assert_bad_flags_end_every_rank("unknown", path, n, small, tmp_path / "out")


@SLOW
def test_every_mistake_ends_a_program(small, tmp_path):
    """Each in one program, by turns: all end in one way, and what the line says is tested without them."""
    failed, programs = {}, itertools.cycle(PROGRAMS)
    for mistakes, assert_ends in ((DATA, assert_bad_data_end_every_rank), (FLAGS, assert_bad_flags_end_every_rank)):
        for case, program in zip(mistakes, programs, strict=False):
            data = shutil.copytree(small, tmp_path / case / "data")
            try:
                assert_ends(case, *PROGRAMS[program], data, tmp_path / case / "out")
            except AssertionError as error:
                failed[case, program] = str(error)
    assert failed == {}


@ONE_PROCESS_AND_FOUR_RANKS
def test_nothing_to_resume(n, script, small, tmp_path):
    ranks = start_ranks(n, script, "--data-dir", small, "--out", tmp_path / "out", "--resume")
    assert_refused(ranks, "checkpoint.pt", "without --resume")


@ALONE_AND_IN_GROUPS
def test_a_file_in_the_way_of_out(path, n, small, tmp_path):
    (tmp_path / "out").touch()
    assert_refused(start_ranks(n, path, "--data-dir", small, "--out", tmp_path / "out"), "--out", "folder", path)


WRITTEN = {  # by the programs that end all their ranks when one meets a full disk
    program: ("history.writing.jsonl", *(["checkpoint.writing.pt"] if path == RESILIENT else []), "model.writing.pt")
    for program, (path, n) in PROGRAMS.items()
    if path == RESILIENT or n == 0
}
FULL_DISKS = [
    pytest.param(program, name, marks=[SLOW] * (program not in ("single", "resilient_four_ranks")))
    for program, names in WRITTEN.items()
    for name in names
]


@pytest.mark.parametrize("program, name", FULL_DISKS)
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_the_disk_is_full(program, name, small, tmp_path):
    path, n = PROGRAMS[program]
    (tmp_path / name).symlink_to("/dev/full")
    ranks = start_ranks(n, path, "--data-dir", small, "--out", tmp_path, "--epochs", 2)
    ranks[0] = ranks[0]._replace(stderr=re.sub("^warning: .*\n", "", ranks[0].stderr))  # nothing can be learnt here
    assert_refused(ranks, str(tmp_path), "name ", path)


@ONE_PROCESS_AND_FOUR_RANKS
def test_a_damaged_checkpoint(n, script, small, tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"no checkpoint")
    ranks = start_ranks(n, script, "--data-dir", small, "--out", tmp_path, "--resume")
    assert_refused(ranks, "checkpoint.pt", "without --resume")


@ONE_PROCESS_AND_FOUR_RANKS
def test_a_checkpoint_without_its_history(n, script, small, tmp_path):
    train(0, script, small, tmp_path, "--epochs", 1)
    (tmp_path / "history.jsonl").unlink()
    ranks = start_ranks(n, script, "--data-dir", small, "--out", tmp_path, "--resume")
    assert_refused(ranks, "history.jsonl", "without --resume")


@ONE_PROCESS_AND_FOUR_RANKS
def test_a_checkpoint_of_other_data(n, script, small, digits, tmp_path):
    train(0, script, digits, tmp_path, "--epochs", 1)
    ranks = start_ranks(n, script, "--data-dir", small, "--out", tmp_path, "--resume")
    assert_refused(ranks, "checkpoint.pt: made with X_train.npy of shape (", "resume with the same")


OTHER_SETTINGS = {
    "--lr": ([], ["--lr", 0.5], "--lr 1.0, not 0.5"),
    "--batch-size": (["--batch-size", 40], ["--batch-size", 20], "--batch-size 40, not 20"),
    "--seed": (["--seed", 1], ["--seed", 2], "--seed 1, not 2"),
}


@FOUR_RANKS_ARE_SLOW
@pytest.mark.parametrize("case", OTHER_SETTINGS)
def test_a_checkpoint_of_other_settings(case, n, script, small, tmp_path):
    was, now, names = OTHER_SETTINGS[case]
    train(0, script, small, tmp_path, "--epochs", 1, *was)
    ranks = start_ranks(n, script, "--data-dir", small, "--out", tmp_path, "--resume", *now)
    assert_refused(ranks, f"checkpoint.pt: made with {names}", "resume with the same")


@FOUR_RANKS_ARE_SLOW
def test_a_checkpoint_of_another_model(n, script, small, tmp_path):
    train(0, script, small, tmp_path, "--epochs", 1)
    without_bias = "nn.Linear(n_features, n_classes, bias=False)"
    other = replace_call(script, "nn.Linear", without_bias, tmp_path / script.name)
    ranks = start_ranks(n, other, "--data-dir", small, "--out", tmp_path, "--resume")
    assert_refused(ranks, "checkpoint.pt: made with 1.linear.bias of shape (3,), not None", "resume with the same")


ENVIRONMENTS = {
    "RANK without WORLD_SIZE": ({"WORLD_SIZE": None}, "WORLD_SIZE"),
    "WORLD_SIZE without RANK": ({"RANK": None}, "WORLD_SIZE"),
    "RANK not a number": ({"RANK": "one"}, "RANK='one'"),
    "RANK out of range": ({"RANK": 1}, "RANK=1"),
    "LOCAL_RANK out of range": ({"LOCAL_RANK": 1}, "LOCAL_RANK=1"),
    "LOCAL_WORLD_SIZE above": ({"LOCAL_WORLD_SIZE": 2}, "LOCAL_WORLD_SIZE=2"),
    "LOCAL_WORLD_SIZE that int() refuses": ({"LOCAL_WORLD_SIZE": "9" * 5000}, "LOCAL_WORLD_SIZE='999"),
    "no MASTER_ADDR": ({"MASTER_ADDR": ""}, "MASTER_ADDR"),
    "no port": ({"MASTER_PORT": 65536}, "MASTER_PORT=65536"),
    "restarts not a number": ({"TORCHELASTIC_RESTART_COUNT": "x"}, "TORCHELASTIC_RESTART_COUNT='x'"),
}
ONE_OF_ONE = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}


def one_of_one(change):
    """The variables of a single rank, but for a change."""
    env = ONE_OF_ONE | {"MASTER_PORT": free_port()} | change
    return {key: str(value) for key, value in env.items() if value is not None}


def test_a_network_card_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [RESILIENT.name])
    with pytest.raises(SystemExit) as left:
        check_environment(one_of_one({"GLOO_SOCKET_IFNAME": "no-card"}))
    assert left.value.code == 2
    assert_good_line(capsys.readouterr().err.removesuffix("\n"), "GLOO_SOCKET_IFNAME=no-card", " lo")


@pytest.mark.parametrize("case", ENVIRONMENTS)
def test_a_bad_environment(case, capsys, monkeypatch):
    change, names = ENVIRONMENTS[case]
    monkeypatch.setattr(sys, "argv", [RESILIENT.name])
    with pytest.raises(SystemExit) as left:
        check_environment(one_of_one(change))
    (line,) = capsys.readouterr().err.splitlines()
    assert left.value.code == 2
    assert_good_line(line, names, "torchrun")


def test_a_good_environment_is_none_of_them():
    check_environment(one_of_one({}))


def test_a_bad_environment_ends_the_rank(script, small, tmp_path):
    env = one_of_one({"WORLD_SIZE": None})
    assert_refused(start([env], script, ("--data-dir", small, "--out", tmp_path / "out")), "WORLD_SIZE", "torchrun")


@pytest.mark.slow
def test_ranks_that_do_not_meet(script, small):
    """At once: a rank whose companion never comes, one whose port is taken, and one that calls the taker.

    The last waits longest, as that program never answers: for twice the --timeout and five seconds.
    """
    with socket.create_server(("", 0)) as listener:
        taken, world = listener.getsockname()[1], {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        places = [(0, free_port()), (0, taken), (1, taken)]
        env = [ONE_OF_ONE | world | {"RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port} for rank, port in places]
        alone, refused, caller = start(env, script, ("--data-dir", small, "--timeout", 0.3))
    assert alone.code == 2
    assert_good_line(alone.stderr.splitlines()[-1], "rank 0 of 2 did not meet the others", "--timeout")
    assert_refused([refused], f"MASTER_PORT={taken} cannot", "another port")
    assert_refused([caller], "rank 1 of 2 did not meet the others", "--timeout")


BATCHES = {  # the flag, samples, ranks, what the line names, and its remedy
    "not divided": (30, 40, 4, "--batch-size 30", "such as 28"),
    "all samples": (64, 40, 3, "--batch-size 40 (all samples)", "such as 39"),
    "fewer samples than ranks": (64, 3, 4, "X_train.npy: 3 samples", "at most 3"),
}


@pytest.mark.parametrize("case", BATCHES)
def test_a_batch_that_the_ranks_do_not_divide(case):
    batch_size, n_samples, n, names, remedy = BATCHES[case]
    with pytest.raises(UserError) as mistake:
        per_rank_batch_size(batch_size, n_samples, n)
    assert_good(str(mistake.value), names, remedy)
    for good in re.findall(r"such as (\d+)", str(mistake.value)):
        assert per_rank_batch_size(int(good), n_samples, n) * n == int(good)


@EVERY_DDP_SCRIPT
@pytest.mark.parametrize("case", [c if c == "not divided" else pytest.param(c, marks=SLOW) for c in BATCHES])
def test_a_batch_that_the_ranks_do_not_divide_ends_them(case, path, small, tmp_path):
    batch_size, n_samples, n, names, remedy = BATCHES[case]
    for name in ("X_train", "y_train"):
        rewrite(name, lambda array: array[:n_samples])(small)
    ranks = start_ranks(n, path, "--data-dir", small, "--out", tmp_path / "out", "--batch-size", batch_size)
    assert_refused(ranks, names, remedy, path)


@pytest.mark.parametrize("alone", [2, pytest.param(0, marks=SLOW)])
def test_one_rank_alone_meets_the_mistake(alone, script, small, tmp_path):
    """As on a machine where the data are missing: the others must not wait for it."""
    rank_env = {r: {"DDP_DATA_DIR": tmp_path / "missing" if r == alone else small} for r in range(4)}
    ranks = start_ranks(4, script, "--out", tmp_path / "out", "--timeout", 60, rank_env=rank_env)
    assert_refused(ranks, str(tmp_path / "missing"), "--data-dir")


OTHER_DATA = {  # what the last rank has in place of the others' files, and what the line names
    "other values": (("X_train", lambda X: X + 1), "training data of fingerprint"),
    "other labels": (("y_val", lambda y: y[::-1].copy()), "validation data of fingerprint"),
    "fewer samples": (("X_val", "y_val", lambda array: array[:-4]), "X_val.npy of shape ("),
    "another class": (("y_train", put(7, 5)), "classes 6"),
}


@pytest.mark.parametrize("case", [c if c == "other values" else pytest.param(c, marks=SLOW) for c in OTHER_DATA])
def test_ranks_with_other_data_end_together(case, script, small, tmp_path):
    """As on two nodes whose folders differ: each would train on its own, and the mean would be of both."""
    (*arrays, change), names = OTHER_DATA[case]
    other = shutil.copytree(small, tmp_path / "other")
    for name in arrays:
        rewrite(name, change)(other)
    rank_env = {r: {"DDP_DATA_DIR": other if r == 2 else small} for r in range(3)}
    ranks = start_ranks(3, script, "--out", tmp_path / "out", "--batch-size", 12, rank_env=rank_env)
    assert_refused(ranks, names, "give all nodes the same files")
    assert f" on node {socket.gethostname()} (rank 2)" in ranks[0].stderr and not (tmp_path / "out").exists()


def test_one_gpu_lacks_the_memory(small, tmp_path):
    """The others must not wait for the rank that has refused."""
    refuse = "if rank == 1: raise console.UserError('--data-on gpu: too little memory on cuda:1: use --data-on cpu')"
    copy = put_before(RESILIENT, calls("move_data_to_gpu"), refuse, tmp_path / RESILIENT.name)
    ranks = start_ranks(2, copy, "--data-dir", small, "--out", tmp_path / "out", "--timeout", 60)
    assert_refused(ranks, "cuda:1", "--data-on cpu")


def test_ranks_with_other_flags_end_together(script, small, tmp_path):
    copy = put_before(script, calls("train"), "args.epochs += rank", tmp_path / script.name)
    ranks = start_ranks(2, copy, "--data-dir", small, "--out", tmp_path / "out", "--epochs", 3)
    assert_refused(ranks, "--epochs 4 on node ", "the same files and flags")


def test_fewer_nodes_than_torchrun_was_promised(script, small, tmp_path):
    """A node whose clock is off is taken for dead, and the other would train alone."""
    flags = ("--data-dir", small, "--epochs", 1, "--batch-size", 40, "--out")
    ranks = start_ranks(2, script, *flags, tmp_path / "refused", "--nnodes", 2)
    assert_refused(ranks, "--nnodes 2: 1 node takes part", "NTP")
    two_nodes = {r: {"GROUP_WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1, "LOCAL_RANK": 0} for r in range(2)}
    assert train(2, script, small, tmp_path / "out", *flags[2:6], "--nnodes", 2, rank_env=two_nodes)


def parsed(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, words)])
    return parse(None)


@pytest.mark.parametrize("text, expected", [("2", [2]), ("1:3", [1, 2, 3]), ("4:4", [4])])
def test_numbers_of_nodes(text, expected, monkeypatch):
    assert list(parsed(monkeypatch, "--nnodes", text).nnodes) == expected


@pytest.mark.parametrize("text", ["0", "3:1", "two", ":2", "1:", "1:2:3"])
def test_what_is_no_number_of_nodes(text, monkeypatch):
    with pytest.raises(UserError, match=f"--nnodes: {text} is not a number of nodes, .* 1:3: see --help"):
        check_flags(parsed(monkeypatch, "--nnodes", text))


SHARES = {  # --nnodes, ranks of a node, --batch-size, samples, and what is said
    "one number": ("1:3", 2, 256, 4096, "256 does not divide among 2, 4, 6 ranks.*a multiple of 12, such as 252$"),
    "small": ("2:3", 1, 4, 4096, "4 does not divide among 2, 3 ranks.*a multiple of 6, such as 6$"),
    "all samples": ("1:3", 1, 999, 100, "100 does not divide among 1, 2, 3 ranks.*a multiple of 6, such as 96$"),
    "too few": ("4:7", 1, 64, 40, "40 does not divide.*allow fewer nodes$"),
    "fits": ("1:4", 2, 48, 4096, None),
    "nothing said": (None, 3, 256, 4096, None),
}


@pytest.mark.parametrize("case", SHARES)
def test_a_batch_for_each_number_of_nodes(case, monkeypatch):
    """A job that starts on two nodes must not end when the third comes, of no use, restart after restart."""
    nnodes, n_local, batch_size, n_samples, says = SHARES[case]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(n_local))
    args = parsed(monkeypatch, "--batch-size", batch_size, *(("--nnodes", nnodes) if nnodes else ()))
    if not says:
        return check_shares(args, n_samples)
    with pytest.raises(UserError, match=says) as mistake:
        check_shares(args, n_samples)
    for good in re.findall(r"such as (\d+)", str(mistake.value)):
        args.batch_size = int(good)
        check_shares(args, n_samples)


def test_a_batch_that_a_later_number_of_nodes_does_not_divide(script, small, tmp_path):
    flags = ("--data-dir", small, "--out", tmp_path / "out", "--batch-size", 40, "--nnodes", "1:3")
    assert_refused(start_ranks(2, script, *flags), "--batch-size 40 does not divide among 2, 4, 6 ranks", "such as 36")


def test_a_mistake_that_the_first_rank_cannot_find_is_not_kept_secret(ddp, small, tmp_path):
    """In ddp_sample.py a rank that alone meets a mistake waits a while for the first one to speak, and then does."""
    copy = put_before(ddp, is_class, "process.MISTAKE = process.MISTAKE._replace(others_wait=1)", tmp_path / ddp.name)
    rank_env = {r: {"DDP_DATA_DIR": small, "TORCHELASTIC_RUN_ID": "x"} for r in range(2)}
    rank_env[1]["DDP_DATA_DIR"] = tmp_path / "missing"
    waiting, alone = start_ranks(2, copy, "--out", tmp_path / "out", rank_env=rank_env, stuck=(0,))
    assert waiting.stderr == "" and alone.code == 2
    assert_good_line(alone.stderr.removesuffix("\n"), str(tmp_path / "missing"), "--data-dir", ddp)


@ALONE_AND_IN_GROUPS
def test_help_is_printed_once(path, n):
    ranks = start_ranks(n, path, "--help")
    assert [rank.code for rank in ranks] == [0] * len(ranks), ranks
    assert ranks[0].stdout.startswith(f"usage: {path.name}") and "--batch-size" in ranks[0].stdout
    assert ("--resume" in ranks[0].stdout) == (path == RESILIENT)
    assert [rank.stdout for rank in ranks[1:]] == [""] * len(ranks[1:])
    assert {rank.stderr for rank in ranks} == {""}


# In a copy of the script: torchrun terminates the last rank unless it is ready, and guarded, in time; and the first
# one's line must not be lost if it comes late.
DELAYS = {
    "as it is": "",
    "one after the other": """import signal
import sys
import time


def slowly(function):
    def call(*args):
        time.sleep(rank / 3)
        return function(*args)

    return call


signal.signal, sys.exit = slowly(signal.signal), slowly(sys.exit)


""",
    "the first comes late": "import time\n\ntime.sleep(0 if rank else 3)\n\n\n",
}
TORCHRUN = {
    "resilient, data": (RESILIENT, "cut in the values", "one after the other"),
    "resilient, flags": (RESILIENT, "unknown", "one after the other"),
    "ddp, data": (DDP, "cut in the values", "one after the other"),
    "ddp, late": (DDP, "unknown", "the first comes late"),
    "ddp, diverges": (DDP, None, "as it is"),
}


@pytest.mark.parametrize("case", [c if c == "ddp, data" else pytest.param(c, marks=SLOW) for c in TORCHRUN])
def test_torchrun_shows_the_line_once_before_its_summary(case, small, tmp_path):
    path, mistake, delay = TORCHRUN[case]
    words, names, remedy = FLAGS.get(mistake, (["--lr", 9e37], "the loss is not finite", "smaller --lr"))
    if mistake in DATA:
        words, (damage, names, remedy) = (), DATA[mistake]
        damage(small)
    copy = put_before(path, is_class, DELAYS[delay], tmp_path / path.name)
    done = torchrun(4, copy, "--data-dir", small, "--out", tmp_path / "out", *words)
    assert done.returncode == 1  # torchrun's own
    ours = [i for i, line in enumerate(done.stderr.splitlines()) if f"{path.name}: error: " in line]
    assert ours == [0], done.stderr
    assert_good_line(done.stderr.splitlines()[0], names, remedy, path)
    assert re.findall(r"exitcode +: (\S+)", done.stderr) == ["2"] * 4, done.stderr
    assert done.stderr.count("Traceback") == 1  # torchrun's own, above its summary


@each_program("single", "resilient_four_ranks")
def test_the_largest_seed(path, n, small, tmp_path):
    train(n, path, small, tmp_path, "--epochs", 1, "--seed", 2**63 - 1)
