"""Checkpoints that are whole, and are known to be."""

import copy
import hashlib
import io
import operator
import os
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ddp_tutorial.console import UserError, announce, reason, warn
from ddp_tutorial.files import check_regular, write_atomically
from ddp_tutorial.history import HISTORY

CHECKSUM = hashlib.sha256  # torch.load does not look at the checksums that its zip archive has
CHECKSUM_SIZE = CHECKSUM().digest_size  # bytes, at the end of the file, which torch.load overlooks
NO_SUMS = torch.zeros(2, dtype=torch.float64)  # of an epoch that has not begun
UNNAMED = "none"  # torchrun's own word for a launch without a name
LR, NEW_LR = "--lr", "--new-lr"  # what a resumed run may change on purpose, and the flag that says so


class CheckpointError(UserError):
    """A checkpoint cannot be read, written or used."""


def launch() -> str:
    """The name that torchrun has given to this launch."""
    return os.environ.get("TORCHELASTIC_RUN_ID", UNNAMED)


def previous(path: Path) -> Path:
    """Where `save` keeps the file that it replaces."""
    return path.with_suffix(".previous" + path.suffix)


def earlier(path: Path) -> Path:
    """What a file of an earlier run is renamed to."""
    return path.with_suffix(".earlier" + path.suffix)


def set_aside(path: Path) -> None:
    """Rename an earlier run's checkpoint, so that `read` does not find it, and the history beside it; say so.

    Renamed back, the two can be resumed. Raises `CheckpointError`.
    """
    checkpoints = [file for file in (previous(path), path) if file.exists()]  # the newest comes last, and stays
    if not checkpoints:
        return
    history = path.with_name(HISTORY)
    renamed = [(history, earlier(history))] * history.exists()  # first: if killed in between, the next start goes on
    renamed += [(file, earlier(path)) for file in checkpoints]
    before = " in the place of one before" if earlier(path).exists() else ""
    try:
        for file, kept in renamed:
            os.replace(file, kept)
    except OSError as error:
        raise CheckpointError(f"{file}: {reason(error)}: move it, or name another --out") from None
    names = " and ".join(dict.fromkeys(kept.name for _, kept in renamed))
    announce(f"{path.parent}: an earlier run is kept as {names}{before}: to --resume it, rename them back")


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
                warn(f"{damage}: {file.name} is whole")
            return file, state
    if damage:
        raise CheckpointError(f"{damage}: put a copy back, or start without --resume")
    return None


def find(path: Path, resume: bool, restarted: bool) -> tuple[Path, dict] | None:
    """What a run at `path` goes on from: what `read` finds, if it shall `resume` or the same launch has saved it.

    Else None: what is there is an earlier run's, for `set_aside`. A launch may have no name: then only a `restarted`
    group goes on unasked. Raises `CheckpointError`, also if there is nothing to `resume`.
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
    return found if resume or of_this_launch else None


def restore(
    found: tuple[Path, dict] | None,
    model: nn.Module,
    optimizer: Optimizer,
    settings: dict | None = None,
    keep_lr: bool = False,
) -> tuple[int, Tensor]:
    """Put a state that `find` or `read` has found, if any, into `model`, `optimizer` and torch's random numbers.

    With `keep_lr` the optimizer keeps its learning rates: they may be others than those of the checkpoint. Returns
    `epoch` and `sums`, as `save` got them. Raises `CheckpointError` if settings, model or optimizer differ.
    """
    if found is None:
        return 0, NO_SUMS
    file, state = found
    try:
        was, now = state["settings"], describe(model, optimizer, settings)
        differing = [key for key in now | was if was.get(key) != now.get(key) and not (keep_lr and key == LR)]
        differs = [f"{key} {was.get(key)}, not {now.get(key)}" for key in differing]
        if not differs:
            return put_back(file, state, model, optimizer, keep_lr)
    except Exception as error:  # a whole file of something else: torch raises many kinds
        differing, differs = [], [f"something else ({reason(error)})"]
    on_purpose = f", add {NEW_LR} if it is meant" * (differing[:1] == [LR])
    remedy = f"resume with the same{on_purpose}, or start without --resume"
    raise CheckpointError(f"{file}: made with {differs[0]}: {remedy}")


def put_back(
    file: Path, state: dict, model: nn.Module, optimizer: Optimizer, keep_lr: bool = False
) -> tuple[int, Tensor]:
    """Load a `state` of `save`; raises whatever torch does where model or optimizer cannot take it."""
    rates = [group["lr"] for group in optimizer.param_groups]
    with warnings.catch_warnings(action="ignore"):  # torch's, about tensors of other kinds than ours
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        for group, rate in zip(optimizer.param_groups, rates if keep_lr else (), strict=keep_lr):
            group["lr"] = rate
        try_step(optimizer)
        torch.set_rng_state(state["rng"])
        epoch, sums = operator.index(state["epoch"]), NO_SUMS.clone().copy_(state["sums"])
    if epoch < 0 or not 0 <= sums[1] < 2**53:
        raise ValueError("no epoch has such a number, or so many samples")
    announce(f"{file}: going on after epoch {epoch}" + f" and {sums[1]:,.0f} samples" * bool(sums[1]))
    return epoch, sums


def try_step(optimizer: Optimizer) -> None:
    """A step of a copy, of weights too, without gradients: torch looks at a loaded state only in the next step."""
    twin = copy.deepcopy(optimizer)
    for group in twin.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    twin.step()


def load(path: Path, model: nn.Module, optimizer: Optimizer, settings: dict | None = None) -> tuple[int, Tensor]:
    """What a run in one process does to resume: `find` and `restore`. Raises `CheckpointError`."""
    return restore(find(path, resume=True, restarted=False), model, optimizer, settings)
