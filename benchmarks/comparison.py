"""Trains with several programs, in turns, checks that they train the same, and compares them with the script."""

import math
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import launch
from benchmarks.launch import Run, TrainingFlags
from benchmarks.plan import Plan
from benchmarks.programs import OURS, Program
from benchmarks.report import Row, Spread, column

TOLERANCE = 0.03  # of the validation loss: every program shuffles in its own way


@dataclass(frozen=True)
class ComparisonRow(Row):
    """What a program's rounds took, beside the script's. None where there is no such number."""

    by: str
    epoch_ms: float | None = column("epoch ms")
    epoch_ratio: Spread | None = column("epoch, times ours")
    whole_seconds: float | None = column("whole s")
    whole_ratio: Spread | None = column("whole, times ours")
    val_loss: float | None = column("validation loss")
    died: str = column("died")


def compare(
    plan: Plan, others: Sequence[Program], n_ranks: int, data: Path, rounds: int, flags: TrainingFlags
) -> list[ComparisonRow]:
    """A row for the script, and one for each of the others. Raises `AssertionError` if one ends in another loss."""
    programs = [OURS, *others]
    name = f"{n_ranks} ranks, {data.name}, {flags}"
    measured = [
        plan.measure(f"{name}, round {i}", train_each, plan, programs, n_ranks, data, flags)
        for i in range(1, 1 + rounds)
    ]
    runs = {}
    for program in programs:
        values = [runs_of_round[program.name] for runs_of_round in measured]
        runs[program.name] = [Run(*run) if run else None for run in values]
    return [summary(name, own_runs, runs[OURS.name]) for name, own_runs in runs.items()]


def train_each(
    plan: Plan, programs: Sequence[Program], n_ranks: int, data: Path, flags: TrainingFlags
) -> dict[str, Run | None]:
    """One round, by the programs' names. A peer that fails has no run; a script that fails raises `RuntimeError`."""

    def train(program: Program) -> Run | None:
        try:
            return plan.run(program, n_ranks, data, flags)
        except RuntimeError as error:
            if not program.is_peer:
                raise
            print(error, flush=True)  # the table says that it failed, and the others go on
            return None

    in_turns = ThreadPoolExecutor(2).map if plan.quick else map  # nobody reads the times of a quick call
    runs = {program.name: run for program, run in zip(programs, in_turns(train, programs), strict=True)}
    check_losses({name: run.val_loss for name, run in runs.items() if run}, data)
    return runs


def check_losses(losses: dict[str, float], data: Path) -> None:
    """Raises `AssertionError` if the script has not learned, or if another program's loss is not nearly its own."""
    n_classes = len(np.unique(np.load(data / "y_train.npy")))
    target = losses[OURS.name]
    assert target < 0.75 * math.log(n_classes), f"{OURS.name} has not learned: {target}"
    for name, loss in losses.items():
        assert abs(loss - target) < TOLERANCE * target, f"{name}: validation loss {loss}, not {target}"


def summary(name: str, runs: list[Run | None], baseline: list[Run]) -> ComparisonRow:
    """Of a program's rounds, beside the script's in the same rounds. A round that failed is None."""
    measured = [(run, base) for run, base in zip(runs, baseline, strict=True) if run]
    completed = [(run, base) for run, base in measured if not run.died]
    return ComparisonRow(
        by=name,
        epoch_ms=rounded_median([1e3 * run.epoch for run, _ in measured], 1),
        epoch_ratio=Spread.of(run.epoch / base.epoch for run, base in measured),
        whole_seconds=rounded_median([run.wall for run, _ in completed], 1),
        whole_ratio=Spread.of(run.wall / base.wall for run, base in completed),
        val_loss=rounded_median([run.val_loss for run, _ in measured[:1]], 4),
        died=deaths(runs),
    )


def rounded_median(values: list[float], digits: int) -> float | None:
    """None of no value."""
    return round(statistics.median(values), digits) if values else None


def deaths(runs: list[Run | None]) -> str:
    """In how many of the rounds: at its end, when its epochs had been timed, or before, in each attempt."""
    counts = {
        "at its end": sum(run.died for run in runs if run),
        f"failed {launch.ATTEMPTS} times": runs.count(None),
    }
    return ", ".join(f"{how} in {n} of {len(runs)}" for how, n in counts.items() if n) or "never"
