"""Checkpoints that are whole, and are known to be."""

import hashlib
import io
import os
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ddp_tutorial.console import UserError, reason, say
from ddp_tutorial.files import check_regular, write_atomically

CHECKSUM = hashlib.sha256  # torch.load does not look at the checksums that its zip archive has
CHECKSUM_SIZE = CHECKSUM().digest_size  # bytes, at the end of the file, which torch.load overlooks
NO_SUMS = torch.zeros(2, dtype=torch.float64)  # of an epoch that has not begun
UNNAMED = "none"  # torchrun's own word for a launch without a name


class CheckpointError(UserError):
    """A checkpoint cannot be read, written or used."""


def launch() -> str:
    """The name that torchrun has given to this launch."""
    return os.environ.get("TORCHELASTIC_RUN_ID", UNNAMED)


def previous(path: Path) -> Path:
    """Where `save` keeps the file that it replaces."""
    return path.with_suffix(".previous" + path.suffix)


def set_aside(path: Path) -> None:
    """Rename an earlier run's checkpoint, so that `read` does not find it. Raises `CheckpointError`."""
    try:
        for file in (previous(path), path):  # the newest comes last, and stays
            if file.exists():
                os.replace(file, path.with_suffix(".earlier" + path.suffix))
    except OSError as error:
        raise CheckpointError(f"{file}: {reason(error)}: move it, or name another --out") from None


