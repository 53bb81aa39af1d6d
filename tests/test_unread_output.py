"""Nobody reads what a program says: it says no more, and its work, its files and its exit code are as ever."""

import os
import pty
import subprocess
import sys
from contextlib import suppress

import pytest

from ddp_tutorial import console
from tests.ranks import DDP, RESILIENT, SINGLE, environment, patience, result, start, start_ranks

SLOW = pytest.mark.slow


def name(script):
    return script.stem


SCRIPTS = pytest.mark.parametrize("script", [SINGLE, DDP, RESILIENT], ids=name)

# Runs a script, the second word, with the streams of the first as a shell would have them.
WRAPPER = """
import os, runpy, sys

reader, writer = os.pipe()
os.close(reader)
streams, sys.argv = sys.argv[1], sys.argv[2:]
for number, stream in ((1, sys.stdout), (2, sys.stderr)):
    if str(number) in streams:
        os.dup2(writer, number)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def unread(tmp_path):
    path = tmp_path / "unread.py"
    path.write_text(WRAPPER)
    return path


@SCRIPTS
def test_a_run_goes_on_when_its_reader_has_gone(script, unread, small, tmp_path):
    """`| head` and `2>&1 | tee`, on one process and on two ranks."""
    cases = [(n, streams) for n in ((0,) if script == SINGLE else (0, 2)) for streams in ("1", "12")]
    for i, (n, streams) in enumerate(cases):
        flags = ("--data-dir", small, "--out", tmp_path / str(i), "--epochs", 12, "--batch-size", 20)
        processes = start_ranks(n, unread, streams, script, *flags)
        assert [process.code for process in processes] == [0] * max(1, n), processes
        assert all("Traceback" not in process.stderr for process in processes), processes
        assert len(result(tmp_path / str(i)).history) == 12


@SCRIPTS
def test_a_mistake_that_nobody_reads_has_its_exit_code(script, unread, small, tmp_path):
    (process,) = start_ranks(0, unread, "12", script, "--data-dir", tmp_path / "missing", "--out", tmp_path / "out")
    assert process.code == 2


@pytest.mark.slow
def test_a_process_that_ends_by_itself(unread, small, tmp_path):
    """Not forked: the interpreter flushes its streams as it ends, and has a code of its own for a failure then, 120."""
    flags = ("--data-dir", small, "--out", tmp_path / "out", "--epochs", 2)
    for streams, *words in (("12", *flags), ("1", "--help")):
        (process,) = start([{}], unread, (streams, SINGLE, *words), fork=False)
        assert process.code == 0 and "Traceback" not in process.stderr and "Exception" not in process.stderr, process


@pytest.mark.parametrize(
    "script", [SINGLE, pytest.param(DDP, marks=SLOW), pytest.param(RESILIENT, marks=SLOW)], ids=name
)
def test_streams_that_are_closed_from_the_start(script, small, tmp_path):
    """`2>&-` and `>&-`: the files that a run opens must not take their numbers."""
    out = tmp_path / "out"
    command = f"exec {sys.executable} {script} --data-dir {small} --out {out} --epochs 2 <&- >&- 2>&-"
    done = subprocess.run(["bash", "-c", command], env=environment(str(tmp_path)), timeout=patience())
    assert done.returncode == 0
    assert len(result(out).history) == 2


def test_the_numbers_of_closed_streams_are_not_given_away():
    program = "import os; from ddp_tutorial import console; console.open_closed_streams(); n = os.open('/', 0);"
    program += "os._exit(n)"
    command = f'exec {sys.executable} -c "{program}" <&- >&- 2>&-'
    assert subprocess.run(["bash", "-c", command], timeout=patience()).returncode > 2


def test_a_terminal_that_closes(monkeypatch):
    """A progress bar writes there, and then cannot."""
    main, terminal = pty.openpty()
    with open(terminal, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        batches = iter(console.progress(range(5000), "epoch 1"))
        seen = [next(batches)]
        os.close(main)
        seen += batches
        console.warn("it has gone")
        assert seen == [*range(5000)]
        with suppress(OSError):
            stream.close()


@pytest.mark.slow
@pytest.mark.parametrize("script", [DDP, RESILIENT], ids=name)
def test_torchrun(script, small, tmp_path):
    """Its own log goes to stderr."""
    program = os.path.join(os.path.dirname(sys.executable), "torchrun")
    flags = f"--data-dir {small} --out {tmp_path / 'unread'} --epochs 12 --batch-size 20"
    launch = f"{sys.executable} {program} --standalone --nproc-per-node=2 --nnodes=1 {script} {flags}"
    for how in ("| head -1", "2>&1 | true"):
        command = f"{launch} {how} > {os.devnull}; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", command], env=environment(str(tmp_path)), timeout=patience())
        assert done.returncode == 0
        assert len(result(tmp_path / "unread").history) == 12
