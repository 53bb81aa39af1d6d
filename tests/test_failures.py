"""What may befall a run: killed, stopped and failed ranks. What is left is whole, and a run that goes on is exact."""

import functools
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ddp_tutorial.history import read
from ddp_tutorial.ranks import checkpoint
from ddp_tutorial.ranks.run import Run
from tests.chaos import KINDS
from tests.edit import calls, is_class, is_main, put_before
from tests.ranks import DDP, SINGLE, Launch, assert_equal, hundred_samples, losses, result, start_ranks, train

FLAGS = ("--batch-size", 4, "--epochs", 3)  # epochs of 25 steps: stops are agreed on after the steps 10, 20 and 25
RESTARTED = {rank: {"TORCHELASTIC_RESTART_COUNT": 1} for rank in range(4)}
CLOSE = {"rtol": 1e-5, "atol": 5e-6}  # for other numbers of ranks, as in test_ddp_equals_one_process.py
DIE, STOP = (f"os.kill(os.getpid(), {int(number)})" for number in (signal.SIGKILL, signal.SIGSTOP))
slow = pytest.mark.slow
linux = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return hundred_samples(tmp_path_factory.mktemp("failures"))


@pytest.fixture(scope="module")
def whole(script, data, tmp_path_factory):
    """The result of a run on n ranks that nothing befalls."""
    return functools.cache(lambda n: train(n, script, data, tmp_path_factory.mktemp("whole"), *FLAGS))


@pytest.fixture(scope="module")
def begun(script, data, tmp_path_factory):
    """Puts into a folder what a run on n ranks leaves that ends after two of the epochs."""
    flags = ("--batch-size", 4, "--epochs", 2)
    folder = tmp_path_factory.mktemp("begun")
    run = functools.cache(lambda n: train(n, script, data, folder / f"{n}", *flags) and folder / f"{n}")
    return lambda n, out: shutil.copytree(run(n), out)


MOMENTS = """import time

ranks.run.SECONDS_BETWEEN = {seconds_between}


def before_each_step(batches, epoch, run):
    for i, batch in enumerate(batches):
        if {training}:
            {do}
        yield batch


def before_validation(epoch, run):
    if {validation}:
        {do}


"""


@pytest.fixture
def at(script, tmp_path):
    """Writes a copy of the script that runs the statement `do` before each step of training that `moment` is true of.

    With "validation" as `where`, before each validation. A group that goes on in an epoch counts its steps from 0.
    """

    def write(moment, do, where="training", seconds_between='float("inf")'):
        moment_of = {"training": False, "validation": False, where: moment}
        moments = MOMENTS.format(**moment_of, do=do, seconds_between=seconds_between)
        copy = put_before(script, is_class, moments, tmp_path / "at.py")
        put_before(copy, calls("train_one_epoch"), "batches = before_each_step(batches, epoch, run)", copy)
        return put_before(copy, calls("run.end_validation"), "before_validation(epoch, run)", copy)

    return write


def send(number, to="os.getpid()"):
    """The statement that sends a signal and waits until this rank has noted it."""
    return f"os.kill({to}, {int(number)}); [time.sleep(0.01) for _ in range(10_000) if not run.stop.noted]"


def paths(data, out):
    return "--data-dir", data, "--out", out


def codes(ranks):
    return [rank.code for rank in ranks]


def lines_of(*stderr):
    """The lines with which runs were ended in an orderly way."""
    return re.findall(r"^\w+\.py: ((?:error|stopped): .+)$", "".join(stderr), re.MULTILINE)


def assert_close(run, expected):
    torch.testing.assert_close(losses(run.history), losses(expected.history), **CLOSE)
    torch.testing.assert_close(run.model, expected.model, **CLOSE)


def n_lines(out):
    """How many lines the history has; all are whole, and of the epochs from 1 on."""
    path = out / "history.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    assert all(line.endswith("\n") for line in lines)
    assert [json.loads(line)["epoch"] for line in lines] == list(range(1, len(lines) + 1))
    return len(lines)


def progress(out):
    """Of the newest whole checkpoint: its epochs, and how many samples of the next one it has; None without any."""
    if found := checkpoint.read(out / "checkpoint.pt"):
        return found[1]["epoch"], int(found[1]["sums"][1])


