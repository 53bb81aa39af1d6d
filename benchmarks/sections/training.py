"""Whole trainings of the script and its peers, as their users would start them.

Each program trains the same model on the same files, with the same global batch, for the same epochs, in a fresh
process, or on ranks of torchrun. Three rounds, in which the programs take turns, are each compared with the script's
run of the same round; the validation losses must agree. An epoch is timed by the program itself, a whole run from the
command to the prompt.
"""

from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.comparison import ComparisonRow, compare
from benchmarks.launch import TrainingFlags
from benchmarks.peers import DatasetKind
from benchmarks.plan import QUICK_FLAGS, Plan
from benchmarks.programs import OTHERS, PER_SAMPLE, Program
from benchmarks.report import Row


@dataclass(frozen=True)
class TrainingRow(Row):
    """One program in one of the cases of the sections `training` and `ranks`."""

    features: int
    ranks: int
    epochs: int
    comparison: ComparisonRow


@dataclass(frozen=True)
class WholeRunRow(Row):
    """One program in one of the cases of the section `whole`."""

    samples: int
    ranks: int
    epochs: int
    comparison: ComparisonRow


class Case(NamedTuple):
    """A training that all programs are compared in."""

    n_features: int
    n_samples: int
    n_ranks: int
    epochs: int
    rounds: int = 3


def one_process_rows(plan: Plan) -> list[TrainingRow]:
    """Epochs and whole runs of the script and its peers on one process: the same files, batch and epochs."""
    quick, full = [Case(20, 2048, 1, 5, 1)], [Case(20, 40_960, 1, 5), Case(784, 16_384, 1, 5)]
    return [row for case in (quick if plan.quick else full) for row in training_rows(plan, case)]


def several_ranks_rows(plan: Plan) -> list[TrainingRow]:
    """The same on two and four ranks, with the same global batch."""
    quick, full = [Case(20, 2048, 2, 5, 1)], [Case(20, 20_480, 2, 4), Case(20, 20_480, 4, 3)]
    return [row for case in (quick if plan.quick else full) for row in training_rows(plan, case)]


def training_rows(plan: Plan, case: Case) -> list[TrainingRow]:
    """A row for each program."""
    lr = 0.1 if case.n_features < 100 else 1.0
    flags = QUICK_FLAGS if plan.quick else TrainingFlags(case.epochs, batch_size=128, lr=lr)
    data = plan.data(case.n_features, case.n_samples)
    compared = compare(plan, others_in(plan, case.n_ranks), case.n_ranks, data, case.rounds, flags)
    return [TrainingRow(case.n_features, case.n_ranks, flags.epochs, row) for row in compared]


def others_in(plan: Plan, n_ranks: int) -> list[Program]:
    """The programs that are compared with the script on so many ranks."""
    others = [program for program in OTHERS if program.is_installed]
    if n_ranks == 2:
        others = [program for program in others if program.dataset is not DatasetKind.GATHER]
    if plan.quick:  # each framework once on one process, with our Dataset, and once on two ranks, with the other
        others = [
            program
            for program in others
            if program is PER_SAMPLE or (program.dataset is DatasetKind.PER_SAMPLE) == (n_ranks > 1)
        ]
    return others


def whole_run_rows(plan: Plan) -> list[WholeRunRow]:
    """Whole runs, from the command to the prompt, of the script and of the per-sample script."""
    flags, rounds = (QUICK_FLAGS, 1) if plan.quick else (TrainingFlags(epochs=100, batch_size=128, lr=0.1), 3)
    return [
        WholeRunRow(n_samples, n_ranks, flags.epochs, row)
        for n_ranks, n_samples in (((2, 2048),) if plan.quick else ((1, 40_960), (4, 4096)))
        for row in compare(plan, [PER_SAMPLE], n_ranks, plan.data(20, n_samples), rounds, flags)
    ]
