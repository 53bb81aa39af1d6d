"""Made-up files, flags, checkpoints and environments: each trains, or is refused in one line. Nothing hangs.

The cases are the same in every run. The quick lane tries a few; the slow lane tries hundreds, and lets ranks meet.
FUZZ_EXAMPLES=5000 pytest -m slow tests/test_fuzz.py hunts with that many new ones for each test instead.
"""

import json
import math
import multiprocessing
import os
import pickle
import re
import runpy
import socket
import sys
import tempfile
import warnings
from collections import Counter
from contextlib import suppress
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, configuration, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from ddp_tutorial import launcher
from ddp_tutorial.ranks import checkpoint
from tests import ranks
from tests.edit import calls, put_before
from tests.ranks import free_port, result, save_data, start_ranks

configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir(), "hypothesis"))  # else it writes beside the tests
EXAMPLES = {"data": 180, "flags": 120, "checkpoint": 120, "history": 60, "environment": 100, "meeting": 4}
SHARE = {"few": 0.25, "many": 1}  # of the examples
A_FEW_AND_MANY = pytest.mark.parametrize("size", ["few", pytest.param("many", marks=pytest.mark.slow)])
HUNT = os.environ.get("FUZZ_EXAMPLES")
GROUPS = 6  # of ranks that try to meet at the same time: most of them wait for --timeout
MISTAKE = re.compile(r"ddp_resilient\.py: error: .{4,}: [a-z]+ .+")  # what and where: what to do
NOTE = re.compile(r"warning: .{9,}: (checkpoint\.previous\.pt is|look for|number|save) .+")
TORCH_LOG = re.compile(
    r"\[[WE]\d+ |Exception raised from |frame #\d+: |<omitting python frames>|$"
)  # of C++, when ranks do not meet
counts = {}


class Served:
    """A process that has imported all and trained once, and is forked for each case: four times as fast."""

    def __init__(self, script: Path, data: Path):
        self.connection, connection = multiprocessing.Pipe()
        self.process = launcher.fork_server().Process(target=serve, args=(connection, script, data))
        self.process.start()

    def start(self, settings: list[dict], flags=(), timeout: float | None = None) -> list[ranks.Rank]:
        """`tests.ranks.start`, in that process."""
        self.connection.send((settings, tuple(flags), timeout))
        answer = self.connection.recv()
        assert isinstance(answer, list), answer
        return answer


def serve(connection, script: Path, data: Path) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a process that has used a GPU cannot be forked
    os.environ["CASE"] = tempfile.mkdtemp()
    sys.argv = [str(script), "--data-dir", str(data), "--epochs", "1"]
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    runpy.run_path(sys.argv[0], run_name="__main__")
    context = multiprocessing.get_context("fork")
    launcher.fork_server = lambda: context
    with suppress(EOFError):
        while True:
            settings, flags, timeout = connection.recv()
            try:
                connection.send(ranks.start(settings, script, flags, timeout))
            except AssertionError as error:
                connection.send(str(error))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A few samples. Do not change the files."""
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((60, 3)).astype(np.float32), np.arange(60) % 3
    return save_data(tmp_path_factory.mktemp("data"), X_train=X[:40], y_train=y[:40], X_val=X[40:], y_val=y[40:])


@pytest.fixture(scope="module")
def case_script(script, tmp_path_factory):
    """The script, in a working directory of the case's own."""
    copy = tmp_path_factory.mktemp("script") / script.name
    return put_before(script, calls("ranks.check_environment"), 'os.chdir(os.environ["CASE"])', copy)


@pytest.fixture(scope="module")
def served(case_script, data):
    served = Served(case_script, data)
    yield served
    served.connection.close()  # and so it ends
    served.process.join()


def trained(rank: ranks.Rank, silent: bool = False, log: re.Pattern | None = None) -> bool:
    """Whether it trained; fails unless it did or was refused in one line.

    The line may be missing if the rank may be `silent`; lines of `log` are overlooked.
    """
    lines = [line for line in rank.stderr.splitlines() if not NOTE.fullmatch(line) and not (log and log.match(line))]
    assert (rank.code, len(lines)) in [(0, 0), (2, 1)] + silent * [(2, 0)], rank
    assert all(MISTAKE.fullmatch(line) and line.isprintable() for line in lines), rank
    return rank.code == 0


