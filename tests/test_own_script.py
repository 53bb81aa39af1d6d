"""Chapter 11: a script for one GPU as people write them, what it becomes, and what the doctor says of it."""

import ast
import re
import shutil
from pathlib import Path

import nbformat
import pytest
import torch

from ddp_tutorial.check.judge import RULES
from ddp_tutorial.show import notebook
from tests.check.doctor import check, short
from tests.ranks import NOTEBOOKS, Launch, assert_same, changed, start_ranks

CHAPTER = NOTEBOOKS / "11_bring_your_own_script.ipynb"
SINGLE, DDP = NOTEBOOKS / "own_single.py", NOTEBOOKS / "own_ddp.py"
MAY_IMPORT = {"argparse", "contextlib", "math", "os", "pathlib", "sklearn", "torch"}
FEW = ("--batch-size", "128", "--accumulate", "3", "--schedule", "plateau")
EXACT = ("--batch-size", "1436", "--dropout", "0", "--no-augment", "--norm", "none", "--workers", "0", "--epochs", "1")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """The ranks take the CPU, also where there is a GPU: two of them cannot share one."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def saved(n: int, script: Path, out: Path, *flags) -> dict:
    """What last.pt holds after a run on `n` ranks; with `n` 0, on one process."""
    ranks = start_ranks(n, script, "--out", out, *flags)
    assert [rank.code for rank in ranks] == [0] * max(n, 1), ranks
    return torch.load(out / "last.pt", weights_only=True)


def examined(folder: Path, script: Path, *flags, options: tuple = ()) -> dict:
    """What the doctor says of a copy of the script."""
    shutil.copy(script, folder)
    return check(folder, *options, script.name, *FEW, "--epochs", "2", *flags)


def test_the_scripts_are_as_cells_write_them():
    for script in (SINGLE, DDP):
        assert notebook.written_file(CHAPTER, script.name) == script.read_text(), script.name


def test_the_scripts_know_nothing_of_the_package():
    for script in (SINGLE, DDP):
        names = set()
        for node in ast.walk(ast.parse(script.read_text())):
            if isinstance(node, ast.ImportFrom):
                names.add(node.module.split(".")[0])
            elif isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
        assert names and names <= MAY_IMPORT, script.name
    assert "distributed" not in SINGLE.read_text()


def test_the_recipe_names_rules_of_the_doctor():
    cells = nbformat.read(CHAPTER, as_version=4).cells
    (text,) = (cell.source for cell in cells if "\n## A recipe" in cell.source)
    rows = re.findall(r"^\| \d+ \|.*", text.split("\n## A recipe")[1], re.M)
    named = {rule for row in rows for rule in re.findall(r"(?<!\*)\*([^*|]+)\*", row)}
    assert len(rows) >= 15 and len(named) >= 20
    assert named - {rule.name for rule in RULES} == set()


def test_one_process_learns_and_resumes(tmp_path):
    flags = ("--workers", "0", "--schedule", "plateau", "--out", tmp_path, "--epochs")
    (first,) = start_ranks(0, SINGLE, *flags, "2")
    (second,) = start_ranks(0, SINGLE, *flags, "4", "--resume")
    lines = (first.stdout + second.stdout).splitlines()
    assert [line.split()[:2] for line in lines] == [["epoch", str(epoch)] for epoch in range(1, 5)], (first, second)
    assert float(lines[-1].split()[-1]) > 0.8, lines
    assert (tmp_path / "best.pt").exists()


def test_a_step_of_two_ranks_is_that_of_one_process(tmp_path):
    one, two = saved(0, SINGLE, tmp_path / "one", *EXACT), saved(2, DDP, tmp_path / "two", *EXACT)
    torch.testing.assert_close(two["model"], one["model"], rtol=1e-4, atol=1e-6)
    assert one["progress"][2] == pytest.approx(two["progress"][2], rel=1e-5)


def test_the_doctor_has_nothing_to_mend(tmp_path):
    report = examined(tmp_path, DDP)
    assert short(report) == [f for f in short(report) if f.startswith("NOTE BatchNorm sees its own rank only")], report
    held = {rule["rule"] for rule in report["holds"]}
    assert held >= {"what a rank decides by is the same", "the last backward exchanges", "ranks augment differently"}


@pytest.mark.slow
def test_the_doctor_has_nothing_to_mend_on_gpus_that_are_made_up(tmp_path):
    saved(2, DDP, tmp_path / "runs", *FEW, "--epochs", "1", "--workers", "0")
    flags = ("--norm", "sync", "--resume", "--out", "runs")
    report = examined(tmp_path, DDP, *flags, options=("--gpu", "made-up"))
    assert short(report) == [], report
    assert {"each rank has its own GPU", "all ranks load"} <= {rule["rule"] for rule in report["holds"]}


SPOILT = {  # what is changed in own_ddp.py -> the rules that are broken then
    ("sampler.set_epoch(epoch)", "pass"): {"each epoch has another order"},
    ("torch.manual_seed(10_000 * args.seed + 100 * epoch + rank)", "pass"): {
        "ranks drop other units",
        "ranks augment differently",
    },
    ("torch.manual_seed(args.seed)", "torch.manual_seed(args.seed + rank)"): {"the data are the same"},
    ("sampler=sampler", "shuffle=True"): {"each rank reads its own samples"},
    ("    dist.all_reduce(sums)\n", ""): {"what a rank decides by is the same"},
    ("DistributedDataParallel(model)", "model"): {"a model is wrapped"},
    ("if steps else", "if not steps else"): {"the last backward exchanges"},
    ("loss / args.accumulate", "loss / args.accumulate / dist.get_world_size()"): {"the loss is a mean, once"},
    ("        if rank == 0:", "        if True:"): {"one rank writes each file"},
    ('("cuda", local_rank)', '("cuda", 0)'): {"each rank has its own GPU"},
}


@pytest.mark.slow
@pytest.mark.parametrize(("spoilt", "broken"), SPOILT.items(), ids=[min(rules) for rules in SPOILT.values()])
def test_the_doctor_names_what_is_spoilt(spoilt, broken, tmp_path):
    script = changed(DDP, *spoilt, tmp_path / "spoilt.py")
    # without DDP there is no no_sync(); a divisor tells nothing with as many pieces as ranks, and it tries 3 ranks, too
    n_pieces = {"a model is wrapped": 1, "the loss is a mean, once": 4}.get(min(broken), 3)
    flags = ("--accumulate", str(n_pieces))
    report = check(tmp_path, "--gpu", "made-up", script.name, *FEW, "--epochs", "2", *flags)
    assert broken <= {f["rule"] for f in report["findings"] if f["level"] == "BROKEN"}, short(report)


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one_under_torchrun(tmp_path):
    flags = (*FEW, "--workers", "1", "--out")
    for out, epochs, *more in (("whole", 3), ("parts", 1), ("parts", 3, "--resume")):
        with Launch(2, DDP, *flags, tmp_path / out, "--epochs", epochs, *more) as launch:
            done = launch.wait()
            assert done.returncode == 0 and launch.left() == [], done
    whole, parts = (torch.load(tmp_path / out / "last.pt", weights_only=True) for out in ("whole", "parts"))
    assert_same(parts["model"], whole["model"])
    assert parts["progress"] == whole["progress"]
