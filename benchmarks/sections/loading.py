"""How fast the batches come, without any training.

An epoch over a set on the disk, shuffled, for each way to get its batches; the ways take turns. Each round is compared
with the limit of the same round: the arrays in memory, and a bare loop that gathers a batch by its indices.
"""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from benchmarks.peers import PerSampleDataset
from benchmarks.plan import Plan
from benchmarks.report import Row, Spread, column
from ddp_tutorial.data import NpyDataset
from ddp_tutorial.show.timing import seconds, take_turns

LIMIT = "limit"


@dataclass(frozen=True)
class LoadingRow(Row):
    """How fast the batches of one size come, one way."""

    features: int
    batch: int
    by: str
    samples_per_second: int = column("samples/s")
    of_limit: Spread = column("of the limit")


def rows(plan: Plan) -> list[LoadingRow]:
    """Samples per second of an epoch's batches, beside the limit: gathers from memory by a loop over indices."""
    return [
        row
        for n_features, n_samples in ((20, 65_536), (784, 16_384))
        for batch_size in ((128,) if plan.quick else (32, 128, 1024))
        for row in batch_size_rows(plan, n_features, 4096 if plan.quick else n_samples, batch_size)
    ]


def batch_size_rows(plan: Plan, n_features: int, n_samples: int, batch_size: int) -> list[LoadingRow]:
    """A row for each way to get the batches of one size."""
    epochs = epochs_of_batches(plan.data(n_features, n_samples), batch_size)
    timers = {way: partial(seconds, epoch) for way, epoch in epochs.items()}
    name = f"{n_features} features, batches of {batch_size}"
    times = plan.measure(name, take_turns, timers, 3 if plan.quick else 9)
    return [
        LoadingRow(
            features=n_features,
            batch=batch_size,
            by=way,
            samples_per_second=int(round(n_samples / statistics.median(values), -3)),
            of_limit=Spread.of_ratios(times[LIMIT], values),
        )
        for way, values in times.items()
    ]


def epochs_of_batches(folder: Path, batch_size: int) -> dict[str, Callable[[], None]]:
    """For each way, a function that gets all batches of an epoch."""
    files = [folder / f"{name}_train.npy" for name in "Xy"]
    X, y = (torch.from_numpy(np.load(file)) for file in files)
    ours = NpyDataset(*files)

    def gather_from_memory() -> None:
        for index in torch.randperm(len(X)).split(batch_size):
            _ = X.index_select(0, index), y.index_select(0, index)  # held until the next, as a training loop does

    def loader(dataset, **options) -> DataLoader:
        return DataLoader(dataset, batch_size, drop_last=True, **options)

    as_the_scripts = {"sampler": DistributedSampler(ours, 1, 0, drop_last=True), "collate_fn": NpyDataset.collate}
    brought = {
        f"ours, {name}": NpyDataset(saved_as(files[0], order, dtype), files[1])
        for name, order, dtype in (
            ("float64", "C", "f8"),
            ("Fortran order", "F", "f4"),
            ("Fortran, float64", "F", "f8"),
        )
    }
    return {
        LIMIT: gather_from_memory,
        "per sample": partial(exhaust, loader(PerSampleDataset(*files), shuffle=True)),
        "TensorDataset": partial(exhaust, loader(TensorDataset(X, y), shuffle=True)),
        "ours": partial(exhaust, loader(ours, **as_the_scripts)),
    } | {way: partial(exhaust, loader(dataset, **as_the_scripts)) for way, dataset in brought.items()}


def saved_as(path: Path, order: str, dtype: str) -> Path:
    """A file of the same values in another memory order and type, as people bring them."""
    other = path.with_name(f"{path.stem}_{order}_{dtype}.npy")
    if not other.exists():
        np.save(other, np.asarray(np.load(path), dtype=dtype, order=order))
    return other


def exhaust(batches: Iterable) -> None:
    """Get all of them."""
    for _ in batches:
        pass
