"""Which samples a rank reads, from which loader, in which epoch."""

import random
import weakref
import zlib
from collections import Counter
from contextlib import suppress

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.weak import WeakIdKeyDictionary

from ddp_tutorial.check.watch.record import SETTINGS, emit, is_users, random_states, safely, user_line

LONG = 4  # an epoch of more than so many times `--batches` is cut
N_PROBES = 3  # batches of a worker whose random numbers are looked at
EPOCHS_HASHED = 4  # in which the samples themselves are hashed, not only their indices noted
N_HASHED = 4096  # numbers of a sample, at most about twice as many
N_KEPT = 2000  # indices of a subset that are written down

loaders: WeakIdKeyDictionary = WeakIdKeyDictionary()  # loader -> what is known of it, and of those before it
last_made: dict[tuple, dict] = {}  # line, data set and kind of sampler -> what is known of the loader last made so
epochs: WeakIdKeyDictionary = WeakIdKeyDictionary()  # iterator of a loader -> what it has read
made_at: Counter = Counter()  # line -> loaders that it has made
open_batches: dict[str, dict] = {}  # loader -> the epoch whose batch no backward has followed yet
n_fetched: Counter = Counter()


def size(thing) -> int | None:
    try:
        return len(thing)
    except Exception:  # the user's own `__len__` may raise what it likes
        return None


def sampler_of(loader: DataLoader):
    inner = getattr(loader.batch_sampler, "sampler", None)
    return loader.sampler if inner is None else inner


def batch_size_of(loader: DataLoader) -> int | None:
    return loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)


