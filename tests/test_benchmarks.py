"""The benchmarks run, each program trains the same, and they would say if one did not. No time is asserted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import launch, sections
from benchmarks.launch import Ratio, Run

ROOT = Path(__file__).parents[1]


def test_quick(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == list(sections.SECTIONS)
    assert all(rows for name, rows in results.items() if name != "gpu")
    assert [row["by"] for row in results["training"]] == [sections.OURS, *sections.PEERS]
    losses = [row["validation loss"] for name in ("training", "ranks") for row in results[name]]
    assert max(losses) < (1 + 2 * sections.TOLERANCE) * min(losses)
    assert (tmp_path / "peers.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "losses, message", [([0.3, 0.32], "validation loss 0.32, not 0.3"), ([1.2, 1.2], "not learned")]
)
def test_a_program_that_trains_otherwise_is_refused(losses, message, monkeypatch, tmp_path):
    runs = iter([Run(1.0, [0.1], loss, 0.0) for loss in losses])
    monkeypatch.setattr(launch, "run", lambda *args, **flags: next(runs))
    plan = sections.Plan(tmp_path, quick=True)
    with pytest.raises(AssertionError, match=message):
        sections.compare(plan, [sections.SLOWEST], 1, plan.data(20, 64), 1)


def test_ratios_are_of_rounds():
    assert Ratio.of([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)
    assert Run(1.0, [9.0, 1.0, 3.0, 2.0], 0.0, 0.0).epoch == 2.0  # the first epoch warms up


def test_a_program_that_fails_is_not_timed():
    with pytest.raises(RuntimeError, match="left with 3"):
        launch.call([sys.executable, "-c", "raise SystemExit(3)"])


def test_pss_counts_this_process():
    assert 10e6 < launch.pss(os.getpid()) < 10e9


def test_a_wrong_section_is_refused():
    done = subprocess.run([sys.executable, "-m", "benchmarks", "speed"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "there is no section speed" in done.stderr
