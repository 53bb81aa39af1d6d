"""ddp_tutorial.data: NpyDataset, what it knows of its files, what it warns of."""

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, Subset

from ddp_tutorial import console, data, npy
from ddp_tutorial.console import UserError
from ddp_tutorial.data import DataError, GpuBatches, NpyDataset, class_prior_loss, load_splits, move_data_to_gpu
from ddp_tutorial.process import per_rank_batch_size
from tests.ranks import Attack, assert_same, save_data


def dataset(folder, X, y=None):
    save_data(folder, X=X, y=np.arange(len(X)) % 2 if y is None else y)
    return NpyDataset(folder / "X.npy", folder / "y.npy")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("dtype", ["f4", "f8", "f2", ">f4", ">f8", "i4", "i8", ">i2", "u1", "u8", "?"])
def test_any_real_type_gives_float32_and_int64(dtype, order, tmp_path):
    X = np.asarray(np.arange(60).reshape(12, 5) % 7, dtype=dtype, order=order)
    y = (np.arange(12) % 2).astype(dtype)
    samples = dataset(tmp_path, X, y)
    x, labels = samples.__getitems__([3, 0, 3, 11])
    assert (x.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert x.tolist() == X[[3, 0, 3, 11]].astype(float).tolist()
    assert labels.tolist() == [1, 0, 1, 1]
    assert (samples.n_features, samples.n_classes, samples.class_counts.tolist()) == (5, 2, [6, 6])


def test_the_files_stay_as_they_are(tmp_path):
    samples = dataset(tmp_path, np.ones((4, 2), np.float32))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    x, y = samples.__getitems__([0, 1])
    x.add_(5)
    y.add_(5)
    for array in (samples.X, samples.y):
        assert isinstance(array.base, np.memmap) and array.base.mode == "r" and not array.flags.writeable
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()} == before
    assert samples[0][0].tolist() == [1, 1]


def test_a_batch_is_its_samples(tmp_path):
    samples = dataset(tmp_path, np.random.default_rng(0).standard_normal((9, 3)))
    order = [8, 2, 2, 5]
    x, y = samples.__getitems__(order)
    singles = [samples[i] for i in order]
    assert torch.equal(x, torch.stack([s[0] for s in singles]))
    assert torch.equal(y, torch.stack([s[1] for s in singles]))
    assert singles[0][0].shape == (3,) and singles[0][1].shape == ()


def test_an_empty_batch(tmp_path):
    x, y = dataset(tmp_path, np.ones((4, 3))).__getitems__([])
    assert (x.shape, y.shape, x.dtype, y.dtype) == ((0, 3), (0,), torch.float32, torch.int64)


@pytest.mark.parametrize("indices", [range(10), range(1, 10, 2), range(0)], ids=["all", "odd", "none"])
def test_a_loader_gathers_a_batch_in_one_call(indices, tmp_path, monkeypatch):
    samples = dataset(tmp_path, np.arange(30.0).reshape(10, 3))
    gather, calls = NpyDataset.__getitems__, []

    def count(self, rows):
        calls.append(list(rows))
        return gather(self, rows)

    monkeypatch.setattr(NpyDataset, "__getitems__", count)
    loader = DataLoader(Subset(samples, indices), batch_size=4, collate_fn=NpyDataset.collate)
    batches = list(loader)
    assert calls == [list(indices[i : i + 4]) for i in range(0, len(indices), 4)]
    assert [row for x, _ in batches for row in x[:, 0].tolist()] == [3 * i for i in indices]


