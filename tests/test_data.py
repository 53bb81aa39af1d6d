"""ddp_tutorial.data: NpyDataset, moments, standardization."""

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, Subset

from ddp_tutorial import data
from ddp_tutorial.data import DataError, NpyDataset, batches, indices, load_splits
from tests.ranks import Attack, save_data


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
    assert (samples.n_features, samples.n_classes, samples.classes.tolist()) == (5, 2, [0, 1])


def test_the_files_stay_as_they_are(tmp_path):
    samples = dataset(tmp_path, np.ones((4, 2), np.float32))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    x, y = samples.__getitems__([0, 1])
    x.add_(5)
    y.add_(5)
    samples.moments()
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


@pytest.mark.parametrize("n_parts", [1, 2, 4, 7, 1500])
def test_moments_of_the_parts_add_up(wild, n_parts, monkeypatch):
    monkeypatch.setattr(data, "SCAN_BYTES", 3000)  # several chunks
    total = sum(wild.moments(part, n_parts) for part in range(n_parts))
    torch.testing.assert_close(total, wild.moments(), rtol=1e-12, atol=1e-9)
    assert total[0].tolist() == [1001] * 5


def test_standardization_is_that_of_float64(wild):
    X = np.asarray(wild.X, np.float64)
    mean, std = wild.standardization(wild.moments())
    np.testing.assert_allclose(mean.numpy(), X.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(std.numpy(), X.std(0), rtol=1e-9)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300], ids=str)
def test_features_must_be_finite_in_float32(value, tmp_path):
    X = np.ones((5, 3))
    X[4, 1] = value
    samples = dataset(tmp_path, X)
    with pytest.raises(DataError, match=r"X\.npy: feature 1 "):
        samples.standardization(samples.moments())


def test_code_in_a_file_does_not_run(tmp_path):
    path = tmp_path / "X.npy"
    path.write_bytes(pickle.dumps(Attack(tmp_path / "attacked")))  # numpy.load would unpickle such a file too
    with pytest.raises(DataError, match="not a .npy file"):
        NpyDataset(path, path)
    assert not (tmp_path / "attacked").exists()


def test_labels_are_looked_at_to_the_last(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SCAN_BYTES", 80)
    y = np.zeros(35, np.int64)
    y[[20, 34]] = 4, 2
    assert dataset(tmp_path, np.ones((35, 1)), y).classes.tolist() == [0, 2, 4]
    y[34] = -1
    with pytest.raises(DataError, match="label -1 is negative"):
        dataset(tmp_path, np.ones((35, 1)), y)


def test_where_the_data_are(small, tmp_path, monkeypatch):
    other = save_data(tmp_path / "other", **{path.stem: np.load(path)[:9] for path in small.iterdir()})
    monkeypatch.setenv("DDP_DATA_DIR", str(small))
    assert [len(split) for split in load_splits(None)] == [40, 20]
    assert [len(split) for split in load_splits(other)] == [9, 9]


@pytest.mark.parametrize("n_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("n_samples", [4, 5, 31, 1000])
def test_indices_are_those_of_the_sampler(n_samples, n_ranks):
    for rank in range(n_ranks):
        sampler = DistributedSampler(range(n_samples), n_ranks, rank, seed=3, drop_last=True)
        for epoch in (0, 1, 7):
            sampler.set_epoch(epoch)
            assert indices(sampler).tolist() == list(sampler)


@pytest.mark.parametrize(
    "n_rows, full, rest", [(6, [[0, 1, 2], [3, 4, 5]], []), (4, [[0, 1, 2]], [[3]]), (2, [], [[0, 1]]), (0, [], [])]
)
def test_batches_are_full_but_for_the_rest(n_rows, full, rest):
    assert [part.tolist() for part in batches(np.arange(n_rows), 3)] == full
    assert [part.tolist() for part in batches(np.arange(n_rows), 3, drop_last=False)] == full + rest


def test_a_batch_of_indices_reaches_the_loader_whole(tmp_path):
    samples = dataset(tmp_path, np.arange(12, dtype=np.float32).reshape(6, 2))
    loader = DataLoader(samples, batch_sampler=batches(np.array([4, 1, 0, 5]), 2), collate_fn=NpyDataset.collate)
    assert [x.tolist() for x, _ in loader] == [[[8, 9], [2, 3]], [[0, 1], [10, 11]]]
