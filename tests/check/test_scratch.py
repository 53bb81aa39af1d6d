"""The user's own files stay as they were, or the report says what did not."""

import pytest

from ddp_tutorial.check import report, scratch
from ddp_tutorial.check.__main__ import main
from ddp_tutorial.check.launch import Plan, Trial
from ddp_tutorial.check.scratch import place_for
from tests.check.doctor import check_text, short

LARGE = 3 * 2**20
WRITES = """
import os
import sqlite3
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
torch.save({"a": 1}, "saved.pt")
Path("made_anew").write_text("new")
with open("appended", "a") as file:
    file.write("more")
assert Path("appended").read_text().startswith("old")
with open("patched", "r+") as file:
    file.write("N")
assert Path("patched").read_text() == "Nld"
np.memmap("mapped", np.uint8, "r+")[:] = 7
os.truncate("cut", 1)
with sqlite3.connect("base") as base:
    base.execute(f"create table t{dist.get_rank()} (x)")
(Path("..") / "beside").write_text("new")
Path("dangling").write_text("new")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 1))
model(torch.ones(2, 3)).sum().backward()
del model
dist.destroy_process_group()
"""
NAMES = ("saved.pt", "made_anew", "appended", "patched", "mapped", "cut")


def test_large_files_are_copied_too(tmp_path):
    """A write to what was a link would have come to the user's own file."""
    folder = tmp_path / "mine"
    (folder / "runs").mkdir(parents=True)
    (folder / "train.py").touch()
    (folder / "runs" / "model.pt").write_bytes(bytes(LARGE))
    (folder / "latest.pt").symlink_to("runs/model.pt")
    with place_for(folder, folder) as place:
        assert place.is_copy and not place.linked
        (place.folder / "latest.pt").write_text("new")
        assert (place.folder / "runs" / "model.pt").read_text() == "new"
    assert (folder / "runs" / "model.pt").read_bytes() == bytes(LARGE)


def test_files_for_which_there_is_no_room_are_linked(tmp_path, monkeypatch):
    """Never the code. A write that no hook has seen is noted."""
    monkeypatch.setattr(scratch, "MAX_FILES", 1)
    for name, size in (("train.py", 100), ("small", 1), ("large", 10)):
        (tmp_path / name).write_bytes(bytes(size))
    with place_for(tmp_path, tmp_path) as place:
        assert [name for name in ("train.py", "small", "large") if (place.copy / name).is_symlink()] == ["large"]
        assert place.changed() == []
        (place.copy / "large").write_text("new")
        assert place.changed() == [str(tmp_path / "large")]


def said_of(place: scratch.Place, in_place: bool = False) -> list[str]:
    return report.where_it_wrote(Trial(Plan(place.original / "train.py", in_place=in_place), place))


def test_the_report_says_where_there_was_no_copy(tmp_path, monkeypatch):
    folder, beside = tmp_path / "mine", tmp_path / "beside"
    folder.mkdir()
    beside.mkdir()
    (folder / "train.py").touch()
    with place_for(folder, folder) as place:
        assert said_of(place) == []
    with place_for(folder, folder, in_place=True) as place:
        assert said_of(place, in_place=True) == ["in its own folder: what it wrote stays"]
    with place_for(folder, beside) as place:
        assert said_of(place) == [f"in {beside}, of which there is no copy: what it wrote there stays"]
    monkeypatch.setattr(scratch, "MAX_ENTRIES", 0)
    with place_for(folder, folder) as place:
        assert said_of(place) == ["in its own folder, which has too many files for a copy: what it wrote stays"]


def test_the_help_says_so_too(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert f"more than\n{scratch.MAX_ENTRIES:,} files and folders is not copied" in said and "{rank} in them" in said


def test_no_write_comes_through_a_link(tmp_path, monkeypatch):
    """Of two ranks at once, to files that are too large for the copy, and to one beside the folder."""
    monkeypatch.setattr(scratch, "MAX_FILES", 0)
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in NAMES:
        (folder / name).write_text("old")
    (folder / "base").touch()
    (tmp_path / "beside").write_text("old")
    (folder / "dangling").symlink_to(tmp_path / "nothing")
    report = check_text(folder, WRITES)
    assert report["exit_codes"] == [0, 0] and report["in_copy"], short(report)
    assert {(folder / name).read_text() for name in NAMES} == {"old"}
    assert (folder / "base").stat().st_size == 0 and (tmp_path / "beside").read_text() == "old"
    assert not (tmp_path / "nothing").exists()
    rules = [finding["rule"] for finding in report["findings"]]
    assert "nothing is written outside of the copy" not in rules and "the doctor itself" not in rules, short(report)


def test_without_a_copy_each_file_is_named(tmp_path):
    text = WRITES.replace('(Path("..") / "beside").write_text("new")', "[open(f'f{i}', 'w').close() for i in range(9)]")
    for name in ("appended", "patched", "mapped", "cut"):
        (tmp_path / name).write_text("old")
    report = check_text(tmp_path, text, "--in-place")
    (finding,) = [f for f in report["findings"] if f["rule"] == "nothing is written outside of the copy"]
    assert finding["seen"].startswith("there was no copy: it wrote ") and finding["fix"] == "leave out --in-place"
    assert not report["in_copy"]
    n_named, n_more = finding["seen"].count(str(tmp_path)), finding["seen"].rpartition(", and ")[2]
    assert (n_named, n_more) == (10, "5 more")
