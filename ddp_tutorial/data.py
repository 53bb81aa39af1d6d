"""The four `.npy` files as PyTorch datasets, and the checks that refuse bad files."""

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ddp_tutorial.console import UserError, reason, say
from ddp_tutorial.files import check_regular

SCAN_BYTES = 16 * 2**20  # of float32 features read at a time: no scan needs the file in memory
FAR_OUT = 10  # times the spread of the middle half: a standard deviation that a few values make


class DataError(UserError):
    """The `.npy` files cannot be used."""


class NpyDataset(Dataset):
    """One split: features `X_path` (N, F) of any real type, integer classes `y_path` (N,) from 0.

    Both files stay on disk, mapped read-only; the ranks of one machine share a single copy in its page cache. A
    `DataLoader` fetches a whole batch by one `__getitems__`; `collate_fn=NpyDataset.collate` takes it as it is.

    Attributes: `n_features` F; `mean`, `std` (F,) float64; `class_counts` (C,) int64, of each label; `n_classes` C.
    Raises `DataError` for a missing, damaged or unsuitable file: every label and every feature is looked at, once.
    """

    def __init__(self, X_path: str | Path, y_path: str | Path):
        self.X_path, self.y_path = Path(X_path), Path(y_path)
        self.X, self.y = map_array(self.X_path), map_array(self.y_path)
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
        x = self.X.take(rows, axis=0).astype(np.float32, copy=False)
        y = self.y.take(rows).astype(np.int64, copy=False)
        return torch.from_numpy(x), torch.from_numpy(y)

    @staticmethod
    def collate(batch):
        """For `DataLoader(collate_fn=...)`: `__getitems__` has made the batch already."""
        return batch


