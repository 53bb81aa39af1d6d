"""What a rank holds in memory.

One training each of the script, whose ranks map the files, and of a program that loads them into each rank, with the
same 2 GB; and of the script with hardly any data, which is what a process holds anyway. `launch.mean_pss` looks twice a
second, and the largest of what it sees counts: a page that ranks share counts once, not once for each of them.
"""

from dataclasses import dataclass

from benchmarks.launch import TrainingFlags
from benchmarks.plan import QUICK_FLAGS, Plan
from benchmarks.programs import OURS, TENSOR_DATASET
from benchmarks.report import Row, column


@dataclass(frozen=True)
class MemoryRow(Row):
    """What the ranks of a program hold at the most, in MB."""

    ranks: int
    X_size: int = column("X, MB")
    by: str
    pss: int = column("PSS MB a rank")
    total_pss: int = column("PSS MB, all")


def rows(plan: Plan) -> list[MemoryRow]:
    """The most that a rank holds (PSS), with an X of 2 GB: mapped, as ours, and loaded; and with hardly any data."""
    n_ranks = 1 if plan.quick else 4
    sizes = ((20, 2048), (20, 2048)) if plan.quick else ((784, 4096), (784, 640_000))
    little, much = (plan.data(*size) for size in sizes)
    flags = QUICK_FLAGS if plan.quick else TrainingFlags(epochs=1, batch_size=4096, lr=0.1)
    result = []
    for program, data in ((OURS, little), (OURS, much), (TENSOR_DATASET, much)):
        pss = plan.measured_run(program, n_ranks, data, flags).pss
        X_size = (data / "X_train.npy").stat().st_size
        result.append(
            MemoryRow(
                ranks=n_ranks,
                X_size=round(X_size / 1e6),
                by=program.name,
                pss=round(pss / 1e6),
                total_pss=round(n_ranks * pss / 1e6),
            )
        )
    return result
