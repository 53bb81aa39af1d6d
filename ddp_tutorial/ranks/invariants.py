"""Checks for a training script. All ranks make a check at the same place, and all raise `AssertionError`, or none.

A check is a collective: between ranks that are out of step it meets another call, and finds nothing. So the check of
the step stands at every exchange, and the others may stand at some of them.
"""

import hashlib
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddp_tutorial.ranks.exchange import all_gather


def same_values(**values: object) -> None:
    """Raise unless all ranks have the same: `same_values(step=step, loss=reduced.item())`. A NaN is never the same."""
    ranks = [{}] * dist.get_world_size()
    dist.all_gather_object(ranks, values)
    for name in sorted(set().union(*ranks)):
        found = [rank.get(name) for rank in ranks]
        if any(value != found[0] for value in found):
            raise AssertionError(f"{name} is not the same on all ranks: {' | '.join(map(str, found))}")


def fingerprint(tensor: Tensor | None) -> str | None:
    """Eight bytes in hexadecimal that another bit anywhere in `tensor` would change. None for None: no gradient."""
    if tensor is not None:
        values = tensor.detach().cpu().reshape(-1).view(torch.uint8)
        return hashlib.blake2b(values.numpy(), digest_size=8).hexdigest()


def same_weights(model: nn.Module) -> None:
    """Raise unless all ranks have the same bits in each weight of `model`, under the same name."""
    same_values(**{name: fingerprint(weight) for name, weight in model.named_parameters()})


def same_gradients(model: nn.Module) -> None:
    """Raise unless all ranks have the same bits in each gradient. Call it after `backward()`, before the step."""
    same_values(**{name: fingerprint(weight.grad) for name, weight in model.named_parameters()})


def every_sample_once(indices: Iterable[int], n_samples: int) -> None:
    """Raise unless the `indices` that the ranks have read in an epoch are together each of 0..`n_samples` - 1, once."""
    counts = torch.bincount(torch.tensor(list(indices), dtype=torch.int64), minlength=n_samples)[:n_samples]
    counts = all_gather(counts).sum(dim=0)
    if (counts != 1).any():
        never, again = (counts == 0).sum(), (counts > 1).sum()
        raise AssertionError(f"of {n_samples} samples, {never} were never read, {again} more than once")
