"""Collectives that the script calls, and what becomes of gathered tensors."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ddp_tutorial.check.watch.record import emit, user_line

gathered: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensor without the gradient that its source has -> line


def tensors_in(values) -> list[Tensor]:
    flat = [x for value in values for x in (value if isinstance(value, list | tuple) else [value])]
    return [x for x in flat if isinstance(x, Tensor)]


def is_whole(group) -> bool:
    """Whether all ranks are in it."""
    return group is None or dist.get_world_size(group) == dist.get_world_size()


def called(name: str):
    def before(*args, group=None, **kwargs) -> None:
        tensors = tensors_in((*args, *kwargs.values()))
        shapes = [list(t.shape) for t in tensors[-1:]]
        emit(
            "call",
            loops=True,
            name=name,
            shapes=shapes,
            dtype=str(tensors[-1].dtype) if tensors else None,
            whole=is_whole(group),
        )

    return before


def point_to_point(*args, **kwargs) -> None:
    emit("p2p")


def joins(join) -> None:
    emit("join")


def has_gathered(result, rows, tensor=None, *args, **kwargs) -> None:
    if isinstance(tensor, Tensor) and tensor.requires_grad and torch.is_grad_enabled():
        for row in rows:
            gathered[row] = user_line()


def used(function, arguments, result) -> None:
    """Follow what is computed from gathered tensors, up to where it meets what has a gradient."""
    if not gathered or not isinstance(result, Tensor):
        return
    for tensor in tensors_in(arguments):
        if tensor in gathered and tensor is not result:
            if not result.requires_grad:
                gathered[result] = gathered[tensor]
            elif getattr(function, "__name__", "") != "__setitem__":
                emit("cut_gradient", at=gathered[tensor])
