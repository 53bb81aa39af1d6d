"""A rank that times exchanges of gradients of several sizes, and the DDP step: rank 0 prints JSON. For torchrun."""

import json
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before the group starts, or gloo's threads outlive it
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddp_tutorial.model import SimpleModel, Standardize
from ddp_tutorial.ranks import exchange
from ddp_tutorial.training import train_one_epoch


def all_reduce(values):
    dist.all_reduce(values)
    return values.div_(dist.get_world_size())


def gather_and_broadcast(values):
    first = dist.get_rank() == 0
    rows = [torch.empty_like(values) for _ in range(dist.get_world_size())] if first else None
    dist.gather(values, rows)
    if first:
        values.copy_(torch.stack(rows).mean(dim=0))
    dist.broadcast(values, 0)
    return values


def through_first_rank(values):
    return exchange.through_first_rank(values, lambda rows: rows.mean(dim=0), out=values)


def along_a_tree(values):
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


def all_to_all(values):
    n = dist.get_world_size()
    received = values.new_empty(n, len(values))
    dist.all_to_all_single(received, values.expand(n, -1).contiguous())
    return received.mean(dim=0)


def by_pairs(values):
    rank, n = dist.get_rank(), dist.get_world_size()
    rows = values.expand(n, -1).contiguous()
    others = [other for other in range(n) if other != rank]
    works = [dist.irecv(rows[other], other) for other in others] + [dist.isend(values, other) for other in others]
    exchange.wait(works)
    return rows.mean(dim=0)


EXCHANGES = {
    "all-reduce": all_reduce,
    "gather and broadcast": gather_and_broadcast,
    "through the first rank": through_first_rank,
    "along a tree": along_a_tree,
    "all-to-all": all_to_all,
    "every pair": by_pairs,
}


def counters():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    names, values = (
        line.split() for line in Path("/proc/net/snmp").read_text().splitlines() if line.startswith("Tcp:")
    )
    return torch.tensor(
        [time.perf_counter(), usage.ru_utime + usage.ru_stime, usage.ru_nvcsw, int(values[names.index("OutSegs")])],
        dtype=torch.float64,
    )


def measure(function, times: int) -> torch.Tensor:
    """Seconds, CPU seconds, waits (voluntary context switches) and TCP segments of the machine, for one call."""
    function()
    dist.barrier()
    before = counters()
    for _ in range(times):
        function()
    return (counters() - before) / times


def compare(functions: dict, rounds: int, times: int) -> dict:
    """{name: medians over the rounds of what `measure` returns}, the functions taking turns."""
    table = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            table[name].append(measure(function, times))
    return {name: torch.stack(rows).median(dim=0).values.tolist() for name, rows in table.items()}


def exchanges(n_numbers: int, rounds: int) -> dict:
    start = torch.randn(n_numbers, generator=torch.Generator().manual_seed(dist.get_rank()))
    expected = all_reduce(start.clone())
    for function in EXCHANGES.values():
        torch.testing.assert_close(function(start.clone()), expected)
    times = max(5, min(100, 2_000_000 // n_numbers))
    return compare({name: lambda f=f: f(start.clone()) for name, f in EXCHANGES.items()}, rounds, times)


def steps(rounds: int, batch_size: int = 128, n_steps: int = 100) -> dict:
    """The training step of SimpleModel: without DDP, with it, with its hook."""

    def trainer(wrap: bool, hook: bool):
        torch.manual_seed(0)
        scale, model = Standardize(torch.zeros(20), torch.ones(20)), SimpleModel(20, 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        ddp_model = DistributedDataParallel(model) if wrap else model
        if hook:
            ddp_model.register_comm_hook(None, exchange.average_gradients)
        return lambda: train_one_epoch(nn.Sequential(scale, ddp_model), batches, optimizer, torch.device("cpu"))

    share = batch_size // dist.get_world_size()
    batches = [(torch.randn(share, 20), torch.randint(4, (share,))) for _ in range(n_steps)]
    trainers = {"no DDP": trainer(False, False), "DDP": trainer(True, False), "DDP with the hook": trainer(True, True)}
    table = compare(trainers, rounds, 1)
    return {name: [value / n_steps for value in row] for name, row in table.items()}


def main() -> None:
    dist.init_process_group("gloo")
    rounds, *sizes = map(int, sys.argv[1:])
    found = {"exchanges": {4 * n: exchanges(n, rounds) for n in sizes}, "steps": steps(rounds)}
    everything = [None] * dist.get_world_size()
    dist.all_gather_object(everything, found)
    if dist.get_rank() == 0:  # the segments are those of the machine, the rest is a rank's: take the mean
        mean = lambda rows: [statistics.mean(column) for column in zip(*rows, strict=True)]  # noqa: E731
        rows = {s: {k: mean([f["exchanges"][s][k] for f in everything]) for k in EXCHANGES} for s in found["exchanges"]}
        print(json.dumps({"exchanges": rows, "steps": {k: mean([f["steps"][k] for f in everything]) for k in found["steps"]}}))  # fmt: skip
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
