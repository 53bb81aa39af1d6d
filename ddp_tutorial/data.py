"""The four `.npy` files as PyTorch datasets."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ddp_tutorial.console import UserError, announce, warn
from ddp_tutorial.npy import (
    FAR_OUT,
    NO_DATA_YET,
    NUMBER_CLASSES,
    X_AS_NUMBERS,
    Y_AS_NUMBERS,
    DataError,
    blocks,
    check_shapes,
    count_labels,
    find_outliers,
    find_rounded,
    is_mapped,
    map_array,
    mean_and_std,
    sample,
)


class NpyDataset(Dataset):
    """One split: features `X_path` (N, F) of any real type, integer classes `y_path` (N,) from 0.

    Both files stay on disk, mapped read-only; the processes of one machine share a single copy in its page cache. A
    `DataLoader` fetches a whole batch by one `__getitems__`; `collate_fn=NpyDataset.collate` takes it as it is.

    Attributes: `n_features` F; `mean`, `std` (F,) float64; `class_counts` (C,) int64, of each label; `n_classes` C.
    Raises `DataError` for a missing, damaged or unsuitable file: every label and every feature is looked at, once.
    """

    def __init__(self, X_path: str | Path, y_path: str | Path):
        self.X_path, self.y_path = Path(X_path), Path(y_path)
        self.X, self.y = map_array(self.X_path, X_AS_NUMBERS), map_array(self.y_path, Y_AS_NUMBERS)
        check_shapes(self.X, self.X_path, self.y, self.y_path)
        self.n_features = self.X.shape[1]
        self.class_counts = count_labels(self.y, self.y_path)
        self.n_classes = len(self.class_counts)
        self.mean, self.std = map(torch.from_numpy, mean_and_std(self.X, self.X_path))

    def __len__(self) -> int:
        return len(self.X)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One sample: x (F,) float32 and y () int64."""
        x, y = self.__getitems__([index])
        return x[0], y[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch in one gather: x (B, F) float32 and y (B,) int64, copies of the files' values."""
        rows = np.asarray(indices, dtype=np.intp)
        x = np.ascontiguousarray(gather(self.X, rows), dtype=np.float32)
        y = np.ascontiguousarray(gather(self.y, rows), dtype=np.int64)
        return torch.from_numpy(x), torch.from_numpy(y)

    def fingerprint(self) -> str:
        """16 hexadecimal digits of the shape, the class counts, and 64 rows, evenly spaced, as the model gets them.

        Other data have others, but for a change that spares these rows and all counts. The same values saved in
        another type or order have the same.
        """
        rows = np.linspace(0, len(self) - 1, 64).astype(np.intp)
        state = hashlib.blake2b(repr(self.X.shape).encode(), digest_size=8)
        for array in (
            self.class_counts,
            gather(self.X, rows).astype(np.float32),
            gather(self.y, rows).astype(np.int64),
        ):
            state.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
        return state.hexdigest()

    @staticmethod
    def collate(batch):
        """For `DataLoader(collate_fn=...)`: `__getitems__` has made the batch already."""
        return batch


def gather(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Copies of these rows. `take` is the faster, but it first copies all of an array that is not as it wants it."""
    as_it_wants = array.flags.c_contiguous and array.flags.aligned
    return array.take(rows, axis=0) if as_it_wants else array[rows]


class GpuBatches:
    """The batches of `loader`, in its order, gathered on the GPU `device` from a copy of its `NpyDataset` there."""

    def __init__(self, loader: DataLoader, device: torch.device):
        self.loader, data = loader, loader.dataset
        self.X = torch.empty(data.X.shape, device=device)
        self.y = torch.empty(data.y.shape, device=device, dtype=torch.int64)
        for rows, columns in blocks(data.X):  # a part of X at a time, as it lies in the file
            self.X[rows, columns] = torch.from_numpy(data.X[rows, columns].astype(np.float32, order="C"))
        for rows, _ in blocks(data.y[:, None]):
            self.y[rows] = torch.from_numpy(data.y[rows].astype(np.int64))

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = torch.from_numpy(np.fromiter(self.loader.sampler, np.int64)).to(self.y.device)  # all that crosses over
        for rows in order.split(self.loader.batch_size)[: len(self)]:
            yield self.X.index_select(0, rows), self.y.index_select(0, rows)


def move_data_to_gpu(data_on: str, device: torch.device, *loaders: DataLoader) -> tuple:
    """The loaders, as `GpuBatches` where the data are to lie on the GPU `device`. On a CPU nothing is moved.

    `data_on` is "gpu", "cpu", or "auto": on the GPU if they take at most half of its free memory. Raises `UserError`.
    """
    if device.type == "cpu":
        return loaders
    n_bytes = sum(4 * loader.dataset.X.size + 8 * len(loader.dataset) for loader in loaders)
    n_free, _ = torch.cuda.mem_get_info(device)
    if data_on == "gpu" and n_bytes > n_free:
        sizes = f"the data take {n_bytes / 1e9:.3g} GB, {n_free / 1e9:.3g} GB are free"
        raise UserError(f"--data-on gpu: {sizes}: use --data-on cpu")
    moved = data_on == "gpu" or (data_on == "auto" and n_bytes <= n_free / 2)
    announce("the data are on the GPU" if moved else "the data are in main memory")
    return tuple(GpuBatches(loader, device) for loader in loaders) if moved else loaders


def warn_of(train_set: NpyDataset, val_set: NpyDataset) -> None:
    """Say what the files can be used with, but had better be without: what costs time, or spoils what is learned."""
    X_path, X = train_set.X_path, train_set.X
    if not all(is_mapped(array) for split in (train_set, val_set) for array in (split.X, split.y)):
        warn(f"{X_path.parent}: this disk cannot map files, so each process has read them into memory")
    for split in (train_set, val_set):
        # With ten features a gather takes about twice as long, with more of them longer: `python -m benchmarks data`.
        if split.X.shape[1] >= 10 and not split.X.flags.c_contiguous:
            cost = "is in Fortran order, as DataFrames are, so each batch takes several times as long to gather"
            warn(f"{split.X_path}: X {cost}: save np.ascontiguousarray(X, dtype=np.float32)")
            break
    n_classes, n_used = train_set.n_classes, np.count_nonzero(train_set.class_counts)
    if n_classes >= 1000 and n_classes > 2 * n_used:
        cost = f"{n_used:,} classes have numbers up to {n_classes - 1:,}, so a step costs as much as for all of these"
        warn(f"{train_set.y_path}: {cost}: {NUMBER_CLASSES}")
    feature = find_rounded(X, train_set.mean.numpy(), train_set.std.numpy())
    if feature is not None:
        what = f"feature {feature} varies by {sample(X[:, feature]).std():.2g} around {train_set.mean[feature]:.3g}"
        remedy = "save X - X_train.mean(axis=0), both splits"
        warn(f"{X_path}: {what}, which float32 cannot tell apart, so nothing is learned from it: {remedy}")
    feature, times = find_outliers(X, train_set.std.numpy())
    if times > FAR_OUT:
        warn(
            f"{X_path}: the standard deviation of feature {feature} is {times:.0f} times the width of "
            "its middle half, so a few values far out set its scale: look for outliers, or clip them"
        )


def load_splits(data_dir: str | Path | None) -> tuple[NpyDataset, NpyDataset]:
    """The training and the validation set in the folder `data_dir`, else `$DDP_DATA_DIR`, else `/mnt/ddp/sample`.

    Warns of what `warn_of` finds. Raises `DataError`, also if the two do not fit each other.
    """
    folder = Path(data_dir or os.environ.get("DDP_DATA_DIR") or "/mnt/ddp/sample")
    if not os.path.isdir(folder):  # Path.is_dir raises for a name that is too long
        raise DataError(f"{folder}: there is no such folder: {NO_DATA_YET}")
    train_set, val_set = (
        NpyDataset(folder / f"X_{split}.npy", folder / f"y_{split}.npy") for split in ("train", "val")
    )
    check_splits(train_set, val_set)
    warn_of(train_set, val_set)
    return train_set, val_set


def check_splits(train_set: NpyDataset, val_set: NpyDataset) -> None:
    """Raise `DataError` unless the two have the same features, and the training set all classes of the other.

    A step takes the time and memory of all class numbers: 10,000 or more, of which not a tenth is used, are refused.
    """
    X_train, y_train = train_set.X_path.name, train_set.y_path.name
    if train_set.n_features != val_set.n_features:
        numbers = f"{val_set.n_features} features, but {X_train} has {train_set.n_features}"
        raise DataError(f"{val_set.X_path}: {numbers}: give both the same features")
    if np.count_nonzero(train_set.class_counts) == 1:  # the loss would be 0 from the start, and nobody would notice
        what = f"every label is {train_set.n_classes - 1}, so there is nothing to learn"
        raise DataError(f"{train_set.y_path}: {what}: give samples of at least two classes")
    n_used = np.count_nonzero(train_set.class_counts)
    if train_set.n_classes >= 10_000 and train_set.n_classes > 10 * n_used:
        what = (
            f"{n_used:,} classes have numbers up to {train_set.n_classes - 1:,}, and a step would pay for all of these"
        )
        raise DataError(f"{train_set.y_path}: {what}: {NUMBER_CLASSES}")
    known = np.pad(train_set.class_counts, (0, max(0, val_set.n_classes - train_set.n_classes)))[: val_set.n_classes]
    unseen = np.flatnonzero((val_set.class_counts > 0) & (known == 0))
    if len(unseen):
        what = f"the label {unseen[0]} is not in {y_train}"
        raise DataError(f"{val_set.y_path}: {what}: add training samples of that class, or leave it out")


def class_prior_loss(train_set: NpyDataset, val_set: NpyDataset) -> float:
    """The validation loss (nats) of always answering with the class frequencies of the training set."""
    frequencies = train_set.class_counts[: val_set.n_classes] / len(train_set)
    seen = val_set.class_counts > 0
    return float(-(val_set.class_counts[seen] * np.log(frequencies[seen])).sum() / len(val_set))
