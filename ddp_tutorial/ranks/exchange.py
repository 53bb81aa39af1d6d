"""What ranks exchange often is small. On gloo, small tensors go through the first rank: two steps, not a ring's.

gloo's all-reduce and all-gather send a tensor's parts round a ring: with N ranks an all-reduce takes 2 (N-1) steps
that wait for each other, and for few bytes nearly all of the time is start-up. Through the first rank there are 2 (N-1)
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


def is_small(values: Tensor, group: dist.ProcessGroup | None = None) -> bool:
    """Whether to send `values` through the first rank of the `group`; the same on all its ranks. None: of all ranks."""
    is_gloo, n_ranks = dist.get_backend(group) == "gloo", dist.get_world_size(group)
    return is_gloo and values.nbytes <= SMALL_BYTES and n_ranks <= FEW_RANKS


def through_first_rank(
    values: Tensor, combine: Callable[[Tensor], Tensor], out: Tensor, group: dist.ProcessGroup | None = None
) -> Tensor:
    """`combine` (what all ranks have in `values`, stacked), computed on the first rank, into every rank's `out`.

    All ranks of the `group` get the same bits. `out` may be `values`; both are contiguous. Returns `out`.
    """
    if dist.get_rank(group) == 0:
        others = range(1, dist.get_world_size(group))
        rows = values.new_empty(dist.get_world_size(group), *values.shape)
        rows[0] = values
        wait([dist.irecv(rows[rank], group=group, group_src=rank) for rank in others])
        out.copy_(combine(rows))
        wait([dist.isend(out, group=group, group_dst=rank) for rank in others])
    else:
        dist.send(values, group=group, group_dst=0)
        dist.recv(out, group=group, group_src=0)
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
    """Average a bucket of gradients: `ddp_model.register_comm_hook(ddp_model.process_group, average_gradients)`."""
    gradients = bucket.buffer()
    if not is_small(gradients, group):
        return allreduce_hook(group, bucket)
    done = Future()
    done.set_result(through_first_rank(gradients, lambda rows: rows.mean(dim=0), gradients, group))
    return done


def prepare_exchange(model: nn.Module, x: Tensor) -> None:
    """Send few gradients the short way, where `model` is wrapped, and settle the order in which DDP sends them.

    DDP settles it in its first backward pass: done now, on any input `x`, a run that goes on adds in the same order.
    """
    if isinstance(model, DistributedDataParallel):
        if dist.get_backend(model.process_group) == "gloo":
            model.register_comm_hook(model.process_group, average_gradients)
        model(x).sum().backward()
        model.zero_grad()
