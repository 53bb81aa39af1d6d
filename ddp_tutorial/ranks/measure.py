"""Time what ranks do together: steps of training and all-reduces, in turns. Chapter 6 measures with it.

A busy moment of the machine hits all measurements alike, since they take turns; and the slowest rank counts, since the
others would wait for it.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddp_tutorial.model import SimpleModel
from ddp_tutorial.ranks import exchange


def mlp(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers with ReLU between, and `SimpleModel` as the last: log-probabilities of `widths[-1]` classes."""
    *hidden, n_features, n_classes = widths
    layers = [layer for n, m in pairwise((*hidden, n_features)) for layer in (nn.Linear(n, m), nn.ReLU())]
    return nn.Sequential(*layers, SimpleModel(n_features, n_classes))


def training_step(widths, batch_size, group=None, hook=None, bucket_cap_mb=None, every=1) -> Callable[[], None]:
    """One step of training: alone, or with DDP in `group`, which exchanges after `every` batches."""
    model = mlp(widths)
    if group:
        model = DistributedDataParallel(model, process_group=group, bucket_cap_mb=bucket_cap_mb)
    if hook:
        model.register_comm_hook(None, hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    x, y = torch.randn(batch_size, widths[0]), torch.randint(widths[-1], (batch_size,))

    def step() -> None:
        optimizer.zero_grad()
        for i in range(every):
            with nullcontext() if i == every - 1 else model.no_sync():
                nn.functional.nll_loss(model(x), y).backward()
        optimizer.step()

    step()
    step()  # from the second on, DDP has its final buckets
    return step


def silent(n_bytes: dict[int, int]) -> Callable:
    """A communication hook that sends nothing. It notes the bytes of each bucket, by the bucket's index."""

    def hook(_, bucket):
        n_bytes[bucket.index()] = bucket.buffer().nbytes
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    return hook


def all_reduces(n_bytes: Iterable[int], group, step: Callable[[], object] = lambda: None) -> Callable[[], None]:
    """A function that takes a step, and then adds up float32 tensors of so many bytes over the ranks of `group`."""
    tensors = [torch.zeros(n // 4) for n in n_bytes]

    def call() -> None:
        step()
        for tensor in tensors:
            dist.all_reduce(tensor, group=group)

    return call


class Measurement(NamedTuple):
    """What to time: `call`, so many times in a row, on the ranks of `group`. On the other ranks `call` is None."""

    what: dict  # what tells it from the others, such as {"model": "MLP 1M", "ranks": 2}
    group: dist.ProcessGroup
    call: Callable[[], object] | None
    n_calls: int


def turn(measurement: Measurement) -> float:
    """The seconds of one call, on the slowest rank. All ranks wait here, which takes no processor time."""
    seconds = torch.zeros(1)
    if measurement.call:
        dist.barrier(measurement.group)
        start = time.perf_counter()
        for _ in range(measurement.n_calls):
            measurement.call()
        seconds[0] = (time.perf_counter() - start) / measurement.n_calls
    return exchange.all_gather(seconds).max().item()


def take_turns(measurements: Sequence[Measurement], rounds: int) -> list[dict]:
    """What each one is, and its `seconds` in each round."""
    results = [{**measurement.what, "seconds": []} for measurement in measurements]
    for _ in range(rounds):
        for measurement, result in zip(measurements, results, strict=True):
            result["seconds"].append(turn(measurement))
    return results
