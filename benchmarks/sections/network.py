"""What a slow network costs, and how well a model of two numbers predicts it.

`benchmarks/network_probe.py` joins two ranks, one on each side, by a cable whose bandwidth is limited, and times a
batch for each scheme of exchanging gradients; rates and schemes take turns. Beside each time stands that of the
alpha-beta model, which is told only two of them: a batch without any exchange, and one with plain DDP, both on a cable
without a limit. What is sent is counted by the kernel.
"""

import os
import statistics
import sys
from dataclasses import dataclass

from benchmarks import launch, network_probe
from benchmarks.network_probe import PLAIN, SCHEMES, SILENT, NetworkMeasurement
from benchmarks.plan import Plan
from benchmarks.report import Row, Spread, column

NEEDS = "the commands unshare, ip and tc, and root, or a kernel that gives users namespaces of their own"
QUICK_RATES = (0, 100)  # Mbit/s; 0: no limit
RATES = (0, 3000, 1000, 300, 100)


@dataclass(frozen=True)
class NetworkRow(Row):
    """A batch at one bandwidth with one scheme."""

    cores: int
    mbit_per_second: int | None = column("Mbit/s")  # None: no limit
    by: str
    batch_ms: Spread = column("ms a batch")
    model_ms: float = column("of the model, ms")
    megabytes_sent: float = column("MB sent a batch")


def rows(plan: Plan) -> list[NetworkRow]:
    """What a batch takes on two ranks that a slow network joins, one on each side, beside the alpha-beta model."""
    unshare = network_probe.unshare_command()
    if not unshare:
        return []
    rates, rounds = (QUICK_RATES, 1) if plan.quick else (RATES, 7)
    return rows_beside_model(NetworkMeasurement.from_json(plan.measure("rates", probe, unshare, rounds, rates)))


def probe(unshare: list[str], rounds: int, rates: tuple[int, ...]) -> dict:
    """What the probe prints."""
    words = (*unshare, sys.executable, "-m", "benchmarks.network_probe", rounds, *rates)
    return launch.run_probe([*map(str, words)])


def rows_beside_model(measurement: NetworkMeasurement) -> list[NetworkRow]:
    """A row for each rate and scheme.

    The model: a batch takes the time of computing, and its share of an exchange, alpha + beta x bytes. Alpha is what an
    exchange adds without a limit; beta is 8 / bandwidth, for a ring of two sends each byte once.
    """
    milliseconds = {
        rate: {name: Spread.of(round(1e3 * step.seconds, 2) for step in steps) for name, steps in schemes.items()}
        for rate, schemes in measurement.steps.items()
    }
    computing = milliseconds[0][SILENT].median
    alpha = milliseconds[0][PLAIN].median - computing
    result = []
    for rate, schemes in measurement.steps.items():
        beta = 8 / (1e3 * rate) if rate else 0  # ms a byte
        for name, steps in schemes.items():
            scheme = SCHEMES[name]
            exchange = alpha + beta * measurement.gradient_bytes / scheme.compression
            sent = statistics.median(step.bytes_sent for step in steps)
            row = NetworkRow(
                cores=len(os.sched_getaffinity(0)),
                mbit_per_second=rate or None,
                by=name,
                batch_ms=milliseconds[rate][name],
                model_ms=round(computing + (exchange / scheme.n_batches if scheme.exchanges else 0), 1),
                megabytes_sent=round(sent / 1e6, 3),
            )
            result.append(row)
    return result
