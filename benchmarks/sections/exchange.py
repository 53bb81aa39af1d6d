"""What it costs ranks to average their gradients.

`benchmarks/exchange_probe.py` runs on gloo ranks: it times each way to exchange vectors of several sizes, the ways
taking turns, then the training step of SimpleModel without DDP, with it, and with the project's hook. A row is the
median of the rounds.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks import launch
from benchmarks.exchange_probe import Cost
from benchmarks.plan import Plan
from benchmarks.report import Row, column

QUICK_SIZES = (84, 65_536)  # numbers of float32; SimpleModel with 20 features and 4 classes has 84
SIZES = (84, 4096, 65_536, 262_144, 1_048_576, 4_194_304)


@dataclass(frozen=True)
class ExchangeRow(Row):
    """What one exchange, or one step, costs."""

    ranks: int
    what: str
    by: str
    milliseconds: float = column("ms")
    cpu_milliseconds: float = column("CPU ms a rank")
    waits: float = column("waits a rank")
    segments: int = column("TCP segments")


def rows(plan: Plan) -> list[ExchangeRow]:
    """One exchange of gradients between gloo ranks, by several ways; then the DDP step of SimpleModel."""
    rounds, sizes = (1, QUICK_SIZES) if plan.quick else (5, SIZES)
    return [
        ExchangeRow(
            ranks=n_ranks,
            what=what,
            by=way,
            milliseconds=round(1e3 * cost.seconds, 2),
            cpu_milliseconds=round(1e3 * cost.cpu_seconds, 2),
            waits=round(cost.waits, 1),
            segments=round(cost.segments),
        )
        for n_ranks in ((2,) if plan.quick else (2, 4))
        for what, way, cost in costs(plan.measure(f"{n_ranks} ranks", probe, n_ranks, rounds, sizes))
    ]


def costs(measured: dict) -> Iterator[tuple[str, str, Cost]]:
    """From what the probe prints: what is exchanged, by which way, and the cost."""
    for n_bytes, ways in measured["exchanges"].items():
        for way, values in ways.items():
            yield f"{int(n_bytes):,} B", way, Cost(*values)
    for way, values in measured["steps"].items():
        yield "step", way, Cost(*values)


def probe(n_ranks: int, rounds: int, sizes: tuple[int, ...]) -> dict:
    """What the probe prints."""
    return launch.run_probe(launch.command_line(n_ranks, ["-m", "benchmarks.exchange_probe", rounds, *sizes]))