# Killed


FIRST = "os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'"


@linux
@pytest.mark.slow
def test_torchrun_restarts_killed_ranks_and_names_the_one_that_raises(at, script, data, tmp_path):
    """Not a victim, which fails when the connection to it breaks. Two of three ranks are killed at once; of the
    restarted ones, one raises."""
    moment = f"(epoch, i) == (3, 13) and rank in ((1, 2) if {FIRST} else (1,))"
    failing = at(moment, f"{DIE} if {FIRST} else int('boom')")
    out, flags = tmp_path / "out", ("--batch-size", 6, "--epochs", 3)  # epochs of 16 steps
    with Launch(3, failing, *paths(data, out), *flags, restarts=1) as launch:
        done = launch.wait()  # not for the 300 s of --timeout
        assert launch.left() == []
    assert done.returncode == 1 and "going on after epoch 2" in done.stdout, done
    failed = re.findall(r"failed \(exitcode: (-?\d+)\) local_rank: (\d)", done.stderr)
    assert failed in ([("-9", "1"), ("1", "1")], [("-9", "2"), ("1", "1")]), done.stderr
    root_cause = done.stderr.rsplit("Root Cause", 1)[1]
    assert re.search(r"rank +: 1 ", root_cause) and "before_each_step" in root_cause  # where it was raised
    assert n_lines(out) == 2 and progress(out) == (2, 0)
    run = train(3, script, data, out, *flags, "--resume")
    assert_equal(run, train(3, script, data, tmp_path / "whole", *flags))


@slow
@linux
def test_two_ranks_killed_at_once(at, data, whole, tmp_path):
    dying = at(f"rank in (1, 3) and (epoch, i) == (3, 13) and {FIRST}", DIE)
    with Launch(4, dying, *paths(data, tmp_path / "out"), *FLAGS, restarts=1) as launch:
        done = launch.wait()
        assert done.returncode == 0, done
        assert launch.left() == []
    assert "going on after epoch 2" in done.stdout
    assert re.findall(r"failed \(exitcode: -9\) local_rank: [13]", done.stderr), done.stderr  # not one of the others
    assert_equal(result(tmp_path / "out"), whole(4))


@slow
@linux
def test_chaos():
    """Each kind of `python -m tests.chaos` once."""
    n, folder = len(KINDS), Path(__file__).parents[1]
    command = [sys.executable, "-m", "tests.chaos", str(n)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=3600)  # for a hang
    total = re.search(r"^total +(\d+) +(\d+) +(\d+) +(\d+)", done.stdout, re.MULTILINE)
    assert done.returncode == 0 and total, done
    runs, kills, survived, identical = map(int, total.groups())
    assert (runs, survived, identical) == (n, n, n) and kills == n + 1, done  # "again" kills twice


# The process is killed at the operation KILL_AT, from 1, on the files of a run, before it is carried out. A write
# counts twice: after the first half of its bytes, and after them all.
OPERATIONS = """
import builtins, signal
from pathlib import Path
n_operations, kill_at = 0, int(os.environ.get("KILL_AT", 0))

def count(*what):
    global n_operations
    n_operations += 1
    print("operation", *what, flush=True)
    if n_operations == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)

def counted(name, do):
    def call(first, *args, **options):
        count(name, *([] if name == "fsync" else [Path(first).name]))
        return do(first, *args, **options)
    return call

for name in ("replace", "fsync", "unlink", "truncate", "mkdir"):
    setattr(os, name, counted(name, getattr(os, name)))

class Written:
    def __init__(self, file, name):
        self.file, self.name = file, name
    def __getattr__(self, name):
        return getattr(self.file, name)
    def __enter__(self):
        return self
    def __exit__(self, *error):
        self.file.close()
    def write(self, content):
        if n_operations + 1 == kill_at:
            self.file.write(content[: len(content) // 2])
            self.file.flush()
        count("half", self.name)
        size = self.file.write(content)
        count("write", self.name)
        return size

def open_counted(path, mode="r", *args, do=open, **options):
    if mode[0] == "r" or Path(path).suffix not in (".pt", ".jsonl"):
        return do(path, mode, *args, **options)
    count("open", Path(path).name)
    return Written(do(path, mode, *args, **options), Path(path).name)

builtins.open = open_counted

"""
REPLACES = "open {0}.writing.{1}", "half {0}.writing.{1}", "write {0}.writing.{1}", "fsync", "replace {0}.writing.{1}"
MODEL, CHECKPOINT, HISTORY = (
    [operation.format(*name.split(".")) for operation in REPLACES]
    for name in ("model.pt", "checkpoint.pt", "history.jsonl")
)
APPEND = ["open history.jsonl", "half history.jsonl", "write history.jsonl", "fsync"]
FIRST_EPOCH = ["mkdir 0", *HISTORY, *CHECKPOINT]
EPOCH = [*APPEND, *CHECKPOINT[:-1], "replace checkpoint.pt", CHECKPOINT[-1]]
OF_A_RUN = [*FIRST_EPOCH, *EPOCH, *EPOCH, *MODEL]