def hunt(kind: str, size: str, strategy: st.SearchStrategy, case) -> None:
    """Try `case` on what the strategy makes up; it returns whether each of its processes trained."""
    n, seen, different = int(HUNT or EXAMPLES[kind] * SHARE[size]), Counter(), set()

    @settings(
        max_examples=n,
        derandomize=not HUNT,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        phases=[Phase.generate] if kind == "meeting" else Phase,  # it would take long to shrink
    )
    @given(strategy)
    def one(drawn):
        ends = case(drawn)
        different.add(repr(drawn))
        seen.update("trained" if end else "refused" for end in ends)

    one()
    counts[kind, size] = seen
    print(f"\n{kind}: {seen['trained']} trained, {seen['refused']} refused, {len(different)} different examples")
    assert len(different) >= 0.75 * n
    assert min(seen["trained"], seen["refused"]) >= (0.08 * n if size == "many" else 1)


# What a command line and an environment can hold: no zero byte, but bytes that are not UTF-8
NASTY = ["", " ", "-", "--", "-1", "nan", "inf", "-inf", "1e400", "1e-400", "²", "½", "0x10", "9" * 30, "9" * 5000]
NASTY += ["\n", "a\nb", "a\u2028b", "\udcff", "é", "None", "%s", "{}", "a: b", "\x1b[31m", "1,5", "+", "1e", "=", "~"]
TEXT = st.sampled_from(NASTY) | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=9)
DIGITS = st.text(st.characters(categories=["Nd"]), min_size=1, max_size=3)  # "٣" is the number 3


# Data

REAL = ["?", "u1", "i1", "<u2", ">i2", "<i4", ">i8", "<u8", "<f2", ">f2", "<f4", ">f4", "<f8", ">f8", "g"]
PLACES = st.integers(0, 130) | st.integers(0, 3000)
EDITS = st.lists(st.tuples(PLACES, st.integers(0, 9), st.binary(max_size=9)), min_size=1, max_size=4)
SIDES = st.sampled_from([0, 1, 3, 20, 40, -1, 2**31, 2**62, 2**63, 2**64, 10**30]) | st.integers(-(2**70), 2**70)
SHAPES = st.sampled_from([(40, 3), (20, 3), (40,), (20,)]) | st.lists(SIDES, max_size=4).map(tuple)
DESCR = st.sampled_from(REAL) | npst.nested_dtypes().map(np.lib.format.dtype_to_descr)
HEADERS = st.builds(
    "{{'descr': {!r}, 'fortran_order': {!r}, 'shape': {!r}, }}{}".format,
    DESCR | st.sampled_from(["<f0", "<f3", "O", "V0", (), [()], ("<f4",), ("<f4", -1), {}, None, 1, "S-1"]),
    st.booleans() | st.sampled_from([0, None, "False"]),
    SHAPES | st.sampled_from([40, None, (40.0, 3), ("40", 3), [40, 3], (True, 3), (None,)]),
    st.sampled_from(["", " " * 60, "\n", "#", " " * 20000]),
) | st.sampled_from(
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (40L, 3L), }",  # as Python 2 wrote it
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1or 40, 3), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (40, 3), '\\d': 1}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (40, 3)",
        "(" * 5000,
        "-" * 9000 + "1",
        "{**{}}",
        "[1]",
        "print(1)",
        "'",
        "\t\\",
    ]
)


def edit(content: bytes, edits) -> bytes:
    for at, length, new in edits:
        content = content[:at] + new + content[at + length :]
    return content


def npy(version: tuple, header: str, size: int) -> bytes:
    """A .npy file with that header, whatever its values are."""
    text = header.encode("utf-8", "replace")
    length = len(text).to_bytes(2 if version == (1, 0) else 4, "little")
    return b"\x93NUMPY" + bytes(version) + length + text + bytes(size)


def array(kind: str, dtype: str, order: str, values) -> np.ndarray:
    """Good features or labels of that type, but for a few values."""
    shape = {"X_train": (40, 3), "y_train": (40,), "X_val": (20, 3), "y_val": (20,)}[kind]
    good = np.arange(math.prod(shape)).reshape(shape) % (3 if np.dtype(dtype) != bool else 2)
    made = np.asarray(good, dtype, order=order)
    with np.errstate(all="ignore"):
        for at, value in values:
            with suppress(OverflowError, ValueError):
                made.flat[at % made.size] = value
    return made


