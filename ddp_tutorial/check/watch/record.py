"""Events of this process, in a file of its own; the line of the user's code at which each happens."""

import ast
import functools
import json
import os
import random
import sys
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import FrameType

import torch

SETTINGS = json.loads(os.environ.get("DDP_CHECK", "{}"))
ENOUGH = 100_000  # events of a process; then only its end is noted
AT_THE_END = ("crash", "final", "exit", "watcher")
SAMPLED = 65_536  # a tensor with more elements is hashed by about half as many or more, evenly spread
OURS = os.path.dirname(os.path.dirname(__file__))
LIBRARIES = tuple({sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")})

descriptors: dict[int, int] = {}  # process id -> its open file: a forked process needs one of its own
n_events: Counter = Counter()


def log_file() -> int:
    pid = os.getpid()
    if pid not in descriptors:
        n_events.clear()
        descriptors[pid] = os.open(f"{SETTINGS['log']}/{pid}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        owner = os.environ.setdefault("DDP_CHECK_OWNER", str(pid))  # inherited: a worker's is its rank
        write({"kind": "process", "pid": pid, "owner": int(owner), "rank": os.environ.get("RANK")})
    return descriptors[pid]


def write(event: dict) -> None:
    os.write(log_file(), json.dumps(event).encode() + b"\n")


def emit(kind: str, *, loops: bool = False, at: list | None = None, **facts) -> None:
    """Write down an event. With `loops`, also what the names are that the `for` loops around it set."""
    log_file()
    n_events[kind] += 1
    if n_events.total() > ENOUGH and kind not in AT_THE_END:
        return
    event = {"kind": kind, **facts}
    frames = list(user_frames())
    if at or frames:
        event["at"] = at or [os.path.abspath(frames[0].f_code.co_filename), frames[0].f_lineno]
    if loops and (values := loop_values(frames)):
        event["loops"] = values
    write(event)


def safely(function: Callable | None, *args, **kwargs):
    """What `function` returns; what fails is noted, and never reaches the script: None."""
    if function is None:
        return None
    try:
        with torch._C.DisableTorchFunction():
            return function(*args, **kwargs)
    except Exception as error:
        with suppress(Exception):  # the log's disk may be full
            emit("watcher", error=f"{getattr(function, '__name__', function)}: {error!r}")
        return None


@functools.cache
def is_users(file: str) -> bool:
    """Whether `file` stands below the folder of the script, and is no library's."""
    path = os.path.abspath(file)
    below = [folder for folder in SETTINGS["user"] if path.startswith(folder + os.sep)]
    inside = [folder for folder in (*LIBRARIES, OURS) if path.startswith(folder + os.sep)]
    return not file.startswith("<") and bool(below) and not any(len(x) > len(max(below, key=len)) for x in inside)


def user_frames() -> Iterator[FrameType]:
    """Those of the user's code in which this thread is, the innermost first."""
    frame = sys._getframe(1)
    while frame:
        if is_users(frame.f_code.co_filename):
            yield frame
        frame = frame.f_back


def user_line() -> list | None:
    """[file, line] of the innermost one."""
    frame = next(user_frames(), None)
    return frame and [os.path.abspath(frame.f_code.co_filename), frame.f_lineno]


@functools.cache
def names_of_loops(file: str) -> dict[int, list[str]]:
    """For each line in the body of a `for`: the names that the loop sets."""
    names: dict[int, list[str]] = {}
    try:
        with open(file, encoding="utf-8") as text:
            tree = ast.parse(text.read())
    except (OSError, SyntaxError, ValueError):
        return names
    for loop in ast.walk(tree):
        if isinstance(loop, ast.For):
            for line in range(loop.body[0].lineno, loop.end_lineno + 1):
                names.setdefault(line, []).extend(x.id for x in ast.walk(loop.target) if isinstance(x, ast.Name))
    return names


def loop_values(frames: list[FrameType]) -> dict[str, int | str]:
    values: dict[str, int | str] = {}
    for frame in frames:
        for name in names_of_loops(frame.f_code.co_filename).get(frame.f_lineno, ()):
            value = frame.f_locals.get(name)
            if isinstance(value, int | str):
                values.setdefault(name, value)
    return values


def fingerprint(tensor: torch.Tensor | None) -> str | None:
    """Of a tensor's bytes: equal tensors have the same, others but once in four billion. "a part" of a sharded one."""
    if tensor is None or tensor.is_meta:
        return None
    if hasattr(tensor, "full_tensor"):
        return "a part"
    flat = (tensor.to_dense() if tensor.is_sparse else tensor).detach().reshape(-1)
    if flat.numel() > SAMPLED:
        flat = flat[:: flat.numel() // (SAMPLED // 2)]
    return format(zlib.crc32(flat.contiguous().cpu().view(torch.uint8).numpy()), "x")


def random_states(device: torch.device | None = None) -> list[int]:
    """Hashes of the states of the global generators: torch's (that of `device`), Python's, NumPy's if it is there."""
    on_gpu = device is not None and device.type == "cuda"
    state = torch.cuda.get_rng_state(device) if on_gpu else torch.get_rng_state()
    states = [state.numpy().tobytes(), repr(random.getstate()).encode()]
    if hasattr(numpy := sys.modules.get("numpy"), "random"):
        states.append(repr(numpy.random.get_state(legacy=False)["state"]).encode())
    return [zlib.crc32(state) for state in states]