@pytest.fixture
def counting(script, tmp_path):
    return put_before(script, is_main, OPERATIONS, tmp_path / "counting.py")


def operations(counting, data, out, n=0, kill_at=0, restarted=False):
    """What rank 0 did until it was killed, or to the end."""
    rank_env = {rank: dict(env) if restarted else {} for rank, env in RESTARTED.items()}
    rank_env[0]["KILL_AT"] = kill_at
    ranks = start_ranks(n, counting, *paths(data, out), *FLAGS, rank_env=rank_env)
    done = re.findall("^operation (.+)$", ranks[0].stdout, re.MULTILINE)
    assert ranks[0].code == (-signal.SIGKILL if len(done) == kill_at else 0), ranks
    assert all(rank.code for rank in ranks) == (len(done) == kill_at), ranks
    return done


def assert_left_by(done, out):
    """What a new run has on the disk when it is killed at the last of its operations, `done`."""
    n_written = done[:-1].count("replace history.writing.jsonl") + done.count("write history.jsonl")
    assert (len(read(out)) if (out / "history.jsonl").exists() else 0) == n_written  # a torn line is none
    n_saved = done[:-1].count("replace checkpoint.writing.pt")
    assert progress(out) == ((n_saved, 0) if n_saved else None)


def last(operation):
    """When, of the operations of a run, this one is the last time."""
    return len(OF_A_RUN) - OF_A_RUN[::-1].index(operation)


# The quick lane has those after which something else is on the disk; the last epoch is as the one before.
TELLING = [1, *map(last, (HISTORY[-1], *APPEND[1:3], CHECKPOINT[1], *EPOCH[-2:], *MODEL[-2:]))]
SECOND_EPOCH = range(len(FIRST_EPOCH) + 1, len(FIRST_EPOCH + EPOCH) + 1)
OTHERS = sorted({*range(1, len(OF_A_RUN) + 1)} - {*SECOND_EPOCH, *TELLING})


@pytest.mark.parametrize("kills", [TELLING, pytest.param(OTHERS, marks=slow)], ids=["telling", "others"])
def test_a_kill_at_an_operation_on_a_file(kills, counting, script, data, whole, tmp_path):
    done = operations(counting, data, tmp_path / "0")
    assert_equal(result(tmp_path / "0"), whole(0))
    assert done == OF_A_RUN  # a kill does not tell what has reached the disk: fsync first
    for k in kills:
        out = tmp_path / f"{k}"
        assert_left_by(operations(counting, data, out, kill_at=k), out)
        assert_equal(train(0, script, data, out, *FLAGS, rank_env=RESTARTED), whole(0))


def test_kills_one_after_the_other(counting, data, whole, tmp_path):
    """Each group gets one operation farther than the one before, from where that has left the files."""
    k, n_epochs = 1, [0]
    while len(operations(counting, data, tmp_path, kill_at=k, restarted=True)) == k:
        n_epochs.append((progress(tmp_path) or [0])[0])
        assert len(read(tmp_path)) - n_epochs[-1] in (0, 1) if (tmp_path / "history.jsonl").exists() else k < 9
        k += 1
    assert n_epochs == sorted(n_epochs) and set(n_epochs) == {0, 1, 2, 3}
    assert_equal(result(tmp_path), whole(0))


