"""The record of a run: `history.jsonl`, one JSON object per epoch and line."""

import json
import math
import os
from pathlib import Path

from torch import Tensor

from ddp_tutorial.cli import UserError, reason
from ddp_tutorial.files import check_regular, write_atomically

NUMBERS = ("epoch", "train_loss", "val_loss", "val_accuracy", "seconds", "world_size")  # of a line


class History:
    """Writes the history of a run of `n_epochs` and prints every tenth part of it."""

    def __init__(self, path: Path, n_epochs: int, keep_epochs: int = 0):
        """Start the file afresh, or with the lines of its first `keep_epochs` epochs. Raises `UserError`."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = read(path)[:keep_epochs] if keep_epochs and path.exists() else []
            if len(kept) < keep_epochs or any(line["epoch"] != i for i, line in enumerate(kept, 1)):
                raise UserError(
                    f"{path}: has not the {keep_epochs} epochs of its checkpoint: put it back, or start without --resume"
                )
            write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        except OSError as error:
            raise UserError(f"--out {path.parent}: {reason(error)}: name a folder you can write to") from None
        self.path, self.n_epochs = path, n_epochs

    def append(self, line: dict) -> None:
        """Add an epoch, which has `NUMBERS`: a float or an int each. Raises `UserError`.

        The line is on the disk when this returns. Of a line that the disk has no room for, nothing stays.
        """
        try:
            with open(self.path, "ab", buffering=0) as file:
                end = file.tell()
                try:
                    if file.write(text := (json.dumps(line) + "\n").encode()) < len(text):
                        raise OSError("the disk took half of a line")
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(end)
                    raise
        except OSError as error:
            raise UserError(f"{self.path}: {reason(error)}: free the disk, or name another --out") from None
        if line["epoch"] in (1, self.n_epochs) or line["epoch"] % max(1, self.n_epochs // 10) == 0:
            text = "epoch {epoch:3}  train loss {train_loss:.4f}  validation loss {val_loss:.4f}  accuracy {val_accuracy:.4f}"
            print(text.format(**line), flush=True)


def epoch_line(epoch: int, table: Tensor, batch_size: int, seconds: float) -> dict:
    """The line of an epoch, from `table`, (ranks, 5) float64.

    A row holds a rank's sums: `train_one_epoch`'s two, then `evaluate`'s three. They are added first and
    divided then, so that the means are exact however the samples are shared. Raises `UserError` if a loss
    is not finite; `batch_size`, a rank's, tells the step.
    """
    train_loss, n_train, val_loss, n_correct, n_val = table.sum(dim=0).tolist()
    if not math.isfinite(train_loss + val_loss):
        where = f"epoch {epoch}"
        if not math.isfinite(train_loss):
            where += f", step {round(table[:, 1].min().item()) // batch_size + 1}"
        raise UserError(f"{where}: the loss is not finite, most likely because steps are too large: use a smaller --lr")
    means = {"train_loss": train_loss / n_train, "val_loss": val_loss / n_val, "val_accuracy": n_correct / n_val}
    return {"epoch": epoch} | means | {"seconds": seconds, "world_size": len(table)}


def read(path: str | Path) -> list[dict]:
    """The epochs of a `history.jsonl`, or of the one in the folder `path`, oldest first.

    They end before the first line that is cut short or is not one of `History`'s. Raises `OSError`.
    """
    path = Path(path)
    path = path / "history.jsonl" if path.is_dir() else path
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
