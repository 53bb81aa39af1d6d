"""Each mistake: one line that says what, where and what to do; exit code 2 on every rank; no hang."""

import os
import re
import socket
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.ranks import DDP, RESILIENT, SINGLE, changed, free_port, save_data, start, start_ranks, torchrun, train

PROGRAMS = {
    "single": (SINGLE, 0),
    "ddp_one_process": (DDP, 0),
    "ddp_four_ranks": (DDP, 4),
    "resilient_one_process": (RESILIENT, 0),
    "resilient_four_ranks": (RESILIENT, 4),
}
EVERY_SCRIPT = pytest.mark.parametrize("path, n", PROGRAMS.values(), ids=PROGRAMS)
EVERY_DDP_SCRIPT = pytest.mark.parametrize("path", [DDP, RESILIENT], ids=["ddp", "resilient"])
ONE_PROCESS_AND_FOUR_RANKS = pytest.mark.parametrize("n", [0, 4], ids=["one_process", "four_ranks"])


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
    what, do = line.removeprefix(prefix).rsplit(": ", 1)
    assert names in what and len(what) > len(names) + 10  # it says more than the name
    assert remedy in do


@EVERY_SCRIPT
@pytest.mark.parametrize("case", DATA)
def test_bad_data(case, path, n, small, tmp_path):
    damage, name, remedy = DATA[case]
    damage(small)
    ranks = start_ranks(n, path, "--data-dir", small, "--out", tmp_path / "out")
    assert_refused(ranks, str(small / name) if name else str(small), remedy, path)
    assert not (tmp_path / "out").exists()


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


@EVERY_SCRIPT
@pytest.mark.parametrize("case", FLAGS)
def test_bad_flags(case, path, n, small, tmp_path):
    flags, names, remedy = FLAGS[case]
    assert_refused(start_ranks(n, path, "--data-dir", small, "--out", tmp_path / "out", *flags), names, remedy, path)


@EVERY_SCRIPT
def test_nothing_to_resume(path, n, small, tmp_path):
    """The two scripts that show something else know no such flag."""
    names, remedy = ("checkpoint.pt", "without --resume") if path == RESILIENT else ("--resume", "--help")
    ranks = start_ranks(n, path, "--data-dir", small, "--out", tmp_path / "out", "--resume")
    assert_refused(ranks, names, remedy, path)


@EVERY_SCRIPT
@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs")
def test_no_gpu(path, n, small):
    ranks = start_ranks(n, path, "--data-dir", small, "--device", "cuda")
    assert_refused(ranks, "--device cuda", "--device auto", path)


@EVERY_SCRIPT
def test_a_file_in_the_way_of_out(path, n, small, tmp_path):
    (tmp_path / "out").touch()
    assert_refused(start_ranks(n, path, "--data-dir", small, "--out", tmp_path / "out"), "--out", "folder", path)


WRITTEN = {  # by the programs that end all their ranks when one meets a full disk
    program: ("history.writing.jsonl", *(["checkpoint.writing.pt"] if path == RESILIENT else []), "model.writing.pt")
    for program, (path, n) in PROGRAMS.items()
    if path == RESILIENT or n == 0
}


@pytest.mark.parametrize("program, name", [(program, name) for program, names in WRITTEN.items() for name in names])
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


@ONE_PROCESS_AND_FOUR_RANKS
@pytest.mark.parametrize("case", OTHER_SETTINGS)
def test_a_checkpoint_of_other_settings(case, n, script, small, tmp_path):
    was, now, names = OTHER_SETTINGS[case]
    train(0, script, small, tmp_path, "--epochs", 1, *was)
    ranks = start_ranks(n, script, "--data-dir", small, "--out", tmp_path, "--resume", *now)
    assert_refused(ranks, f"checkpoint.pt: made with {names}", "resume with the same")


@ONE_PROCESS_AND_FOUR_RANKS
def test_a_checkpoint_of_another_model(n, script, small, tmp_path):
    train(0, script, small, tmp_path, "--epochs", 1)
    other = changed(script, "nn.Linear(n_features, n_classes)", "nn.Linear(n_features, n_classes, bias=False)", tmp_path / script.name)  # fmt: skip
    ranks = start_ranks(n, other, "--data-dir", small, "--out", tmp_path, "--resume")
    assert_refused(ranks, "checkpoint.pt: made with 1.linear.bias of shape (3,), not None", "resume with the same")


ENVIRONMENTS = {
    "RANK without WORLD_SIZE": ({"WORLD_SIZE": None}, "WORLD_SIZE"),
    "WORLD_SIZE without RANK": ({"RANK": None}, "WORLD_SIZE"),
    "RANK not a number": ({"RANK": "one"}, "RANK='one'"),
    "RANK out of range": ({"RANK": 1}, "RANK=1"),
    "LOCAL_RANK out of range": ({"LOCAL_RANK": 1}, "LOCAL_RANK=1"),
    "LOCAL_WORLD_SIZE above": ({"LOCAL_WORLD_SIZE": 2}, "LOCAL_WORLD_SIZE=2"),
    "no MASTER_ADDR": ({"MASTER_ADDR": ""}, "MASTER_ADDR"),
    "no port": ({"MASTER_PORT": 65536}, "MASTER_PORT=65536"),
    "restarts not a number": ({"TORCHELASTIC_RESTART_COUNT": "x"}, "TORCHELASTIC_RESTART_COUNT='x'"),
}


