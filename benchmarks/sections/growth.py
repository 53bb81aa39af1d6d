"""How the script's time and memory grow with the data and with the ranks.

One training of two epochs for each case; the second epoch is timed, for the first one also reads the files from the
disk. Memory is measured as in `benchmarks/sections/memory.py`.
"""

from dataclasses import dataclass

from benchmarks.launch import TrainingFlags
from benchmarks.plan import QUICK_FLAGS, Plan
from benchmarks.programs import OURS
from benchmarks.report import Row, column


@dataclass(frozen=True)
class GrowthRow(Row):
    """The script on so many samples and ranks."""

    samples: int
    ranks: int
    epoch_seconds: float = column("epoch s")
    step_microseconds: float = column("us a step")
    pss: int = column("PSS MB a rank")


def rows(plan: Plan) -> list[GrowthRow]:
    """What grows with the samples and with the ranks: 20 features, batches of 1024, the script's second epoch."""
    flags = QUICK_FLAGS if plan.quick else TrainingFlags(epochs=2, batch_size=1024, lr=0.1)
    quick, full = [(2048, 1), (2048, 2)], [*((10**k, 1) for k in (4, 5, 6, 7)), (10**6, 2), (10**6, 4)]
    result = []
    for n_samples, n_ranks in quick if plan.quick else full:
        run = plan.measured_run(OURS, n_ranks, plan.data(20, n_samples), flags)
        epoch = run.epochs[1]
        result.append(
            GrowthRow(
                samples=n_samples,
                ranks=n_ranks,
                epoch_seconds=round(epoch, 3),
                step_microseconds=round(1e6 * epoch / (n_samples // flags.batch_size), 1),
                pss=round(run.pss / 1e6),
            )
        )
    return result
