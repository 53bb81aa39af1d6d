"""The files that people bring: any memory order, any width, any labels, any disk; and a resumed run knows its own."""

import errno
import mmap
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ddp_tutorial import flags, npy, ranks
from ddp_tutorial.data import DataError, NpyDataset, load_splits
from ddp_tutorial.history import report_epoch
from ddp_tutorial.model import ScaleInputs
from tests.ranks import RESILIENT, environment, patience, save_data, start_ranks, train

ROOT = Path(__file__).parents[1]


def splits(folder, X=None, y=None, n_val=40):
    """Save 4,096 tame samples, or these, of which the first are the validation set as well."""
    X = np.random.default_rng(0).standard_normal((4096, 5)) if X is None else X
    y = np.arange(len(X)) % 4 if y is None else y
    return save_data(folder, X_train=X, y_train=y, X_val=X[:n_val], y_val=y[:n_val])


def said(folder, capsys):
    """The lines that loading says on stderr."""
    load_splits(folder)
    output = capsys.readouterr()
    assert output.out == ""
    return output.err.splitlines()


def refusal(folder):
    with pytest.raises(DataError) as mistake:
        load_splits(folder)
    return str(mistake.value)


# Memory: what a process may take besides what it shares is bounded by the system, in a process of its own

BOUNDED = """
import resource, sys
import numpy as np
from ddp_tutorial.data import NpyDataset, load_splits
folder, n_bytes = sys.argv[1], int(sys.argv[2])
load_splits(sys.argv[3])  # imports what is imported late
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (1024 * used + n_bytes, -1))
train_set, _ = load_splits(folder)
for start in range(0, len(train_set), 64):
    train_set.__getitems__(np.arange(start, min(start + 64, len(train_set))))
"""


def sparse(folder, shape, fortran_order):
    """Files of zeros, but for the first rows: nothing of the rest lies on the disk."""
    for split, n in (("train", shape[0]), ("val", 8)):
        save_data(folder, **{f"y_{split}": np.arange(n) % 2})
        kind = {"dtype": np.float32, "shape": (n, shape[1]), "fortran_order": fortran_order}
        X = np.lib.format.open_memmap(folder / f"X_{split}.npy", mode="w+", **kind)
        X[:2] = 1
        X.flush()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("shape, order", [((3000, 16000), "C"), ((3000, 16000), "F"), ((400_000, 100), "F")], ids=str)
