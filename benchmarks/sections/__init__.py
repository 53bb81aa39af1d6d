"""What is measured: a module for each section, or for sections that are closely kin, and all in `SECTIONS`.

A new section is a module here, with a function from a `Plan` to rows of one type, and a line in `SECTIONS`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks.plan import Plan
from benchmarks.report import Row
from benchmarks.sections import (
    exchange,
    gpu,
    growth,
    loading,
    memory,
    network,
    photos,
    startup,
    training,
    training_step,
    ways,
)


class Section(NamedTuple):
    """A part of the benchmark, with a table of its own."""

    name: str  # on the command line and in results.json
    rows: Callable[[Plan], Sequence[Row]]  # its docstring's first line stands above the table
    needs: str = ""  # what is missing where there are no rows


SECTIONS = {
    section.name: section
    for section in (
        Section("data", loading.rows),
        Section("photos", photos.rows),
        Section("step", training_step.rows),
        Section("exchange", exchange.rows),
        Section("startup", startup.rows),
        Section("training", training.one_process_rows),
        Section("ranks", training.several_ranks_rows),
        Section("whole", training.whole_run_rows),
        Section("memory", memory.rows),
        Section("growth", growth.rows),
        Section("gpu", gpu.rows, gpu.NEEDS),
        Section("network", network.rows, network.NEEDS),
        Section("ways", ways.rows, network.NEEDS),
    )
}