def save(
    path: Path, model: nn.Module, optimizer: Optimizer, epoch: int, sums: Tensor = NO_SUMS, settings: dict | None = None
) -> None:
    """Write everything that training needs to go on, and a checksum; keep the old file as `previous(path)`.

    `epoch` counts the finished epochs; `sums`, (2,) float64, are the sums over all ranks of what `train_one_epoch`
    has returned in the next one, if that has begun. `settings` maps what a resumed run must not change to plain values.
    Pass the plain model. Of the random numbers it keeps the CPU's. Raises `CheckpointError`, also for infinite weights.
    """
    if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
        raise CheckpointError(f"{path}: not written, for a weight is not finite: use a smaller --lr")
    state = {
        "epoch": epoch,
        "sums": sums,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "settings": describe(model, optimizer, settings),
        "launch": launch(),
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    try:
        write_atomically(path, content + CHECKSUM(content).digest(), keep=previous(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({reason(error)}): mend it, or name another --out") from None


def describe(model: nn.Module, optimizer: Optimizer, settings: dict | None) -> dict:
    """What a checkpoint and the run that goes on from it must have in common."""
    shapes = {f"{name} of shape": tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return (settings or {}) | shapes | {"optimizer": type(optimizer).__name__}


def outline(value):
    """The types and shapes in nested dictionaries and lists."""
    if isinstance(value, dict):
        return {key: outline(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [outline(inner) for inner in value]
    if isinstance(value, Tensor):
        has_all = value.untyped_storage().nbytes() >= value.nbytes  # an expanded one has not
        return tuple(value.shape), value.dtype, value.layout, value.is_meta, has_all
    return type(value)


def check_state(state: dict, model: nn.Module, optimizer: Optimizer) -> None:
    """Raise `ValueError` unless a `state` is one that `save` writes for such a model and such an optimizer."""
    epoch, sums = state["epoch"], state["sums"]
    if type(epoch) is not int or epoch < 0:
        raise ValueError(f"its epoch is {epoch!r}")
    if outline(sums) != outline(NO_SUMS) or not sums.isfinite().all() or not 0 <= sums[1] < 2**53:
        raise ValueError("its sums are not those of an epoch")
    if outline(state["model"]) != outline(model.state_dict()):
        raise ValueError("its weights are of other types")
    groups, values_of = map(dict(state["optimizer"]).get, ("param_groups", "state"))
    if any(not 0 < group["lr"] < 1e38 for group in groups):  # a schedule may have changed it
        raise ValueError("its learning rate is out of range")
    mine = optimizer.state_dict()["param_groups"]
    was, now = ([dict(group) | {"lr": type(group["lr"])} for group in those] for those in (groups, mine))
    if was != now:
        raise ValueError("its optimizer has other options")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for i, values in values_of.items():
        weight = parameters[i].data
        if outline(values.get("momentum_buffer", weight)) != outline(weight):  # SGD's; what others keep varies
            raise ValueError("its optimizer is in another state")


def read(path: Path) -> tuple[Path, dict] | None:
    """The newest whole checkpoint, `path` or `previous(path)`: its file and its state; None if there is neither.

    Only tensors and plain values are read (`weights_only=True`): a checkpoint cannot run code.
    Says so if `path` is damaged; raises `CheckpointError` if neither is whole.
    """
    damage = None
    for file in (path, previous(path)):
        try:
            check_regular(file)
            content = file.read_bytes()
            if CHECKSUM(content[:-CHECKSUM_SIZE]).digest() != content[-CHECKSUM_SIZE:]:
                raise ValueError("its checksum is wrong")
            with warnings.catch_warnings(action="ignore"):  # torch's, about tensors of other kinds than ours
                state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            if not isinstance(state, dict) or "launch" not in state:
                raise ValueError("it is not a checkpoint of this package")
        except (FileNotFoundError, NotADirectoryError):
            continue
        except Exception as error:  # torch raises many kinds
            damage = damage or f"{file}: damaged ({reason(error)})"
        else:
            if damage:
                say(f"{damage}: {file.name} is whole", file=sys.stderr)
            return file, state
    if damage:
        raise CheckpointError(f"{damage}: put a copy back, or start without --resume")
    return None


def find(path: Path, resume: bool, restarted: bool) -> tuple[Path, dict] | None:
    """What a run at `path` goes on from: what `read` finds, if it shall `resume` or the same launch has saved it.

    Else None, and an earlier run's checkpoint gets another name: no restart goes on from it. A launch may have no name:
    then only a `restarted` group goes on unasked. Raises `CheckpointError`, also if there is nothing to `resume`.
    """
    try:
        found = read(path)
    except CheckpointError:
        if resume or restarted:
            raise
        found = None
    if resume and found is None:
        raise CheckpointError(f"{path}: there is no checkpoint to resume: start without --resume")
    of_this_launch = found and found[1]["launch"] == launch() and (restarted or launch() != UNNAMED)
    return found if resume or of_this_launch else set_aside(path)


def restore(
    found: tuple[Path, dict] | None, model: nn.Module, optimizer: Optimizer, settings: dict | None = None
) -> tuple[int, Tensor]:
    """Put a state that `find` or `read` has found, if any, into `model`, `optimizer` and torch's random numbers.

    Returns `epoch` and `sums`, as `save` got them. Raises `CheckpointError` if settings, model or optimizer differ.
    """
    if found is None:
        return 0, NO_SUMS
    file, state = found
    try:
        was, now = state["settings"], describe(model, optimizer, settings)
        differs = [f"{key} {was.get(key)}, not {now.get(key)}" for key in now | was if was.get(key) != now.get(key)]
        if not differs:
            with warnings.catch_warnings(action="ignore"):
                check_state(state, model, optimizer)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["rng"])
            epoch, sums = state["epoch"], state["sums"]
            say(f"{file}: going on after epoch {epoch}" + f" and {sums[1]:,.0f} samples" * bool(sums[1]))
            return epoch, sums
    except Exception as error:  # a whole file of something else
        differs = [f"something else ({reason(error)})"]
    raise CheckpointError(f"{file}: made with {differs[0]}: resume with the same, or start without --resume")


def load(path: Path, model: nn.Module, optimizer: Optimizer, settings: dict | None = None) -> tuple[int, Tensor]:
    """What a run in one process does to resume: `find` and `restore`. Raises `CheckpointError`."""
    return restore(find(path, resume=True, restarted=False), model, optimizer, settings)
