"""How long an epoch of decoded photos takes. For `python -m benchmarks photos`, in the folder of the shards.

ROUNDS: each way takes so many epochs, in turns, and one more that warms up. Prints {way: seconds of each} as JSON.
As ranks of a group: ROUNDS SECONDS, an epoch of DDP whose step waits SECONDS a sample, as for a GPU. Rank 0 prints.
"""

import importlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from ddp_tutorial.show.timing import seconds, take_turns

sys.path.insert(0, os.getcwd())
page = importlib.import_module("image_shards")  # which a cell of the chapter writes

BATCH = 16  # for each rank
SHARDS = sorted(map(str, Path("photos").glob("*.tar")))


class Photos(Dataset):
    """Decodes each photo when it is asked for, from bytes in memory."""

    def __init__(self):
        self.samples = [sample for shard in SHARDS for sample in page.samples_of(shard)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int, int]:
        number, jpeg, label = self.samples[i]
        return page.decode(jpeg), label, number


def n_workers(n: int) -> str:
    """In words."""
    return "1 worker" if n == 1 else f"{n} workers"


def by_library() -> Iterable:
    """The same samples by webdataset."""
    import webdataset as wds

    stream = wds.WebDataset(SHARDS, shardshuffle=False, workersplitter=wds.split_by_worker)
    return stream.to_tuple("jpg", "cls", "__key__").map_tuple(page.decode, int, int)


def loader(data, workers: int, **options) -> DataLoader:
    """Its workers are forked, and live on: their start is in the first epoch, which is not counted."""
    kept = {"multiprocessing_context": "fork", "persistent_workers": True} if workers else {}
    return DataLoader(data, BATCH, num_workers=workers, **kept, **options)


def read(batches: Iterable, n_samples: int) -> None:
    """All of them. Raises `AssertionError` unless each sample comes once."""
    numbers = [number for *_, batch in batches for number in torch.as_tensor(batch).flatten().tolist()]
    assert sorted(numbers) == list(range(n_samples)), "each sample once"


def ways() -> dict[str, Callable[[], None]]:
    """An epoch of each way; the first one, a loop without a loader, is what the others are compared with."""
    photos = Photos()
    loaders = {f"loader, {n_workers(n)}": loader(photos, n, shuffle=True) for n in (0, 1, 2, 4)}
    loaders |= {f"stream, {n_workers(n)}": loader(page.ImageStream("photos"), n) for n in (0, 2)}
    if find_spec("webdataset"):
        loaders |= {f"webdataset, {n_workers(n)}": loader(by_library(), n) for n in (0, 2)}
    epochs = {way: partial(read, batches, len(photos)) for way, batches in loaders.items()}
    return {"a loop": lambda: read((photos[i] for i in range(len(photos))), len(photos))} | epochs


def train(ddp_model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable, wait: float) -> None:
    """An epoch, at whose steps the process waits `wait` seconds a sample."""
    for photos, labels, _ in batches:
        loss = cross_entropy(ddp_model(photos), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        time.sleep(wait * len(photos))
    dist.barrier()


def training_ways(wait: float) -> dict[str, Callable[[], None]]:
    """An epoch of DDP without workers, and with one for each rank."""
    ddp_model = DistributedDataParallel(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2)))
    optimizer = torch.optim.SGD(ddp_model.parameters(), lr=0.01)
    stream = page.ImageStream("photos", dist.get_rank(), dist.get_world_size())
    return {
        f"DDP, {n_workers(n)} a rank": partial(train, ddp_model, optimizer, loader(stream, n), wait) for n in (0, 1)
    }


def main(rounds: str, wait: str = "0") -> None:
    """Measure, and print."""
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores: here on purpose
    is_rank = "RANK" in os.environ
    if is_rank:
        dist.init_process_group("gloo")
    epochs = training_ways(float(wait)) if is_rank else ways()
    times = take_turns({way: partial(seconds, epoch) for way, epoch in epochs.items()}, 1 + int(rounds))
    if not is_rank or dist.get_rank() == 0:
        print(json.dumps({way: values[1:] for way, values in times.items()}))
    if is_rank:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