@pytest.mark.parametrize("case", ENVIRONMENTS)
def test_a_bad_environment(case, script, small, tmp_path):
    change, names = ENVIRONMENTS[case]
    env = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
    env = {key: value for key, value in (env | {"MASTER_PORT": free_port()} | change).items() if value is not None}
    assert_refused(start([env], script, ("--data-dir", small, "--out", tmp_path / "out")), names, "torchrun")


def test_a_port_that_is_taken(script, small):
    with socket.create_server(("", 0)) as listener:
        port = listener.getsockname()[1]
        ranks = start_ranks(2, script, "--data-dir", small, "--timeout", 3, rank_env={r: {"MASTER_PORT": port} for r in range(2)})  # fmt: skip
    assert_refused(ranks[:1], f"MASTER_PORT={port} cannot", "another port")
    assert_refused(ranks[1:], "rank 1 of 2 did not meet the others", "--timeout")  # that program never answers


def test_a_world_that_is_smaller_than_said(script, small):
    """The rank that never comes is waited for no longer than --timeout."""
    (rank,) = start_ranks(1, script, "--data-dir", small, "--timeout", 3, rank_env={0: {"WORLD_SIZE": 2}})
    assert rank.code == 2
    assert_good_line(rank.stderr.splitlines()[-1], "rank 0 of 2 did not meet the others", "--timeout")


@EVERY_DDP_SCRIPT
def test_a_batch_that_the_ranks_do_not_divide(path, small, tmp_path):
    flags = ("--data-dir", small, "--out", tmp_path / "out", "--batch-size")
    assert_refused(start_ranks(4, path, *flags, 30), "--batch-size 30", "such as 28", path)
    assert_refused(start_ranks(3, path, *flags, 64), "--batch-size 40 (all samples)", "such as 39", path)
    assert [rank.code for rank in start_ranks(4, path, *flags, 28, "--epochs", 1)] == [0] * 4


@EVERY_DDP_SCRIPT
def test_fewer_samples_than_ranks(path, small, tmp_path):
    for name in ("X_train", "y_train"):
        rewrite(name, lambda array: array[:3])(small)
    ranks = start_ranks(4, path, "--data-dir", small, "--out", tmp_path / "out")
    assert_refused(ranks, "X_train.npy: 3 samples", "at most 3", path)


@pytest.mark.parametrize("alone", [0, 2])
def test_one_rank_alone_meets_the_mistake(alone, script, small, tmp_path):
    """As on a machine where the data are missing: the others must not wait for it."""
    rank_env = {r: {"DDP_DATA_DIR": tmp_path / "missing" if r == alone else small} for r in range(4)}
    ranks = start_ranks(4, script, "--out", tmp_path / "out", rank_env=rank_env)
    assert_refused(ranks, str(tmp_path / "missing"), "--data-dir")


def test_a_mistake_that_the_first_rank_cannot_find_is_not_kept_secret(ddp, small, tmp_path):
    """In ddp_sample.py a rank that alone meets a mistake waits a while for the first one to speak, and then does."""
    impatient = "console.PATIENCE = 1.0\n\n\nclass SimpleModel"
    copy = changed(ddp, "class SimpleModel", impatient, tmp_path / ddp.name)
    rank_env = {r: {"DDP_DATA_DIR": small, "TORCHELASTIC_RUN_ID": "x"} for r in range(2)}
    rank_env[1]["DDP_DATA_DIR"] = tmp_path / "missing"
    waiting, alone = start_ranks(2, copy, "--out", tmp_path / "out", rank_env=rank_env, stuck=(0,))
    assert waiting.stderr == "" and alone.code == 2
    assert_good_line(alone.stderr.removesuffix("\n"), str(tmp_path / "missing"), "--data-dir", ddp)


@EVERY_SCRIPT
def test_help_is_printed_once(path, n):
    ranks = start_ranks(n, path, "--help")
    assert [rank.code for rank in ranks] == [0] * len(ranks), ranks
    assert ranks[0].stdout.startswith(f"usage: {path.name}") and "--batch-size" in ranks[0].stdout
    assert ("--resume" in ranks[0].stdout) == (path == RESILIENT)
    assert [rank.stdout for rank in ranks[1:]] == [""] * len(ranks[1:])
    assert {rank.stderr for rank in ranks} == {""}


# In a copy of the script: torchrun terminates the last rank unless it is ready, and guarded, in time; and the first
# one's line must not be lost if it comes late.
SLOW = {
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


@pytest.mark.parametrize("case", TORCHRUN)
def test_torchrun_shows_the_line_once_before_its_summary(case, small, tmp_path):
    path, mistake, slow = TORCHRUN[case]
    flags, names, remedy = FLAGS.get(mistake, (["--lr", 9e37], "the loss is not finite", "smaller --lr"))
    if mistake in DATA:
        flags, (damage, names, remedy) = (), DATA[mistake]
        damage(small)
    copy = changed(path, "class SimpleModel", SLOW[slow] + "class SimpleModel", tmp_path / path.name)
    done = torchrun(4, copy, "--data-dir", small, "--out", tmp_path / "out", *flags)
    assert done.returncode == 1  # torchrun's own
    ours = [i for i, line in enumerate(done.stderr.splitlines()) if f"{path.name}: error: " in line]
    assert ours == [0], done.stderr
    assert_good_line(done.stderr.splitlines()[0], names, remedy, path)
    assert re.findall(r"exitcode +: (\S+)", done.stderr) == ["2"] * 4, done.stderr
    assert done.stderr.count("Traceback") == 1  # torchrun's own, above its summary


@EVERY_SCRIPT
def test_the_largest_seed(path, n, small, tmp_path):
    train(n, path, small, tmp_path, "--epochs", 1, "--seed", 2**63 - 1)
