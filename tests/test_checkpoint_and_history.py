"""Checkpoints, the history, and going on from both."""

import io
import json
import math
import os
import pickle
import shutil
from contextlib import suppress
from copy import deepcopy

import pytest
import torch
from torch import nn

from ddp_tutorial.console import UserError
from ddp_tutorial.history import History, check_finite, read, report_epoch
from ddp_tutorial.model import SimpleModel
from ddp_tutorial.ranks import checkpoint
from ddp_tutorial.ranks.checkpoint import CheckpointError
from tests.edit import calls, put_before
from tests.ranks import Attack, assert_same, start_ranks, train


def pair(seed=0, n_features=3):
    """A model and its optimizer after a step, which gives the optimizer a state."""
    torch.manual_seed(seed)
    model = SimpleModel(n_features, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(4, n_features)).sum().backward()
    optimizer.step()
    return model, optimizer


def state(model, optimizer):
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()["state"]}


def load(path, *pair):
    """What `checkpoint.load` returns, as plain values."""
    epoch, sums = checkpoint.load(path, *pair)
    assert (sums.shape, sums.dtype) == ((2,), torch.float64)
    return epoch, *sums.tolist()


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, *pair(), epoch=7)
    return path


def write_whole(path, content):
    """A file with a right checksum, whatever is in it."""
    path.write_bytes(content + checkpoint.CHECKSUM(content).digest())


def bytes_of(state) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def test_round_trip(saved):
    expected = torch.rand(3)  # `pair` and `save` came before it
    other = pair(seed=1)
    assert load(saved, *other) == (7, 0, 0)
    assert torch.equal(torch.rand(3), expected)
    assert_same(state(*other), state(*pair()))
    assert list(torch.load(saved)["model"]) == ["linear.weight", "linear.bias"]


def test_the_middle_of_an_epoch(saved):
    checkpoint.save(saved, *pair(), epoch=7, sums=torch.tensor([4.0, 40.0], dtype=torch.float64))
    assert load(saved, *pair()) == (7, 4.0, 40.0)


def test_the_previous_one_is_kept(saved):
    checkpoint.save(saved, *pair(seed=1), epoch=8)
    assert sorted(path.name for path in saved.parent.iterdir()) == ["checkpoint.previous.pt", "checkpoint.pt"]
    assert torch.load(checkpoint.previous(saved))["epoch"] == 7
    saved.unlink()  # as if killed between the two renames
    other = pair(seed=2)
    assert load(saved, *other) == (7, 0, 0)
    assert_same(state(*other), state(*pair()))


def test_no_checkpoint(tmp_path):
    assert checkpoint.read(tmp_path / "checkpoint.pt") is None
    assert checkpoint.find(tmp_path / "checkpoint.pt", resume=False, restarted=True) is None
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        checkpoint.load(tmp_path / "checkpoint.pt", *pair())


def test_a_new_run_sets_an_earlier_one_aside(saved, capsys):
    checkpoint.save(saved, *pair(), epoch=8)
    before = sorted(saved.parent.iterdir())
    assert checkpoint.find(saved, resume=False, restarted=False) is None
    assert sorted(saved.parent.iterdir()) == before  # to look is to change nothing
    checkpoint.set_aside(saved)
    assert [path.name for path in saved.parent.iterdir()] == ["checkpoint.earlier.pt"]
    assert load(saved.with_suffix(".earlier.pt"), *pair()) == (8, 0, 0)
    assert "in the place of one before" not in capsys.readouterr().out
    checkpoint.save(saved, *pair(), epoch=1)
    checkpoint.set_aside(saved)
    assert load(saved.with_suffix(".earlier.pt"), *pair()) == (1, 0, 0)
    assert "is kept as checkpoint.earlier.pt in the place of one before: to " in capsys.readouterr().out


def test_code_in_a_checkpoint_does_not_run(saved, tmp_path):
    attack = torch.load(saved) | {"epoch": Attack(tmp_path / "attacked")}
    for content in (bytes_of(attack), pickle.dumps(attack, protocol=2)):
        write_whole(saved, content)
        with pytest.raises(CheckpointError, match="damaged"):
            checkpoint.load(saved, *pair())
    assert not (tmp_path / "attacked").exists()
    assert torch.load(io.BytesIO(bytes_of(attack)), weights_only=False) and (tmp_path / "attacked").exists()


