"""Files that a rank writes, and what it downloads."""

import fcntl
import os
import shutil

from torch import nn

from ddp_tutorial.check.watch.record import OURS, SETTINGS, emit, safely, user_line

NOT_FILES = ("/dev/", "/proc/", "/sys/")
TEMPORARY = os.path.realpath(os.environ.get("TMPDIR", "/tmp")) + os.sep  # the doctor's
WRITES = os.O_WRONLY | os.O_RDWR
CHANGES = ("os.truncate", "os.chmod", "os.utime", "sqlite3.connect")  # of a file, by its path


def unlink_original(path: str, flags: int = 0) -> None:
    """Before a write: a link in the copy of the user's folder becomes a file of the copy's own."""
    if not os.path.islink(path) or flags & os.O_EXCL:
        return
    link = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    copy = SETTINGS["copy"] + os.sep
    if not link.startswith(copy) or os.path.realpath(link).startswith(copy):
        return
    with open(f"{SETTINGS['log']}/copying", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # what another rank has begun to write must not be replaced
        if os.path.islink(link):
            replace_link(link, flags)


def replace_link(link: str, flags: int) -> None:
    if not os.path.exists(link):
        os.unlink(link)
    elif os.path.isfile(link):
        new = f"{SETTINGS['log']}/{os.getpid()}.copied"
        open(new, "w").close() if flags & os.O_TRUNC else shutil.copyfile(link, new)
        shutil.copymode(link, new)
        os.replace(new, link)


def saves(thing, file, *args, **kwargs) -> None:
    """`torch.save`."""
    path = file if isinstance(file, str | os.PathLike) else getattr(file, "name", None)
    states = [thing, *(thing.values() if isinstance(thing, dict) else ())]
    names = [str(name) for state in states if isinstance(state, dict) for name in state]
    prefixed = any(name.startswith("module.") or ".module." in name for name in names)
    whole = isinstance(thing, nn.parallel.DistributedDataParallel)
    known = isinstance(path, str | os.PathLike)
    if known:  # torch's own writer opens it past Python
        safely(unlink_original, os.fspath(path), os.O_TRUNC)
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
        if isinstance(path, str | bytes) and flags and flags & WRITES:
            safely(unlink_original, os.fsdecode(path), flags)
            safely(opened, os.fsdecode(path), flags)
    elif event in CHANGES and isinstance(arguments[0], str | bytes):
        safely(unlink_original, os.fsdecode(arguments[0]))
    elif event == "urllib.Request":
        safely(emit, "download", url=str(arguments[0]))