def saved(array: np.ndarray) -> bytes:
    with tempfile.TemporaryFile() as file:
        np.save(file, array)
        file.seek(0)
        return file.read()


WILD = st.sampled_from([0, 1, 2, 3, -1, 0.5, 2**20, 1e5, 1e30, 3.4e38, -3.4e38, 1e300, math.nan, math.inf, -math.inf])
VALUES = st.lists(st.tuples(st.integers(0, 119), WILD), max_size=3)
OTHER_FILES = [b"", b"PK\x03\x04", b"PK\x05\x06" + bytes(18), b"\x80\x04.", b"1,2,3\n"]
OTHER_FILES += [b"\x93NUMPY", b"\x93NUMPY\x01\x00"]
OTHER_FILES += [pickle.dumps([1]), b"\x1f\x8b" + bytes(30), b"\x89HDF\r\n\x1a\n"]
NAMES = st.sampled_from(["X_train", "y_train", "X_val", "y_val"])
MISUSES = st.sampled_from(["missing", "folder", "loop", "dangling", "pipe", "endless", "unreadable"])
FILES = st.one_of(
    st.tuples(st.just("edit"), EDITS),
    st.tuples(st.just("array"), st.sampled_from(REAL), st.sampled_from("CF"), VALUES),
    st.tuples(
        st.just("bytes"), npst.arrays(npst.nested_dtypes(), npst.array_shapes(min_dims=0, min_side=0)).map(saved)
    ),
    st.tuples(
        st.just("bytes"),
        st.builds(npy, st.sampled_from([(1, 0), (2, 0), (3, 0), (9, 9)]), HEADERS, st.sampled_from([0, 40, 480, 960])),
    ),
    st.tuples(st.just("bytes"), st.sampled_from(OTHER_FILES) | st.binary(max_size=40)),
    st.tuples(st.just("misuse"), MISUSES),
)


def misuse(path: Path, how: str) -> None:
    """Put something else than a file in its place."""
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "unreadable":
        path.symlink_to("/proc/self/mem")
    elif how != "missing":
        path.symlink_to({"loop": path, "dangling": path.parent / "gone", "endless": "/dev/zero"}[how])


def make(path: Path, how: str, *details) -> None:
    """Change a file as FILES says."""
    if how == "edit":
        path.write_bytes(edit(path.read_bytes(), *details))
    elif how == "array":
        path.write_bytes(saved(array(path.stem, *details)))
    elif how == "bytes":
        path.write_bytes(*details)
    else:
        misuse(path, *details)


