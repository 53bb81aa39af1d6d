"""Files that a rank writes, and what it downloads."""

import os

from torch import nn

from ddp_tutorial.check.watch.record import OURS, SETTINGS, emit, safely, user_line

NOT_FILES = ("/dev/", "/proc/", "/sys/")
TEMPORARY = os.path.realpath(os.environ.get("TMPDIR", "/tmp")) + os.sep  # the doctor's
WRITES = os.O_WRONLY | os.O_RDWR


def saves(thing, file, *args, **kwargs) -> None:
    """`torch.save`."""
    path = file if isinstance(file, str | os.PathLike) else getattr(file, "name", None)
    states = [thing, *(thing.values() if isinstance(thing, dict) else ())]
    names = [str(name) for state in states if isinstance(state, dict) for name in state]
    prefixed = any(name.startswith("module.") or ".module." in name for name in names)
    whole = isinstance(thing, nn.parallel.DistributedDataParallel)
    known = isinstance(path, str | os.PathLike)
    emit("save", path=os.path.realpath(path) if known else None, prefixed=prefixed, whole=whole)


def opened(path: str, flags: int) -> None:
    full = os.path.realpath(path)
    others = (SETTINGS["log"] + os.sep, TEMPORARY, OURS + os.sep, *NOT_FILES)
    if full.startswith(others) or "__pycache__" in full or os.path.isdir(full):
        return
    if line := user_line():  # what a library writes by itself is its own affair
        emit("write", path=full, append=bool(flags & os.O_APPEND), at=line)


def audit(event: str, arguments: tuple) -> None:
    """A hook of Python itself, which sees each file that is opened."""
    if event == "open":
        path, _, flags = arguments
        if isinstance(path, str) and flags and flags & WRITES:
            safely(opened, path, flags)
    elif event == "urllib.Request":
        safely(emit, "download", url=str(arguments[0]))
