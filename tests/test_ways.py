"""Ways to communicate less over a slow network: the model's arithmetic, the stored run, and two ranks on a cable."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import cli, network_probe
from benchmarks.report import Spread
from benchmarks.sections import network
from benchmarks.sections.ways import PLAIN, TIMED, WARM_UP, WAYS, WayRow, batch_seconds, row

ROOT = Path(__file__).parents[1]
needs_links = pytest.mark.skipif(not network_probe.unshare_command(), reason=f"this needs {network.NEEDS}")
WEIGHTS = 64 * 256 + 256 + 256 * 256 + 256 + 256 * 10 + 10  # of the page's network
THIN = 2 * (64 + 256 + 256 + 256 + 256 + 10) + 256 + 256 + 10  # what PowerSGD of rank 2 makes of them
BYTES = {"Plain": 4 * WEIGHTS, "Accumulate-4": WEIGHTS, "Float16": 2 * WEIGHTS, "PowerSGD": 4 * THIN}
BYTES |= {"Local-4": WEIGHTS, "Local-16": WEIGHTS // 4, "DiLoCo-16": WEIGHTS // 4}


def test_the_model_adds_computing_starts_and_bytes():
    seeds = [{"bytes": [0, 1_250_000] * n, "calls": [0, 3] * n, "seconds": [0.5] * 2 * n} for n in (4, 5, 6)]
    # 10 batches of 10 ms, and 5 exchanges of 3 starts of 20 ms and 10 Mbit, which take 100 ms
    computed = row("Local-2", seeds, alone=0.010, alpha=0.020)
    assert computed.model_seconds == pytest.approx(10 * 0.010 + 5 * (3 * 0.020 + 0.100))
    assert computed.batches == (10, 8, 12) and computed.seconds == (5, 4, 6) and computed.bytes_per_batch == 625_000


def test_exchanges_count_in_their_turn():
    """The median batch of a way that exchanges every second time is one that sends nothing."""
    runs = [{"seconds": [9.0] * WARM_UP + [0.0, exchange] * (TIMED // 2)} for exchange in (2.0, 4.0, 100.0)]
    assert batch_seconds(runs) == 2.0


def stored_rows(path: Path) -> dict[str, WayRow]:
    """Of a results file, whose columns must be those of today."""
    tables = json.loads(path.read_text())["ways"]
    rows = [WayRow(*(Spread(*cell) if isinstance(cell, list) else cell for cell in row.values())) for row in tables]
    assert [list(row.cells()) for row in rows] == [list(row) for row in tables]
    return {row.by: row for row in rows}


def test_the_stored_run_is_as_predicted():
    rows = stored_rows(ROOT / "notebooks" / "images" / "ways.json")
    assert {way: row.bytes_per_batch for way, row in rows.items()} == BYTES and list(rows) == list(WAYS)
    assert all(row.model_seconds / 2 < row.seconds.median < 2 * row.model_seconds for row in rows.values())


def test_without_links_the_section_says_what_it_needs(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["ways", "--out", str(tmp_path)]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "not here" in line)
    assert line == f"  not here: this needs {network.NEEDS}"


@pytest.mark.slow
@needs_links
def test_two_ranks_train_by_each_way_over_a_limited_link(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "--quick", "ways", "--out", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)  # it takes 40 s
    assert done.returncode == 0, done
    rows = stored_rows(tmp_path / "results.json")
    assert {way: row.bytes_per_batch for way, row in rows.items()} == BYTES
    for of_way in rows.values():
        on_the_link = of_way.batches.median * of_way.bytes_per_batch / (100e6 / 8)
        assert of_way.seconds.low > 0.8 * on_the_link and of_way.batches.median < 400, of_way  # a limit on any machine
    assert rows["Local-16"].bytes_per_batch < rows[PLAIN].bytes_per_batch
