"""python -m data_gen."""

import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from data_gen import gaussian as gaussian_module
from data_gen.output import FILES
from tests.ranks import data_gen

SMALL = {
    "gaussian": ("gaussian", "--n-train", 50, "--n-val", 40, "--n-features", 3),
    "digits": ("digits", "--n-val", 300),
}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", SMALL)
def test_the_seed_makes_the_bytes(kind, tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("other", 6)):
        assert data_gen(*SMALL[kind], "--out", tmp_path / name, "--seed", seed) == 0
    first, again, other = (contents(tmp_path / name) for name in ("a", "b", "other"))
    assert sorted(first) == sorted(FILES)
    assert first == again
    assert all(first[name] != other[name] for name in FILES)


@pytest.mark.parametrize("split, n_samples", [("train", 2000), ("val", 3000)])
def test_bayes_numbers_against_the_densities(split, n_samples, tmp_path, monkeypatch):
    """Each split's own samples have a floor of their own."""
    monkeypatch.setattr(gaussian_module, "CHUNK_BYTES", 40_000)  # three chunks, five chunks
    n_classes, n_features, rho, seed, separation = 5, 7, 0.6, 11, 1.5
    sizes = ("--n-train", 2000, "--n-val", 3000, "--n-features", n_features, "--n-classes", n_classes)
    shape = ("--correlation", rho, "--seed", seed, "--separation", separation)
    assert data_gen("gaussian", "--out", tmp_path, *sizes, *shape) == 0
    X, y = np.load(tmp_path / f"X_{split}.npy").astype(np.float64), np.load(tmp_path / f"y_{split}.npy")
    means = class_means(seed, n_classes, n_features, separation)
    covariance = (1 - rho) * np.eye(n_features) + rho
    joint = np.column_stack([multivariate_normal(mean, covariance).logpdf(X) for mean in means])
    posterior = np.exp(joint) / np.exp(joint).sum(1, keepdims=True)
    nll = -np.log(posterior[np.arange(len(y)), y])
    correct = posterior.argmax(1) == y
    bayes = json.loads((tmp_path / "meta.json").read_text())["bayes"]
    assert sorted(bayes) == ["train", "val"]
    assert bayes[split] == pytest.approx(
        {
            "cross_entropy_nats": nll.mean(),
            "cross_entropy_standard_error": nll.std() / len(y) ** 0.5,
            "accuracy": correct.mean(),
            "accuracy_standard_error": correct.std() / len(y) ** 0.5,
            "n_samples": n_samples,
        },
        rel=1e-9,
    )


def test_samples_have_the_stated_distribution(tmp_path):
    n, rho = 200_000, 0.4
    sizes = ("--n-train", n, "--n-val", 1, "--n-features", 3, "--n-classes", 2)
    assert data_gen("gaussian", "--out", tmp_path, *sizes, "--correlation", rho) == 0
    X, y = np.load(tmp_path / "X_train.npy"), np.load(tmp_path / "y_train.npy")
    means = class_means(0, 2, 3, 2.0)
    assert (X.dtype, y.dtype, X.shape, y.shape) == (np.float32, np.int64, (n, 3), (n,))
    # Of 100,000 samples of a class, a mean or covariance is off by about 0.003 to 0.005, one standard error.
    assert np.bincount(y) / n == pytest.approx([0.5, 0.5], abs=0.01)
    for c in (0, 1):
        assert X[y == c].mean(0) == pytest.approx(means[c], abs=0.02)
        np.testing.assert_allclose(np.cov(X[y == c].T), (1 - rho) * np.eye(3) + rho, atol=0.03)


def class_means(seed, n_classes, n_features, separation):
    rng = np.random.default_rng(np.random.SeedSequence(seed).spawn(3)[2])
    return rng.standard_normal((n_classes, n_features)) * separation / n_features**0.5


def test_training_and_validation_differ(tmp_path):
    assert data_gen("gaussian", "--out", tmp_path, "--n-train", 50, "--n-val", 50) == 0
    assert not np.isin(np.load(tmp_path / "X_train.npy"), np.load(tmp_path / "X_val.npy")).any()


def test_digits_are_split_without_loss_or_overlap(digits):
    from sklearn.datasets import load_digits

    X, y = load_digits(return_X_y=True)
    parts = {name: np.load(digits / f"{name}.npy") for name in ("X_train", "y_train", "X_val", "y_val")}
    assert len(parts["X_train"]) == 1437 and len(parts["X_val"]) == 360
    drawn = np.vstack([np.column_stack((parts[f"X_{s}"], parts[f"y_{s}"])) for s in ("train", "val")])
    assert sorted(map(tuple, drawn)) == sorted(map(tuple, np.column_stack((X, y))))
    share = np.bincount(parts["y_val"]) / np.bincount(y)
    assert share == pytest.approx(np.full(10, 360 / 1797), abs=0.005)  # as near as whole samples come


