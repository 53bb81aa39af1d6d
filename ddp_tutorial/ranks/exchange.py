"""What ranks exchange often is small. On gloo, small tensors go through the first rank: two steps, not a ring's.

gloo's all-reduce and all-gather send a tensor's parts round a ring: with N ranks an all-reduce takes 2 (N-1) steps
that wait for each other, and for few bytes the waiting is all there is. Through the first rank there are 2 (N-1)
messages, and each rank waits once. `python -m benchmarks exchange` measures both, and where the ring wins.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

SMALL_BYTES = 2**18  # well below the size from which the ring is faster, also where links are slower than memory
FEW_RANKS = 8  # the first rank serves the others one after the other


def is_small(values: Tensor) -> bool:
    """Whether to send `values` through the first rank; the same on all ranks."""
    return dist.get_backend() == "gloo" and values.nbytes <= SMALL_BYTES and dist.get_world_size() <= FEW_RANKS


def through_first_rank(values: Tensor, combine: Callable[[Tensor], Tensor], out: Tensor) -> Tensor:
    """`combine` (what all ranks have in `values`, stacked), computed on the first rank, into every rank's `out`.

    All ranks get the same bits. `out` may be `values`; both are contiguous. Returns `out`.
    """
    if dist.get_rank() == 0:
        others = range(1, dist.get_world_size())
        rows = values.new_empty(dist.get_world_size(), *values.shape)
        rows[0] = values
        wait([dist.irecv(rows[rank], rank) for rank in others])
        out.copy_(combine(rows))
        wait([dist.isend(out, rank) for rank in others])
    else:
        dist.send(values, 0)
        dist.recv(out, 0)
    return out


def wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()


def all_gather(values: Tensor) -> Tensor:
    """Every rank's `values`, stacked in the order of ranks, on every rank: (N, *values.shape)."""
    if dist.get_backend() == "nccl":
        values = values.cuda()  # NCCL moves nothing else
    rows = values.new_empty(dist.get_world_size(), *values.shape)
    if is_small(values):
        return through_first_rank(values, torch.Tensor.contiguous, rows)
    dist.all_gather(list(rows), values)
    return rows


def average_gradients(group: dist.ProcessGroup | None, bucket: dist.GradBucket) -> Future[Tensor]:
    """Average a bucket of gradients over all ranks: `ddp_model.register_comm_hook(None, average_gradients)`."""
    gradients = bucket.buffer()
    if not is_small(gradients):
        return allreduce_hook(group, bucket)
    done = Future()
    done.set_result(through_first_rank(gradients, lambda rows: rows.mean(dim=0), out=gradients))
    return done


def prepare_exchange(model: nn.Module, x: Tensor) -> None:
    """Send few gradients the short way, where `model` is wrapped, and settle the order in which DDP sends them.

    DDP settles it in its first backward pass: done now, on any input `x`, a run that goes on adds in the same order.
    """
    if isinstance(model, DistributedDataParallel):
        if dist.get_backend() == "gloo":
            model.register_comm_hook(None, average_gradients)
        model(x).sum().backward()
        model.zero_grad()
