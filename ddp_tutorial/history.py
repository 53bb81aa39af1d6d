"""The record of a run: `history.jsonl`, one JSON object per epoch and line."""

import json
import os
import time
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from ddp_tutorial.console import UserError, announce, reason, warn
from ddp_tutorial.files import check_regular, lock, write_atomically

HISTORY = "history.jsonl"  # in --out
NUMBERS = ("epoch", "train_loss", "val_loss", "val_accuracy", "seconds", "world_size")  # of a line
HARDLY = 0.98  # of the loss of the class frequencies: a validation loss above it has learned next to nothing


class History:
    """Writes the history of a run into the folder `out`. What it has written is on the disk, whatever happens next."""

    def __init__(self, out: Path, writes: bool = True):
        """Make the folder and, if this process `writes`, lock it. Raises `UserError`.

        An earlier run's file stays until the first line.
        """
        self.path = out / HISTORY
        self.content = b""  # all lines of this run
        self.written = None  # the file as this object has left it; none yet
        self.start = time.perf_counter()
        try:
            out.mkdir(parents=True, exist_ok=True)
            if not os.access(out, os.W_OK | os.X_OK):
                raise OSError("it cannot be written to")
            self.lock = lock(out / "lock") if writes else None  # as long as this object lives
        except OSError as error:
            raise UserError(f"--out {out}: {reason(error)}: name a folder you can write to") from None

    def keep(self, n_epochs: int) -> None:
        """Go on after the first `n_epochs` of the file. Raises `UserError` if it has not got them."""
        epochs = []
        with suppress(OSError):
            epochs = read(self.path)[:n_epochs]
        if [line["epoch"] for line in epochs] != list(range(1, n_epochs + 1)):
            remedy = "put it back, or start without --resume"
            raise UserError(f"{self.path}: has not the {n_epochs} epochs of its checkpoint: {remedy}")
        self.content = "".join(json.dumps(line) + "\n" for line in epochs).encode()

    def append(self, epoch: int, sums: Tensor, val_sums: Tensor, world_size: int = 1) -> dict:
        """Add an epoch, from its sums over all samples: (2,) of `train_one_epoch` and (3,) of `evaluate`.

        Returns the line. Its seconds count from the line before, the first line's from the start of the run. Raises
        `UserError`, also if another process has written to the file: then nothing of the line stays.
        """
        train_loss, n_train = sums.tolist()
        val_loss, n_val, n_correct = val_sums.tolist()
        now = time.perf_counter()
        line = {
            "epoch": epoch,
            "train_loss": train_loss / n_train,
            "val_loss": val_loss / n_val,
            "val_accuracy": n_correct / n_val,
            "seconds": now - self.start,
            "world_size": world_size,
        }
        self.start = now
        try:
            self._write((json.dumps(line) + "\n").encode())
        except OSError as error:
            raise UserError(f"{self.path}: {reason(error)}: free the disk, or name another --out") from None
        return line

    def _write(self, line: bytes) -> None:
        present = identity(self.path)
        if self.written is None or present is None:  # the first line, or somebody has removed the file
            write_atomically(self.path, self.content + line)
        elif present == self.written:
            append_to_disk(self.path, line)
        else:  # not all disks have locks
            raise UserError(f"{self.path}: another run writes here as well: give each an --out of its own")
        self.content, self.written = self.content + line, identity(self.path)


def identity(path: Path) -> tuple[int, int] | None:
    """Which file has that name, and its bytes: another program's writing changes one of them. None if there is none."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_size


def append_to_disk(path: Path, line: bytes) -> None:
    """Add `line` to the file: all of it, on the disk, or nothing. Raises `OSError`."""
    with open(path, "ab", buffering=0) as file:
        before = file.tell()
        try:
            if file.write(line) < len(line):
                raise OSError("no space left on the disk")
            os.fsync(file.fileno())
        except OSError:
            file.truncate(before)
            raise


def report_epoch(line: dict, n_epochs: int, class_prior_loss: float) -> None:
    """Print a `line` of the history: the first, the last, and every tenth part of a run between them.

    A run that ends hardly better than the class frequencies, whose loss is `class_prior_loss`, gets a warning.
    """
    if line["epoch"] in (1, n_epochs) or line["epoch"] % max(1, n_epochs // 10) == 0:
        losses = "train loss {train_loss:.4f}  validation loss {val_loss:.4f}  accuracy {val_accuracy:.4f}"
        announce(f"epoch {line['epoch']:3}  " + losses.format(**line))
    if line["epoch"] == n_epochs and line["val_loss"] > HARDLY * class_prior_loss:
        warn(
            f"a validation loss of {line['val_loss']:.4f} is hardly better than guessing by how frequent each class is "
            f"({class_prior_loss:.4f}): look for outliers in X, labels that belong to other rows, too few steps, "
            "features that float32 cannot tell apart, or classes that no linear model can"
        )


def check_finite(epoch: int, *sums: Tensor, step: int | None = None) -> None:
    """Raise `UserError` if one of the summed losses is not finite; `step` is the first such step, if known."""
    if not all(values.isfinite().all() for values in sums):
        place = f"epoch {epoch}" + (f", step {step}" if step else "")
        raise UserError(f"{place}: the loss is not finite, most likely because steps are too large: use a smaller --lr")


def read(path: str | Path) -> list[dict]:
    """The epochs of a `history.jsonl`, or of the folder's, up to a line that is not `History`'s. Raises `OSError`."""
    path = Path(path, HISTORY) if Path(path).is_dir() else Path(path)
    check_regular(path)
    epochs = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            epoch = json.loads(line)
            if not all(type(epoch[name]) in (int, float) for name in NUMBERS):
                break
        except (ValueError, TypeError, KeyError, RecursionError):
            break
        epochs.append(epoch)
    return epochs
