"""A rank that times exchanges of gradients of several sizes, and the DDP step: rank 0 prints JSON. For torchrun."""

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before the group starts, or gloo's threads outlive it
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddp_tutorial.model import ScaleInputs, SimpleModel
from ddp_tutorial.ranks import exchange
from ddp_tutorial.show.timing import take_turns
from ddp_tutorial.training import train_one_epoch


def all_reduce(values: Tensor) -> Tensor:
    """As DDP does it."""
    dist.all_reduce(values)
    return values.div_(dist.get_world_size())


def gather_and_broadcast(values: Tensor) -> Tensor:
    """The first rank takes the mean and tells it to all, both by torch's collectives."""
    is_first = dist.get_rank() == 0
    rows = [torch.empty_like(values) for _ in range(dist.get_world_size())] if is_first else None
    dist.gather(values, rows)
    if is_first:
        values.copy_(torch.stack(rows).mean(dim=0))
    dist.broadcast(values, 0)
    return values


def through_first_rank(values: Tensor) -> Tensor:
    """The project's own."""
    return exchange.through_first_rank(values, lambda rows: rows.mean(dim=0), out=values)


def along_a_tree(values: Tensor) -> Tensor:
    """Pairs, pairs of pairs, and back: fewer messages for the first rank, more waits."""
    rank, n, step, children = dist.get_rank(), dist.get_world_size(), 1, []
    while step < n and not rank & step:
        received = torch.empty_like(values)
        dist.recv(received, rank + step)
        values.add_(received)
        children.append(rank + step)
        step *= 2
    if rank:
        dist.send(values, rank - step)
        dist.recv(values, rank - step)
    else:
        values.div_(n)
    for child in reversed(children):
        dist.send(values, child)
    return values


def all_to_all(values: Tensor) -> Tensor:
    """Each rank gets all rows and takes the mean itself, by torch's collective."""
    n = dist.get_world_size()
    received = values.new_empty(n, len(values))
    dist.all_to_all_single(received, values.expand(n, -1).contiguous())
    return received.mean(dim=0)


def by_pairs(values: Tensor) -> Tensor:
    """The same by messages."""
    rank, n = dist.get_rank(), dist.get_world_size()
    rows = values.expand(n, -1).contiguous()
    others = [other for other in range(n) if other != rank]
    works = [dist.irecv(rows[other], other) for other in others] + [dist.isend(values, other) for other in others]
    exchange.wait(works)
    return rows.mean(dim=0)


EXCHANGES = {  # each takes a vector, which it may change, and returns the mean of all ranks' vectors
    "all-reduce": all_reduce,
    "gather and broadcast": gather_and_broadcast,
    "through the first rank": through_first_rank,
    "along a tree": along_a_tree,
    "all-to-all": all_to_all,
    "every pair": by_pairs,
}


class Cost(NamedTuple):
    """Of one call, on one rank."""

    seconds: float
    cpu_seconds: float
    waits: float  # voluntary context switches
    segments: float  # TCP segments that the whole machine has sent


def counters() -> Tensor:
    """What `Cost` has, since some time in the past. (4,) float64."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    lines = Path("/proc/net/snmp").read_text().splitlines()  # psutil has no such counter
    headings, values = (line.split() for line in lines if line.startswith("Tcp:"))
    segments = int(values[headings.index("OutSegs")])
    cost = Cost(time.perf_counter(), usage.ru_utime + usage.ru_stime, usage.ru_nvcsw, segments)
    return torch.tensor(cost, dtype=torch.float64)


def measure(function: Callable[[], object], n_calls: int) -> Tensor:
    """The `Cost` of one call, the mean of so many. (4,) float64."""
    function()
    dist.barrier()
    before = counters()
    for _ in range(n_calls):
        function()
    return (counters() - before) / n_calls


def compare(functions: dict[str, Callable[[], object]], rounds: int, n_calls: int) -> dict[str, Tensor]:
    """{name: medians over the rounds of what `measure` returns}, the functions taking turns."""
    costs = take_turns({name: lambda f=f: measure(f, n_calls) for name, f in functions.items()}, rounds)
    return {name: torch.stack(rows).median(dim=0).values for name, rows in costs.items()}


def exchange_costs(n_numbers: int, rounds: int) -> dict[str, Tensor]:
    """{name in `EXCHANGES`: its cost for vectors of float32}. Raises `AssertionError` if one gives another mean."""
    start = torch.randn(n_numbers, generator=torch.Generator().manual_seed(dist.get_rank()))
    expected = all_reduce(start.clone())
    for function in EXCHANGES.values():
        torch.testing.assert_close(function(start.clone()), expected)
    n_calls = max(5, min(100, 2_000_000 // n_numbers))
    return compare({name: lambda f=f: f(start.clone()) for name, f in EXCHANGES.items()}, rounds, n_calls)


def step_costs(rounds: int, batch_size: int = 128, n_steps: int = 100) -> dict[str, Tensor]:
    """The cost of a training step of SimpleModel: without DDP, with it, with its hook."""

    def epoch(wrap: bool, hook: bool) -> Callable[[], object]:
        torch.manual_seed(0)
        scale, model = ScaleInputs(torch.zeros(20), torch.ones(20)), SimpleModel(20, 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        ddp_model = DistributedDataParallel(model) if wrap else model
        if hook:
            ddp_model.register_comm_hook(None, exchange.average_gradients)
        return lambda: train_one_epoch(nn.Sequential(scale, ddp_model), batches, optimizer, torch.device("cpu"))

    share = batch_size // dist.get_world_size()
    batches = [(torch.randn(share, 20), torch.randint(4, (share,))) for _ in range(n_steps)]
    epochs = {
        "no DDP": epoch(wrap=False, hook=False),
        "DDP": epoch(wrap=True, hook=False),
        "DDP with the hook": epoch(wrap=True, hook=True),
    }
    return {name: cost / n_steps for name, cost in compare(epochs, rounds, 1).items()}


def mean_over_ranks(costs: dict[str, Tensor]) -> dict[str, Cost]:
    """The segments are those of the machine, the rest is a rank's."""
    return {name: Cost(*all_reduce(cost.clone()).tolist()) for name, cost in costs.items()}


def main() -> None:
    """ROUNDS SIZE...; a size is a number of float32."""
    dist.init_process_group("gloo")
    rounds, *sizes = map(int, sys.argv[1:])
    costs = {4 * size: mean_over_ranks(exchange_costs(size, rounds)) for size in sizes}
    steps = mean_over_ranks(step_costs(rounds))
    if dist.get_rank() == 0:
        print(json.dumps({"exchanges": costs, "steps": steps}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