@pytest.mark.parametrize("operation", [CHECKPOINT[1], pytest.param(CHECKPOINT[-1], marks=slow)])
def test_a_kill_of_the_rank_that_writes(operation, counting, script, data, whole, tmp_path):
    k = len(FIRST_EPOCH) + EPOCH.index(operation) + 1
    assert_left_by(operations(counting, data, tmp_path / "out", n=4, kill_at=k), tmp_path / "out")
    assert_equal(train(4, script, data, tmp_path / "out", *FLAGS, rank_env=RESTARTED), whole(4))


# Asked to stop


def assert_stopped(ranks, out, epoch, n_samples):
    """In an epoch, after so many samples of it; or after it, with all of them."""
    n_done, where = (epoch, "after") if n_samples == 100 else (epoch - 1, "in")
    assert codes(ranks) == [75] * len(ranks), ranks
    line = f"stopped: {where} epoch {epoch}, as asked: go on with --resume"
    assert lines_of(*(rank.stderr for rank in ranks)) == [line]
    assert n_lines(out) == n_done
    assert progress(out) == (n_done, n_samples % 100)


@pytest.mark.parametrize("number, rank", [(signal.SIGTERM, 3), (signal.SIGUSR1, 0)])
def test_one_rank_is_asked_to_stop(number, rank, at, script, data, whole, tmp_path):
    out, stopping = tmp_path / "out", at(f"(rank, epoch, i) == ({rank}, 2, 13)", send(number))
    assert_stopped(start_ranks(4, stopping, *paths(data, out), *FLAGS), out, 2, 80)
    assert_equal(train(4, script, data, out, *FLAGS, "--resume"), whole(4))


def test_slow_steps_are_asked_after_each(at, script, data, whole, tmp_path):
    """Ten of them would take longer than torchrun waits."""
    out = tmp_path / "out"
    stopping = at("(rank, epoch, i) == (1, 2, 11)", send(signal.SIGTERM), seconds_between=1e-9)  # each step is too slow
    ranks = start_ranks(2, stopping, *paths(data, out), *FLAGS)
    assert_stopped(ranks, out, 2, 48)  # the twelfth step, and not the twentieth
    assert_equal(train(2, script, data, out, *FLAGS, "--resume"), whole(2))


def test_a_stop_that_takes_too_long_is_announced(at, data, tmp_path):
    slow_save = at("(epoch, i) == (2, 3)", "run.longest_save = 40.0")
    by_torchrun = {0: {"TORCHELASTIC_RUN_ID": "its own"}}
    (rank,) = start_ranks(0, slow_save, *paths(data, tmp_path / "out"), *FLAGS, rank_env=by_torchrun)
    (line,) = [line for line in rank.stderr.splitlines() if "warning" in line and "guessing" not in line]
    assert "torchrun kills ranks 30 s after" in line and "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=80" in line, rank
    assert rank.code == 0


@pytest.mark.parametrize(
    "version, set_to, run_id, said",
    [
        ("2.13.0", None, "1", "30 s after it was asked to: export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=80"),
        ("2.13.0", "35", "1", "35 s after it was asked to: export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=80"),
        ("2.13.0", "300", "1", ""),
        ("2.11.0", "300", "1", "30 s after it was asked to: PyTorch 2.12 or newer"),
        ("2.13.0", None, None, ""),  # nobody kills it
    ],
)
def test_what_is_announced_is_so(version, set_to, run_id, said, monkeypatch, capsys):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    for name, value in (("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", set_to), ("TORCHELASTIC_RUN_ID", run_id)):
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    Run._check_grace(SimpleNamespace(has_warned=False), 40.0)
    warned = capsys.readouterr().err
    assert said in warned and bool(said) == bool(warned)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_one_process_is_asked_to_stop(number, at, script, data, whole, tmp_path):
    out, stopping = tmp_path / "out", at("(epoch, i) == (2, 13)", send(number))
    assert_stopped(start_ranks(0, stopping, *paths(data, out), *FLAGS), out, 2, 80)
    assert_equal(train(0, script, data, out, *FLAGS, "--resume"), whole(0))


