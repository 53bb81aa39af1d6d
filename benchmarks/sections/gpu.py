"""How long an epoch takes on GPUs, and what no program can beat there.

`benchmarks/gpu_probe.py` trains the same weights on the same batches in the same order, by the loops of
`gpu_probe.LOOPS`, which are fed and launched in different ways, take turns, and must end in one validation loss. On one
GPU two floors follow: all launches of a step one by one, and the same kernels in a graph or the bytes of the batch,
whichever takes longer. Then the frameworks train as whole programs, validation included, as in
`benchmarks/sections/training.py`.
"""

import itertools
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import gpu_probe, launch
from benchmarks.comparison import compare
from benchmarks.gpu_probe import GpuMeasurement
from benchmarks.launch import TrainingFlags
from benchmarks.peers import DatasetKind
from benchmarks.plan import Plan
from benchmarks.programs import OTHERS
from benchmarks.report import Row, Spread, column

NEEDS = "a GPU"
BATCH_SIZE = 1024  # of the whole programs
FLOAT32 = 4  # bytes


@dataclass(frozen=True)
class GpuCase(Row):
    """What is the same for all rows that are compared."""

    card: str
    ranks: int
    features: int
    batch: int


@dataclass(frozen=True)
class GpuRow(Row):
    """A loop, a floor or a program. None where a program has failed."""

    case: GpuCase
    by: str
    epoch_ms: float | None = column("epoch ms")
    step_us: int | None = column("us a step")
    ratio: Spread | None = column("times the scripts")


def rows(plan: Plan) -> list[GpuRow]:
    """Epochs on GPUs: one training, fed and launched in several ways; then whole programs, validation included."""
    if not torch.cuda.is_available():
        return []
    shapes = [(20, 8192)] if plan.quick else [(20, 131_072), (784, 65_536)]
    batch_sizes = (1024,) if plan.quick else (256, 1024, 4096)
    rounds = 1 if plan.quick else 5
    result = []
    for n_ranks in (n for n in (1, 2, 4) if n <= torch.cuda.device_count()):
        for (n_features, n_samples), batch_size in itertools.product(shapes, batch_sizes):
            name = f"{n_ranks} ranks, {n_samples}x{n_features}, batches of {batch_size}"
            measured = plan.measure(name, probe, n_ranks, plan.data(n_features, n_samples), batch_size, rounds)
            measurement = GpuMeasurement.from_json(measured)
            case = GpuCase(measurement.card, n_ranks, n_features, batch_size)
            n_steps = n_samples // batch_size
            result += loop_rows(measurement, case, n_steps) + floor_rows(measurement, case, n_steps)
        result += program_rows(plan, n_ranks, *shapes[-1], min(rounds, 3))
    return result


def probe(n_ranks: int, data: Path, batch_size: int, rounds: int) -> dict:
    """What the probe prints."""
    return launch.run_probe(launch.command_line(n_ranks, ["-m", "benchmarks.gpu_probe", data, batch_size, rounds]))


def loop_rows(measurement: GpuMeasurement, case: GpuCase, n_steps: int) -> list[GpuRow]:
    """A row for each loop. Raises `AssertionError` if one ends in another loss than the scripts' own."""
    ours = measurement.loops[gpu_probe.ON_GPU]
    for name, loop in measurement.loops.items():
        assert abs(loop.val_loss - ours.val_loss) < 1e-3 * ours.val_loss, f"{name}: {loop.val_loss}"
    result = []
    for name, loop in measurement.loops.items():
        seconds, ratio = statistics.median(loop.seconds), Spread.of_ratios(loop.seconds, ours.seconds)
        result.append(gpu_row(case, name, seconds, n_steps, ratio))
    return result


def floor_rows(measurement: GpuMeasurement, case: GpuCase, n_steps: int) -> list[GpuRow]:
    """What no loop can beat: the launches of a step, or its kernels and bytes. None on several ranks, which wait."""
    if measurement.n_launches is None:
        return []
    launches = measurement.n_launches / n_steps
    # X of a batch: read and written by the gather, read by the forward and by the backward pass
    n_bytes = 4 * FLOAT32 * (case.batch // case.ranks) * case.features
    in_graph = max(launches * measurement.graph_kernel_seconds, n_bytes / measurement.bytes_per_second)
    floors = {
        f"floor: {launches:.0f} launches, one by one": launches * measurement.kernel_seconds,
        f"floor: {launches:.0f} kernels in a graph, or {n_bytes / 1e6:.1f} MB": in_graph,
    }
    ours = statistics.median(measurement.loops[gpu_probe.ON_GPU].seconds)
    return [
        gpu_row(case, name, n_steps * seconds, n_steps, Spread.of([n_steps * seconds / ours]))
        for name, seconds in floors.items()
    ]


def gpu_row(case: GpuCase, by: str, seconds: float, n_steps: int, ratio: Spread) -> GpuRow:
    """`seconds` are those of an epoch."""
    return GpuRow(case, by, epoch_ms=round(1e3 * seconds, 1), step_us=round(1e6 * seconds / n_steps), ratio=ratio)


def program_rows(plan: Plan, n_ranks: int, n_features: int, n_samples: int, rounds: int) -> list[GpuRow]:
    """A row for the script, and for each program that trains on the device it is told."""
    others = [program for program in OTHERS if program.obeys_device and program.is_installed]
    if plan.quick:
        others = [program for program in others if program.dataset is not DatasetKind.PER_SAMPLE]
    flags = TrainingFlags(epochs=5, batch_size=BATCH_SIZE, lr=0.1, device="cuda")
    case = GpuCase(torch.cuda.get_device_name(), n_ranks, n_features, BATCH_SIZE)
    return [
        GpuRow(
            case,
            row.by,
            epoch_ms=row.epoch_ms,
            step_us=row.epoch_ms and round(1e3 * row.epoch_ms / (n_samples // BATCH_SIZE)),
            ratio=row.epoch_ratio,
        )
        for row in compare(plan, others, n_ranks, plan.data(n_features, n_samples), rounds, flags)
    ]
