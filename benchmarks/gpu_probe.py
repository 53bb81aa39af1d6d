"""Epochs of one training on GPUs, fed and launched in several ways, in turns; prints one JSON object.

For `python -m benchmarks gpu`. DATA BATCH_SIZE ROUNDS; every way trains the same weights on the same batches in the same order.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import nll_loss
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from benchmarks.peers import MOMENTUM, PerSampleDataset
from ddp_tutorial.data import GpuBatches, NpyDataset, load_splits
from ddp_tutorial.model import SimpleModel, Standardize
from ddp_tutorial.show.timing import seconds, take_turns
from ddp_tutorial.training import evaluate, train_one_epoch

RANK, LOCAL_RANK, WORLD_SIZE = (int(os.environ.get(name, i)) for i, name in ((0, "RANK"), (0, "LOCAL_RANK"), (1, "WORLD_SIZE")))  # fmt: skip
LR = 0.1
SLOWEST, GATHER, PINNED = "a tensor per sample", "a gather per batch", "a gather per batch, pinned copies"
OURS, LOOP = "data on the GPU (the scripts)", "data on the GPU, a loop"
COMPILED, GRAPH = "the loop, torch.compile(reduce-overhead)", "the loop, a CUDA graph of the step"
WAYS = (SLOWEST, GATHER, PINNED, OURS, LOOP, COMPILED, GRAPH)


class Way:
    """A model, its optimizer, and `train(epoch)`, which makes the steps of an epoch."""

    def __init__(self, train_set: NpyDataset, device: torch.device):
        torch.manual_seed(0)
        scale = Standardize(train_set.mean, train_set.std).to(device)
        self.model = SimpleModel(train_set.n_features, train_set.n_classes).to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LR, momentum=MOMENTUM)
        wrapped = DistributedDataParallel(self.model) if WORLD_SIZE > 1 else self.model
        self.whole, self.plain = nn.Sequential(scale, wrapped), nn.Sequential(scale, self.model)

    def through(self, loader, device: torch.device) -> "Way":
        """With the scripts' own loop over the batches of a loader."""
        sampler = (loader.loader if isinstance(loader, GpuBatches) else loader).sampler

        def train(epoch: int) -> None:
            sampler.set_epoch(epoch)
            train_one_epoch(self.whole, loader, self.optimizer, device)

        self.train = train
        return self

    def by_hand(self, step: Callable[[Tensor], None], orders: Callable[[int], Iterator[Tensor]]) -> "Way":
        """With a bare loop: `step` for the numbers of each batch's samples, a tensor on the GPU."""

        def train(epoch: int) -> None:
            for rows in orders(epoch):
                step(rows)

        self.train = train
        return self

    def eager(self, X: Tensor, y: Tensor, model: nn.Module | None = None) -> Callable[[Tensor], None]:
        model = model or self.whole

        def step(rows: Tensor) -> None:
            loss = nll_loss(model(X.index_select(0, rows)), y.index_select(0, rows))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

        return step

    def graph(self, X: Tensor, y: Tensor, batch_size: int) -> Callable[[Tensor], None]:
        """The same step, recorded once: a replay starts all of its kernels with one launch."""
        rows, step = torch.zeros(batch_size, dtype=torch.int64, device=X.device), self.eager(X, y)
        start = [parameter.detach().clone() for parameter in self.model.parameters()]
        side = torch.cuda.Stream()  # what capturing asks for: a few steps in another stream come first
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step(rows)
        torch.cuda.current_stream().wait_stream(side)
        self.optimizer.zero_grad()  # the graph makes gradients of its own
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step(rows)
        with torch.no_grad():  # undo these steps
            for parameter, value in zip(self.model.parameters(), start, strict=True):
                parameter.copy_(value)
                self.optimizer.state[parameter]["momentum_buffer"].zero_()

        def replay(new_rows: Tensor) -> None:
            rows.copy_(new_rows)
            graph.replay()

        return replay