@pytest.mark.parametrize("n, m", [(4, 0), (0, 4)])
def test_another_number_of_ranks_goes_on(n, m, at, script, data, whole, tmp_path):
    out, stopping = tmp_path / "out", at("(rank, epoch, i) == (0, 2, 13)", send(signal.SIGTERM))
    assert_stopped(start_ranks(n, stopping, *paths(data, out), *FLAGS), out, 2, 80)
    run = train(m, script, data, out, *FLAGS, "--resume")
    assert [line["world_size"] for line in run.history] == [n or 1] + [m or 1] * 2
    assert_close(run, whole(m))


def test_stopped_twice_in_an_epoch(at, script, data, whole, tmp_path):
    out, stopping = tmp_path / "out", at("(rank, epoch, i) == (1, 2, 3)", send(signal.SIGTERM))
    assert_stopped(start_ranks(2, stopping, *paths(data, out), *FLAGS), out, 2, 40)
    assert_stopped(start_ranks(2, stopping, *paths(data, out), *FLAGS, "--resume"), out, 2, 80)
    assert_equal(train(2, script, data, out, *FLAGS, "--resume"), whole(2))


@pytest.mark.parametrize("where", [pytest.param("training", marks=slow), "validation"])
def test_asked_to_stop_at_the_end_of_an_epoch(where, at, script, data, whole, tmp_path):
    moment = "(rank, epoch) == (1, 2)" + (" and i == 23" if where == "training" else "")
    out, stopping = tmp_path / "out", at(moment, send(signal.SIGTERM), where)
    assert_stopped(start_ranks(2, stopping, *paths(data, out), *FLAGS), out, 2, 100)
    assert_equal(train(2, script, data, out, *FLAGS, "--resume"), whole(2))


def test_asked_to_stop_in_an_epoch_of_twenty_steps(at, script, data, tmp_path):
    """After the last one nothing of the epoch is left: it is finished."""
    out, stopping = tmp_path / "out", at("(epoch, i) == (2, 13)", send(signal.SIGTERM))
    flags = ("--batch-size", 5, "--epochs", 3)
    assert_stopped(start_ranks(0, stopping, *paths(data, out), *flags), out, 2, 100)
    assert_equal(train(0, script, data, out, *flags, "--resume"), train(0, script, data, tmp_path / "whole", *flags))


@pytest.mark.parametrize("where", ["training", pytest.param("validation", marks=slow)])
def test_asked_to_stop_when_nothing_is_left_to_stop(where, at, data, whole, tmp_path):
    moment = "(rank, epoch) == (1, 3)" + (" and i == 23" if where == "training" else "")
    assert_equal(train(2, at(moment, send(signal.SIGTERM), where), data, tmp_path / "out", *FLAGS), whole(2))


def test_a_second_interrupt_ends_at_once(at, data, tmp_path):
    twice = send(signal.SIGINT).split(";")[0]
    (rank,) = start_ranks(0, at("(epoch, i) == (2, 13)", f"{twice}; {twice}"), *paths(data, tmp_path / "out"), *FLAGS)
    assert rank.code == -signal.SIGINT
    assert n_lines(tmp_path / "out") == 1 and progress(tmp_path / "out") == (1, 0)


@pytest.mark.parametrize("path", [SINGLE, DDP], ids=lambda path: path.stem)
def test_an_interrupt_ends_the_other_scripts_without_a_traceback(path, data, tmp_path):
    raising = put_before(path, calls("evaluate"), "raise KeyboardInterrupt", tmp_path / "at.py")
    (rank,) = start_ranks(0, raising, *paths(data, tmp_path / "out"))
    assert (rank.code, rank.stderr) == (130, "")


@linux
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=slow)])
def test_torchrun_is_asked_to_stop(number, at, script, data, whole, tmp_path):
    out, stopping = tmp_path / "out", at("(rank, epoch, i) == (0, 2, 13)", send(number, to="os.getppid()"))
    with Launch(2, stopping, *paths(data, out), *FLAGS, restarts=1) as launch:
        done = launch.wait()
        assert launch.left() == []
    assert done.returncode != 0
    assert lines_of(done.stderr) == ["stopped: in epoch 2, as asked: go on with --resume"]
    assert n_lines(out) == 1 and progress(out) == (1, 80)
    assert_equal(train(2, script, data, out, *FLAGS, "--resume"), whole(2))