def fail_at_the_second_chunk(monkeypatch):
    monkeypatch.setattr(gaussian_module, "CHUNK_BYTES", 1000)
    draw, calls = gaussian_module.sample, []

    def refuse(*args):
        calls.append(args)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return draw(*args)

    monkeypatch.setattr(gaussian_module, "sample", refuse)


def test_a_failure_leaves_nothing(tmp_path, monkeypatch, capsys):
    fail_at_the_second_chunk(monkeypatch)
    assert data_gen("gaussian", "--out", tmp_path) == 2
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err.splitlines() == [
        f"python -m data_gen: error: --out {tmp_path}: No space left on device"
    ]


def test_a_failure_leaves_the_old_data(tmp_path, monkeypatch):
    assert data_gen(*SMALL["gaussian"], "--out", tmp_path) == 0
    before = contents(tmp_path)
    fail_at_the_second_chunk(monkeypatch)
    assert data_gen("gaussian", "--out", tmp_path, "--force") == 2
    assert contents(tmp_path) == before


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of a file")
def test_a_file_the_system_refuses_to_grow(tmp_path):
    program = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        "sys.argv[0] = 'data_gen'; runpy.run_module('data_gen', run_name='__main__')"
    )
    command = [sys.executable, "-c", program, "gaussian", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "--out" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_sigterm_leaves_nothing(tmp_path):
    out = tmp_path / "data"
    command = [sys.executable, "-m", "data_gen", "gaussian", "--out", str(out), "--n-train", str(20 * 10**6)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while not list(out.glob(".partial-*/y_train.npy")):  # it is in the middle of its work
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
    finally:
        process.kill()
    assert list(out.iterdir()) == []


def test_what_a_killed_run_left_is_cleared(tmp_path):
    (tmp_path / ".partial-abc").mkdir()
    (tmp_path / ".partial-abc" / "X_train.npy").touch()
    assert data_gen(*SMALL["gaussian"], "--out", tmp_path) == 0
    assert sorted(contents(tmp_path)) == sorted(FILES)


def test_a_full_folder_is_replaced_only_with_force(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "X_train.npy").write_text("mine too")
    before = contents(tmp_path)
    assert data_gen(*SMALL["gaussian"], "--out", tmp_path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--force" in line
    assert contents(tmp_path) == before
    assert data_gen(*SMALL["gaussian"], "--out", tmp_path, "--force") == 0
    assert sorted(contents(tmp_path)) == sorted((*FILES, "notes.txt"))
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert np.load(tmp_path / "X_train.npy").shape == (50, 3)


def test_reuse(tmp_path):
    arguments = (*SMALL["gaussian"], "--out", tmp_path, "--reuse")
    assert data_gen(*arguments) == 0
    before, times = contents(tmp_path), [path.stat().st_mtime_ns for path in sorted(tmp_path.iterdir())]
    assert data_gen(*arguments) == 0
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.iterdir())] == times
    assert data_gen(*arguments, "--seed", 1) == 0  # other data of this command: replaced
    assert contents(tmp_path)["X_train.npy"] != before["X_train.npy"]
    (tmp_path / "y_val.npy").unlink()  # no longer data of this command: refused
    assert data_gen(*arguments) == 2


def test_reuse_refuses_a_foreign_folder(tmp_path):
    (tmp_path / "meta.json").write_text("[]")
    assert data_gen(*SMALL["gaussian"], "--out", tmp_path, "--reuse") == 2
    assert contents(tmp_path) == {"meta.json": b"[]"}


@pytest.mark.parametrize(
    "flags",
    [
        ["--n-train", "0"],
        ["--n-val", "many"],
        ["--n-classes", "1"],
        ["--correlation", "1"],
        ["--separation", "nan"],
        ["--seed", "-1"],
        ["--no-such-flag"],
        ["--force", "--reuse"],
    ],
    ids=" ".join,
)
def test_bad_flags(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        data_gen("gaussian", "--out", tmp_path / "new", *flags)
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"python -m data_gen( gaussian)?: error: .*" + flags[0] + ".*: see --help\n", error)
    assert not (tmp_path / "new").exists()


def test_more_than_the_disk_holds(tmp_path, capsys):
    assert data_gen("gaussian", "--out", tmp_path, "--n-train", 10**12) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "GB are free" in line
    assert list(tmp_path.iterdir()) == []
