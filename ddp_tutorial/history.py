"""The record of a run: `history.jsonl`, one JSON object per epoch and line."""

import json
import math
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from ddp_tutorial.console import UserError, is_first_rank, reason, say
from ddp_tutorial.files import check_regular, lock, write_atomically

NUMBERS = ("epoch", "train_loss", "val_loss", "val_accuracy", "seconds", "world_size")  # of a line


class History:
    """Writes the history of a run of `n_epochs` into the folder `out`, and prints every tenth part of it.

    `chance` is the validation loss of guessing (see `data.guessing_loss`): a run that ends hardly better is told so.
    """

    def __init__(self, out: Path, n_epochs: int, chance: float = math.inf):
        """Make the folder, and lock it; an earlier run's file stays until the first line. Raises `UserError`."""
        self.path, self.n_epochs, self.chance = out / "history.jsonl", n_epochs, chance
        self.content, self.begun, self.start = b"", False, time.perf_counter()
        try:
            out.mkdir(parents=True, exist_ok=True)
            if not os.access(out, os.W_OK | os.X_OK):
                raise OSError("it cannot be written to")
            self.lock = lock(out / "lock") if is_first_rank() else None  # as long as this object lives
        except OSError as error:
            raise UserError(f"--out {out}: {reason(error)}: name a folder you can write to") from None

    def keep(self, n_epochs: int) -> None:
        """Go on after the first `n_epochs` of the file. Raises `UserError` if it has not got them."""
        epochs = []
        with suppress(OSError):
            epochs = read(self.path)[:n_epochs]
        if [line["epoch"] for line in epochs] != list(range(1, n_epochs + 1)):
            raise UserError(f"{self.path}: has not the {n_epochs} epochs of its checkpoint: put it back, or start without --resume")  # fmt: skip
        self.content = "".join(json.dumps(line) + "\n" for line in epochs).encode()

    def append(self, epoch: int, sums: Tensor, val_sums: Tensor, world_size: int = 1) -> None:
        """Add an epoch: its sums over all ranks, (2,) of `train_one_epoch` and (3,) of `evaluate`.

        Its seconds count from the line before, the first line's from the start of the run. The line is on the disk when
        this returns. Raises `UserError`, also if another process has written to the file: then nothing of the line stays.
        """
        (train_loss, n_train), (val_loss, n_correct, n_val) = sums.tolist(), val_sums.tolist()
        line = {"epoch": epoch, "train_loss": train_loss / n_train, "val_loss": val_loss / n_val}
        now = time.perf_counter()
        line |= {"val_accuracy": n_correct / n_val, "seconds": now - self.start, "world_size": world_size}
        content, self.start = self.content + (json.dumps(line) + "\n").encode(), now
        try:
            if self.begun and self.path.exists() and self.path.read_bytes() != self.content:  # not all disks have locks
                raise UserError(f"{self.path}: another run writes here as well: give each an --out of its own")
            write_atomically(self.path, content)
        except OSError as error:
            raise UserError(f"{self.path}: {reason(error)}: free the disk, or name another --out") from None
        self.content, self.begun = content, True
        if epoch in (1, self.n_epochs) or epoch % max(1, self.n_epochs // 10) == 0:
            print("epoch {epoch:3}  train loss {train_loss:.4f}  validation loss {val_loss:.4f}  accuracy {val_accuracy:.4f}".format(**line), flush=True)  # fmt: skip
        if epoch == self.n_epochs and line["val_loss"] > 0.98 * self.chance:
            say(f"warning: a validation loss of {line['val_loss']:.4f} is hardly better than guessing ({self.chance:.4f}): look for outliers in X, labels that belong to other rows, or too few steps", sys.stderr)  # fmt: skip


def check_finite(epoch: int, sums: Tensor, step: int | None = None) -> None:
    """Raise `UserError` if one of the summed losses is not finite; `step` is the first such step, if known."""
    if not sums.isfinite().all():
        where = f"epoch {epoch}" + (f", step {step}" if step else "")
        raise UserError(f"{where}: the loss is not finite, most likely because steps are too large: use a smaller --lr")


def read(path: str | Path) -> list[dict]:
    """The epochs of a `history.jsonl`, or of the folder's, up to a line that is not `History`'s. Raises `OSError`."""
    path = Path(path, "history.jsonl") if Path(path).is_dir() else Path(path)
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