def n_batches_of(loader: DataLoader) -> int | None:
    """Of a stream by its own length: the loader would remember that it was asked, and warn."""
    if not isinstance(loader.dataset, IterableDataset):
        return size(loader)
    n_samples = size(loader.dataset)
    return n_samples and -(-n_samples // (batch_size_of(loader) or 1))


def new_loader(result, loader: DataLoader, *args, **kwargs) -> None:
    """One that is made anew, at the same line of the same data, goes on where the one before has begun its epoch."""
    line = user_line()
    key = (str(line), id(loader.dataset), type(sampler_of(loader)).__name__)
    info = last_made.get(key)
    if info is None or info["is_new"] or info["data"]() is not loader.dataset:
        made_at[str(line)] += 1
        info = {"name": f"{line} {made_at[str(line)]}", "made": line, "epochs": 0}
        with suppress(TypeError):  # no reference to a list of samples
            last_made[key] = info | {"data": weakref.ref(loader.dataset)}
            info = last_made[key]
    info["is_new"] = True
    loaders[loader] = info


def number(index) -> int:
    return index if isinstance(index, int) else zlib.crc32(repr(index).encode())


def subset_of(data) -> list[int] | None:
    """Indices of a `Subset`, those whose hash is small if they are many: so those of two subsets can be compared."""
    if not hasattr(data, "indices"):
        return None
    indices = [int(i) for i in data.indices]
    every = 1 + len(indices) // N_KEPT
    return [i for i in indices if zlib.crc32(str(i).encode()) % every == 0]


def new_epoch(iterator, loader: DataLoader) -> None:
    info, data = loaders[loader], loader.dataset
    stream = isinstance(data, IterableDataset)
    sampler, batch, whole = sampler_of(loader), batch_size_of(loader), n_batches_of(loader)
    epochs[iterator] = {"name": info["name"], "number": info["epochs"], "whole": whole}
    epochs[iterator] |= {"n": 0, "indices": [], "trains": False}
    is_new, info["is_new"] = info["is_new"], False
    info["epochs"] += 1
    n_batches = None if stream else whole
    shares = [x for x in (size(sampler), n_batches and batch and n_batches * batch) if x]
    facts = {
        "sampler": type(sampler).__name__,
        "shuffle": getattr(sampler, "shuffle", None),
        "samples": None if stream else size(data),
        "share": None if stream else min(shares, default=None),
        "batches": n_batches,
        "is_new": is_new,
        "workers": loader.num_workers,
        "subset": subset_of(data) if not stream and info["epochs"] == 1 else None,
    }
    emit("epoch", loader=info["name"], epoch=epochs[iterator]["number"], made=info["made"], stream=stream, **facts)


def begins(iterator, loader: DataLoader) -> None:
    if loader not in loaders:  # it was unpickled
        new_loader(None, loader)
    new_epoch(iterator, loader)


def resets(iterator, loader: DataLoader, first_iter: bool = False) -> None:
    if not first_iter:  # workers that live on begin another epoch
        new_epoch(iterator, loader)


def index_drawn(indices, iterator) -> None:
    epochs[iterator]["indices"].append(indices)


def row_hashes(batch) -> list[int]:
    """Of the rows of the first tensor in `batch`."""
    while isinstance(batch, list | tuple | dict) and batch:
        batch = next(iter(batch.values() if isinstance(batch, dict) else batch))
    if not isinstance(batch, torch.Tensor) or not batch.dim():
        return []
    table = batch.detach().cpu().reshape(len(batch), -1)
    columns = table[:, :: 1 + table.shape[1] // N_HASHED].contiguous().view(torch.uint8).numpy()
    return [zlib.crc32(row) for row in columns]


def has_batch(batch, iterator) -> None:
    info = epochs[iterator]
    drawn = info["indices"][info["n"]] if info["n"] < len(info["indices"]) else []
    drawn = drawn if isinstance(drawn, list) else [drawn]
    indices = [number(i) for i in drawn if i is not None]
    is_known = indices and info["number"] >= EPOCHS_HASHED
    rows = [] if is_known else row_hashes(batch)
    emit("batch", loader=info["name"], epoch=info["number"], n=info["n"], indices=indices, rows=rows)
    info["n"] += 1
    open_batches[info["name"]] = info


def is_cut(iterator) -> bool:
    """Whether its epoch is long, or perhaps without an end, and enough of it has been read."""
    limit = SETTINGS["batches"]
    if iterator not in epochs or not limit or epochs[iterator]["n"] < limit:
        return False
    whole = epochs[iterator]["whole"]
    return whole is None or whole > LONG * limit


def is_read(iterator, cut: bool) -> None:
    if iterator in epochs:
        info = epochs[iterator]
        emit("read", loader=info["name"], epoch=info["number"], n=info["n"], cut=cut)
        open_batches.pop(info["name"], None)


def next_batch(original, iterator):
    """`__next__` of a loader's iterator: a long epoch ends early."""
    if safely(is_cut, iterator):
        safely(is_read, iterator, cut=True)
        raise StopIteration
    try:
        return original(iterator)
    except StopIteration:
        safely(is_read, iterator, cut=False)
        raise


def trains() -> None:
    """A backward: the batches that came before it are trained on."""
    for info in open_batches.values():
        if not info["trains"]:
            info["trains"] = True
            emit("trains", loader=info["name"], epoch=info["number"])
    open_batches.clear()


def validates() -> None:
    """A forward without gradients: its batch is not trained on."""
    open_batches.clear()


def own_generators(data) -> list[int]:
    """Hashes of the states of generators that a data set, or the one inside it, keeps as attributes."""
    states = []
    for thing in (data, getattr(data, "dataset", None)):
        for value in vars(thing).values() if hasattr(thing, "__dict__") else ():
            if isinstance(value, torch.Generator):
                states.append(value.get_state().numpy().tobytes())
            elif isinstance(value, np.random.Generator):
                states.append(repr(value.bit_generator.state).encode())
            elif isinstance(value, random.Random):
                states.append(repr(value.getstate()).encode())
    return [zlib.crc32(state) for state in states]


def states_for(fetcher) -> list[int]:
    return random_states() + own_generators(fetcher.dataset)


def compare_states(fetcher, n: int, before: list[int]) -> None:
    drawn = [i for i, (a, b) in enumerate(zip(before, states_for(fetcher), strict=True)) if a != b]
    if drawn:
        worker = torch.utils.data.get_worker_info()
        states = [before[i] for i in drawn]
        emit("draw", worker=worker and worker.id, n=n, which=drawn, states=states, at=draw_line(fetcher.dataset))


def fetch(original, fetcher, wanted):
    """A batch is read from the data set, perhaps in a worker: which random numbers are used?"""
    n = n_fetched[id(fetcher)]
    n_fetched[id(fetcher)] += 1
    before: list[int] = []
    if n < N_PROBES:
        safely(lambda: before.extend(states_for(fetcher)))
    batch = original(fetcher, wanted)
    if before:
        safely(compare_states, fetcher, n, before)
    return batch


def draw_line(data) -> list | None:
    """The first line of the data set's `__getitem__`, if it is the user's."""
    while hasattr(data, "indices") and hasattr(data, "dataset"):
        data = data.dataset
    function = getattr(type(data), "__getitems__", None) or getattr(type(data), "__getitem__", None)
    code = getattr(function, "__code__", None)
    return [code.co_filename, code.co_firstlineno] if code and is_users(code.co_filename) else None