@pytest.mark.parametrize("size", [0, 20, 100, -200, -1])
def test_a_torn_file(size, saved):
    saved.write_bytes(saved.read_bytes()[:size])
    with pytest.raises(CheckpointError, match="checkpoint.pt: damaged .*: put a copy back") as caught:
        checkpoint.load(saved, *pair())
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("stride", [97, pytest.param(7, marks=pytest.mark.slow)])
def test_an_edited_byte_is_noticed(stride, saved):
    """torch.load alone takes most of these files without a word."""
    content = saved.read_bytes()
    silent = 0
    edits = range(0, len(content), stride)
    for i in edits:
        edited = bytearray(content)
        edited[i] ^= 0x10
        saved.write_bytes(edited)
        with pytest.raises(CheckpointError, match="its checksum is wrong"):
            checkpoint.load(saved, *pair())
        with suppress(Exception):
            silent += bool(torch.load(saved, weights_only=True))
    assert silent > len(edits) / 2


def test_a_damaged_file_gives_way_to_the_previous_one(saved, capsys):
    checkpoint.save(saved, *pair(seed=1), epoch=8)
    saved.write_bytes(saved.read_bytes()[:500])
    assert load(saved, *pair()) == (7, 0, 0)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"warning: {saved}: damaged (its checksum is wrong): checkpoint.previous.pt is whole"
    checkpoint.previous(saved).write_bytes(b"")
    with pytest.raises(CheckpointError, match="checkpoint.pt: damaged"):
        checkpoint.load(saved, *pair())


def adam(model):
    return torch.optim.Adam(model.parameters())


def test_what_differs_is_named(saved):
    model, optimizer = pair()
    checkpoint.save(saved, model, optimizer, epoch=7, settings={"--lr": 0.1, "classes": 2})

    def refused(model, optimizer, settings):
        before = deepcopy(model.state_dict())
        with pytest.raises(CheckpointError) as caught:
            checkpoint.load(saved, model, optimizer, settings)
        assert_same(model.state_dict(), before)
        return str(caught.value).removeprefix(f"{saved}: made with ").split(":")[0]

    settings = {"--lr": 0.1, "classes": 2}
    assert refused(model, optimizer, settings | {"--lr": 0.5}) == "--lr 0.1, not 0.5"
    assert refused(model, optimizer, settings | {"classes": 3}) == "classes 2, not 3"
    assert refused(*pair(n_features=4), settings) == "linear.weight of shape (2, 3), not (2, 4)"
    assert refused(model, adam(model), settings) == "optimizer SGD, not Adam"
    assert refused(nn.Sequential(model), optimizer, settings).startswith("0.linear.weight of shape None")
    assert load(saved, model, optimizer, settings) == (7, 0, 0)


@pytest.mark.parametrize("key", ["epoch", "sums", "model", "optimizer", "rng", "settings"])
def test_a_missing_entry(key, saved):
    content = torch.load(saved)
    del content[key]
    write_whole(saved, bytes_of(content))
    with pytest.raises(CheckpointError, match="made with something else"):
        checkpoint.load(saved, *pair())


def test_weights_that_are_not_finite_are_not_saved(saved):
    before = saved.read_bytes()
    model, optimizer = pair()
    model.linear.bias.data[0] = torch.nan
    with pytest.raises(CheckpointError, match="a weight is not finite"):
        checkpoint.save(saved, model, optimizer, epoch=8)
    assert saved.read_bytes() == before and list(saved.parent.iterdir()) == [saved]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_keeps_the_old_one(saved):
    before = saved.read_bytes()
    writing = saved.with_suffix(".writing.pt")
    writing.symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match="cannot be written"):
        checkpoint.save(saved, *pair(), epoch=8)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


@pytest.mark.parametrize("folder", ["missing", "checkpoint.pt"])
def test_no_folder_to_write_to(folder, saved):
    with pytest.raises(CheckpointError, match="cannot be written"):
        checkpoint.save(saved.parent / folder / "checkpoint.pt", *pair(), epoch=8)


SUMS, VAL_SUMS = torch.tensor([80.0, 80.0]), torch.tensor([40.0, 20.0, 10.0])


def epochs(*numbers):
    line = {"train_loss": 1.0, "val_loss": 2.0, "val_accuracy": 0.5, "seconds": 0.1, "world_size": 2}
    return [{"epoch": e} | line for e in numbers]


def assert_epochs(path, *numbers):
    """That the file has these epochs, of `SUMS` and `VAL_SUMS`, in whole lines."""
    assert [line | {"seconds": 0.1} for line in read(path)] == epochs(*numbers)
    assert path.read_text().count("\n") == len(numbers) and path.read_text().endswith("\n")


def test_history(tmp_path, capsys):
    out = tmp_path / "new" / "out"
    path, history = out / "history.jsonl", History(out)
    for epoch in range(1, 41):
        report_epoch(history.append(epoch, SUMS, VAL_SUMS, 2), 40, math.inf)
        assert_epochs(path, *range(1, epoch + 1))
    assert read(path) == read(out)
    assert [int(line.split()[1]) for line in capsys.readouterr().out.splitlines()] == [1, *range(4, 41, 4)]
    again = History(out)
    assert_epochs(path, *range(1, 41))  # until there is something better
    again.append(1, SUMS, VAL_SUMS, 2)
    assert_epochs(path, 1)
    assert {*out.iterdir()} == {path, out / "lock"}