def copy_of(files: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in files.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def finite(out: Path, n_epochs: int) -> bool:
    """Whether a run left as many epochs, each with losses that are numbers, and a checkpoint that can be read."""
    history = result(out).history
    losses = [line[key] for line in history for key in ("train_loss", "val_loss")]
    return [line["epoch"] for line in history] == [*range(1, n_epochs + 1)] and all(map(math.isfinite, losses))


@A_FEW_AND_MANY
@pytest.mark.filterwarnings("ignore:Stored array in format")  # the case asks for it
def test_data(size, served, data):
    def case(changes):
        with tempfile.TemporaryDirectory() as folder:
            files, out = copy_of(data, Path(folder, "data")), Path(folder, "out")
            for name, change in changes.items():
                make(files / f"{name}.npy", *change)
            ends = served.start([{"CASE": folder}], ("--data-dir", files, "--out", out, "--epochs", 1))
            if trained(*ends):
                assert finite(out, 1)
            return [trained(*ends)]

    hunt("data", size, st.dictionaries(NAMES, FILES, min_size=1, max_size=2), case)


# Flags

GOOD = {
    "--epochs": st.sampled_from(["1", "2", "03", "٣"]),
    "--batch-size": st.integers(1, 2**63 - 1).map(str) | DIGITS.filter(lambda text: int(text) > 0),
    "--lr": st.floats(1e-45, 2).map(str) | st.sampled_from(["1", " 1 ", "1_0e-1", ".5", "٣e-1"]),
    "--seed": st.integers(0, 2**63 - 1).map(str) | DIGITS,
    "--device": st.sampled_from(["auto", "cpu"]),
    "--timeout": st.floats(0.001, 3e7).map(str) | DIGITS.filter(lambda text: int(text) > 0),
    "--out": st.sampled_from(["out", "", ".", "a/b/c", "a: b", "a\nb", "é", "\udcff", "-", "~", "%s", "{}", "x" * 200]),
}
WHOLE = [
    "0",
    "-1",
    "1.5",
    "",
    "x",
    "1e3",
    "²",
    "½",
    "0x10",
    "nan",
    "inf",
    " ",
    str(2**63),
    "9" * 5000,
    "a\nb",
    "\udcff",
]
BAD = {
    "--epochs": WHOLE,
    "--batch-size": WHOLE,
    "--seed": [*WHOLE[1:], "-0"],
    "--lr": ["0", "-1", "nan", "inf", "1e39", "1e-400", "", "x", "9" * 5000, "a\nb", "1,5"],
    "--timeout": ["0", "-1", "nan", "inf", "1e8", "1e-4", "", "x", "9" * 5000, "\udcff"],
    "--device": ["cuda", "", "gpu", "CPU", "a\nb", "\udcff"],
    "--data-dir": ["nowhere", "/proc/self/mem", "x" * 300, "/".join("x" * 5000), "a\nb", "\udcff", "/dev/full", "-"],
    "--out": ["x" * 300, "/proc/self/mem", "/dev/full/out", "/".join("x" * 5000), "/proc/out"],
}
UNKNOWN = ["--epoch=1", "--lr-", "---", "-x", "--resume=1", "a\nb", "\udcff", "--=1", "-", "--frobnicate=%s", "é", "-9"]


def words(flag: str, value: str, joined: bool) -> list[str]:
    return [f"{flag}={value}"] if joined or value.startswith("-") else [flag, value]


def flagged(pools: dict) -> st.SearchStrategy:
    """A flag and a value that its pool has."""
    return st.sampled_from(sorted(pools)).flatmap(
        lambda flag: st.builds(
            words,
            st.just(flag),
            st.sampled_from(pools[flag]) if isinstance(pools[flag], list) else pools[flag],
            st.booleans(),
        )
    )


def short(line: list[str]) -> bool:
    """Whether no epochs are asked for that it would take long to train."""
    return not any(word.isdecimal() and 4 < int(word[:40]) < 2**63 for text in line for word in [text.split("=")[-1]])


ODD_WORDS = st.sampled_from([*GOOD, "--data-dir", "--resume", "--help", "-h", "--"]) | TEXT
ODD = st.lists(ODD_WORDS, min_size=1, max_size=3).filter(short)
LINES = st.lists(
    st.one_of(
        *[st.tuples(st.just("good"), flagged(GOOD))] * 6,
        st.tuples(st.just("bad"), flagged(BAD)),
        st.tuples(st.just("bad"), st.sampled_from(UNKNOWN).map(lambda word: [word])),
        st.tuples(st.just("odd"), ODD),
    ),
    min_size=1,
    max_size=4,
)


@A_FEW_AND_MANY
def test_flags(size, served, data):
    def case(line):
        kinds = {kind for kind, _ in line}
        flags = ["--data-dir", str(data), "--epochs", "1", *(word for _, words in line for word in words)]
        with tempfile.TemporaryDirectory() as folder:
            (rank,) = served.start([{"CASE": folder}], flags)
        if "odd" not in kinds:
            assert trained(rank) == (kinds == {"good"}), (flags, rank)
        return [trained(rank)]

    hunt("flags", size, LINES, case)


# What a run goes on from


def collections(inner):
    dictionaries = st.dictionaries(TEXT | st.integers(0, 2), inner, max_size=3)
    return st.lists(inner, max_size=3) | dictionaries | st.tuples(inner)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | TEXT | st.binary(max_size=4),
    collections,
    max_leaves=4,
)
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64]
DTYPES += [torch.uint8, torch.bool, torch.complex64]
TENSORS = st.builds(
    lambda shape, dtype, value: torch.full(shape, value, dtype=torch.float64).to(dtype),
    st.sampled_from([(), (0,), (1,), (2,), (3,), (1, 2), (2, 2), (4, 2), (0, 2), (2, 1), (3, 3), (3, 4), (5056,)]),
    st.sampled_from(DTYPES),
    st.sampled_from([0.0, 1.0, -1.0, 40.0, 20.0, 0.5, 1e9, 1e300, math.nan, math.inf, -math.inf]),
)
SPECIAL = ["sparse", "csr", "nested", "strided", "meta", "quantized", "deep", "parameter"]
COUNTS = st.sampled_from([0, 1, 2, 3, -1, 10**9, 2**63, 10**30, True, 2.0, "2", None])
OTHER_VALUES = PLAIN | TENSORS | COUNTS | st.sampled_from([*map("a {} one".format, SPECIAL), "gone"])
CHANGES = st.lists(st.tuples(st.integers(0, 99), OTHER_VALUES), min_size=1, max_size=2)