class GpuBatches:
    """The batches of `loader`, in its order, gathered on the GPU `device` from a copy of its `NpyDataset` there."""

    def __init__(self, loader: DataLoader, device: torch.device):
        self.loader, data = loader, loader.dataset
        self.X = torch.empty(data.X.shape, device=device)
        self.y = torch.empty(data.y.shape, device=device, dtype=torch.int64)
        for rows in torch.arange(len(data)).split(max(1, SCAN_BYTES // (4 * data.n_features))):
            self.X[rows[0] : rows[-1] + 1], self.y[rows[0] : rows[-1] + 1] = data.__getitems__(rows)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = torch.from_numpy(np.fromiter(self.loader.sampler, np.int64)).to(self.y.device)  # all that crosses over
        for rows in order.split(self.loader.batch_size)[: len(self)]:
            yield self.X.index_select(0, rows), self.y.index_select(0, rows)


def place(data_on: str, device: torch.device, *loaders: DataLoader) -> tuple:
    """Where the data are, in words, and the loaders: as `GpuBatches` where the data are on the GPU.

    `data_on` is "gpu", "cpu", or "auto": on the GPU if they take at most half of its free memory. Raises `UserError`.
    """
    if device.type == "cpu":
        return "cpu", *loaders
    n_bytes = sum(4 * loader.dataset.X.size + 8 * len(loader.dataset) for loader in loaders)
    n_free, _ = torch.cuda.mem_get_info(device)
    if data_on == "gpu" and n_bytes > n_free:
        raise UserError(f"--data-on gpu: the data take {n_bytes / 1e9:.3g} GB, {n_free / 1e9:.3g} GB are free: use --data-on cpu")  # fmt: skip
    if data_on == "gpu" or (data_on == "auto" and n_bytes <= n_free / 2):
        return "cuda, data on the GPU", *(GpuBatches(loader, device) for loader in loaders)
    return "cuda, data in main memory", *loaders


def map_array(path: Path) -> np.ndarray:
    """Map a `.npy` file of real numbers for reading. Raises `DataError`."""
    try:
        check_regular(path)
        with warnings.catch_warnings(action="ignore"):  # numpy's own, about headers that Python 2 wrote
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file: make sample data with 'python -m data_gen', or name another folder with --data-dir") from None  # fmt: skip
    except OSError as error:
        raise DataError(f"{path}: {reason(error)}: put a readable file there") from None
    except Exception as error:  # whatever a made-up header provokes: numpy evaluates it
        raise DataError(f"{path}: {why_unreadable(path, error)}: write it again with numpy.save") from None
    if not isinstance(array, np.ndarray):
        array.close()
        raise DataError(f"{path}: this is an .npz archive: save each array in a file of its own with numpy.save")
    if array.dtype.kind not in "fiub":
        raise DataError(f"{path}: the type is {array.dtype}: save real numbers")
    return np.asarray(array)  # still mapped; the class memmap would slow each small gather


def why_unreadable(path: Path, error: Exception) -> str:
    with open(path, "rb") as file:
        head = file.read(6)
    if head != b"\x93NUMPY":
        return "this is not a .npy file" if head else "the file is empty"
    if "object" in str(error).lower():
        return "it holds Python objects, which could run code when loaded"
    return "the file is damaged or was cut short"


def check_shapes(X: np.ndarray, X_path: Path, y: np.ndarray, y_path: Path) -> None:
    """Raise `DataError` unless X is (N, F) and y is (N,), with at least one sample and one feature."""
    if X.ndim != 2 or X.shape[1] == 0:
        remedy = "call X.reshape(len(X), -1)" if X.ndim > 2 else "call X.reshape(-1, 1) for one feature" if X.ndim == 1 else "give at least one"  # fmt: skip
        raise DataError(f"{X_path}: the shape is {X.shape}, not (samples, features): {remedy}")
    if y.ndim != 1:
        remedy = "call y.argmax(axis=1) on one-hot labels" if y.ndim == 2 and y.shape[1] > 1 else "call y.ravel()"
        raise DataError(f"{y_path}: the shape is {y.shape}, not (samples,): {remedy}")
    if len(X) != len(y):
        raise DataError(f"{y_path}: {len(y)} labels for the {len(X)} samples of {X_path.name}: give each sample one label")  # fmt: skip
    if len(X) == 0:
        raise DataError(f"{X_path}: there are no samples: give at least one")


def count_labels(y: np.ndarray, path: Path) -> np.ndarray:
    """How often each class from 0 on occurs in `y`: (C,) int64. Raises `DataError` for labels that are not classes."""
    counts = np.zeros(1, np.int64)
    for i in range(0, len(y), SCAN_BYTES // 8):
        values, n = np.unique(y[i : i + SCAN_BYTES // 8], return_counts=True)
        with np.errstate(invalid="ignore"):
            wrong = values[values != np.floor(values)] if values.dtype.kind == "f" else ()
        for label, what in ((wrong[:1], "not an integer"), (values[values < 0], "negative"), (values[values.astype(float) >= 2**20], "too large")):  # fmt: skip
            if len(label):
                raise DataError(f"{path}: the label {label[0]:g} is {what}: number the classes 0, 1, 2, ...")
        values = values.astype(np.int64)
        counts = np.pad(counts, (0, max(0, values[-1] + 1 - len(counts))))
        counts[values] += n
    return counts


def mean_and_std(X: np.ndarray, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column, (F,) float64 each, by one pass over the file.

    Values relative to the first row keep the variance exact where the mean is large (Chan, Golub and LeVeque,
    "Algorithms for Computing the Sample Variance", 1983). Raises `DataError` if one is not finite in float32.
    """
    step = max(1, SCAN_BYTES // (4 * X.shape[1]))
    sums = np.zeros((2, X.shape[1]))
    with np.errstate(all="ignore"):
        origin = X[0].astype(np.float32).astype(np.float64)
        for i in range(0, len(X), step):
            x = X[i : i + step].astype(np.float32) - origin
            sums += x.sum(0), np.square(x, out=x).sum(0)
    bad = np.flatnonzero(~np.isfinite(sums).all(0))
    if len(bad):
        others = f", as do {len(bad) - 1} other features" if len(bad) > 1 else ""
        raise DataError(f"{path}: feature {bad[0]} holds a nan or an infinite value{others}: replace these values or leave their samples out")  # fmt: skip
    mean, mean_square = sums / len(X)
    return mean + origin, np.sqrt(np.maximum(mean_square - mean**2, 0))


def warn_of_outliers(train_set: NpyDataset) -> None:
    """Say so if a few values, far from all others, make the standard deviation of a feature."""
    rows = train_set.X[:: max(1, len(train_set) // 4096)].astype(np.float32)  # their spread stands for that of all
    low, high = np.percentile(rows, (25, 75), axis=0)
    times = np.divide(train_set.std.numpy(), high - low, out=np.zeros_like(low), where=high > low)
    worst = times.argmax()
    if times[worst] > FAR_OUT:
        say(f"warning: {train_set.X_path}: the standard deviation of feature {worst} is {times[worst]:.0f} times the width of its middle half, so a few values far out set its scale: look for outliers, or clip them", sys.stderr)  # fmt: skip


def load_splits(data_dir: str | Path | None) -> tuple[NpyDataset, NpyDataset]:
    """The training and the validation set in the folder `data_dir`, else `$DDP_DATA_DIR`, else `/mnt/ddp/sample`.

    Warns of outliers in the training set. Raises `DataError`, also if the two do not fit each other.
    """
    folder = Path(data_dir or os.environ.get("DDP_DATA_DIR") or "/mnt/ddp/sample")
    if not os.path.isdir(folder):  # Path.is_dir raises for a name that is too long
        raise DataError(f"{folder}: there is no such folder: make sample data with 'python -m data_gen', or name another folder with --data-dir")  # fmt: skip
    train_set, val_set = (NpyDataset(folder / f"X_{split}.npy", folder / f"y_{split}.npy") for split in ("train", "val"))  # fmt: skip
    if train_set.n_features != val_set.n_features:
        raise DataError(f"{val_set.X_path}: {val_set.n_features} features, but {train_set.X_path.name} has {train_set.n_features}: give both the same features")  # fmt: skip
    if np.count_nonzero(train_set.class_counts) == 1:  # the loss would be 0 from the start, and nobody would notice
        raise DataError(f"{train_set.y_path}: every label is {train_set.n_classes - 1}, so there is nothing to learn: give samples of at least two classes")  # fmt: skip
    known = np.pad(train_set.class_counts, (0, max(0, val_set.n_classes - train_set.n_classes)))[: val_set.n_classes]
    unseen = np.flatnonzero((val_set.class_counts > 0) & (known == 0))
    if len(unseen):
        raise DataError(f"{val_set.y_path}: the label {unseen[0]} is not in {train_set.y_path.name}: add training samples of that class, or leave it out")  # fmt: skip
    warn_of_outliers(train_set)
    return train_set, val_set


def guessing_loss(train_set: NpyDataset, val_set: NpyDataset) -> float:
    """The validation loss (nats) of always answering with the class frequencies of the training set."""
    frequencies = train_set.class_counts[: val_set.n_classes] / len(train_set)
    seen = val_set.class_counts > 0
    return float(-(val_set.class_counts[seen] * np.log(frequencies[seen])).sum() / len(val_set))