# Of the tests' own ranks


HANGING = """
import sys, time
from pathlib import Path
def stand_here():
    Path(sys.argv[1]).touch()
    time.sleep(10_000)
stand_here()
"""


@linux
def test_a_launch_that_hangs_tells_where_its_ranks_stand(tmp_path):
    (tmp_path / "hanging.py").write_text(HANGING)
    with Launch(1, tmp_path / "hanging.py", tmp_path / "stands") as launch:
        while not (tmp_path / "stands").exists():
            assert launch.agent.poll() is None
            time.sleep(0.1)
        with pytest.raises(subprocess.TimeoutExpired) as caught:
            launch.wait(timeout=0.1)
    assert "in stand_here" in caught.value.stderr, caught.value.stderr


def test_a_rank_that_is_killed_before_it_runs_has_said_nothing(tmp_path):
    """At once: the server may not have forked it yet."""
    (tmp_path / "script.py").write_text("import time\ntime.sleep(60)\n")
    assert start_ranks(0, tmp_path / "script.py", stuck=(0,)) == [(-signal.SIGKILL, "", "")]


# Failed


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs SIGSTOP")
def test_a_rank_that_hangs_is_not_waited_for(at, data, tmp_path):
    hanging = at("(rank, epoch, i) == (1, 2, 13)", STOP)
    flags = (*paths(data, tmp_path / "out"), *FLAGS, "--timeout", 5)
    ranks = start_ranks(4, hanging, *flags, stuck=(1,))
    assert ranks[1].code == -signal.SIGKILL and all(rank.code == 1 for rank in ranks if rank is not ranks[1]), ranks
    assert n_lines(tmp_path / "out") == 1 and progress(tmp_path / "out") == (1, 0)


ASKED = """
import os, signal, time
from ddp_tutorial.ranks import run

run.WAIT_IN_A_CALL = {patience}
request = run.StopRequest()
waiting = request.waiting()
alive = waiting.__enter__()
{before}
os.kill(os.getpid(), signal.SIGTERM)
{after}
assert request.noted
"""


@pytest.mark.parametrize(
    "patience, before, after, code",
    [
        (0.3, "", "time.sleep(100)", 143),
        (0.3, "waiting.__exit__(None, None, None)", "time.sleep(1.5)", 0),  # it validates, or saves
        pytest.param(3, "", "[(time.sleep(0.1), alive()) for _ in range(60)]", 0, marks=slow),
        pytest.param(2, "time.sleep(2); alive()", "time.sleep(4)", 0, marks=slow),
    ],
    ids=["stands still", "does not wait", "goes on", "long steps"],
)
def test_a_rank_that_is_asked_to_stop_and_waits_for_a_dead_one_leaves(patience, before, after, code, tmp_path):
    """On NCCL it would wait in a call that no handler interrupts, until torchrun kills it after half a minute."""
    script = tmp_path / "asked.py"
    script.write_text(ASKED.format(patience=patience, before=before, after=after))
    assert codes(start_ranks(0, script)) == [code]


@pytest.mark.parametrize("n, rank", [pytest.param(0, 0, marks=slow), pytest.param(4, 0, marks=slow), (4, 2)])
def test_training_that_diverges(n, rank, at, data, begun, tmp_path):
    """The values of one step, on one rank, become infinite, after two epochs that were good."""
    out = tmp_path / "out"
    begun(n, out)
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.name != "lock"}  # which names the process
    diverging = at(f"(rank, epoch, i) == ({rank}, 3, 5)", "batch = batch[0] * torch.inf, batch[1]")
    ranks = start_ranks(n, diverging, *paths(data, out), *FLAGS, "--resume")
    assert codes(ranks) == [2] * len(ranks), ranks
    (line,) = lines_of(*(rank.stderr for rank in ranks))
    assert line.startswith("error: epoch 3, step 6: ") and line.endswith("--lr")
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.name != "lock"} == before


