"""How much a call measures, on which data, and what it has measured already."""

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import launch
from benchmarks.launch import Run, TrainingFlags
from benchmarks.programs import Program
from benchmarks.store import MeasurementStore
from data_gen.__main__ import main as data_gen

QUICK_FLAGS = TrainingFlags(epochs=5, batch_size=64, lr=0.1)  # the same in every section, so that they can share runs
N_VAL = 4096  # samples


@dataclass(frozen=True)
class Plan:
    """What a section is given. With `quick` it measures all that it has once, on little data."""

    folder: Path
    quick: bool
    store: MeasurementStore
    section: str = ""  # under which name the store keeps what is measured
    shared: dict[tuple, Run] = field(default_factory=dict)  # by sections, with `quick`

    def measure(self, name: str, function: Callable, *args, **options) -> Any:
        """What `function` returns, as JSON gives it back, or has returned before the last call was stopped."""
        return self.store.measure(self.section, name, function, *args, **options)

    def run(self, program: Program, n_ranks: int, data: Path, flags: TrainingFlags) -> Run:
        """`launch.train`. With `quick` one launch serves every section that asks for it."""
        if not self.quick:
            return launch.train(program.command, n_ranks, data, flags)
        key = (program, n_ranks, data, flags)
        if key not in self.shared:
            self.shared[key] = launch.train(program.command, n_ranks, data, flags)
        return self.shared[key]

    def measured_run(self, program: Program, n_ranks: int, data: Path, flags: TrainingFlags) -> Run:
        """`run`, kept on the disk."""
        name = f"{program.name}, {n_ranks} ranks, {data.name}"
        return Run(*self.measure(name, self.run, program, n_ranks, data, flags))

    def data(self, n_features: int, n_samples: int) -> Path:
        """A folder with so many training samples; made if it is not there."""
        folder = self.folder / "data" / f"{n_samples}x{n_features}"
        n_classes = 4 if n_features < 100 else 10
        sizes = {"features": n_features, "train": n_samples, "val": N_VAL, "classes": n_classes}
        flags = [word for name, size in sizes.items() for word in (f"--n-{name}", str(size))]
        with contextlib.redirect_stdout(io.StringIO()):
            if data_gen(["gaussian", "--out", str(folder), "--reuse", *flags]):
                raise RuntimeError(f"no data in {folder}")
        return folder
