"""The record of a run: `history.jsonl`, one JSON object per epoch and line."""

import json
from pathlib import Path

from ddp_tutorial.cli import UserError


class History:
    """Writes the history of a run of `n_epochs` and prints every tenth part of it."""

    def __init__(self, path: Path, n_epochs: int, keep_epochs: int = 0):
        """Start the file afresh, or with the lines of its first `keep_epochs` epochs. Raises `UserError`."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = [line for line in read(path) if line["epoch"] <= keep_epochs] if keep_epochs else []
            path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        except FileNotFoundError:
            raise UserError(f"{path}: missing beside its checkpoint: put it back, or start without --resume") from None
        except OSError as error:
            raise UserError(f"--out {path.parent}: {error.strerror or error}: name a folder you can write to") from None
        self.path, self.n_epochs = path, n_epochs

    def append(self, line: dict) -> None:
        """Add an epoch: `epoch, train_loss, val_loss, val_accuracy, seconds, world_size`. Raises `UserError`."""
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror or error}: free the disk, or name another --out") from None
        if line["epoch"] in (1, self.n_epochs) or line["epoch"] % max(1, self.n_epochs // 10) == 0:
            text = "epoch {epoch:3}  train loss {train_loss:.4f}  validation loss {val_loss:.4f}  accuracy {val_accuracy:.4f}"
            print(text.format(**line), flush=True)


def read(path: str | Path) -> list[dict]:
    """The epochs of a `history.jsonl`, or of the one in the folder `path`, oldest first.

    A last line that was cut short is left out.
    """
    path = Path(path)
    epochs = []
    for line in (path / "history.jsonl" if path.is_dir() else path).read_text().splitlines():
        try:
            epochs.append(json.loads(line))
        except ValueError:
            break
    return epochs