@pytest.fixture
def wild(tmp_path):
    """Columns of a large mean and a small deviation, and of the reverse, with a first row far out."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((1001, 5)) * [1e-3, 1e-3, 1, 4e3, 1e-3] + [4e3, 0, -7, 1e-3, 1]
    X[0] += 10 * np.array([1e-3, 1e-3, 1, 4e3, 1e-3])
    return dataset(tmp_path, X.astype(np.float32))


@pytest.mark.parametrize("dtype", ["f4", "f8", "u1"])
@pytest.mark.parametrize("drop_last", [False, True])
def test_batches_gathered_on_the_device_are_the_loaders(drop_last, dtype, tmp_path, monkeypatch):
    """In test_gpu.py a GPU gathers them; here the CPU does. The copy is made in several parts."""
    monkeypatch.setattr(npy, "SCAN_BYTES", 7 * 5 * 4)
    samples = dataset(tmp_path, np.random.default_rng(0).uniform(0, 200, (53, 5)).astype(dtype))
    for sampler in (DistributedSampler(samples, 2, 1, drop_last=drop_last), range(1, 53, 3), range(0)):
        loader = DataLoader(samples, 4, sampler=sampler, drop_last=drop_last, collate_fn=NpyDataset.collate)
        batches = GpuBatches(loader, torch.device("cpu"))
        for epoch in (0, 1):
            if isinstance(sampler, DistributedSampler):
                sampler.set_epoch(epoch)
            expected, found = list(loader), list(batches)
            assert len(found) == len(batches) == len(expected)
            assert_same(found, expected)


def test_without_a_gpu_the_data_stay_where_they_are(tmp_path):
    loader = DataLoader(dataset(tmp_path, np.ones((4, 2), np.float32)), 2)
    assert move_data_to_gpu("auto", torch.device("cpu"), loader, loader) == (loader, loader)


def test_the_gpu_holds_the_data_if_half_of_its_free_memory_is_enough(tmp_path, monkeypatch):
    loader = DataLoader(dataset(tmp_path, np.ones((10, 3), np.float32)))
    n_bytes = 10 * (3 * 4 + 8)
    monkeypatch.setattr(data, "GpuBatches", lambda loader, device: "a copy")
    for data_on, n_free, found in (
        ("auto", 2 * n_bytes, "a copy"),
        ("auto", 2 * n_bytes - 1, loader),
        ("gpu", n_bytes, "a copy"),
        ("cpu", 100 * n_bytes, loader),
    ):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, n_free=n_free: (n_free, 10**12))
        (placed,) = move_data_to_gpu(data_on, torch.device("cuda"), loader)
        assert placed is found, (data_on, n_free)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (n_bytes - 1, 10**12))
    with pytest.raises(UserError, match="--data-on gpu: the data take .*: use --data-on cpu"):
        move_data_to_gpu("gpu", torch.device("cuda"), loader)


@pytest.mark.parametrize("scan_bytes", [20, 3000, 2**24])  # a row at a time, several, all
def test_mean_and_std_are_those_of_float64(scan_bytes, wild, monkeypatch):
    monkeypatch.setattr(npy, "SCAN_BYTES", scan_bytes)
    samples, X = NpyDataset(wild.X_path, wild.y_path), np.asarray(wild.X, np.float64)
    assert samples.mean.dtype == samples.std.dtype == torch.float64
    np.testing.assert_allclose(samples.mean.numpy(), X.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(samples.std.numpy(), X.std(0), rtol=1e-9)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300], ids=str)
def test_features_must_be_finite_in_float32(value, tmp_path):
    X = np.ones((5, 3))
    X[4, 1] = value
    with pytest.raises(DataError, match=r"X\.npy: feature 1 "):
        dataset(tmp_path, X)


def test_code_in_a_file_does_not_run(tmp_path):
    path = tmp_path / "X.npy"
    path.write_bytes(pickle.dumps(Attack(tmp_path / "attacked")))  # numpy.load would unpickle such a file too
    with pytest.raises(DataError, match="not a .npy file"):
        NpyDataset(path, path)
    assert not (tmp_path / "attacked").exists()


def test_labels_are_looked_at_to_the_last(tmp_path, monkeypatch):
    monkeypatch.setattr(npy, "SCAN_BYTES", 80)
    y = np.zeros(35, np.int64)
    y[[20, 34]] = 4, 2
    assert dataset(tmp_path, np.ones((35, 1)), y).class_counts.tolist() == [33, 0, 1, 0, 1]
    y[34] = -1
    with pytest.raises(DataError, match="label -1 is negative"):
        dataset(tmp_path, np.ones((35, 1)), y)


def test_where_the_data_are(small, tmp_path, monkeypatch):
    other = save_data(tmp_path / "other", **{path.stem: np.load(path)[:9] for path in small.iterdir()})
    monkeypatch.setenv("DDP_DATA_DIR", str(small))
    assert [len(split) for split in load_splits(None)] == [40, 20]
    assert [len(split) for split in load_splits(other)] == [9, 9]


def test_guessing_loss_is_that_of_the_class_frequencies(tmp_path):
    X, y_train, y_val = np.ones((8, 1)), np.array([0, 0, 0, 0, 1, 1, 3, 3]), np.array([0, 1, 1, 0])
    train_set, val_set = dataset(tmp_path / "train", X, y_train), dataset(tmp_path / "val", X[:4], y_val)
    assert class_prior_loss(train_set, val_set) == pytest.approx(-(2 * np.log(1 / 2) + 2 * np.log(1 / 4)) / 4)
    assert class_prior_loss(train_set, train_set) == pytest.approx(1.5 * np.log(2))  # the entropy, without class 2


@pytest.mark.parametrize("n_ranks, share", [(1, 28), (2, 14), (4, 7), (7, 4)])
def test_a_batch_is_shared_equally(n_ranks, share):
    assert per_rank_batch_size(28, 1000, n_ranks) == share
    assert per_rank_batch_size(1000, 28, n_ranks) == share  # all samples


def outliers(folder, change, capsys):
    """What is said of 4,096 tame rows to which `change` has been done."""
    X, y = np.random.default_rng(0).standard_normal((4096, 5)), np.arange(4096) % 4
    change(X)
    save_data(folder, X_train=X, y_train=y, X_val=X[:40], y_val=y[:40])
    load_splits(folder)
    output = capsys.readouterr()
    assert output.out == ""
    return output.err.splitlines()


@pytest.mark.parametrize("row", [0, 17, 4095])
def test_a_row_far_out_is_warned_of(row, tmp_path, capsys):
    def change(X):
        X[row] *= 10
        X[row, 3] = 1e4

    (line,) = outliers(tmp_path, change, capsys)
    assert line.startswith(f"warning: {tmp_path}/X_train.npy: the standard deviation of feature 3 is ")
    assert line.endswith(": look for outliers, or clip them")


def test_a_quiet_process_does_not_warn(tmp_path, capsys, monkeypatch):
    """Of several ranks, all but the first are quiet."""
    monkeypatch.setattr(console, "quiet", True)
    assert outliers(tmp_path, lambda X: X.put(0, 1e4), capsys) == []


QUIET = {
    "tame": lambda X: None,
    "heavy tails": lambda X: np.power(X, 3, out=X),
    "all zero": lambda X: X.fill(0),
    "mostly zero": lambda X: X.__setitem__(np.abs(X) < 1.5, 0),
    "two values": lambda X: np.sign(X, out=X),
    "skewed": lambda X: np.exp(X, out=X),
    "wild scales": lambda X: np.multiply(X, 10.0 ** np.arange(-8, 12, 4), out=X),
}


@pytest.mark.parametrize("case", QUIET)
def test_of_other_features_nothing_is_said(case, tmp_path, capsys):
    assert outliers(tmp_path, QUIET[case], capsys) == []
