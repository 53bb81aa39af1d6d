"""A folder of `.npy` files that appear under their names only when all of them are whole."""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

FILES = ("X_train.npy", "y_train.npy", "X_val.npy", "y_val.npy", "meta.json")
PARTIAL = ".partial-"


class OutputError(Exception):
    """The data cannot be written; the message is one line for the user."""


class Output:
    """Collects files in a hidden folder inside `out`, on the same file system, so that a rename is atomic."""

    def __init__(self, out: Path, partial: Path):
        self.out = out
        self.partial = partial

    def reserve(self, n_bytes: int) -> None:
        """Raise `OutputError` unless `n_bytes` fit on the disk.

        Writing through a memory map to a full disk kills the process with SIGBUS, so ask first.
        """
        free = shutil.disk_usage(self.partial).free
        if n_bytes > free:
            raise OutputError(
                f"--out {self.out}: {n_bytes / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free:"
                " ask for fewer samples or features"
            )

    def array(self, name: str, shape: tuple[int, ...], dtype: type) -> np.memmap:
        """A new array on disk, mapped for writing. It is larger than memory if need be."""
        return np.lib.format.open_memmap(self.partial / name, mode="w+", dtype=dtype, shape=shape)

    def write_meta(self, meta: dict) -> None:
        (self.partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


@contextmanager
def one_at_a_time(out: Path) -> Iterator[None]:
    """Make the folder `out`, and wait until no other process that calls this for it is in here.

    Some disks have no locks: nobody waits there. Raises `OutputError`.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        folder = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise OutputError(f"--out {out}: {error.strerror or error}") from error
    try:
        with suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_EX)  # gone with the process
        yield
    finally:
        os.close(folder)


@contextmanager
def open_output(out: Path, replace: bool) -> Iterator[Output]:
    """Give an `Output`; on success move its files into `out`, on any error remove them. Be in `one_at_a_time`.

    Raises `OutputError` if `out` is not empty and `replace` is false, or if the disk refuses.
    """
    partial = None
    try:
        left_over = list(out.glob(PARTIAL + "*"))
        if not replace and len(list(out.iterdir())) > len(left_over):
            raise OutputError(f"--out {out} is not empty: name another folder, or replace its data with --force")
        for folder in left_over:  # of a run that was killed
            shutil.rmtree(folder)
        partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=out))
        yield Output(out, partial)
        (out / "meta.json").unlink(missing_ok=True)  # so that no meta.json ever describes other arrays
        for name in FILES:  # meta.json comes last
            os.replace(partial / name, out / name)
    except OSError as error:
        raise OutputError(f"--out {out}: {error.strerror or error}") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