def special(name):
    """A tensor that has not the usual form, or a list that is nested deeply."""
    nest = []
    for _ in range(300):
        nest = [nest]
    eye = torch.eye(3)
    with warnings.catch_warnings(action="ignore"):
        return {
            "a sparse one": eye.to_sparse,
            "a csr one": eye.to_sparse_csr,
            "a nested one": lambda: torch.nested.nested_tensor([eye[0], eye[0, :2]]),
            "a strided one": lambda: torch.zeros(1).expand(3, 3),
            "a meta one": lambda: eye.to("meta"),
            "a quantized one": lambda: torch.quantize_per_tensor(eye, 0.1, 0, torch.qint8),
            "a deep one": lambda: nest,
            "a parameter one": lambda: torch.nn.Parameter(eye),
        }[name]()


def places(state, at=()) -> list[tuple]:
    """The ways to everything that is in nested dictionaries and lists."""
    pairs = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return [place for key, value in pairs for place in [(*at, key), *places(value, (*at, key))]]


def put(state: dict, place: tuple, value) -> None:
    *way, key = place
    inner = reduce(lambda inner, step: inner[step], way, state)
    if isinstance(value, str) and value == "gone":
        del inner[key]
    else:
        inner[key] = special(value) if isinstance(value, str) and value.endswith(" one") else value


def whole(state) -> bytes:
    """A checkpoint with a right checksum, whatever is in it."""
    with tempfile.TemporaryFile() as file:
        torch.save(state, file)
        file.seek(0)
        content = file.read()
    return content + checkpoint.CHECKSUM(content).digest()


@pytest.fixture(scope="module")
def run(script, data, tmp_path_factory):
    """What a run of two epochs has left. Do not change the files."""
    out = tmp_path_factory.mktemp("run")
    ranks.train(0, script, data, out, "--epochs", 2)
    return out


def resume(served, data: Path, out: Path) -> list[bool]:
    ends = served.start([{"CASE": out}], ("--data-dir", data, "--out", out, "--epochs", 3, "--resume"))
    if trained(*ends):
        assert finite(out, 3), ends
    return [trained(*ends)]


@A_FEW_AND_MANY
def test_checkpoint(size, served, data, run):
    original = (run / "checkpoint.pt").read_bytes()

    def case(drawn):
        (kind, detail), backup = drawn
        with tempfile.TemporaryDirectory() as folder:
            out = copy_of(run, Path(folder, "out"))
            file = out / "checkpoint.pt"
            if not backup:
                (out / "checkpoint.previous.pt").unlink()
            content = None
            if kind == "edit":
                content = edit(original, detail)
            elif kind == "cut":
                content = original[:detail]
            elif kind == "changes":
                state = torch.load(file, weights_only=True)
                for i, value in detail:
                    found = places(state)
                    put(state, found[i % len(found)], value)
                content = whole(state)
            elif kind == "whole":
                content = whole(detail)
            else:
                misuse(file, detail)
            if content is not None:
                file.write_bytes(content)
            ends = resume(served, data, out)
        if kind in ("edit", "cut"):  # no change stays unseen
            assert ends == [backup or content == original]
        return ends

    edits = EDITS | st.tuples(st.tuples(st.integers(0, len(original)), st.integers(0, 9), st.binary(max_size=9)))
    details = st.one_of(
        st.tuples(st.just("edit"), edits),
        st.tuples(st.just("cut"), st.integers(-len(original), -1)),
        *[st.tuples(st.just("changes"), CHANGES)] * 4,
        st.tuples(st.just("whole"), PLAIN | TENSORS),
        st.tuples(st.just("misuse"), MISUSES),
    )
    hunt("checkpoint", size, st.tuples(details, st.booleans()), case)


