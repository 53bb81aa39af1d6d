"""The `.npy` files that people bring: mapped, looked at to the last value in blocks of bounded size, or refused."""

import errno
import os
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from ddp_tutorial.console import UserError, reason
from ddp_tutorial.files import check_regular

n_processes = 1  # of this machine that read the same files; `process` knows
SCAN_BYTES = 4 * 2**20  # of a block as float32: no scan needs the file in memory
SAMPLE = 4096  # rows at most, evenly spaced, whose spread stands for that of all
FAR_OUT = 10  # times the spread of the middle half: a standard deviation that a few values make
ROUNDED = 4 * np.finfo(np.float32).eps  # of a feature's size: of a smaller spread, float32 keeps a step or two
NO_DATA_YET = "make sample data with 'python -m data_gen', or name another folder with --data-dir"
X_AS_NUMBERS = "X.astype(float)"
Y_AS_NUMBERS = "np.unique(np.concatenate((y_train, y_val)), return_inverse=True)[1]"  # one numbering for both
NUMBER_CLASSES = f"number the classes 0, 1, 2, ... in both files at once, {Y_AS_NUMBERS}"
CANNOT_MAP = (errno.ENODEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # what such a disk answers to mmap


class DataError(UserError):
    """The `.npy` files cannot be used."""


def map_array(path: Path, as_numbers: str) -> np.ndarray:
    """Map a `.npy` file of real numbers for reading; where the disk cannot map files, read it into memory.

    `as_numbers` is the expression that makes numbers of whatever else it holds. Raises `DataError`.
    """
    try:
        check_regular(path)
        with warnings.catch_warnings(action="ignore"):  # numpy's own, about headers that Python 2 wrote
            array = load(path)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file: {NO_DATA_YET}") from None
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{path}: {reason(error)}: put a readable file there") from None
    except Exception as error:  # whatever a made-up header provokes: numpy evaluates it
        raise DataError(f"{path}: {why_unreadable(path, error, as_numbers)}") from None
    if not isinstance(array, np.ndarray):
        array.close()
        raise DataError(f"{path}: this is an .npz archive: save each array in a file of its own with numpy.save")
    if array.dtype.kind not in "fiub":
        raise DataError(f"{path}: {why_not_numbers(array.dtype, as_numbers)}")
    return np.asarray(array)  # still mapped; the class memmap would slow each small gather


def load(path: Path) -> np.ndarray:
    """The array in the file: mapped, or in memory. Raises whatever numpy does, and `DataError` for want of memory."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        if error.errno not in CANNOT_MAP:
            raise
    n_bytes, n_free = os.path.getsize(path), free_memory()
    if n_processes * n_bytes > n_free:
        memory = f"{n_processes} x {n_bytes / 1e9:.3g} GB of memory are needed, {n_free / 1e9:.3g} GB are free"
        raise DataError(f"{path}: this disk cannot map files, and {memory}: copy the files to a disk of this machine")
    return np.load(path, allow_pickle=False)


def is_mapped(array: np.ndarray) -> bool:
    """Whether an array of `map_array` is a map of its file, not a copy."""
    return isinstance(array.base, np.memmap)


def free_memory() -> int:
    """Bytes that processes can get: what is free, and what the page cache gives back."""
    with suppress(OSError, StopIteration), open("/proc/meminfo") as file:
        return 1024 * int(next(line for line in file if line.startswith("MemAvailable:")).split()[1])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def why_unreadable(path: Path, error: Exception, as_numbers: str) -> str:
    """What is wrong with a file that numpy cannot read, and what to do."""
    with open(path, "rb") as file:
        head = file.read(6)
    again = "write it again with numpy.save"
    if head != b"\x93NUMPY":
        return f"{'this is not a .npy file' if head else 'the file is empty'}: {again}"
    if "object" in str(error).lower():
        return f"it holds Python objects, which could run code when loaded: {again}, as {as_numbers}"
    if "'<f1'" in str(error):  # how numpy.save writes float8_e5m2, and cannot read it
        return f"the type is float8, which numpy cannot read: {again}, as {X_AS_NUMBERS}"
    return f"the file is damaged or was cut short: {again}"


def why_not_numbers(dtype: np.dtype, as_numbers: str) -> str:
    """What is wrong with a file of this type, and what to do."""
    if dtype.kind == "V" and not dtype.names and dtype.itemsize <= 2:  # numpy.save loses the names of such types
        kind = "bfloat16" if dtype.itemsize == 2 else "float8, say,"
        return f"the type is {dtype}, as numpy.save writes {kind} of ml_dtypes: save real numbers, {X_AS_NUMBERS}"
    if dtype.names:
        as_numbers = "numpy.lib.recfunctions.structured_to_unstructured(X)"
    elif dtype.kind not in "USOMm":
        return f"the type is {dtype}: save real numbers"
    return f"the type is {dtype}: save real numbers, {as_numbers}"


def check_shapes(X: np.ndarray, X_path: Path, y: np.ndarray, y_path: Path) -> None:
    """Raise `DataError` unless X is (N, F) and y is (N,), with at least one sample and one feature."""
    if X.ndim != 2 or X.shape[1] == 0:
        remedies = {1: "call X.reshape(-1, 1) for one feature", 2: "give at least one"}
        remedy = remedies.get(X.ndim, "call X.reshape(len(X), -1)")
        raise DataError(f"{X_path}: the shape is {X.shape}, not (samples, features): {remedy}")
    if y.ndim != 1:
        remedy = "call y.argmax(axis=1) on one-hot labels" if y.ndim == 2 and y.shape[1] > 1 else "call y.ravel()"
        raise DataError(f"{y_path}: the shape is {y.shape}, not (samples,): {remedy}")
    if len(X) != len(y):
        numbers = f"{len(y)} labels for the {len(X)} samples of {X_path.name}"
        raise DataError(f"{y_path}: {numbers}: give each sample one label")
    if len(X) == 0:
        raise DataError(f"{X_path}: there are no samples: give at least one")


def count_labels(y: np.ndarray, path: Path) -> np.ndarray:
    """How often each class from 0 on occurs in `y`: (C,) int64. Raises `DataError` for labels that are not classes."""
    counts = np.zeros(1, np.int64)
    for i in range(0, len(y), max(1, SCAN_BYTES // 8)):
        values, n = np.unique(y[i : i + max(1, SCAN_BYTES // 8)], return_counts=True)
        with np.errstate(invalid="ignore"):
            wrong = values[values != np.floor(values)] if values.dtype.kind == "f" else ()
        too_large = values[values.astype(float) >= 2**20]
        for labels, what in ((wrong, "not an integer"), (values[values < 0], "negative"), (too_large, "too large")):
            if len(labels):
                raise DataError(f"{path}: the label {labels[0]:g} is {what}: {NUMBER_CLASSES}")
        values = values.astype(np.int64)
        counts = np.pad(counts, (0, max(0, values[-1] + 1 - len(counts))))
        counts[values] += n
    return counts


def blocks(X: np.ndarray) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of parts of X (N, F) that lie together in its file, of at most `SCAN_BYTES` as float32."""
    n_values = max(1, SCAN_BYTES // 4)
    if X.flags.c_contiguous:
        n_columns = min(X.shape[1], n_values)
        n_rows = n_values // n_columns
    else:
        n_rows = min(len(X), n_values)
        n_columns = n_values // n_rows
    for i in range(0, len(X), n_rows):
        for j in range(0, X.shape[1], n_columns):
            yield slice(i, i + n_rows), slice(j, j + n_columns)


def mean_and_std(X: np.ndarray, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column as float32, (F,) float64 each, by one pass over the file.

    Values relative to the first row keep the variance exact where the mean is large (Chan, Golub and LeVeque,
    "Algorithms for Computing the Sample Variance", 1983). Raises `DataError` if one is not finite in float32.
    """
    sums = np.zeros((2, X.shape[1]))
    with np.errstate(all="ignore"):
        origin = X[0].astype(np.float32).astype(np.float64)
        for rows, columns in blocks(X):
            x = X[rows, columns].astype(np.float32) - origin[columns]
            sums[:, columns] += x.sum(0), np.square(x, out=x).sum(0)
    bad = np.flatnonzero(~np.isfinite(sums).all(0))
    if len(bad):
        raise DataError(f"{path}: {why_not_finite(X, bad)}")
    mean, mean_square = sums / len(X)
    return mean + origin, np.sqrt(np.maximum(mean_square - mean**2, 0))


def why_not_finite(X: np.ndarray, bad: np.ndarray) -> str:
    """What is wrong with the features `bad` of X, and what to do."""
    feature = X[:, bad[0] : bad[0] + 1]
    others = f", as do {len(bad) - 1} other features" if len(bad) > 1 else ""
    if all(np.isfinite(feature[rows]).all() for rows, _ in blocks(feature)):
        return f"feature {bad[0]} holds values beyond 3.4e38, float32's largest{others}: divide them, or clip them"
    return f"feature {bad[0]} holds a nan or an infinite value{others}: replace these values or leave their samples out"


def sample(X: np.ndarray) -> np.ndarray:
    """At most `SAMPLE` rows of X, evenly spaced; nothing is copied."""
    return X[:: -(-len(X) // SAMPLE)]


def find_outliers(X: np.ndarray, std: np.ndarray) -> tuple[int, float]:
    """The feature whose standard deviation is the most times the width of its middle half, and how many times.

    The rows of `sample` stand for all. 0 times where there is no width.
    """
    rows = sample(X)
    n_columns, times = max(1, SCAN_BYTES // (4 * len(rows))), np.zeros(len(std))
    for j in range(0, len(std), n_columns):
        columns = slice(j, j + n_columns)
        values = rows[:, columns].astype(np.float32)
        low, high = np.percentile(values, (25, 75), axis=0)
        np.divide(std[columns], high - low, out=times[columns], where=high > low)
        for k in np.flatnonzero(times[columns] > FAR_OUT):
            width = width_without_the_commonest(values[:, k])
            times[j + k] = std[j + k] / width if width else 0
    return int(times.argmax()), float(times.max())


def width_without_the_commonest(values: np.ndarray) -> float:
    """The width of the middle half of `values` (N,), without the value that a quarter of them or more share, if any.

    Of pixels that are mostly 0, three quarters or a little less can be 0: then all of the middle half nearly is.
    """
    distinct, n = np.unique(values, return_counts=True)
    if n.max() >= len(values) / 4 and len(distinct) > 1:
        values = values[values != distinct[n.argmax()]]
    low, high = np.percentile(values, (25, 75))
    return float(high - low)


def find_rounded(X: np.ndarray, mean: np.ndarray, std: np.ndarray) -> int | None:
    """The first feature that is not constant, but whose values float32 cannot tell apart; None if there is none.

    The rows of `sample` stand for all. `mean`, `std` (F,) are those of `mean_and_std`.
    """
    if np.can_cast(X.dtype, np.float32):
        return None
    rows = sample(X)
    return next((j for j in np.flatnonzero(std < ROUNDED * np.abs(mean)) if (rows[:, j] != rows[0, j]).any()), None)
