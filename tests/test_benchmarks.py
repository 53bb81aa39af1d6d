"""The benchmarks run, each program trains the same, and they would say if one did not. No time is asserted."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import cli, comparison, figure, gpu_probe, launch, plan, report, store
from benchmarks.gpu_probe import GpuMeasurement
from benchmarks.launch import Run, TrainingFlags
from benchmarks.programs import LIMIT, OTHERS, OURS, PER_SAMPLE, RESILIENT
from benchmarks.report import Spread
from benchmarks.sections import SECTIONS, gpu, training
from tests.ranks import save_data

ROOT = Path(__file__).parents[1]
FLAGS = TrainingFlags(epochs=3, batch_size=8, lr=0.1)
CLASSES_OF_4 = {"X_train": np.zeros((8, 20)), "y_train": np.arange(8) % 4}  # all that a comparison reads itself
DYING_PEER = """
import json, os, pathlib, resource, sys
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
lines = [json.dumps({"val_loss": 0.5, "seconds": 0.25}) + "\\n" for _ in range(3)]
pathlib.Path(flags["--out"], "history.jsonl").write_text("".join(lines)[: int(os.environ["CUT"])])
os.abort()
"""
AGENT = """
import subprocess, sys
held = b"x" * 50_000_000
print("alone", flush=True)
sys.stdin.readline()
with subprocess.Popen(["sleep", "1000"]) as child:
    print("a parent", flush=True)
    sys.stdin.read()
    child.kill()
