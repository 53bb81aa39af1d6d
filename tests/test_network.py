"""What the network costs: the model's arithmetic, the stored figure, and two ranks joined by a limited link."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks import cli, figure, network_probe
from benchmarks.network_probe import HALF, PLAIN, RARE, SCHEMES, SILENT, NetworkMeasurement
from benchmarks.report import Spread
from benchmarks.sections.network import NEEDS, NetworkRow, rows_beside_model
from ddp_tutorial.ranks import network
from tests.ranks import start_ranks

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "notebooks" / "images"
needs_links = pytest.mark.skipif(not network_probe.unshare_command(), reason=f"this needs {NEEDS}")


def test_the_model_has_two_times_and_predicts_the_others():
    free = {PLAIN: 0.030, HALF: 0.5, RARE: 0.5, SILENT: 0.010}  # of these it knows the first and the last
    steps = {rate: {name: [[s, 7_000_000]] * 3 for name, s in free.items()} for rate in ("0", "100", "1000")}
    measurement = NetworkMeasurement.from_json({"gradient_bytes": 4_000_000, "steps": steps})
    rows = {(row.mbit_per_second, row.by): row for row in rows_beside_model(measurement)}
    model = {name: [rows[rate, name].model_ms for rate in (None, 100, 1000)] for name in SCHEMES}
    assert model[SILENT] == [10, 10, 10]
    assert model[PLAIN] == [30, 30 + 320, 30 + 32]  # 4 MB are 32 Mbit
    assert model[HALF] == [30, 30 + 160, 30 + 16]
    assert model[RARE] == [15, 15 + 80, 15 + 8]
    assert rows[100, HALF].batch_ms == (500, 500, 500) and rows[100, HALF].megabytes_sent == 7


def stored_rows(path: Path) -> list[NetworkRow]:
    """Of a results file, whose columns must be those of today."""
    tables = json.loads(path.read_text())["network"]
    rows = [NetworkRow(*(Spread(*cell) if isinstance(cell, list) else cell for cell in row.values())) for row in tables]
    assert [list(row.cells()) for row in rows] == [list(row) for row in tables]
    return rows


def test_the_stored_figure_shows_the_stored_numbers():
    rows = stored_rows(IMAGES / "network.json")
    assert Image.open(IMAGES / "network.png").text["Title"] == figure.network(rows).get_suptitle()
    assert all(row.model_ms / 2 < row.batch_ms.median < 2 * row.model_ms for row in rows)


def test_without_links_the_section_says_what_it_needs(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["network", "--out", str(tmp_path)]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "not here" in line)
    assert line == f"  not here: this needs {NEEDS}"
    assert not (tmp_path / "network.png").exists()


def test_what_is_still_on_its_way_at_the_end_of_a_step_counts(monkeypatch):
    """It waits in a buffer until the other has taken it in, and so has finished its step, too."""
    sent, trainer = [], network_probe.SchemeTrainer.__new__(network_probe.SchemeTrainer)
    trainer.scheme, trainer.ddp_model = SCHEMES[PLAIN], nn.Linear(2, 2)
    trainer.optimizer = torch.optim.SGD(trainer.ddp_model.parameters())
    trainer.x, trainer.y = torch.ones(1, 2), torch.tensor([0])
    monkeypatch.setattr(network_probe, "bytes_sent", lambda: sum(sent))
    monkeypatch.setattr(network_probe.dist, "barrier", lambda: None)
    monkeypatch.setattr(network_probe.dist, "all_reduce", lambda *_: sent.append(7))  # it waits for the other
    assert trainer.step().bytes_sent == 7


@pytest.mark.slow
@needs_links
def test_two_ranks_joined_by_a_limited_link(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "--quick", "network", "--out", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)  # it takes 20 s
    assert done.returncode == 0, done
    n_bytes = 4_006_952
    rows = {(row.mbit_per_second, row.by): row for row in stored_rows(tmp_path / "results.json")}
    assert list(rows) == [(rate, name) for rate in (None, 100) for name in SCHEMES]
    for rate in (None, 100):
        sent = {name: rows[rate, name].megabytes_sent for name in SCHEMES}
        assert n_bytes / 1e6 < sent[PLAIN] < 1.4 * n_bytes / 1e6  # the gradients, once; headers, and what TCP repeats
        assert 0.4 < sent[HALF] / sent[PLAIN] < 0.6 and 0.15 < sent[RARE] / sent[PLAIN] < 0.4, sent
        assert sent[SILENT] < 0.01
    assert rows[100, PLAIN].batch_ms.low > 0.9 * 1e3 * n_bytes / (100e6 / 8)  # the link is a limit, on any machine
    assert Image.open(tmp_path / "network.png").text["Title"]


@pytest.mark.slow
@needs_links
def test_an_agent_that_fails_ends_all():
    """No process is left, and so no namespace and no link."""
    probe = [*network_probe.unshare_command(), sys.executable, "-m", "benchmarks.network_probe", "1", "no-rate"]
    done = subprocess.run(probe, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode not in (0, None) and "no-rate" in done.stderr, done
    assert not running("no-rate")


@pytest.mark.slow
@needs_links
def test_sigterm_ends_all():
    probe = [*network_probe.unshare_command(), sys.executable, "-m", "benchmarks.network_probe", "12345", "0"]
    with subprocess.Popen(probe, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 200
        while len(running("12345")) < 5 and time.monotonic() < deadline:  # itself, two agents, two ranks
            time.sleep(0.5)
        assert len(running("12345")) == 5
        process.terminate()
        assert process.wait(200) == 143
    assert not running("12345")


def running(word: str) -> list[list[str]]:
    """The command lines of the probe's processes that have this flag."""
    lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    return [words for words in lines if "benchmarks.network_probe" in words and word in words]