def ways(folder: Path, batch_size: int, device: torch.device) -> tuple[dict[str, Way], DataLoader]:
    """Every way by its name, and the loader of the validation set."""
    train_set, val_set = load_splits(folder)
    per_sample = PerSampleDataset(folder / "X_train.npy", folder / "y_train.npy")
    share = batch_size // WORLD_SIZE

    def loader(dataset, **options) -> DataLoader:
        sampler = DistributedSampler(dataset, WORLD_SIZE, RANK, drop_last=True)
        return DataLoader(dataset, share, sampler=sampler, drop_last=True, **options)

    gather = {"collate_fn": NpyDataset.collate}
    loaders = {
        SLOWEST: loader(per_sample),
        GATHER: loader(train_set, **gather),
        PINNED: loader(train_set, **gather, pin_memory=True),
        OURS: GpuBatches(loader(train_set, **gather), device),
    }
    found = {name: Way(train_set, device).through(batches, device) for name, batches in loaders.items()}
    X, y = loaders[OURS].X, loaders[OURS].y
    n = len(train_set) // WORLD_SIZE * WORLD_SIZE

    def orders(epoch: int) -> Iterator[Tensor]:
        """The batches of `DistributedSampler`."""
        order = torch.randperm(len(train_set), generator=torch.Generator().manual_seed(epoch))
        mine = order[RANK:n:WORLD_SIZE].to(device)
        return iter(mine[: len(mine) // share * share].split(share))

    way = Way(train_set, device)
    found[LOOP] = way.by_hand(way.eager(X, y), orders)
    if WORLD_SIZE == 1:  # NCCL's calls can be captured as well, with rules of their own
        way = Way(train_set, device)
        found[COMPILED] = way.by_hand(way.eager(X, y, torch.compile(way.whole, mode="reduce-overhead")), orders)
        way = Way(train_set, device)
        found[GRAPH] = way.by_hand(way.graph(X, y, share), orders)
    return found, GpuBatches(DataLoader(val_set, 1024, **gather), device)


def launches(way: Way) -> float:
    """How many kernels, copies and fills an epoch gives to the GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        way.train(0)
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA)


def bandwidth(n_bytes: int = 2**30) -> float:
    """Bytes a second, read or written, of a copy within the GPU's memory."""
    source = torch.zeros(n_bytes, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        times.append(seconds(lambda: (target.copy_(source), torch.cuda.synchronize())))
    return 2 * n_bytes / min(times)


def launch_rates(n: int = 2000) -> tuple[float, float]:
    """Seconds for the smallest kernel: started by itself from Python, and as a part of a graph."""
    x = torch.zeros(1, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(n):
            x.add_(1)

    def eager() -> None:
        for _ in range(n):
            x.add_(1)
        torch.cuda.synchronize()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return tuple(min(seconds(function) for _ in range(5)) / n for function in (eager, replay))


def main() -> None:
    folder, batch_size, rounds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    device = torch.device("cuda", LOCAL_RANK)
    torch.cuda.set_device(device)
    if WORLD_SIZE > 1:
        dist.init_process_group("nccl", device_id=device)
    found, val_loader = ways(folder, batch_size, device)
    epochs = dict.fromkeys(found, 0)

    def epoch(name: str) -> float:
        epochs[name] += 1
        torch.cuda.synchronize()
        if WORLD_SIZE > 1:
            dist.barrier()
        start = time.perf_counter()
        found[name].train(epochs[name])
        torch.cuda.synchronize()
        return time.perf_counter() - start

    times = take_turns({name: lambda n=name: epoch(n) for name in found}, rounds + 1)
    rows = {}
    for name, way in found.items():
        loss, _, n = evaluate(way.plain, val_loader, device).tolist()
        rows[name] = {"s": times[name][1:], "val_loss": loss / n}
    n_launches = launches(found[LOOP]) if WORLD_SIZE == 1 else None
    found.clear()  # the models go before the process group
    if WORLD_SIZE > 1:
        dist.destroy_process_group()
    if RANK == 0:
        card = torch.cuda.get_device_name()
        print(json.dumps({"card": card, "rows": rows, "launches": n_launches, "copy B/s": bandwidth(), "kernel s": launch_rates()}))  # fmt: skip


if __name__ == "__main__":
    main()
