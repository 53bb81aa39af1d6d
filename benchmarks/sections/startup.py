"""What passes before the first step is over.

`benchmarks/startup_probe.py` runs the script, as it is, on fresh processes, notes when each part of the start is over,
and leaves after the first step. Of the ranks of a start the one that took longest counts; a row is the median of
several starts.
"""

import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import launch, startup_probe
from benchmarks.plan import Plan
from benchmarks.programs import OURS
from benchmarks.report import Row, column


@dataclass(frozen=True)
class StartupRow(Row):
    """How long a part of the start takes."""

    ranks: int
    part: str
    seconds: float = column("s")


def rows(plan: Plan) -> list[StartupRow]:
    """Seconds from the command to the end of the first step, of the rank that is last."""
    data = plan.data(20, 2048)
    result = []
    for n_ranks in (2,) if plan.quick else (1, 2, 4):
        n_starts = 1 if plan.quick else 5
        names = [f"{n_ranks} ranks, start {i}" for i in range(1, 1 + n_starts)]
        starts = [plan.measure(name, start_once, n_ranks, data) for name in names]
        seconds = {part: [start[part] for start in starts] for part in starts[0]}
        seconds["all"] = [sum(start.values()) for start in starts]
        result += [StartupRow(n_ranks, part, round(statistics.median(s), 2)) for part, s in seconds.items()]
    return result


def start_once(n_ranks: int, data: Path) -> dict[str, float]:
    """{part: seconds} of the rank that took longest, in order."""
    with tempfile.TemporaryDirectory() as folder:
        program = [startup_probe.__file__, folder, *OURS.command, "--data-dir", data, "--out", folder]
        given = {"STARTED": str(time.clock_gettime(time.CLOCK_BOOTTIME))}
        launch.run_checked(launch.command_line(n_ranks, program), given)
        ranks = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
    return max(ranks, key=lambda parts: sum(parts.values()))
