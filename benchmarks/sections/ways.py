"""What each way of chapter 13 to communicate less takes to one loss over a slow network, and what was predicted.

The ways and the script are the page's own. The prediction knows what a batch takes on one rank alone, and what one with
plain DDP takes on a cable without a limit: their difference is alpha, the start of an all-reduce. Beta is one over the
bandwidth.
"""

import contextlib
import io
import os
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import launch, network_probe
from benchmarks.page import write_scripts
from benchmarks.plan import Plan
from benchmarks.report import Row, Spread, column
from data_gen.__main__ import main as data_gen
from ddp_tutorial.launcher import run_ranks

PLAIN = "Plain"
WAYS = (PLAIN, "Accumulate-4", "Float16", "PowerSGD", "Local-4", "Local-16", "DiLoCo-16")
RATE, MOST = 100, 400  # Mbit/s; batches
WARM_UP = 8  # batches that are left out where a batch is timed: DDP orders its buckets, PowerSGD does not compress
TIMED = 32  # batches that are timed: two exchanges of those that exchange least


@dataclass(frozen=True)
class WayRow(Row):
    """A way over the limited link."""

    cores: int
    mbit_per_second: int = column("Mbit/s")
    by: str
    bytes_per_batch: int = column("bytes a batch")  # that a rank hands over, once the way has begun
    batches: Spread = column("batches to the loss")
    seconds: Spread = column("s to the loss")
    model_seconds: float = column("of the model, s")
    start_milliseconds: float = column("start, ms")  # of an all-reduce: alpha


def rows(plan: Plan) -> list[WayRow]:
    """What each way of chapter 13 takes to one loss over 100 Mbit/s, beside the alpha-beta model; two ranks."""
    unshare = network_probe.unshare_command()
    if not unshare:
        return []
    folder = plan.folder / "ways"
    write_page(folder)
    n_seeds = 1 if plan.quick else 3
    alone = plan.measure("alone", measure_alone, folder)
    free = plan.measure("no limit", measure, unshare, folder, 0, n_seeds, (PLAIN,))[PLAIN]
    alpha = max(0.0, batch_seconds(free) - alone[PLAIN])
    measured = plan.measure("limited", measure, unshare, folder, RATE, n_seeds, WAYS)
    return [row(way, runs, alone[way], alpha) for way, runs in measured.items()]


def row(way: str, runs: list[dict], alone: float, alpha: float) -> WayRow:
    """`runs` has a run for each seed; `alone` and `alpha` are in seconds."""
    batches = Spread.of(len(run["bytes"]) for run in runs)
    every = int(way.partition("-")[2] or 1)
    exchange = [calls * alpha + 8e-6 * n_bytes / RATE for run in runs for calls, n_bytes in exchanges(run)]
    predicted = batches.median * (alone + statistics.fmean(exchange) / every)
    return WayRow(
        cores=len(os.sched_getaffinity(0)),
        mbit_per_second=RATE,
        by=way,
        bytes_per_batch=int(statistics.median(n_bytes for run in runs for _, n_bytes in exchanges(run))) // every,
        batches=batches,
        seconds=Spread.of(round(sum(run["seconds"]), 2) for run in runs),
        model_seconds=round(predicted, 2),
        start_milliseconds=round(1e3 * alpha, 2),
    )


def batch_seconds(runs: list[dict]) -> float:
    """What a batch takes on average, exchanges in their turn; of several runs the median."""
    return statistics.median(statistics.fmean(run["seconds"][WARM_UP:]) for run in runs)


def exchanges(run: dict) -> list[tuple[int, int]]:
    """Calls and bytes of each batch that sends."""
    return [(calls, n_bytes) for calls, n_bytes in zip(run["calls"], run["bytes"], strict=True) if calls]


def write_page(folder: Path) -> None:
    """The files of the page's cells, some of which go on with a file that another one has begun; and the digits."""
    (folder / "runs" / "less").mkdir(parents=True, exist_ok=True)
    write_scripts("13", folder, "digits.py", "exchanging.py", "train_by_ways.py")
    with contextlib.redirect_stdout(io.StringIO()):
        if data_gen(["digits", "--out", str(folder / "data" / "digits"), "--reuse"]):
            raise RuntimeError(f"no digits in {folder}")


def measure(unshare: list[str], folder: Path, rate: int, n_seeds: int, ways: tuple[str, ...]) -> dict[str, list[dict]]:
    """Of each way and seed, what rank 0 of two has saved: bytes, calls and seconds of each batch to the loss."""
    words = (sys.executable, "-m", "benchmarks.ways_probe", folder.resolve(), rate, "digits", MOST, n_seeds, *ways)
    launch.run_checked([*unshare, *map(str, words)])
    return {way: saved(folder, way, 2) for way in ways}


def measure_alone(folder: Path) -> dict[str, float]:
    """Seconds of a batch on a group of one rank, of each way: computing, and the way's own work."""
    (rank,) = run_ranks(1, ["train_by_ways.py", "digits", WARM_UP + TIMED, 3, *WAYS], folder=folder, fork=False)
    if rank.code:
        raise RuntimeError(f"one rank alone left with {rank.code}:\n{rank.stderr}")
    return {way: batch_seconds(saved(folder, way, 1)) for way in WAYS}


def saved(folder: Path, way: str, n_ranks: int) -> list[dict]:
    """Of each seed, what a table needs of what rank 0 has saved."""
    runs = torch.load(folder / "runs" / "less" / f"digits_{way}_0_of_{n_ranks}.pt")
    return [{name: run[name] for name in ("bytes", "calls", "seconds")} for run in runs]