def test_no_order_and_no_width_needs_the_file_in_memory(shape, order, small, tmp_path):
    """Of 150 MiB and more, 100 are allowed: the blocks of a scan, and a batch."""
    folder = sparse(tmp_path / "wide", shape, order == "F")
    command = [sys.executable, "-c", BOUNDED, folder, 100 * 2**20, small]
    done = subprocess.run(list(map(str, command)), env=environment(str(tmp_path)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def unaligned(path, X):
    """A file whose values begin at an odd byte, as a writer may have it who does not pad the header."""
    header = repr({"descr": X.dtype.str, "fortran_order": False, "shape": X.shape})
    header += " " * (len(header) % 2) + "\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + X.tobytes())


def test_take_is_not_asked_for_what_it_would_copy(small, tmp_path, monkeypatch):
    X = np.random.default_rng(0).standard_normal((60, 3))
    expected = torch.from_numpy(X[[5, 1]].astype(np.float32))
    save_data(tmp_path, X=np.asfortranarray(X), y=np.arange(60) % 2)
    unaligned(tmp_path / "odd.npy", X)
    for name in ("X", "odd"):
        samples = NpyDataset(tmp_path / f"{name}.npy", tmp_path / "y.npy")
        assert not (samples.X.flags.c_contiguous and samples.X.flags.aligned)

        class Untaken(np.ndarray):
            def take(self, *args, **options):
                raise AssertionError("this copies the whole file")

        samples.X = samples.X.view(Untaken)
        x, _ = samples.__getitems__([5, 1])
        assert x.is_contiguous() and torch.equal(x, expected)


@pytest.mark.parametrize("scan_bytes", [20, 3000, 2**24])
@pytest.mark.parametrize("shape", [(37, 11), (3, 900)], ids=str)
def test_blocks_are_bounded_and_cover_each_value_once(shape, scan_bytes, monkeypatch):
    monkeypatch.setattr(npy, "SCAN_BYTES", scan_bytes)
    for X in (np.zeros(shape), np.zeros(shape, order="F")):
        for rows, columns in npy.blocks(X):
            X[rows, columns] += 1
            assert 4 * X[rows, columns].size <= scan_bytes
        assert (X == 1).all()


def test_a_slow_order_is_said_once_with_the_line_that_mends_it(tmp_path, capsys):
    X = np.random.default_rng(0).standard_normal((4096, 20)).astype(np.float32)
    (line,) = said(splits(tmp_path, np.asfortranarray(X)), capsys)
    assert line.startswith(f"warning: {tmp_path}/X_train.npy: X is in Fortran order")
    mended = eval(line.rpartition(": save ")[2], {"np": np, "X": np.load(tmp_path / "X_train.npy")})
    assert said(splits(tmp_path, mended), capsys) == []
    assert said(splits(tmp_path, X.astype(float)), capsys) == []
    assert said(splits(tmp_path, np.asfortranarray(X[:, :5])), capsys) == []  # it costs less than twice


# Labels


def test_class_numbers_that_are_no_class_numbers(tmp_path, capsys):
    """Refused from 10,000 on, if a tenth is not used; warned of from 1,000 on, if a half is not."""
    ids = np.where(np.arange(4096) % 2, 100_017, 999_983)
    message = refusal(splits(tmp_path, y=ids))
    assert message.startswith(f"{tmp_path}/y_train.npy: 2 classes have numbers up to 999,983")
    remedy = re.search(r"np\.unique.*", message)[0]
    both = {"np": np, "y_train": ids, "y_val": ids[:40]}
    numbers = eval(remedy, both)
    assert numbers[:4096].tolist() == (ids == 999_983).astype(int).tolist()
    few = np.arange(4096) % 400
    (line,) = said(splits(tmp_path, y=few * 20), capsys)
    assert line.startswith("warning: ") and "y_train.npy: 400 classes have numbers up to 7,980" in line
    assert remedy in line
    for harmless in (few, few * 2, few % 3 * 400, np.arange(4096) * 4):
        lines = said(splits(tmp_path, y=harmless), capsys)
        assert len(lines) == (harmless[-1] == 4095 * 4), lines
    (tmp_path / "y_val.npy").unlink()
    save_data(tmp_path, y_train=np.arange(4096) * 5 % 20_000, y_val=np.zeros(40, int))
    assert "y_train.npy: 4,000 classes have numbers up to 19,995" in said(tmp_path, capsys)[0]


def test_a_label_beyond_all_has_the_remedy(tmp_path):
    assert refusal(splits(tmp_path, y=np.arange(4096) * 1000)).endswith(npy.Y_AS_NUMBERS)


# Types


def test_what_is_not_a_number_is_said_with_its_cast(tmp_path):
    X = np.random.default_rng(0).standard_normal((40, 3))
    text, labels = X.astype(str), np.array(["cat", "dog"] * 20)
    for bad in (text, X.astype(object), np.array(X[:, 0] * 1e6, "M8[s]")[:, None]):
        message = refusal(splits(tmp_path, bad, np.arange(40) % 2))
        assert message.endswith("X.astype(float)"), message
        assert eval(message.rpartition(" ")[2], {"X": bad}).dtype == float
    for bad in (labels, labels.astype(object)):
        message = refusal(splits(tmp_path, X, bad))
        numbers = eval(re.search(r"np\.unique.*", message)[0], {"np": np, "y_train": bad, "y_val": bad[:40]})
        assert numbers.tolist() == [0, 1] * 40, message
    save_data(tmp_path, X_train=np.zeros(40, [("age", float), ("height", float)]))
    assert refusal(tmp_path).endswith("structured_to_unstructured(X)")


@pytest.mark.parametrize("descr, size, name", [("<V2", 2, "bfloat16"), ("<V1", 1, "float8"), ("<f1", 1, "float8")])
def test_types_that_numpy_does_not_know_have_their_name(descr, size, name, tmp_path):
    """The headers that numpy.save writes for the types of ml_dtypes."""
    splits(tmp_path)
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': (40, 3), }}".ljust(117) + "\n"
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(120 * size)
    (tmp_path / "X_train.npy").write_bytes(content)
    message = refusal(tmp_path)
    assert f"the type is {name}" in message or f"as numpy.save writes {name}" in message
    assert message.endswith("X.astype(float)")


def test_values_beyond_float32_are_called_so(tmp_path):
    X = np.random.default_rng(0).standard_normal((4096, 5))
    X[70, 3] = 1e39
    assert "feature 3 holds values beyond 3.4e38, float32's largest: " in refusal(splits(tmp_path, X))
    X[71, 3] = np.nan
    assert "feature 3 holds a nan or an infinite value: " in refusal(splits(tmp_path, X))


# Spreads


def test_a_spread_that_float32_cannot_hold_is_said(tmp_path, capsys):
    X = np.random.default_rng(0).standard_normal((4096, 5))
    X[:, 1] = 7e8  # constant: nothing is lost
    X[:, 2] = 1.7e9 + np.round(X[:, 2] * 86_400)  # seconds, over days
    assert said(splits(tmp_path, X), capsys) == []
    X[:, 3] += 1.7e9
    (line,) = said(splits(tmp_path, X), capsys)
    assert "X_train.npy: feature 3 varies by 0.99 around 1.7e+09, which float32 cannot tell apart" in line
    (line,) = said(splits(tmp_path, X[:, 3:4].astype(np.int64)), capsys)
    assert "feature 0 varies by 1 around" in line  # whole seconds
    mended = eval(re.search(r"save (.*),", line)[1], {"X": X, "X_train": X})
    assert said(splits(tmp_path, mended), capsys) == []
    assert said(splits(tmp_path, X.astype(np.float32)), capsys) == []  # it is lost already


def test_rounding_errors_do_not_drown_the_other_features():
    """The only feature that is left of a column of large numbers is their rounding: up to 64, here."""
    x = torch.tensor(1.7e9 + np.random.default_rng(0).standard_normal((500, 1)) * 20, dtype=torch.float32)
    mean, std = x.double().mean(0), x.double().std(0, correction=0)
    assert 0 < std < 1.7e9 * torch.finfo(torch.float32).eps
    assert ScaleInputs(mean, std)(x).abs().max() <= 1


def test_zero_inflated_columns_are_no_outliers(tmp_path, capsys):
    """As in pictures of digits: a quarter of a pixel's values, from 1 to 255, is not 0."""
    rng = np.random.default_rng(0)
    shares = np.linspace(0.2, 0.3, 41)
    X = rng.integers(1, 256, (4096, 41)) * (rng.random((4096, 41)) < shares)
    middle = np.percentile(X, 75, axis=0)
    assert ((0 < middle) & (X.std(0) > npy.FAR_OUT * middle)).any()  # what looks like an outlier
    assert said(splits(tmp_path, X.astype(np.uint8)), capsys) == []
    X[9, 40] = 10**6
    (line,) = said(splits(tmp_path, X), capsys)
    assert "the standard deviation of feature 40 is " in line


@pytest.mark.parametrize("share", [0.001, 0.05, 0.2])
def test_codes_for_missing_values_are_outliers(share, tmp_path, capsys):
    rng = np.random.default_rng(0)
    X = rng.standard_normal((4096, 5))
    X[rng.random(4096) < share, 2] = -9999
    (line,) = said(splits(tmp_path, X), capsys)
    assert "the standard deviation of feature 2 is " in line


def test_the_last_warning_names_more_causes(capsys):
    report_epoch({"epoch": 2, "train_loss": 1.0, "val_loss": 2.0, "val_accuracy": 0.5}, 2, 2.0)
    line = capsys.readouterr().err
    assert "classes that no linear model can" in line and "features that float32 cannot tell apart" in line


# Disks that cannot map


def refuse_to_map(monkeypatch):
    def refuse(*args, **options):
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(mmap, "mmap", refuse)


def test_a_disk_that_cannot_map_is_read_and_said_once(small, capsys, monkeypatch):
    mapped, _ = load_splits(small)
    refuse_to_map(monkeypatch)
    (line,) = said(small, capsys)
    assert line.startswith(f"warning: {small}: this disk cannot map files")
    read, _ = load_splits(small)
    assert torch.equal(read.__getitems__([3, 1])[0], mapped.__getitems__([3, 1])[0])
    assert read.fingerprint() == mapped.fingerprint()


def test_a_disk_that_cannot_map_and_too_little_memory(small, monkeypatch):
    refuse_to_map(monkeypatch)
    monkeypatch.setattr(npy, "free_memory", lambda: 3 * (small / "X_train.npy").stat().st_size)
    load_splits(small)
    monkeypatch.setattr(npy, "n_processes", 4)  # as `process.start` sets it
    assert re.search(r"X_train\.npy: this disk cannot map files, and 4 x .* GB are free: copy ", refusal(small))


def test_free_memory_is_a_number_of_bytes():
    assert 2**24 < npy.free_memory() < 2**50


# A run that goes on, or begins anew


def test_the_fingerprint_is_of_the_values(tmp_path):
    X, y = np.random.default_rng(0).standard_normal((400, 5)), np.arange(400) % 4

    def fingerprint(X, y=y):
        save_data(tmp_path, X=X, y=y)
        return NpyDataset(tmp_path / "X.npy", tmp_path / "y.npy").fingerprint()

    original = fingerprint(X)
    assert re.fullmatch("[0-9a-f]{16}", original)
    for same in (np.asfortranarray(X), X.astype(np.float32), X.astype(">f8")):
        assert fingerprint(same) == original
    assert fingerprint(X, y.astype(np.uint8)) == original
    one_label = y.copy()
    one_label[7] = 0
    others = [fingerprint(*case) for case in ((X[:399], y[:399]), (X + 1,), (X[::-1],), (X[:, ::-1],), (X, one_label))]
    assert len({original, *others}) == 6


def test_what_a_run_says_of_an_earlier_one(small, tmp_path):
    """Of the same folder: set aside as a pair that can be resumed; nothing to do; other data of the same shape."""
    out, flags = tmp_path / "out", ("--batch-size", 20)
    first = train(0, RESILIENT, small, out, "--epochs", 2, *flags)
    (rank,) = start_ranks(0, RESILIENT, "--data-dir", small, "--out", out, "--epochs", 1, *flags)
    kept = ["checkpoint.earlier.pt", "history.earlier.jsonl"]
    (line,) = [line for line in rank.stdout.splitlines() if "earlier run" in line]
    assert rank.code == 0 and all(name in line for name in kept) and "--resume" in line
    for name in kept:
        shutil.move(out / name, out / name.replace(".earlier", ""))
    whole = train(0, RESILIENT, small, tmp_path / "whole", "--epochs", 3, *flags)
    assert first.history == whole.history[:2]

    before = (out / "history.jsonl").read_bytes()
    (rank,) = start_ranks(0, RESILIENT, "--data-dir", small, "--out", out, "--epochs", 1, "--resume", *flags)
    assert rank.code == 0 and "--epochs 1: " in rank.stdout and "has 2 of them: there is nothing to do" in rank.stdout
    assert (out / "history.jsonl").read_bytes() == before
    assert train(0, RESILIENT, small, out, "--epochs", 3, "--resume", *flags).history == whole.history

    save_data(small, X_train=np.load(small / "X_train.npy") + 1)
    (rank,) = start_ranks(0, RESILIENT, "--data-dir", small, "--out", out, "--epochs", 4, "--resume", *flags)
    (line,) = rank.stderr.splitlines()
    assert rank.code == 2 and "checkpoint.pt: made with training data of fingerprint " in line


# Around the files


def test_without_docstrings(monkeypatch):
    """`python -OO` leaves a script's out."""
    monkeypatch.setattr(sys, "argv", ["script.py", "--epochs", "3"])
    assert flags.parse(None).epochs == ranks.parse(None).epochs == 3


def test_two_makers_of_data_at_once(tmp_path):
    """The second waits, and finds them; before, one of the two removed the other's unfinished files."""
    words = [sys.executable, "-m", "data_gen", "gaussian", "--out", str(tmp_path / "data"), "--n-train", "100000"]
    makers = [subprocess.Popen([*words, "--reuse"], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [maker.communicate(timeout=patience())[0] for maker in makers]
    assert [maker.returncode for maker in makers] == [0, 0, 0]
    assert sum("holds these data already" in output for output in outputs) == 2, outputs


def test_a_clone_keeps_the_line_ends_of_linux(tmp_path):
    """With core.autocrlf, as git for Windows has it: bash takes no others."""
    for name in (".gitattributes", ".ci/run", "notebooks/images/ddp.png"):
        (tmp_path / "repository" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "repository" / name)
    git = ["git", "-c", "user.name=x", "-c", "user.email=x", "-C", str(tmp_path / "repository")]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    clone = ["git", "clone", "-q", "-c", "core.autocrlf=true", tmp_path / "repository", tmp_path / "clone"]
    subprocess.run(clone, check=True, capture_output=True)
    for name in (".ci/run", "notebooks/images/ddp.png"):
        assert (tmp_path / "clone" / name).read_bytes() == (ROOT / name).read_bytes()


def test_files_that_are_renamed_into_place_do_no_harm(tmp_path):
    """A file that is written over loses the pages that are mapped, and the process ends with SIGBUS."""
    X, y = np.random.default_rng(0).standard_normal((4096, 50)), np.arange(4096) % 2
    save_data(tmp_path, X=X, y=y)
    samples = NpyDataset(tmp_path / "X.npy", tmp_path / "y.npy")
    save_data(tmp_path, new=X[:7])
    (tmp_path / "new.npy").rename(tmp_path / "X.npy")
    assert torch.equal(samples.__getitems__([4095])[0], torch.from_numpy(X[4095:].astype(np.float32)))


def test_a_file_that_is_written_over_is_named_in_the_log(small, tmp_path):
    program = (
        "import sys; from ddp_tutorial import process; from ddp_tutorial.data import load_splits; process.start();"
        "train_set, _ = load_splits(sys.argv[1]); open(train_set.X_path, 'wb').close(); train_set.__getitems__([9])"
    )
    command = [sys.executable, "-c", program, str(small)]
    done = subprocess.run(command, env=environment(str(tmp_path)), capture_output=True, text=True, timeout=patience())
    assert done.returncode == -7 and "Bus error" in done.stderr and "in gather" in done.stderr, done


def test_the_lines_for_dataframes(tmp_path, capsys, monkeypatch):
    """What the README says, of a training and of a validation set."""
    pd = pytest.importorskip("pandas", reason="pandas is not installed")
    lines = re.findall(r"`(np\.save\(.*?\))` \|", (ROOT / "README.md").read_text())
    assert len(lines) == 2
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    known = {"np": np, "pd": pd}
    for split, labels in (("train", ["dog", "cat", "eel"] * 40), ("val", ["eel", "cat"] * 10)):
        df = known["df"] = pd.DataFrame(rng.standard_normal((len(labels), 2)), columns=["height", "weight"])
        df["label"] = labels
        known.setdefault("classes", df["label"].unique())
        for line in lines:
            exec(line.replace("_train", f"_{split}"), known)
    train_set, val_set = load_splits(tmp_path)
    assert capsys.readouterr().err == ""
    assert train_set.y[:3].tolist() == [0, 1, 2] and val_set.y[:2].tolist() == [2, 1]
    assert train_set.X.flags.c_contiguous and train_set.X.dtype == np.float32
