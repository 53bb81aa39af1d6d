"""Epochs of one training on GPUs, fed and launched in several ways, in turns; prints a `GpuMeasurement` as JSON.

For `python -m benchmarks gpu`. DATA BATCH_SIZE ROUNDS. Every loop trains the same weights on the same batches in the
same order.
"""

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import nll_loss
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from benchmarks.peers import MOMENTUM, PerSampleDataset
from ddp_tutorial.data import GpuBatches, NpyDataset, load_splits
from ddp_tutorial.model import ScaleInputs, SimpleModel
from ddp_tutorial.show.timing import seconds, take_turns
from ddp_tutorial.training import evaluate, train_one_epoch

RANK, LOCAL_RANK = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
LR = 0.1
PER_SAMPLE, GATHER, PINNED = "a tensor per sample", "a gather per batch", "a gather per batch, pinned copies"
ON_GPU, LOOP = "data on the GPU (the scripts)", "data on the GPU, a loop"
COMPILED, GRAPH = "the loop, torch.compile(reduce-overhead)", "the loop, a CUDA graph of the step"
LOOPS = (PER_SAMPLE, GATHER, PINNED, ON_GPU, LOOP, COMPILED, GRAPH)
COPIES_BATCHES = (PER_SAMPLE, GATHER, PINNED)  # from the host; the others have all data on the GPU


class LoopTimes(NamedTuple):
    """Of one loop."""

    seconds: list[float]  # of its epochs, less the first
    val_loss: float  # after the last one


class GpuMeasurement(NamedTuple):
    """What the probe prints, as JSON."""

    card: str
    loops: dict[str, LoopTimes]
    n_launches: int | None  # of an epoch of `LOOP`; None on several ranks
    bytes_per_second: float  # read or written within the GPU's memory
    kernel_seconds: float  # of the smallest kernel, launched by itself from Python
    graph_kernel_seconds: float  # of the same in a graph

    @classmethod
    def from_json(cls, measured: dict) -> "GpuMeasurement":
        """JSON has made lists of the tuples."""
        loops = {name: LoopTimes(*loop) for name, loop in measured["loops"].items()}
        return cls(**measured | {"loops": loops})


class TrainingLoop:
    """A model, its optimizer, and `train(epoch)`, which makes the steps of an epoch."""

    def __init__(self, train_set: NpyDataset, device: torch.device):
        torch.manual_seed(0)
        scale = ScaleInputs(train_set.mean, train_set.std).to(device)
        self.model = SimpleModel(train_set.n_features, train_set.n_classes).to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LR, momentum=MOMENTUM)
        wrapped = DistributedDataParallel(self.model) if WORLD_SIZE > 1 else self.model
        self.trained, self.evaluated = nn.Sequential(scale, wrapped), nn.Sequential(scale, self.model)

    def over_loader(self, loader, device: torch.device) -> "TrainingLoop":
        """With the scripts' own loop over the batches of a loader."""
        sampler = (loader.loader if isinstance(loader, GpuBatches) else loader).sampler

        def train(epoch: int) -> None:
            sampler.set_epoch(epoch)
            train_one_epoch(self.trained, loader, self.optimizer, device)

        self.train = train
        return self

    def over_indices(
        self, step: Callable[[Tensor], None], batches_of: Callable[[int], Iterator[Tensor]]
    ) -> "TrainingLoop":
        """With a bare loop: a `step` for each batch of an epoch, which is given by its samples' indices on the GPU."""

        def train(epoch: int) -> None:
            for index in batches_of(epoch):
                step(index)

        self.train = train
        return self

    def eager_step(self, X: Tensor, y: Tensor, model: nn.Module | None = None) -> Callable[[Tensor], None]:
        """A step for a batch, by its samples' indices; of `model`, or of the loop's own."""
        model = model or self.trained

        def step(index: Tensor) -> None:
            loss = nll_loss(model(X.index_select(0, index)), y.index_select(0, index))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

        return step

    def recorded_step(self, X: Tensor, y: Tensor, batch_size: int) -> Callable[[Tensor], None]:
        """The same step, recorded once: a replay starts all of its kernels with one launch."""
        index, step = torch.zeros(batch_size, dtype=torch.int64, device=X.device), self.eager_step(X, y)
        start = [parameter.detach().clone() for parameter in self.model.parameters()]
        side = torch.cuda.Stream()  # what capturing asks for: a few steps in another stream come first
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step(index)
        torch.cuda.current_stream().wait_stream(side)
        self.optimizer.zero_grad()  # the graph makes gradients of its own
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step(index)
        with torch.no_grad():  # undo these steps
            for parameter, value in zip(self.model.parameters(), start, strict=True):
                parameter.copy_(value)
                self.optimizer.state[parameter]["momentum_buffer"].zero_()

        def replay(new_index: Tensor) -> None:
            index.copy_(new_index)
            graph.replay()

        return replay


