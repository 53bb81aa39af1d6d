"""What the network costs: the model's arithmetic, the stored figure, and two ranks joined by a limited link."""

import json
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks import __main__ as benchmarks
from benchmarks import figure, network_probe, sections
from benchmarks.network_probe import HALF, PLAIN, RARE, SILENT

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "notebooks" / "images"
WAYS = (PLAIN, HALF, RARE, SILENT)
needs_links = pytest.mark.skipif(not network_probe.isolated(), reason=f"this needs {sections.NEEDS['network']}")


def by_rate(rows: list[dict]) -> dict:
    return {(row["Mbit/s"], row["by"]): row for row in rows}


def test_the_model_has_two_times_and_predicts_the_others():
    free = {PLAIN: 0.030, HALF: 0.5, RARE: 0.5, SILENT: 0.010}  # of these it knows the first and the last
    steps = {rate: {way: [[s, 7_000_000]] * 3 for way, s in free.items()} for rate in ("0", "100", "1000")}
    rows = by_rate(sections.beside_model({"bytes": 4_000_000, "rates": steps}))
    model = {way: [rows[rate, way]["of the model, ms"] for rate in (None, 100, 1000)] for way in WAYS}
    assert model[SILENT] == [10, 10, 10]
    assert model[PLAIN] == [30, 30 + 320, 30 + 32]  # 4 MB are 32 Mbit
    assert model[HALF] == [30, 30 + 160, 30 + 16]
    assert model[RARE] == [15, 15 + 80, 15 + 8]
    assert rows[100, HALF]["ms a batch"] == (500, 500, 500) and rows[100, HALF]["MB sent a batch"] == 7


def test_the_stored_figure_shows_the_stored_numbers():
    rows = json.loads((IMAGES / "network.json").read_text())["network"]
    drawn = figure.network(rows)
    assert Image.open(IMAGES / "network.png").text["Title"] == drawn.get_suptitle()
    assert figure.network([]) is None
    assert all(row["of the model, ms"] / 2 < row["ms a batch"][0] < 2 * row["of the model, ms"] for row in rows)


def test_without_links_the_section_says_what_it_needs(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert benchmarks.main(["network", "--out", str(tmp_path)]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "not here" in line)
    assert line == f"  not here: this needs {sections.NEEDS['network']}"
    assert not (tmp_path / "network.png").exists()


def test_what_is_still_on_its_way_at_the_end_of_a_step_counts(monkeypatch):
    """It waits in a buffer until the other has taken it in, and so has finished its step, too."""
    sent, way = [], network_probe.Way.__new__(network_probe.Way)
    way.model, way.n_batches, way.silent = nn.Linear(2, 2), 1, False
    way.optimizer, way.x, way.y = torch.optim.SGD(way.model.parameters()), torch.ones(1, 2), torch.tensor([0])
    monkeypatch.setattr(network_probe, "bytes_sent", lambda: sum(sent))
    monkeypatch.setattr(network_probe.dist, "barrier", lambda: None)
    monkeypatch.setattr(network_probe.dist, "all_reduce", lambda *_: sent.append(7))  # it waits for the other
    assert way.step()[1] == 7


@pytest.mark.slow
@needs_links
def test_two_ranks_joined_by_a_limited_link(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "--quick", "network", "--out", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)  # it takes 20 s
    assert done.returncode == 0, done
    n_bytes = 4_006_952
    rows = by_rate(json.loads((tmp_path / "results.json").read_text())["network"])
    assert list(rows) == [(rate, way) for rate in (None, 100) for way in WAYS]
    for rate in (None, 100):
        sent = {way: rows[rate, way]["MB sent a batch"] for way in WAYS}
        assert n_bytes / 1e6 < sent[PLAIN] < 1.4 * n_bytes / 1e6  # the gradients, once; headers, and what TCP repeats
        assert 0.4 < sent[HALF] / sent[PLAIN] < 0.6 and 0.15 < sent[RARE] / sent[PLAIN] < 0.4, sent
        assert sent[SILENT] < 0.01
    assert rows[100, PLAIN]["ms a batch"][1] > 0.9 * 1e3 * n_bytes / (100e6 / 8)  # the link is a limit, on any machine
    assert Image.open(tmp_path / "network.png").text["Title"]


@pytest.mark.slow
@needs_links
def test_an_agent_that_fails_ends_all():
    """No process is left, and so no namespace and no link."""
    probe = [*network_probe.isolated(), sys.executable, "-m", "benchmarks.network_probe", "1", "no-rate"]
    done = subprocess.run(probe, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode not in (0, None) and "no-rate" in done.stderr, done
    assert not running("no-rate")


@pytest.mark.slow
@needs_links
def test_sigterm_ends_all():
    probe = [*network_probe.isolated(), sys.executable, "-m", "benchmarks.network_probe", "12345", "0"]
    with subprocess.Popen(probe, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 200
        while len(running("12345")) < 5 and time.monotonic() < deadline:  # itself, two agents, two ranks
            time.sleep(0.5)
        assert len(running("12345")) == 5
        process.terminate()
        assert process.wait(200) == 143
    assert not running("12345")


def running(word: str) -> list[str]:
    """The command lines of the probe's processes that have this flag."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = path.read_bytes().decode(errors="replace").split("\0")
            if "benchmarks.network_probe" in words and word in words:
                found.append(words)
    return found
