"""Files that are on the disk whole, or not at all."""

import fcntl
import io
import os
import stat
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from ddp_tutorial.console import UserError, reason


def check_regular(path: Path) -> None:
    """Raise `OSError` unless `path` is a file that has an end: a pipe would be waited for, a device read for ever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("this is not a file")


def lock(path: Path) -> io.IOBase:
    """A file that no other process can lock while it is open here; the lock of a process that dies is gone.

    Some disks have no locks: nothing is locked there. Raises `UserError`, which names the process that has the lock.
    """
    file = open(path, "a+")
    with suppress(OSError):  # no lock, or no room for the name
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            first = path.read_text().strip() or "another process"
            raise UserError(f"--out {path.parent}: {first} trains there: end it first, or name another --out") from None
        file.truncate(0)
        print(f"process {os.getpid()} on {os.uname().nodename}", file=file, flush=True)
    return file


def write_atomically(path: Path, content: bytes, keep: Path | None = None) -> None:
    """Put `content` under the name `path`; rename the file that it replaces to `keep`.

    A temporary file in the same folder gets the bytes, then the name: a process killed at any moment leaves a whole
    file under `path` or `keep`. Raises `OSError`.
    """
    temporary = path.with_suffix(".writing" + path.suffix)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


def save_model(path: Path, model: nn.Module) -> None:
    """Write `model`'s weights and buffers, for `model.load_state_dict(torch.load(path, weights_only=True))`.

    Pass the plain model, so that no `module.` stands before the names. Raises `UserError`.
    """
    buffer = io.BytesIO()
    torch.save({name: tensor.cpu() for name, tensor in model.state_dict().items()}, buffer)  # loads without a GPU, too
    try:
        write_atomically(path, buffer.getvalue())
    except OSError as error:
        raise UserError(f"{path}: {reason(error)}: free the disk, or name another --out") from None