# The reader's tool: python -m ddp_tutorial.ranks.network, under torchrun

TWO_NODES = """
set -e
unshare --net sleep 1000 & other=$!
trap 'kill $other $(jobs -p) 2> /dev/null || true' EXIT
until [ "$(readlink /proc/$other/ns/net)" != "$(readlink /proc/$$/ns/net)" ]; do sleep 0.05; done
there="nsenter --net=/proc/$other/ns/net"
ip link add cable type veth peer name cable netns $other
ip address add 10.0.0.1/24 dev cable
$there ip address add 10.0.0.2/24 dev cable
for device in lo cable; do ip link set $device up; $there ip link set $device up; done
$there tc qdisc add dev cable root tbf rate 200mbit burst 64kb limit 16mb
export GLOO_SOCKET_IFNAME=cable
flags="--nnodes=2 --nproc-per-node=1 --rdzv-backend=c10d --rdzv-endpoint=10.0.0.1:29400"
agent="$PYTHON -m torch.distributed.run $flags --local-addr"
program="-m ddp_tutorial.ranks.network"
$agent=10.0.0.1 --rdzv-conf=is_host=1 $program &
$there $agent=10.0.0.2 --rdzv-conf=is_host=0 $program
wait $!
"""


@pytest.mark.slow
@needs_links
def test_the_slow_node_is_found():
    """Two nodes, of which the second sends at most 200 Mbit/s: 0.025 GB/s."""
    env = os.environ | {"PATH": network_probe.PATH, "PYTHON": sys.executable}
    command = [*network_probe.unshare_command(), "bash", "-c", TWO_NODES]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=580)  # it takes 30 s
    assert done.returncode == 0, done
    rates = [float(rate) for rate in re.findall(r"([\d.]+) GB/s", done.stdout)]
    assert len(rates) == 5, done.stdout
    *all_reduces, from_0, from_1 = rates
    assert from_1 < 0.027 and max(all_reduces[1:]) < 0.03, done.stdout
    assert from_0 > 2 * from_1, done.stdout  # the other way the cable has no limit


def test_a_rank_that_computes_slowly_is_named(monkeypatch):
    monkeypatch.setattr(network.dist, "get_backend", lambda: "gloo")
    rows = [(node, "2.13.0", taken, 1.0) for node, taken in (("a", 0.010), ("a", 0.011), ("bad", 0.030))]
    head, names, *lines, last = network.report({1: 0.5}, rows).splitlines()
    assert [line.partition("GB/s")[2] for line in lines] == ["", ", on bad", ", on a"], "which speed is a cable's"
    assert head == "3 ranks, 2 host names, gloo; all-reduce of 1 MB at 0.500 GB/s" and len(lines) == 3
    assert last == "slow: rank 2 on bad computes 2.7 times as long as the median rank"
    assert "slow" not in network.report({1: 0.5}, rows[:2])
    for n in (1, 4):  # ranks on each of two nodes
        _, _, *lines = network.report({1: 0.5}, rows[:1] * n + rows[2:] * n).splitlines()
        slow = [line for line in lines if line.startswith("slow: ")]
        assert len(slow) == n and all("on bad computes 3.0 times as long" in line for line in slow)


def test_the_table_has_a_row_for_each_rank(tmp_path):
    (tmp_path / "table.py").write_text("from ddp_tutorial.ranks import network\nnetwork.main()\n")
    first, *others = start_ranks(3, tmp_path / "table.py")
    assert first.code == 0 and len(re.findall(r"^ +\d .* ms .* GB/s$", first.stdout, re.M)) == 3, first
    assert [rank.stdout for rank in others] == ["", ""]
    (alone,) = start_ranks(0, tmp_path / "table.py")
    assert alone.code == 2 and "one rank exchanges nothing" in alone.stderr, alone
