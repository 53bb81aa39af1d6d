"""A checkpoint that is on the disk whole, or not at all."""

import os
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from ddp_tutorial.cli import UserError


class CheckpointError(UserError):
    """A checkpoint cannot be read, written or used."""


def previous(path: Path) -> Path:
    """Where `save` keeps the file that it replaces."""
    return path.with_suffix(".previous" + path.suffix)


def exists(path: Path) -> bool:
    """Whether there is anything to `load`."""
    return path.exists() or previous(path).exists()


def discard(path: Path) -> None:
    """Remove what there is to `load`. Raises `CheckpointError`."""
    for file in (path, previous(path)):
        try:
            file.unlink(missing_ok=True)
        except NotADirectoryError:
            pass  # nor is there a checkpoint
        except OSError as error:
            raise CheckpointError(f"{file}: {error.strerror or error}: remove it, or name another --out") from None


def save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> None:
    """Write everything that training needs to go on after `epoch`; keep the old file as `previous(path)`.

    Pass the plain model, so that no `module.` stands before the names. The bytes go to a temporary
    file in the same folder, are flushed to the disk and get their name by a rename: a process killed
    at any moment leaves a whole file under `path` or `previous(path)`. Raises `CheckpointError`.
    """
    state = {
        "epoch": epoch,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
    }
    temporary = path.with_suffix(".writing" + path.suffix)
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            os.replace(path, previous(path))
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        with suppress(OSError):
            temporary.unlink()
        raise CheckpointError(
            f"{path}: cannot be written ({reason(error)}): free the disk, or name another --out"
        ) from None


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Put the state of `path`, or of `previous(path)` if there is none, into `model` and `optimizer`.

    Returns the last epoch that was finished. Only tensors and plain values are read
    (`weights_only=True`): a checkpoint cannot run code. Raises `CheckpointError`.
    """
    found = path if path.exists() else previous(path)
    try:
        state = torch.load(found, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        return int(state["epoch"])
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no checkpoint to resume: start without --resume") from None
    except Exception as error:  # torch raises many kinds for a damaged file, and for that of another model
        raise CheckpointError(f"{found}: cannot be resumed ({reason(error)}): start without --resume") from None


def reason(error: Exception) -> str:
    """The last line of what `error` says."""
    return (getattr(error, "strerror", None) or str(error).strip() or type(error).__name__).splitlines()[-1].strip()