EPOCHS = st.sampled_from([1, 2, 1, 2, 3, 0, -1, 1.0, True, "1", None, [1], 2**70, math.nan])
ODD_LINES = ["", "[" * 10**5, '{"epoch":' * 10**5, '{"epoch": 1', "9" * 5000, "null", "\ufeff{}", '{"epoch": 1}\r']
HISTORY_LINES = (
    EPOCHS.map(lambda epoch: json.dumps({"epoch": epoch})) | st.sampled_from([*ODD_LINES, '"epoch"']) | PLAIN.map(repr)
)
HISTORIES = st.one_of(
    st.tuples(st.just("edit"), EDITS),
    st.tuples(st.just("bytes"), st.binary(max_size=30)),
    st.tuples(
        st.sampled_from(["lines", "lines after the good ones"]),
        st.lists(HISTORY_LINES, max_size=4),
    ),
    st.tuples(st.just("misuse"), MISUSES),
)


@A_FEW_AND_MANY
def test_history(size, served, data, run):
    def case(drawn):
        kind, detail = drawn
        with tempfile.TemporaryDirectory() as folder:
            out = copy_of(run, Path(folder, "out"))
            file = out / "history.jsonl"
            if kind.startswith("lines"):
                good = file.read_text().splitlines()
                detail = [*good, *detail] if kind != "lines" else detail
                known = {json.dumps({"epoch": i + 1}): line for i, line in enumerate(good)}
                text = "".join(known.get(line, line) + "\n" for line in detail)
                file.write_bytes(text.encode("utf-8", "surrogateescape"))
            else:
                make(file, kind, detail)
            return resume(served, data, out)

    hunt("history", size, HISTORIES, case)


# The environment

NUMBERS = ["", "x", "-1", "1.5", "²", "٣", "1_0", " 1", "0x1", "9" * 10, "9" * 5000, "a\nb", "\udcff", "nan", "None"]
ONE_RANK = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
FREE, TAKEN, GONE = "free", "taken", "gone"
GOOD_SETTINGS = {
    "RANK": ["00"],
    "LOCAL_WORLD_SIZE": [GONE],
    "TORCHELASTIC_RESTART_COUNT": ["0", "1", GONE],
    "DDP_DATA_DIR": ["", "\udcff"],
}
BAD_SETTINGS = {
    "RANK": [*NUMBERS, "1", "7", GONE],
    "WORLD_SIZE": [*NUMBERS, "0", GONE],
    "LOCAL_RANK": [*NUMBERS, "1", GONE],
    "LOCAL_WORLD_SIZE": [*NUMBERS, "0", "2"],
    "MASTER_ADDR": ["", GONE],
    "MASTER_PORT": [*NUMBERS, "0", "65536", "99999", TAKEN, GONE],
    "TORCHELASTIC_RESTART_COUNT": NUMBERS,
}


def pick(pools: dict) -> st.SearchStrategy:
    """Some of the variables, each with a value that its pool has."""
    some = st.lists(st.sampled_from(sorted(pools)), unique=True, min_size=1, max_size=3)
    return some.flatmap(lambda names: st.fixed_dictionaries({name: st.sampled_from(pools[name]) for name in names}))


def environment(settings: dict, port: int, taken: int) -> dict:
    """The variables for a process: `settings` over those of a single rank."""
    ports = {FREE: port, TAKEN: taken}
    whole = ONE_RANK | {"MASTER_PORT": FREE} | settings
    return {name: ports.get(value, value) for name, value in whole.items() if value != GONE}


