"""Checkpoints, the history, and going on from both."""

import json
import os
import pickle

import pytest
import torch

from ddp_tutorial import checkpoint
from ddp_tutorial.checkpoint import CheckpointError
from ddp_tutorial.cli import UserError
from ddp_tutorial.history import History, read
from ddp_tutorial.model import SimpleModel
from tests.ranks import Attack, start_ranks, train


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


def assert_same(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, *pair(), epoch=7)
    return path


def test_round_trip(saved):
    expected = torch.rand(3)  # `pair` and `save` came before it
    other = pair(seed=1)
    assert checkpoint.load(saved, *other) == 7
    assert torch.equal(torch.rand(3), expected)
    assert_same(state(*other), state(*pair()))
    assert list(torch.load(saved)["model"]) == ["linear.weight", "linear.bias"]


def test_the_previous_one_is_kept(saved):
    checkpoint.save(saved, *pair(seed=1), epoch=8)
    assert sorted(path.name for path in saved.parent.iterdir()) == ["checkpoint.previous.pt", "checkpoint.pt"]
    assert torch.load(checkpoint.previous(saved))["epoch"] == 7
    saved.unlink()  # as if killed between the two renames
    other = pair(seed=2)
    assert checkpoint.load(saved, *other) == 7
    assert_same(state(*other), state(*pair()))


def test_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        checkpoint.load(tmp_path / "checkpoint.pt", *pair())


@pytest.mark.parametrize("write", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing, protocol=2))])
def test_code_in_a_checkpoint_does_not_run(write, saved, tmp_path):
    content = torch.load(saved)
    write(content | {"epoch": Attack(tmp_path / "attacked")}, saved)
    with pytest.raises(CheckpointError, match="cannot be resumed"):
        checkpoint.load(saved, *pair())
    assert not (tmp_path / "attacked").exists()


def test_another_model(saved):
    with pytest.raises(CheckpointError, match="cannot be resumed"):
        checkpoint.load(saved, *pair(n_features=4))


@pytest.mark.parametrize("size", [0, 100, -200])
def test_a_damaged_file(size, saved):
    saved.write_bytes(saved.read_bytes()[:size])
    with pytest.raises(CheckpointError, match="cannot be resumed") as caught:
        checkpoint.load(saved, *pair())
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_entry(saved):
    content = torch.load(saved)
    del content["rng"]
    torch.save(content, saved)
    with pytest.raises(CheckpointError, match="cannot be resumed"):
        checkpoint.load(saved, *pair())


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


def epochs(*numbers):
    return [{"epoch": e, "train_loss": 1.0, "val_loss": 2.0, "val_accuracy": 0.5} for e in numbers]


def test_history(tmp_path, capsys):
    path = tmp_path / "new" / "history.jsonl"
    history = History(path, 40)
    for line in epochs(*range(1, 41)):
        history.append(line)
    assert read(path) == read(path.parent) == epochs(*range(1, 41))
    assert [int(line.split()[1]) for line in capsys.readouterr().out.splitlines()] == [1, *range(4, 41, 4)]
    History(path, 40)
    assert read(path) == []


def test_resuming_drops_later_epochs_and_a_torn_line(tmp_path):
    path = tmp_path / "history.jsonl"
    lines = [json.dumps(line) for line in epochs(1, 2, 3, 4)]
    path.write_text("\n".join(lines)[:-9])  # killed in the middle of writing epoch 4
    assert read(path) == epochs(1, 2, 3)
    history = History(path, 5, keep_epochs=2)
    assert path.read_text() == "\n".join(lines[:2]) + "\n"
    history.append(*epochs(3))
    assert read(path) == epochs(1, 2, 3)


def test_history_has_no_folder(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(UserError, match="--out"):
        History(tmp_path / "out" / "history.jsonl", 1)


@pytest.mark.parametrize("n", [0, 4])
def test_resume_equals_uninterrupted_bit_for_bit(n, script, small, tmp_path):
    flags = ("--batch-size", 12)
    whole = train(n, script, small, tmp_path / "whole", "--epochs", 6, *flags)
    parts = tmp_path / "parts"
    train(n, script, small, parts, "--epochs", 3, *flags)
    before = (parts / "history.jsonl").read_text()
    resumed = train(n, script, small, parts, "--epochs", 6, "--resume", *flags)
    assert (parts / "history.jsonl").read_text().startswith(before)  # the seconds too: these were not trained again
    assert_same(resumed.checkpoint, whole.checkpoint)
    assert resumed.history == whole.history
    assert [line["epoch"] for line in resumed.history] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("n", [0, 4])
def test_resume_after_a_kill_between_the_renames(n, script, small, tmp_path):
    whole = train(n, script, small, tmp_path / "whole", "--epochs", 4)
    parts = tmp_path / "parts"
    train(n, script, small, parts, "--epochs", 3)
    (parts / "checkpoint.pt").unlink()
    before = (parts / "history.jsonl").read_text().splitlines()
    resumed = train(n, script, small, parts, "--epochs", 4, "--resume")
    after = (parts / "history.jsonl").read_text().splitlines()
    assert [i for i in range(3) if after[i] == before[i]] == [0, 1]  # the previous checkpoint is of epoch 2
    assert_same(resumed.checkpoint, whole.checkpoint)
    assert resumed.history == whole.history


def test_a_run_starts_afresh_unless_told_to_resume(script, small, tmp_path):
    first = train(0, script, small, tmp_path / "out", "--epochs", 2)
    again = train(0, script, small, tmp_path / "out", "--epochs", 2)
    assert again.history == first.history
    assert_same(again.checkpoint, first.checkpoint)


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
    out, loop = tmp_path / "out", "    for epoch in range("
    train(2, script, small, out, "--epochs", 2)
    dying = tmp_path / "dying.py"
    dying.write_text(script.read_text().replace(loop, "    raise RuntimeError\n" + loop))
    ranks = start_ranks(2, dying, "--data-dir", small, "--out", out)
    assert [rank.code for rank in ranks] == [1, 1], ranks
    assert list(out.glob("*.pt")) == []