"""


@pytest.fixture
def full_plan(tmp_path):
    return plan.Plan(tmp_path, False, store.MeasurementStore(tmp_path / "measured.json", {}))


@pytest.fixture
def launches(monkeypatch):
    """Nothing is launched: the list of what would have been. A test sets `launches.fail`, which may raise."""

    class Launches(list):
        def fail(self, command):
            pass

    def train(command, n_ranks, data, flags):
        commands.append(command)
        commands.fail(command)
        return Run(2.0, [0.5, 0.5], 0.3, 1e8)

    commands = Launches()
    monkeypatch.setattr(launch, "train", train)
    monkeypatch.setattr(plan.Plan, "data", lambda self, *sizes: save_data(self.folder / "data", **CLASSES_OF_4))
    return commands


def failing(program):
    def fail(command):
        if command == program.command:
            raise RuntimeError("it fails")

    return fail


@pytest.mark.slow
def test_quick(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)  # it takes a minute
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == list(SECTIONS)
    assert all(rows for name, rows in results.items() if not SECTIONS[name].needs)
    trained = results["training"] + results["ranks"]
    assert {row["by"] for row in trained} == {program.name for program in (OURS, *OTHERS)}
    on_two_ranks = {row["by"].partition(",")[0] for row in results["ranks"]}
    assert on_two_ranks >= {"hand-written", "Accelerate", "Fabric", "Lightning"}
    losses = [row["validation loss"] for row in trained]
    assert None not in losses, done.stdout
    assert max(losses) < (1 + 2 * comparison.TOLERANCE) * min(losses)
    assert (tmp_path / "peers.png").stat().st_size > 10_000
    assert not (tmp_path / "measured.json").exists()


@pytest.mark.parametrize("quick, expected", [(True, 1), (False, 2)])
def test_only_quick_sections_share_a_launch(quick, expected, launches, full_plan):
    one_section = replace(full_plan, quick=quick, section="one")
    for its_plan in (one_section, replace(one_section, section="another")):
        its_plan.run(PER_SAMPLE, 1, its_plan.folder, FLAGS)
    assert len(launches) == expected


def test_the_rows_of_a_gpu():
    """From what the probe has printed: loops, ratios and floors; a loop that trains otherwise is refused."""
    loops = {name: [[1.0 + i, 2.0 + 2 * i], 0.5] for i, name in enumerate(gpu_probe.LOOPS)}
    rates = {"bytes_per_second": 1e12, "kernel_seconds": 1e-5, "graph_kernel_seconds": 1e-6}
    printed = {"card": "a card", "loops": loops, "n_launches": 640} | rates
    case = gpu.GpuCase("a card", ranks=1, features=784, batch=1024)
    measurement = GpuMeasurement.from_json(printed)
    all_rows = gpu.loop_rows(measurement, case, 64) + gpu.floor_rows(measurement, case, 64)
    rows = {row.by: row for row in all_rows}
    assert list(rows)[:7] == list(gpu_probe.LOOPS) and len(rows) == 9
    assert rows[gpu_probe.ON_GPU].ratio == (1.0, 1.0, 1.0)
    assert rows[gpu_probe.GRAPH].ratio == (7 / 4, 7 / 4, 7 / 4)
    assert rows[gpu_probe.LOOP].epoch_ms == 7500 and rows[gpu_probe.LOOP].step_us == round(7.5e6 / 64)
    assert rows["floor: 10 launches, one by one"].step_us == 100
    assert rows["floor: 10 kernels in a graph, or 12.8 MB"].step_us == 13
    headings = ["card", "ranks", "features", "batch", "by", "epoch ms", "us a step", "times the scripts"]
    assert list(all_rows[0].cells()) == headings
    assert "(a card)" in figure.gpu(all_rows).get_suptitle()
    assert figure.gpu([]) is None
    assert gpu.floor_rows(measurement._replace(n_launches=None), case, 64) == []
    loops[gpu_probe.GRAPH][1] = 0.502
    with pytest.raises(AssertionError, match="a CUDA graph of the step: 0.502"):
        gpu.loop_rows(GpuMeasurement.from_json(printed), case, 64)


@pytest.mark.parametrize(
    "losses, message", [([0.3, 0.32], "validation loss 0.32, not 0.3"), ([1.2, 1.2], "not learned")]
)
def test_a_program_that_trains_otherwise_is_refused(losses, message, monkeypatch, launches, full_plan):
    runs = iter([Run(1.0, [0.1], loss, 0.0) for loss in losses])
    monkeypatch.setattr(launch, "train", lambda *args: next(runs))
    with pytest.raises(AssertionError, match=message):
        comparison.compare(full_plan, [PER_SAMPLE], 1, full_plan.data(), 1, FLAGS)
    assert not full_plan.store.path.exists()  # such a round is not gone on from


def test_a_call_that_was_stopped_goes_on_after_its_last_round(launches, tmp_path):
    def call(folder, *flags):
        del launches[:]
        cli.main(["training", "--out", str(tmp_path / folder), *flags])
        return len(launches), json.loads((tmp_path / folder / "results.json").read_text())

    all_launches, expected = call("undisturbed")
    of_a_round = all_launches // 6  # of two cases in three rounds

    def stop(command):
        if len(launches) == 4 * of_a_round + 3:
            raise KeyboardInterrupt

    launches.fail = stop
    with pytest.raises(KeyboardInterrupt):
        call("stopped")
    launches.fail = lambda command: None
    assert call("stopped") == (2 * of_a_round, expected)
    assert call("stopped") == (all_launches, expected)  # a call that has ended leaves nothing to go on from


def test_measurements_with_other_settings_are_not_mixed(tmp_path, capsys):
    path = tmp_path / "measured.json"
    settings = store.settings(quick=False)
    store.MeasurementStore(path, settings | {"cores": 1000}).measure("training", "a round", lambda: 1)
    with pytest.raises(SystemExit) as refused:
        cli.main(["training", "--out", str(tmp_path)])
    assert refused.value.code == 2
    assert f"cores 1000, not {settings['cores']}: --again measures it anew" in capsys.readouterr().err
    again = store.MeasurementStore(path, settings, again=True)
    assert again.measure("training", "a round", lambda: 2) == 2
    assert store.MeasurementStore(path, settings).measure("training", "a round", lambda: 3) == 2


def test_a_peer_that_fails_has_a_row_that_says_so(launches, full_plan):
    launches.fail = failing(LIMIT)
    ours, limit, per_sample = comparison.compare(full_plan, [LIMIT, PER_SAMPLE], 1, full_plan.data(), 2, FLAGS)
    assert limit.cells() == dict.fromkeys(ours.cells()) | {"by": LIMIT.name, "died": "failed 3 times in 2 of 2"}
    assert per_sample == replace(ours, by=PER_SAMPLE.name)
    rows = [training.TrainingRow(20, 1, 3, row) for row in (ours, limit, per_sample)]
    report.print_table(rows)
    bars = [text.get_text() for text in figure.peers(rows).axes[0].get_yticklabels()]
    assert bars == [PER_SAMPLE.name]


@pytest.mark.parametrize("program", [OURS, RESILIENT], ids=lambda program: program.name)
def test_a_script_of_ours_that_fails_is_an_error(program, launches, full_plan):
    launches.fail = failing(program)
    with pytest.raises(RuntimeError, match="it fails"):
        comparison.compare(full_plan, [RESILIENT], 1, full_plan.data(), 1, FLAGS)


def test_a_run_that_died_at_its_end_has_epochs_and_no_whole():
    well, late = Run(4.0, [9.0, 1.0], 0.3, 1e8), Run(None, [9.0, 2.0], 0.3, 1e8, True)
    row = comparison.summary("Fabric", [late, well, None], [well] * 3)
    assert row.epoch_ratio == (1.5, 1.0, 2.0)
    assert (row.whole_seconds, row.whole_ratio) == (4.0, (1.0, 1.0, 1.0))
    assert row.died == "at its end in 1 of 3, failed 3 times in 1 of 3"
    assert comparison.summary("Fabric", [late], [well]).whole_seconds is None


def test_a_row_in_a_row_stands_in_its_columns(capsys):
    row = training.WholeRunRow(2048, 4, 5, comparison.summary("Fabric", [None], [Run(4.0, [1.0], 0.3, 1e8)]))
    assert list(row.cells())[:5] == ["samples", "ranks", "epochs", "by", "epoch ms"]
    report.print_table([row])
    headings, cells = capsys.readouterr().out.splitlines()
    assert cells.split()[:5] == ["2,048", "4", "5", "Fabric", "-"]
    assert headings.index("by") == cells.index("Fabric")


@pytest.fixture
def dying(monkeypatch, tmp_path):
    (tmp_path / "dying.py").write_text(DYING_PEER)
    monkeypatch.setitem(launch.ENVIRONMENT, "PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(launch, "ATTEMPTS", 2)
    return tmp_path / "dying.py"


def test_a_peer_that_aborts_after_its_last_epoch_is_measured(dying, monkeypatch):
    monkeypatch.setitem(launch.ENVIRONMENT, "CUT", "10000")
    run = launch.train(["-m", "dying"], 1, dying.parent, FLAGS)
    assert run[:3] == (None, [0.25] * 3, 0.5)
    assert run.died


def test_a_peer_that_aborts_before_is_tried_again(dying, monkeypatch):
    monkeypatch.setitem(launch.ENVIRONMENT, "CUT", "100")  # its last line is cut short
    with pytest.raises(RuntimeError, match="left with -6 after 2 of 3 epochs, attempt 2"):
        launch.train(["-m", "dying"], 1, dying.parent, FLAGS)


def test_a_script_of_ours_that_aborts_at_its_end_is_an_error(dying, monkeypatch):
    monkeypatch.setitem(launch.ENVIRONMENT, "CUT", "10000")
    with pytest.raises(RuntimeError, match="left with -6 after 3 of 3 epochs, attempt 1"):
        launch.train([dying], 1, dying.parent, FLAGS)


def test_spreads_are_of_rounds():
    assert Spread.of([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)
    assert Spread.of_ratios([3.0, 1.0, 2.0], [1.0, 1.0, 2.0]) == (1.0, 1.0, 3.0)
    assert Run(1.0, [9.0, 1.0, 3.0, 2.0], 0.0, 0.0).epoch == 2.0  # the first epoch warms up


def test_a_program_that_fails_is_not_timed():
    with pytest.raises(RuntimeError, match="left with 3"):
        launch.run_checked([sys.executable, "-c", "raise SystemExit(3)"])


def test_pss_is_a_process_or_its_children():
    with subprocess.Popen([sys.executable, "-c", AGENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as agent:
        assert agent.stdout.readline() == b"alone\n"
        assert 50e6 < launch.mean_pss(agent.pid) < 10e9
        agent.stdin.write(b"go on\n")
        agent.stdin.flush()
        assert agent.stdout.readline() == b"a parent\n"
        assert 0 < launch.mean_pss(agent.pid) < 10e6  # its child's
    assert launch.mean_pss(agent.pid) == 0  # it has ended


def test_a_wrong_section_is_refused(capsys):
    with pytest.raises(SystemExit) as refused:
        cli.main(["speed"])
    assert refused.value.code == 2
    assert "there is no section speed" in capsys.readouterr().err