@pytest.fixture(scope="module")
def taken():
    """A port that another program listens at."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@A_FEW_AND_MANY
def test_environment(size, served, data, taken):
    """One process. Whatever is wrong with its variables, it is found before anybody waits."""

    def case(drawn):
        bad, settings, launched = drawn
        if not launched:  # without RANK; the others alone mean that something is missing
            settings = dict.fromkeys((*ONE_RANK, "MASTER_PORT"), GONE) | {"DDP_DATA_DIR": "x"} | settings
            settings["RANK"] = GONE
        with tempfile.TemporaryDirectory() as folder:
            env = environment(settings, free_port(), taken) | {"CASE": folder}
            (rank,) = served.start([env], ("--data-dir", data, "--epochs", 1, "--timeout", 20))
        if launched:
            assert trained(rank) != bad, (env, rank)
        return [trained(rank)]

    one = st.tuples(
        st.just(True), st.builds(lambda a, b: a | b, pick(GOOD_SETTINGS), pick(BAD_SETTINGS)), st.just(True)
    )
    good = st.tuples(st.just(False), pick(GOOD_SETTINGS), st.just(True))
    alone = st.tuples(st.just(None), pick(GOOD_SETTINGS | BAD_SETTINGS), st.just(False))
    hunt("environment", size, st.one_of(one, one, good, alone), case)


ADDRESSES = ["127.0.0.1", "localhost", "nowhere.invalid", "256.1.1.1", "a\nb", "\udcff", "é", " ", "::1", "0.0.0.0"]
LIES = st.one_of(
    st.just({}),
    st.just({}),
    st.fixed_dictionaries({"WORLD_SIZE": st.sampled_from(["1", "2", "3", "999999999"])}),
    st.fixed_dictionaries({"RANK": st.sampled_from(["0", "1", "2"])}),
    st.fixed_dictionaries({"LOCAL_WORLD_SIZE": st.sampled_from(["1", "2"])}),
    st.fixed_dictionaries({"MASTER_ADDR": st.sampled_from(ADDRESSES)}),
    st.fixed_dictionaries({"MASTER_PORT": st.sampled_from([FREE, TAKEN, "1"])}),
    st.fixed_dictionaries({"TORCHELASTIC_RESTART_COUNT": st.sampled_from(["1", "2", "x"])}),
    st.fixed_dictionaries({"TORCHELASTIC_USE_AGENT_STORE": st.sampled_from(["True", "False", "x"])}),
    st.fixed_dictionaries({"DDP_DATA_DIR": st.sampled_from(["nowhere", "a\nb", "\udcff"])}),
)


@pytest.mark.slow
def test_meeting(served, data, taken):
    """Two ranks, some of which are told something wrong: no rank waits longer than --timeout."""

    def case(groups):
        with tempfile.TemporaryDirectory() as folder:
            settings = []
            for i, lies in enumerate(groups):
                case, port = Path(folder, str(i)), free_port()
                case.mkdir()
                for rank, lie in enumerate(lies):
                    truth = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
                    settings.append({"CASE": case, "DDP_DATA_DIR": data} | environment(truth | lie, port, taken))
            ends = served.start(settings, ("--epochs", 1, "--timeout", 3))
        for i in range(0, len(ends), 2):
            pair = ends[i : i + 2]
            met = [trained(rank, silent=True, log=TORCH_LOG) for rank in pair]
            assert met == [True, True] or any("error: " in rank.stderr for rank in pair), pair
            assert groups[i // 2] != ({}, {}) or met == [True, True], pair
        return [rank.code == 0 for rank in ends]

    hunt("meeting", "many", st.lists(st.tuples(LIES, LIES), min_size=GROUPS, max_size=GROUPS), case)


def test_a_served_process_ends_as_a_real_one(served, script, data, tmp_path):
    (tmp_path / "file").touch()
    for i, flags in enumerate([(), ("--lr", "x"), ("--out", tmp_path / "file"), ("--resume",), ("--help",)]):
        ends = []
        for real in (True, False):
            folder = tmp_path / f"{i}{real}"
            folder.mkdir()
            line = ("--data-dir", data, "--epochs", 1, "--out", folder, *flags)
            ends += start_ranks(0, script, *line) if real else served.start([{"CASE": folder}], line)
        one, other = ([rank.code, *(text.replace("False", "True") for text in rank[1:])] for rank in ends)
        assert one == other


def test_what_a_served_process_must_not_do_is_seen():
    for code, stderr in [
        (0, "a warning\n"),
        (1, "Traceback"),
        (2, ""),
        (2, "ddp_resilient.py: error: what: do it\n" * 2),
    ]:
        with pytest.raises(AssertionError):
            trained(ranks.Rank(code, "", stderr))


@pytest.mark.slow
def test_how_many_cases_ran():
    many = {kind: seen for (kind, size), seen in counts.items() if size == "many"}
    if many.keys() != EXAMPLES.keys():
        pytest.skip("only a part of the tests ran")
    total = sum(many.values(), Counter())
    print(f"\n{total.total()} cases: {total['trained']} trained, {total['refused']} refused")
    assert total.total() >= (int(HUNT) if HUNT else 600)
