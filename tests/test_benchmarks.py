"""The benchmarks run, each program trains the same, and they would say if one did not. No time is asserted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import __main__ as benchmarks
from benchmarks import figure, gpu_probe, kept, launch, sections
from benchmarks.launch import Ratio, Run
from tests.ranks import save_data

ROOT = Path(__file__).parents[1]
CLASSES_OF_4 = {"X_train": np.zeros((8, 20)), "y_train": np.arange(8) % 4}  # all that a comparison reads itself
DYING_PEER = """
import json, os, pathlib, resource, sys
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
lines = [json.dumps({"val_loss": 0.5, "seconds": 0.25}) + "\\n" for _ in range(3)]
pathlib.Path(flags["--out"], "history.jsonl").write_text("".join(lines)[: int(flags["--cut"])])
os.abort()
"""


@pytest.fixture
def plan(tmp_path):
    return sections.Plan(tmp_path, False, kept.Kept(tmp_path / "measured.json", {}))


@pytest.fixture
def launches(monkeypatch):
    """Nothing is launched: the list of what would have been. A test sets `launches.fail`, which may raise."""

    class Launches(list):
        def fail(self, program):
            pass

    def run(n_ranks, program, data, **flags):
        found.append(program)
        found.fail(program)
        return Run(2.0, [0.5, 0.5], 0.3, 1e8)

    found = Launches()
    monkeypatch.setattr(launch, "run", run)
    monkeypatch.setattr(sections.Plan, "data", lambda plan, *sizes: save_data(plan.folder / "data", **CLASSES_OF_4))
    return found


def failing(word):
    def fail(program):
        if word in program:
            raise RuntimeError("it fails")

    return fail


@pytest.mark.slow
def test_quick(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)  # it takes a minute
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == list(sections.SECTIONS)
    assert all(rows for name, rows in results.items() if name not in sections.NEEDS)
    trained = results["training"] + results["ranks"]
    assert {row["by"] for row in trained} == {sections.OURS, *sections.PEERS}
    assert {row["by"].partition(",")[0] for row in results["ranks"]} >= {"hand-written", "Accelerate", "Fabric", "Lightning"}  # fmt: skip
    losses = [row["validation loss"] for row in trained]
    assert None not in losses, done.stdout
    assert max(losses) < (1 + 2 * sections.TOLERANCE) * min(losses)
    assert (tmp_path / "peers.png").stat().st_size > 10_000
    assert not (tmp_path / "measured.json").exists()


@pytest.mark.parametrize("quick, expected", [(True, 1), (False, 2)])
def test_only_quick_sections_share_a_launch(quick, expected, launches, plan):
    plan.quick = quick
    for _ in range(2):
        plan.run(1, sections.program(sections.SLOWEST), plan.folder, epochs=2)
    assert len(launches) == expected


def test_the_ladder_of_a_gpu():
    """From what the probe has printed: rows, ratios and floors; a way that trains otherwise is refused."""
    ways = {name: {"s": [1.0 + i, 2.0 + 2 * i], "val_loss": 0.5} for i, name in enumerate(gpu_probe.WAYS)}
    found = {"rows": ways, "launches": 640, "copy B/s": 1e12, "kernel s": [1e-5, 1e-6]}
    rows = {row["by"]: row for row in sections.ladder(found, 784, 1024, 64)}
    assert list(rows)[:7] == list(gpu_probe.WAYS) and len(rows) == 9
    assert rows[gpu_probe.OURS]["times the scripts"] == (1.0, 1.0, 1.0)
    assert rows[gpu_probe.GRAPH]["times the scripts"] == (7 / 4, 7 / 4, 7 / 4)
    assert rows["floor: 10 launches, one by one"]["us a step"] == 100
    assert rows["floor: 10 kernels in a graph, or 12.8 MB"]["us a step"] == 13
    case = {"card": "a card", "ranks": 1, "features": 784, "batch": 1024}
    assert "(a card)" in figure.gpu([case | row for row in rows.values()]).get_suptitle()
    assert figure.gpu([]) is None
    ways[gpu_probe.GRAPH]["val_loss"] = 0.502
    with pytest.raises(AssertionError, match="a CUDA graph of the step: 0.502"):
        sections.ladder(found, 784, 1024, 64)


@pytest.mark.parametrize(
    "losses, message", [([0.3, 0.32], "validation loss 0.32, not 0.3"), ([1.2, 1.2], "not learned")]
)
def test_a_program_that_trains_otherwise_is_refused(losses, message, monkeypatch, launches, plan):
    runs = iter([Run(1.0, [0.1], loss, 0.0) for loss in losses])
    monkeypatch.setattr(launch, "run", lambda *args, **flags: next(runs))
    with pytest.raises(AssertionError, match=message):
        sections.compare(plan, [sections.SLOWEST], 1, plan.data(), 1)
    assert not plan.kept.path.exists()  # such a round is not gone on from


def test_a_call_that_was_stopped_goes_on_after_its_last_round(launches, tmp_path):
    def call(folder, *flags):
        del launches[:]
        benchmarks.main(["training", "--out", str(tmp_path / folder), *flags])
        return len(launches), json.loads((tmp_path / folder / "results.json").read_text())

    all_launches, expected = call("undisturbed")
    of_a_round = all_launches // 6  # of two cases in three rounds

    def stop(program):
        if len(launches) == 4 * of_a_round + 3:
            raise KeyboardInterrupt

    launches.fail = stop
    with pytest.raises(KeyboardInterrupt):
        call("stopped")
    launches.fail = lambda program: None
    assert call("stopped") == (2 * of_a_round, expected)
    assert call("stopped") == (all_launches, expected)  # a call that has ended leaves nothing to go on from


def test_measurements_with_other_settings_are_not_mixed(tmp_path, capsys):
    path = tmp_path / "measured.json"
    settings = kept.settings(quick=False)
    kept.Kept(path, settings | {"cores": 1000}).measure("training", "a round", lambda: 1)
    with pytest.raises(SystemExit) as refused:
        benchmarks.main(["training", "--out", str(tmp_path)])
    assert refused.value.code == 2
    assert f"cores 1000, not {settings['cores']}: --again measures it anew" in capsys.readouterr().err
    assert kept.Kept(path, settings, again=True).measure("training", "a round", lambda: 2) == 2
    assert kept.Kept(path, settings).measure("training", "a round", lambda: 3) == 2


def test_a_peer_that_fails_has_a_row_that_says_so(launches, plan):
    launches.fail = failing("benchmarks.peers.limit")
    limit = "bare loop in memory (the limit)"
    rows = sections.compare(plan, [limit, sections.SLOWEST], 1, plan.data(), 2)
    assert rows[1] == dict.fromkeys(rows[0]) | {"by": limit, "died": "failed 3 times in 2 of 2"}
    assert rows[2] == rows[0] | {"by": sections.SLOWEST}
    benchmarks.print_table("training", "", rows)
    figure.peers([row | {"features": 20} for row in rows])


@pytest.mark.parametrize("script", [sections.OURS, sections.RESILIENT])
def test_a_script_of_ours_that_fails_is_an_error(script, launches, plan):
    launches.fail = failing(sections.NOTEBOOKS / script)
    with pytest.raises(RuntimeError, match="it fails"):
        sections.compare(plan, [sections.RESILIENT], 1, plan.data(), 1)


def test_a_run_that_died_at_its_end_has_epochs_and_no_whole():
    well, late = Run(4.0, [9.0, 1.0], 0.3, 1e8), Run(None, [9.0, 2.0], 0.3, 1e8, True)
    row = sections.summary("Fabric", [late, well, None], [well] * 3)
    assert row["epoch, times ours"] == (1.5, 1.0, 2.0)
    assert (row["whole s"], row["whole, times ours"]) == (4.0, (1.0, 1.0, 1.0))
    assert row["died"] == "at its end in 1 of 3, failed 3 times in 1 of 3"
    assert sections.summary("Fabric", [late], [well])["whole s"] is None


@pytest.fixture
def dying(monkeypatch, tmp_path):
    (tmp_path / "dying.py").write_text(DYING_PEER)
    monkeypatch.setitem(launch.ENVIRONMENT, "PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(launch, "ATTEMPTS", 2)
    return tmp_path / "dying.py"


def test_a_peer_that_aborts_after_its_last_epoch_is_measured(dying):
    run = launch.run(1, ["-m", "dying"], dying.parent, epochs=3, cut=10_000)
    assert run[:3] == (None, [0.25] * 3, 0.5)
    assert run.died


def test_a_peer_that_aborts_before_is_tried_again(dying):
    with pytest.raises(RuntimeError, match="left with -6 after 2 of 3 epochs, attempt 2"):
        launch.run(1, ["-m", "dying"], dying.parent, epochs=3, cut=100)  # its last line is cut short


def test_a_script_of_ours_that_aborts_at_its_end_is_an_error(dying):
    with pytest.raises(RuntimeError, match="left with -6 after 3 of 3 epochs, attempt 1"):
        launch.run(1, [dying], dying.parent, epochs=3, cut=10_000)


def test_ratios_are_of_rounds():
    assert Ratio.of([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)
    assert Run(1.0, [9.0, 1.0, 3.0, 2.0], 0.0, 0.0).epoch == 2.0  # the first epoch warms up


def test_a_program_that_fails_is_not_timed():
    with pytest.raises(RuntimeError, match="left with 3"):
        launch.call([sys.executable, "-c", "raise SystemExit(3)"])


def test_pss_counts_this_process():
    assert 10e6 < launch.pss(os.getpid()) < 10e9


def test_a_wrong_section_is_refused(capsys):
    with pytest.raises(SystemExit) as refused:
        benchmarks.main(["speed"])
    assert refused.value.code == 2
    assert "there is no section speed" in capsys.readouterr().err