def test_the_seconds_are_those_of_each_epoch(tmp_path, monkeypatch):
    now = 100.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    history = History(tmp_path)
    for epoch in (1, 2, 3):
        now += epoch
        history.append(epoch, SUMS, VAL_SUMS)
    assert [line["seconds"] for line in read(tmp_path)] == [1.0, 2.0, 3.0]
    assert [line["world_size"] for line in read(tmp_path)] == [1, 1, 1]


def test_resuming_drops_later_epochs_and_a_torn_line(tmp_path):
    path = tmp_path / "history.jsonl"
    lines = [json.dumps(line) for line in epochs(1, 2, 3, 4)]
    path.write_text("\n".join(lines)[:-9])  # killed in the middle of writing epoch 4
    assert read(path) == epochs(1, 2, 3)
    history = History(tmp_path)
    history.keep(2)
    history.append(3, SUMS * 2, VAL_SUMS, 4)
    assert path.read_text().startswith("\n".join(lines[:2]) + "\n")
    history.append(4, SUMS, VAL_SUMS, 4)
    assert [(line["epoch"], line["world_size"]) for line in read(path)] == [(1, 2), (2, 2), (3, 4), (4, 4)]


@pytest.mark.parametrize("numbers", [[], [1], [1, 3], [2, 1], [1, 1, 2]])
def test_resuming_wants_each_epoch_once(numbers, tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in epochs(*numbers)))
    with pytest.raises(UserError, match="has not the 2 epochs of its checkpoint"):
        History(tmp_path).keep(2)


def test_a_line_of_something_else_ends_the_history(tmp_path):
    path = tmp_path / "history.jsonl"
    good = json.dumps(*epochs(1)).encode()
    for bad in (b"[]", b"7", b"null", b"{}", b"\xff\xfe", b"NaN"):
        path.write_bytes(good + b"\n" + bad + b"\n" + good + b"\n")
        assert read(path) == epochs(1)


FULL = """
import resource, sys, torch
from pathlib import Path
from ddp_tutorial.history import History, UserError
out, size = sys.argv[1:]
history, (soft, hard) = History(Path(out)), resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), hard))
try:
    for epoch in (1, 2):
        history.append(epoch, torch.tensor([80.0, 80.0]), torch.tensor([40.0, 20.0, 10.0]), 2)
except UserError as error:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    print(error, file=sys.stderr)
"""


@pytest.mark.parametrize("size, kept", [(50, []), (200, [1])])
def test_a_line_that_the_disk_cannot_hold_leaves_nothing(size, kept, tmp_path):
    """A process whose files may grow to so many bytes: the first line is cut, or the second."""
    program, out = tmp_path / "full.py", tmp_path / "out"
    program.write_text(FULL)
    (rank,) = start_ranks(0, program, out, size)
    assert rank.code == 0 and "history.jsonl" in rank.stderr and "free the disk" in rank.stderr, rank
    assert sorted(path.name for path in out.iterdir()) == ["history.jsonl"] * len(kept) + ["lock"]
    if kept:
        assert_epochs(out / "history.jsonl", *kept)


def test_losses_that_are_not_finite():
    check_finite(3, SUMS, step=2)
    for value in (torch.nan, torch.inf, -torch.inf):
        sums = torch.tensor([1.0, value])
        with pytest.raises(UserError, match="^epoch 3, step 2: the loss is not finite.*--lr$"):
            check_finite(3, sums, step=2)
        with pytest.raises(UserError, match="^epoch 3: the loss is not finite"):
            check_finite(3, sums)


@pytest.mark.parametrize("chance, warns", [(2.0, True), (1.5, True), (2.5, False), (float("inf"), False)])
def test_a_run_that_ends_no_better_than_guessing_is_told_so(chance, warns, capsys):
    line = {"train_loss": 1.0, "val_loss": 2.0, "val_accuracy": 0.5}
    report_epoch({"epoch": 1} | line, 2, chance)
    assert capsys.readouterr().err == ""  # there is time
    report_epoch({"epoch": 2} | line, 2, chance)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == warns
    assert all(line.startswith("warning: a validation loss of 2.0000 is ") for line in lines)


