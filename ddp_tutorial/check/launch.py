"""Start the ranks of a script, look after them, and end what is left of them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from ddp_tutorial.check.fork import INJECT, forked, new_process, spec_of_module
from ddp_tutorial.check.scratch import Place, place_for
from ddp_tutorial.launcher import Forked, inherited_environment, meeting_point, rank_variables

PACKAGE = Path(__file__).resolve().parents[2]
STACKS = int(signal.SIGRTMIN + 7 if hasattr(signal, "SIGRTMIN") else signal.SIGUSR2)  # asks a rank where it stands
LOOK = 0.2  # seconds between two looks at the ranks
BUSY = 0.3  # seconds of the processors' time that are a sign of life
LAST_WORDS = 4000  # bytes


@dataclass(frozen=True)
class Plan:
    """What to launch, and how."""

    script: Path  # of a module: its file
    arguments: tuple[str, ...] = ()
    module: str | None = None
    ranks: int = 2
    seconds: float = 60.0
    patience: float = 10.0
    batches: int = 8
    gpu: str = "none"  # "none", "made-up", "real"
    data: str = "real"  # "real", "made-up"
    spawns: bool = False  # whether the script starts its ranks itself
    in_place: bool = False
    fork: bool = False  # start the ranks as copies of one process: quicker from the second check on


@dataclass
class Trial:
    """What has come of it."""

    plan: Plan
    place: Place
    codes: list[int | None] = field(default_factory=list)
    seconds: float = 0.0
    end: str = "ended"  # "ended", "time": it was over, "hang": nothing moved any more
    words: list[str] = field(default_factory=list)  # the last ones of each process
    logs: dict[int, list[dict]] = field(default_factory=dict)  # process id -> events
    stacks: dict[int, str] = field(default_factory=dict)  # process id -> where it stood
    changed: list[str] = field(default_factory=list)  # files of the user's that are not as they were

    def events(self, *kinds: str) -> list[dict]:
        """Those of all processes, one process after the other."""
        return [event for events in self.logs.values() for event in events if event["kind"] in kinds]


def source(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def spawns_ranks(path: Path) -> bool:
    """Whether the script seems to start its ranks itself."""
    return bool(re.search(r"\bspawn\s*\(|\bProcess\(\s*target|start_processes\s*\(|\.launch\s*\(", source(path)))


def rank_flag(path: Path) -> str | None:
    """The flag by which older launchers tell a rank its number, if the script has it."""
    flag = re.search(r"['\"](--local[_-]rank)['\"]", source(path))
    return flag and flag[1]


def arguments_of(plan: Plan, rank: int) -> list[str]:
    arguments = [argument.replace("{rank}", str(rank)) for argument in plan.arguments]
    flag = None if plan.spawns else rank_flag(plan.script)
    given = any(re.match(r"--local[_-]rank(=|$)", argument) for argument in arguments)
    return [f"{flag}={rank}", *arguments] if flag and not given else arguments


def settings(plan: Plan, place: Place, meeting: dict[str, str]) -> str:
    folders = {str(place.original), str(place.copy)}
    texts = [plan.script, *islice(place.copy.rglob("*.py"), 500)]
    return json.dumps(
        {
            "log": str(place.temporary / "log"),
            "package": str(PACKAGE),
            "user": sorted(folders),
            "copy": str(place.temporary / "copy"),
            "batches": plan.batches,
            "gpu": plan.gpu,
            "data": plan.data,
            "ranks": plan.ranks,
            "stacks": STACKS,
            "meeting": {} if plan.spawns else meeting,
            "gathers": any("all_gather" in source(text) for text in texts if text.is_file()),
        }
    )


def environment(plan: Plan, place: Place, meeting: dict[str, str]) -> dict[str, str]:
    path = [str(INJECT), *filter(None, [os.environ.get("PYTHONPATH")])]
    ours = {"DDP_CHECK": settings(plan, place, meeting), "PYTHONPATH": os.pathsep.join(path)}
    ours |= {"PYTHONUNBUFFERED": "1", "TMPDIR": str(place.temporary / "tmp"), "TQDM_DISABLE": "1"}
    if plan.gpu != "real":
        ours["CUDA_VISIBLE_DEVICES"] = ""
    defaults = {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    return defaults | inherited_environment() | ours


@contextmanager
def started(plan: Plan, place: Place) -> Iterator[list[subprocess.Popen | Forked]]:
    """The ranks, or the one process that starts them; whatever is left of them at the end is ended."""
    with ExitStack() as stack:
        meeting = {} if plan.spawns else stack.enter_context(meeting_point())
        common = environment(plan, place, meeting)
        own = [{}] if plan.spawns else [variables | meeting for variables in rank_variables(plan.ranks)]
        program = ["-m", plan.module] if plan.module else [str(place.in_copy(plan.script))]
        start = forked if plan.fork else new_process
        processes: list[subprocess.Popen | Forked] = []
        stack.callback(lambda: [end(process) for process in processes])
        for rank, variables in enumerate(own):
            said = place.temporary / "log" / f"{rank}.words"
            processes.append(start([*program, *arguments_of(plan, rank)], common | variables, place.folder, said))
        yield processes


def end(process: subprocess.Popen | Forked) -> None:
    """End it and all that it has started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def processor_seconds(sessions: set[int]) -> float:
    """Of all processes of these sessions."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            fields = path.read_text().rsplit(")", 1)[1].split()
            if int(fields[3]) in sessions:
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def look_after(processes: list[subprocess.Popen | Forked], plan: Plan, log: Path) -> str:
    """Wait until they have ended, nothing moves, or their time is over: "ended", "hang" or "time"."""
    began = moved = time.monotonic()
    n_bytes, used = -1, 0.0
    while any(process.poll() is None for process in processes):
        time.sleep(LOOK)
        now = time.monotonic()
        written = sum(path.stat().st_size for path in log.iterdir())
        seconds = processor_seconds({process.pid for process in processes})
        if written != n_bytes or seconds - used > BUSY:
            n_bytes, used, moved = written, seconds, now
        if now - moved > plan.patience:
            return "hang"
        if now - began > plan.seconds:
            return "time"
    return "ended"


def read_logs(log: Path) -> dict[int, list[dict]]:
    logs = {}
    for path in sorted(log.glob("*.jsonl"), key=lambda path: path.stat().st_ctime_ns):
        lines = path.read_bytes().split(b"\n")[:-1]  # the last one may be cut off
        logs[int(path.stem)] = [json.loads(line) for line in lines]
    return logs


def ask_for_stacks(logs: dict[int, list[dict]]) -> None:
    """Let each rank write down in which line it stands."""
    for pid, events in logs.items():
        if any(event["kind"] == "met" for event in events):
            with suppress(ProcessLookupError):
                os.kill(pid, STACKS)
    time.sleep(0.5)


def run(plan: Plan) -> Trial:
    """Launch the script and watch it to its end."""
    folder, current = plan.script.parent, Path.cwd()
    folder = current if plan.module and plan.script.is_relative_to(current) else folder
    with place_for(folder, current, plan.in_place) as place:
        trial, log, began = Trial(plan, place), place.temporary / "log", time.monotonic()
        with started(plan, place) as processes:
            trial.end = look_after(processes, plan, log)
            if trial.end != "ended":
                ask_for_stacks(read_logs(log))
        trial.codes = [process.returncode for process in processes]
        trial.seconds = time.monotonic() - began
        trial.logs, trial.changed = read_logs(log), place.changed()
        trial.stacks = {int(path.stem): path.read_text() for path in log.glob("*.stack")}
        words = [log / f"{rank}.words" for rank in range(len(processes))]
        trial.words = [path.read_text(errors="replace")[-LAST_WORDS:] for path in words]
    return trial


def file_of_module(name: str) -> Path | None:
    """The file that `python -m name` runs, found as it would be."""
    sys.path.insert(0, os.getcwd())
    try:
        spec = spec_of_module(name)
        return Path(spec.origin) if spec and spec.origin else None
    except (ImportError, ValueError, AttributeError):
        return None
    finally:
        sys.path.pop(0)