@pytest.mark.parametrize("n", [0, pytest.param(4, marks=slow)])
def test_training_that_diverges_in_an_epoch_that_was_cut(n, at, data, tmp_path):
    """The step is counted from the start of the epoch."""
    out = tmp_path / "out"
    stopping = at("(rank, epoch, i) == (0, 2, 13)", send(signal.SIGTERM))
    assert_stopped(start_ranks(n, stopping, *paths(data, out), *FLAGS), out, 2, 80)
    diverging = at(f"(rank, i) == ({n // 2}, 3)", "batch = batch[0] * torch.inf, batch[1]")
    ranks = start_ranks(n, diverging, *paths(data, out), *FLAGS, "--resume")
    assert codes(ranks) == [2] * len(ranks), ranks
    (line,) = lines_of(*(rank.stderr for rank in ranks))
    assert line.startswith("error: epoch 2, step 24: ") and progress(out) == (1, 80)


def test_training_that_diverges_and_is_asked_to_stop(at, data, tmp_path):
    diverging = at("(epoch, i) == (2, 13)", "batch = batch[0] * torch.inf, batch[1]; " + send(signal.SIGTERM))
    (rank,) = start_ranks(0, diverging, *paths(data, tmp_path), *FLAGS)
    assert rank.code == 2 and lines_of(rank.stderr)[0].endswith("--lr")
    assert progress(tmp_path) == (1, 0)


# Each rank has a folder of its own: what rank 0 has counts.


@pytest.fixture
def apart(script, tmp_path):
    return put_before(script, calls("train"), "args.out /= str(rank)", tmp_path / "apart.py")


@pytest.mark.parametrize("others", ["nothing", "another run"])
def test_all_ranks_go_on_from_rank_0(others, apart, script, data, begun, whole, tmp_path):
    out = tmp_path / "out"
    begun(2, out / "0")
    if others == "another run":
        train(2, script, data, out / "1", "--batch-size", 4, "--epochs", 3)
    ranks = start_ranks(2, apart, *paths(data, out), *FLAGS, "--resume")
    assert codes(ranks) == [0, 0] and "going on after epoch 2" in ranks[0].stdout, ranks
    assert_equal(result(out / "0"), whole(2))


def test_only_rank_0_has_to_have_a_checkpoint(apart, data, begun, whole, tmp_path):
    out = tmp_path / "out"
    begun(2, out / "1")
    ranks = start_ranks(2, apart, *paths(data, out), *FLAGS, "--resume")
    assert codes(ranks) == [2, 2] and len(lines_of(ranks[0].stderr, ranks[1].stderr)) == 1, ranks
    ranks = start_ranks(2, apart, *paths(data, out), *FLAGS, rank_env=RESTARTED)
    assert codes(ranks) == [0, 0], ranks
    assert_equal(result(out / "0"), whole(2))


# Which runs go on unasked: those of the same launch, by TORCHELASTIC_RUN_ID, however they were restarted.


def relaunched(run, restarts, script, data, out, *flags):
    env = {"TORCHELASTIC_RUN_ID": run, "TORCHELASTIC_RESTART_COUNT": restarts}
    return start_ranks(0, script, *paths(data, out), *FLAGS, *flags, rank_env={0: env})[0]


def test_a_launch_killed_before_it_sets_the_checkpoint_of_an_earlier_one_aside(script, data, whole, tmp_path):
    assert relaunched("earlier", 0, script, data, tmp_path, "--epochs", 2).code == 0
    rank = relaunched("later", 1, script, data, tmp_path)
    assert rank.code == 0 and "going on" not in rank.stdout, rank
    assert_equal(result(tmp_path), whole(0))


def test_a_group_that_a_node_joins_goes_on(script, data, whole, tmp_path):
    """torchrun restarts it, and does not count that."""
    assert relaunched("this", 0, script, data, tmp_path, "--epochs", 2).code == 0
    rank = relaunched("this", 0, script, data, tmp_path)
    assert rank.code == 0 and "going on after epoch 2" in rank.stdout, rank
    assert_equal(result(tmp_path), whole(0))
