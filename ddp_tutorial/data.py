"""The four `.npy` files as PyTorch datasets, and the checks that refuse bad files."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, DistributedSampler

from ddp_tutorial.cli import UserError, reason
from ddp_tutorial.files import check_regular

DEFAULT_DATA_DIR = "/mnt/ddp/sample"
SCAN_BYTES = 16 * 2**20  # of float32 features read at a time: no scan needs the file in memory


class DataError(UserError):
    """The `.npy` files cannot be used."""


class NpyDataset(Dataset):
    """One split: features `X_path` (N, F) of any real type, integer classes `y_path` (N,) from 0.

    Both files stay on disk, mapped read-only; the ranks of one machine share a single copy in its
    page cache. A `DataLoader` fetches a whole batch with one call of `__getitems__`: pass
    `collate_fn=NpyDataset.collate` so that it takes the batch as it is.

    Attributes: `n_features` F, `n_classes` (largest label + 1), `classes` (the labels that occur).

    Raises `DataError` for a missing, damaged or unsuitable file. Every label is looked at; the features are
    looked at by `moments`.
    """

    def __init__(self, X_path: str | Path, y_path: str | Path):
        self.X_path, self.y_path = Path(X_path), Path(y_path)
        self.X, self.y = map_array(self.X_path), map_array(self.y_path)
        if self.X.ndim != 2 or self.X.shape[1] == 0:
            raise DataError(f"{self.X_path}: the shape is {self.X.shape}: it must be (samples, features)")
        if self.y.ndim != 1:
            raise DataError(f"{self.y_path}: the shape is {self.y.shape}: it must be (samples,)")
        if len(self.X) != len(self.y):
            raise DataError(
                f"{self.y_path}: {len(self.y)} labels for the {len(self.X)} samples of {self.X_path.name}: "
                "give each sample one label"
            )
        if len(self.X) == 0:
            raise DataError(f"{self.X_path}: there are no samples: give at least one")
        self.n_features = self.X.shape[1]
        self.classes = check_labels(self.y, self.y_path)
        self.n_classes = int(self.classes[-1]) + 1

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

    def moments(self, part: int = 0, n_parts: int = 1) -> torch.Tensor:
        """Count, sum and sum of squares of each feature over one of `n_parts` blocks of rows.

        Returns (3, F) float64; the tensors of all parts add up to that of the whole. The values are
        taken relative to the first row, which keeps the variance exact where the mean is large
        (Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance", 1983).
        A nan or an infinity in a feature makes its sums non-finite: see `standardization`.
        """
        start, stop = (len(self) * p // n_parts for p in (part, part + 1))
        step = max(1, SCAN_BYTES // (4 * self.n_features))
        sums = np.zeros((3, self.n_features))
        with np.errstate(all="ignore"):
            for i in range(start, stop, step):
                x = self.X[i : min(i + step, stop)].astype(np.float32) - self._origin()
                sums[0] += len(x)
                sums[1] += x.sum(0)
                sums[2] += np.square(x, out=x).sum(0)
        return torch.from_numpy(sums)

    def standardization(self, moments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (F,) and standard deviation (F,), float64, from the `moments` of all rows.

        Raises `DataError` if a feature holds a value that is not finite in float32.
        """
        count, total, total_square = moments.cpu()
        bad = torch.nonzero(~(total + total_square).isfinite()).flatten().tolist()
        if bad:
            raise DataError(
                f"{self.X_path}: feature {bad[0]} holds a nan or an infinite value"
                + (f", as do {len(bad) - 1} other features" if bad[1:] else "")
                + ": replace these values or leave their samples out"
            )
        mean = total / count
        std = (total_square / count - mean**2).clamp(min=0).sqrt()
        return mean + torch.from_numpy(self._origin()), std

    def _origin(self) -> np.ndarray:
        return self.X[0].astype(np.float32).astype(np.float64)


def indices(sampler: DistributedSampler) -> np.ndarray:
    """`list(sampler)` as an array, for a sampler that shuffles and drops the rest.

    `DistributedSampler` makes a Python list of the whole data set's indices in each rank: 40 bytes and
    60 ns a sample, every epoch. The numbers and their order are the same.
    """
    generator = torch.Generator().manual_seed(sampler.seed + sampler.epoch)
    order = torch.randperm(len(sampler.dataset), generator=generator)
    return order[sampler.rank : sampler.total_size : sampler.num_replicas].contiguous().numpy()


def batches(rows: np.ndarray, batch_size: int, drop_last: bool = True) -> list[np.ndarray]:
    """`rows` in parts of `batch_size`, without or with the rest, for `DataLoader(batch_sampler=...)`."""
    stop = len(rows) - batch_size + 1 if drop_last else len(rows)
    return [rows[i : i + batch_size] for i in range(0, stop, batch_size)]


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
    if not head:
        return "the file is empty"
    if head != b"\x93NUMPY":
        return "this is not a .npy file"
    if "object" in str(error).lower():
        return "it holds Python objects, which could run code when loaded"
    return "the file is damaged or was cut short"


def check_labels(y: np.ndarray, path: Path) -> np.ndarray:
    """The classes that occur in `y`, ascending, int64. Raises `DataError` for labels that are not classes."""
    found = np.empty(0, np.int64)
    for i in range(0, len(y), SCAN_BYTES // 8):
        values = np.unique(y[i : i + SCAN_BYTES // 8])
        with np.errstate(invalid="ignore"):
            wrong = values[values != np.floor(values)] if values.dtype.kind == "f" else ()
        if len(wrong):
            raise DataError(f"{path}: the label {wrong[0]:g} is not an integer: number the classes 0, 1, 2, ...")
        if values[0] < 0:
            raise DataError(f"{path}: the label {values[0]:g} is negative: number the classes 0, 1, 2, ...")
        if float(values[-1]) >= 2**20:
            raise DataError(f"{path}: the label {values[-1]:g} is too large: number the classes 0, 1, 2, ...")
        found = np.union1d(found, values.astype(np.int64))
    return found


def resolve_data_dir(data_dir: str | Path | None) -> Path:
    """The folder of the four files: `data_dir`, else `$DDP_DATA_DIR`, else `/mnt/ddp/sample`."""
    return Path(data_dir or os.environ.get("DDP_DATA_DIR") or DEFAULT_DATA_DIR)


def load_split(data_dir: str | Path | None, split: str) -> NpyDataset:
    """`X_{split}.npy` and `y_{split}.npy` of a folder (see `resolve_data_dir`); `split` is "train" or "val".

    Raises `DataError`.
    """
    folder = resolve_data_dir(data_dir)
    if not os.path.isdir(folder):  # Path.is_dir raises for a name that is too long
        raise DataError(f"{folder}: there is no such folder: make sample data with 'python -m data_gen', or name another folder with --data-dir")  # fmt: skip
    return NpyDataset(folder / f"X_{split}.npy", folder / f"y_{split}.npy")


def load_splits(data_dir: str | Path | None) -> tuple[NpyDataset, NpyDataset]:
    """The training and the validation set of a folder. Raises `DataError`, also if they do not fit each other."""
    train_set, val_set = load_split(data_dir, "train"), load_split(data_dir, "val")
    if train_set.n_features != val_set.n_features:
        raise DataError(
            f"{val_set.X_path}: {val_set.n_features} features, but {train_set.X_path.name} has {train_set.n_features}: "
            "give both the same features"
        )
    if len(train_set.classes) == 1:  # the loss would be 0 from the start, and nobody would notice
        raise DataError(
            f"{train_set.y_path}: every label is {train_set.classes[0]}, so there is nothing to learn: "
            "give samples of at least two classes"
        )
    unseen = np.setdiff1d(val_set.classes, train_set.classes)
    if len(unseen):
        raise DataError(
            f"{val_set.y_path}: the label {unseen[0]} is not in {train_set.y_path.name}: "
            "add training samples of that class, or leave it out"
        )
    return train_set, val_set


def split_batch(batch_size: int, train_set: NpyDataset, world_size: int) -> int:
    """The samples of a step that each of `world_size` ranks takes: an equal share of `batch_size`.

    A batch larger than the training set is all of it. Raises `UserError` if the shares are not equal.
    """
    n = len(train_set)
    if n < world_size:
        raise DataError(f"{train_set.X_path}: {n} samples cannot be shared by {world_size} ranks: start at most {n}")
    batch_size = min(batch_size, n)
    if batch_size % world_size:
        all_of_them = " (all samples)" if batch_size == n else ""
        nearest = max(world_size, batch_size // world_size * world_size)
        raise UserError(
            f"--batch-size {batch_size}{all_of_them} does not divide among {world_size} ranks: use a multiple of "
            f"{world_size}, such as {nearest}"
        )
    return batch_size // world_size