def test_history_has_no_folder(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(UserError, match="--out"):
        History(tmp_path / "out")


@pytest.mark.parametrize("n", [0, 4])
def test_resume_equals_uninterrupted_bit_for_bit(n, script, small, tmp_path):
    """Also from what a kill between the two renames leaves: the checkpoint before the last."""
    flags = ("--batch-size", 12)
    whole = train(n, script, small, tmp_path / "whole", "--epochs", 5, *flags)
    parts, killed = tmp_path / "parts", tmp_path / "killed"
    train(n, script, small, parts, "--epochs", 3, *flags)
    shutil.copytree(parts, killed)
    (killed / "checkpoint.pt").unlink()
    for out, n_kept in ((parts, 3), (killed, 2)):
        before = (out / "history.jsonl").read_text().splitlines()
        resumed = train(n, script, small, out, "--epochs", 5, "--resume", *flags)
        after = (out / "history.jsonl").read_text().splitlines()
        assert [i for i in range(3) if after[i] == before[i]] == list(
            range(n_kept)
        )  # the seconds too: not trained again
        assert_same(resumed.checkpoint, whole.checkpoint)
        assert resumed.history == whole.history
        assert [line["epoch"] for line in resumed.history] == [1, 2, 3, 4, 5]


def test_a_run_starts_afresh_unless_told_to_resume(script, small, tmp_path):
    first = train(0, script, small, tmp_path / "out", "--epochs", 2)
    before = (tmp_path / "out" / "checkpoint.pt").read_bytes()
    again = train(0, script, small, tmp_path / "out", "--epochs", 2)
    assert (tmp_path / "out" / "checkpoint.earlier.pt").read_bytes() == before
    assert again.history == first.history
    assert_same(again.checkpoint, first.checkpoint)


def test_what_was_set_aside_can_be_resumed(script, small, tmp_path):
    """Checkpoint and history are a pair: both are there under the names with "earlier", of the same run."""
    flags, out = ("--batch-size", 12), tmp_path / "out"
    whole = train(2, script, small, tmp_path / "whole", "--epochs", 4, *flags)
    train(2, script, small, out, "--epochs", 3, *flags)
    train(2, script, small, out, "--epochs", 1, *flags)
    for name in ("checkpoint{}.pt", "history{}.jsonl"):
        (out / name.format(".earlier")).replace(out / name.format(""))
    assert_same(train(2, script, small, out, "--epochs", 4, "--resume", *flags)[:2], whole[:2])


def test_another_learning_rate_on_purpose(script, small, tmp_path):
    """It is refused unless it is meant; then the steps from there on are of that size, also after one more restart."""
    out, flags = tmp_path / "out", ("--batch-size", 12)
    train(0, script, small, out, "--epochs", 2, "--lr", 1.0, *flags)
    other = ("--data-dir", small, "--out", out, "--epochs", 4, "--resume", "--lr", 0.125, *flags)
    (refused,) = start_ranks(0, script, *other)
    assert refused.code == 2 and "--lr 1.0, not 0.125" in refused.stderr and "--new-lr" in refused.stderr, refused
    run = train(0, script, small, out, *other[4:], "--new-lr")
    assert [line["epoch"] for line in run.history] == [1, 2, 3, 4]
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert state["optimizer"]["param_groups"][0]["lr"] == state["settings"]["--lr"] == 0.125
    assert train(0, script, small, out, *other[4:], "--epochs", 5).history[:4] == run.history


@pytest.mark.parametrize("left", ["checkpoint.pt", "checkpoint.previous.pt"])
def test_a_restarted_group_resumes_unasked(left, script, small, tmp_path):
    """torchrun counts its restarts; a kill may leave either name."""
    out = tmp_path / "out"
    train(2, script, small, out, "--epochs", 2)
    for path in out.glob("*.pt"):
        if path.name != left:
            path.unlink()
    restarted = {r: {"TORCHELASTIC_RESTART_COUNT": 1} for r in (0, 1)}
    ranks = start_ranks(2, script, "--data-dir", small, "--out", out, "--epochs", 4, rank_env=restarted)
    said = [line.split()[1] for line in ranks[0].stdout.splitlines() if line.startswith("epoch")]
    assert said == (["3", "4"] if left == "checkpoint.pt" else ["2", "3", "4"]), ranks


def test_a_restarted_group_without_a_checkpoint_starts(script, small, tmp_path):
    restarted = {r: {"TORCHELASTIC_RESTART_COUNT": 1} for r in (0, 1)}
    assert len(train(2, script, small, tmp_path / "out", "--epochs", 2, rank_env=restarted).history) == 2


def test_a_restarted_group_does_not_go_on_from_an_earlier_run(script, small, tmp_path):
    out = tmp_path / "out"
    train(2, script, small, out, "--epochs", 2)
    dying = put_before(script, calls("run.epochs"), "raise RuntimeError", tmp_path / "dying.py")
    ranks = start_ranks(2, dying, "--data-dir", small, "--out", out)
    assert [rank.code for rank in ranks] == [1, 1], ranks
    assert sorted(path.name for path in out.glob("checkpoint*")) == ["checkpoint.earlier.pt"]