def new_loops(folder: Path, batch_size: int, device: torch.device) -> tuple[dict[str, TrainingLoop], GpuBatches]:
    """Every loop by its name, less COMPILED and GRAPH on several ranks, and the batches of the validation set."""
    train_set, val_set = load_splits(folder)
    per_sample = PerSampleDataset(folder / "X_train.npy", folder / "y_train.npy")
    share = batch_size // WORLD_SIZE

    def loader(dataset, **options) -> DataLoader:
        sampler = DistributedSampler(dataset, WORLD_SIZE, RANK, drop_last=True)
        return DataLoader(dataset, share, sampler=sampler, drop_last=True, **options)

    gather = {"collate_fn": NpyDataset.collate}
    on_gpu = GpuBatches(loader(train_set, **gather), device)
    loaders = {
        PER_SAMPLE: loader(per_sample),
        GATHER: loader(train_set, **gather),
        PINNED: loader(train_set, **gather, pin_memory=True),
        ON_GPU: on_gpu,
    }
    loops = {name: TrainingLoop(train_set, device).over_loader(batches, device) for name, batches in loaders.items()}
    loops |= bare_loops(train_set, on_gpu.X, on_gpu.y, share)
    return loops, GpuBatches(DataLoader(val_set, 1024, **gather), device)


def bare_loops(train_set: NpyDataset, X: Tensor, y: Tensor, share: int) -> dict[str, TrainingLoop]:
    """Those without a loader, over (N, F) X and (N,) y on the GPU; `share` is a rank's batch size."""
    batches_of = partial(index_batches, len(X), share, X.device)
    loop = TrainingLoop(train_set, X.device)
    loops = {LOOP: loop.over_indices(loop.eager_step(X, y), batches_of)}
    if WORLD_SIZE == 1:  # NCCL's calls can be captured as well, with rules of their own
        loop = TrainingLoop(train_set, X.device)
        compiled = torch.compile(loop.trained, mode="reduce-overhead")
        loops[COMPILED] = loop.over_indices(loop.eager_step(X, y, compiled), batches_of)
        loop = TrainingLoop(train_set, X.device)
        loops[GRAPH] = loop.over_indices(loop.recorded_step(X, y, share), batches_of)
    return loops


def index_batches(n_samples: int, share: int, device: torch.device, epoch: int) -> Iterator[Tensor]:
    """The batches that `DistributedSampler` gives this rank in an epoch: (share,) int64 each, on the device."""
    order = torch.randperm(n_samples, generator=torch.Generator().manual_seed(epoch))
    even = n_samples // WORLD_SIZE * WORLD_SIZE
    own = order[RANK:even:WORLD_SIZE].to(device)
    return iter(own[: len(own) // share * share].split(share))


def count_launches(loop: TrainingLoop) -> int:
    """How many kernels, copies and fills an epoch gives to the GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        loop.train(0)
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA)


def memory_bandwidth(n_bytes: int = 2**30) -> float:
    """Bytes a second, read or written, of a copy within the GPU's memory."""
    source = torch.zeros(n_bytes, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        times.append(seconds(lambda: (target.copy_(source), torch.cuda.synchronize())))
    return 2 * n_bytes / min(times)


def kernel_times(n: int = 2000) -> tuple[float, float]:
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


def timed_epochs(loops: dict[str, TrainingLoop], rounds: int) -> dict[str, list[float]]:
    """Seconds of each epoch; the loops take turns. All ranks begin an epoch together."""
    next_epochs = {name: itertools.count(1) for name in loops}

    def epoch(name: str) -> float:
        torch.cuda.synchronize()
        if WORLD_SIZE > 1:
            dist.barrier()
        start = time.perf_counter()
        loops[name].train(next(next_epochs[name]))
        torch.cuda.synchronize()
        return time.perf_counter() - start

    return take_turns({name: partial(epoch, name) for name in loops}, rounds)


def measure_loops(
    folder: Path, batch_size: int, rounds: int, device: torch.device
) -> tuple[dict[str, LoopTimes], int | None]:
    """Each loop's times, and the launches of `LOOP`. On each rank; what this makes is gone when it returns."""
    loops, val_batches = new_loops(folder, batch_size, device)
    seconds = timed_epochs(loops, rounds + 1)
    times = {}
    for name, loop in loops.items():
        loss, n, _ = evaluate(loop.evaluated, val_batches, device).tolist()
        times[name] = LoopTimes(seconds[name][1:], loss / n)
    return times, count_launches(loops[LOOP]) if WORLD_SIZE == 1 else None


def main() -> None:
    """The first rank prints."""
    folder, batch_size, rounds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    device = torch.device("cuda", LOCAL_RANK)
    torch.cuda.set_device(device)
    if WORLD_SIZE > 1:
        dist.init_process_group("nccl", device_id=device)
    times, n_launches = measure_loops(folder, batch_size, rounds, device)
    if WORLD_SIZE > 1:
        dist.destroy_process_group()
    if RANK == 0:
        card = torch.cuda.get_device_name()
        measurement = GpuMeasurement(card, times, n_launches, memory_bandwidth(), *kernel_times())
        print(json.dumps(measurement._asdict()))


if __name__ == "__main__":
    main()
