"""Start ranks on this machine as torchrun does, but quickly: as copies of a process that has imported PyTorch already.

The functions build on each other, from the variables of a rank to `launch`, which starts a script on some ranks.
A program that is not a notebook calls it below `if __name__ == "__main__":`, for each copy imports that program first.
"""

import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import CodeType, MappingProxyType, ModuleType
from typing import NamedTuple

import numpy
import torch

# The launcher's side of a meeting. What ranks do with one another stands in the scripts and in `ranks`.
from torch.distributed import TCPStore

TIME_LIMIT = 200.0  # seconds: for a rank that hangs
GRACE = 30.0  # seconds between the signal that asks a process to end and the one that ends it; torchrun's
TIME_IS_UP = "the launcher has ended it"
IMPORTED_BY_SERVER = ["torch._dynamo"]  # PyTorch, and what else an optimizer imports: a second for each rank
IMPORTED_BY_SERVER += ["tqdm", "ddp_tutorial.ranks", "ddp_tutorial.model", "ddp_tutorial.training", __name__]
SET_BY_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SET_BY_LAUNCHERS += ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_RUN_ID")
ONE_AT_A_TIME = threading.Lock()  # starting a process, multiprocessing looks after all others: also another thread's


class Rank(NamedTuple):
    """How a rank ended: its exit code (negative: the signal that ended it) and what it said."""

    code: int
    stdout: str
    stderr: str


def rank_variables(n: int) -> list[dict[str, str]]:
    """What tells `n` ranks of this machine apart: the variables of each."""
    size = {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n)}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank)} | size for rank in range(n)]


@contextmanager
def meeting_point() -> Iterator[dict[str, str]]:
    """Where ranks leave their addresses for each other: yields the variables that lead them there.

    This process listens, as an agent of torchrun does, at a port that is free and stays its own until the block ends.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    # with these, the first rank joins the store as the others do; else it would open one of its own at that port
    yield address | {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}


def inherited_environment() -> dict[str, str]:
    """This process's variables, less what would make a process a rank."""
    return {key: value for key, value in os.environ.items() if key not in SET_BY_LAUNCHERS}


def fork_server() -> multiprocessing.context.BaseContext:
    """The process that is copied. It starts with the first copy, and imports `IMPORTED_BY_SERVER` then."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # PyTorch reads it when it is imported
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(IMPORTED_BY_SERVER)
    return server


class Forked:
    """A copy of the server that calls `target(*arguments)`, with what of `subprocess.Popen` is needed."""

    def __init__(self, target: Callable, *arguments):
        self._process = fork_server().Process(target=target, args=arguments)
        with ONE_AT_A_TIME:
            self._process.start()
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None of one that runs."""
        with ONE_AT_A_TIME:
            return self._process.exitcode

    returncode = property(poll)

    def wait(self, timeout: float | None = None) -> int:
        """Raises `subprocess.TimeoutExpired` after so many seconds."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, number)


def begin_anew(environment: Mapping[str, str], folder: Path, outputs: tuple[Path, Path]) -> None:
    """Forget what this copy has from the server: variables, folder, outputs and random numbers are those of a new one.

    `outputs` are the files of stdout and stderr, which are there.
    """
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    multiprocessing.set_start_method(None, force=True)  # the system's own for a DataLoader's workers, as in any program
    torch.default_generator.seed()
    numpy.random.seed()  # noqa: NPY002 (the one that all share; that of Python does it by itself)


def pause_before_forks() -> None:
    """Before this process forks, as for a DataLoader's workers, let gloo's threads come to rest.

    In a Python before 3.11.10 the copy stands still for ever if it is made just while a thread that Python has not
    started, such as gloo's, makes itself known to it: https://github.com/python/cpython/issues/112275
    """
    if sys.version_info < (3, 11, 10):
        os.register_at_fork(before=lambda: time.sleep(0.005))


def run_as_main(code: CodeType, **variables: object) -> None:
    """Run `code` as Python runs a script, whose names outlive it.

    A DDP model that goes after its process group can make a copy of a process wait forever.
    """
    sys.modules["__main__"] = main = ModuleType("__main__")
    vars(main).update(variables)
    exec(code, vars(main))


def become(argv: list[str], environment: dict[str, str], folder: Path, outputs: tuple[Path, Path]) -> None:
    """Make this copy of the server what `python *argv` would be. With its work done, it ends at once."""
    begin_anew(environment, folder, outputs)
    faulthandler.enable()
    pause_before_forks()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Jupyter interrupts the ranks, too: no traceback for each
    sys.argv = argv
    sys.path.insert(0, str(Path(argv[0]).resolve().parent))
    try:
        run_as_main(compile(Path(argv[0]).read_bytes(), argv[0], "exec"), __file__=argv[0])
        code = 0
    except Exception as error:
        frames = error.__traceback__
        while frames and frames.tb_frame.f_code.co_filename != argv[0]:  # those before are ours
            frames = frames.tb_next
        traceback.print_exception(error.with_traceback(frames))
        code = 1
    sys.stdout.flush()
    os._exit(code)  # nothing that is left of it, such as a thread, may keep it from ending


def start(
    argv: list[str], environment: dict[str, str], folder: Path, outputs: tuple[Path, Path], fork: bool
) -> Forked | subprocess.Popen:
    """`python *argv`, as a copy of the server or as a new process, which imports everything itself."""
    if fork:
        return Forked(become, argv, environment, folder, outputs)
    environment = environment | {"PYTHONFAULTHANDLER": "1"}
    with outputs[0].open("a") as stdout, outputs[1].open("a") as stderr:
        return subprocess.Popen([sys.executable, *argv], cwd=folder, env=environment, stdout=stdout, stderr=stderr)


def exit_codes(processes: Sequence[Forked | subprocess.Popen]) -> list[int | None]:
    """None of one that runs."""
    return [process.poll() for process in processes]


def wait(processes: Sequence, seconds: float, enough: Callable[[list[int | None]], bool] = lambda codes: False) -> bool:
    """Whether, at the latest after `seconds`, they all have ended, or what is known of their exit codes is `enough`."""
    deadline = time.monotonic() + seconds
    while None in (codes := exit_codes(processes)) and not enough(codes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def end(processes: Sequence, first_signal: int) -> None:
    """End those that still run: with a signal that they may heed, and soon with one that they cannot ignore."""
    for number, seconds in ((first_signal, GRACE), (signal.SIGKILL, TIME_LIMIT)):
        for process in processes:
            process.send_signal(number)
        wait(processes, seconds)


def run_processes(
    argv: Sequence,
    environments: Sequence[Mapping[str, str]],
    folder: Path | str = ".",
    fork: bool = True,
    time_limit: float = TIME_LIMIT,
    enough: Callable[[list[int | None]], bool] = any,
    end_by: int = signal.SIGTERM,
) -> list[Rank]:
    """`python *argv` in `folder`, once with each of the environments, all at once; how each ended.

    Once the exit codes (None of one that runs) are `enough`, those that still run are ended with the signal `end_by`:
    unless told otherwise, once one has failed. What runs for `time_limit` seconds is aborted and says where it stood.
    """
    argv, folder = [str(word) for word in argv], Path(folder).resolve()
    processes, is_late = [], False
    with tempfile.TemporaryDirectory() as temporary:
        outputs = [(Path(temporary, f"{i}.stdout"), Path(temporary, f"{i}.stderr")) for i in range(len(environments))]
        try:
            for environment, paths in zip(environments, outputs, strict=True):
                for path in paths:
                    path.touch()  # one that is ended before it runs has said nothing
                processes.append(start(argv, dict(environment), folder, paths, fork))
            is_late = not wait(processes, time_limit, enough)
        finally:
            late = [is_late and code is None for code in exit_codes(processes)]
            end(processes, signal.SIGABRT if is_late else end_by)  # faulthandler then prints where each thread stands
        said = [[path.read_text(errors="replace") for path in paths] for paths in outputs]
    for i in range(len(said)):
        said[i][1] += f"{TIME_IS_UP} after {time_limit:g} s\n" * late[i]
    return [Rank(code, *texts) for code, texts in zip(exit_codes(processes), said, strict=True)]


def run_ranks(
    n: int, argv: Sequence, rank_env: Mapping[int, Mapping[str, str]] = MappingProxyType({}), **options
) -> list[Rank]:
    """`run_processes` with `n` ranks of one group, or with `n` 0, one process that knows nothing of ranks.

    `rank_env` maps ranks to variables that only they get.
    """
    with meeting_point() as address:
        variables = [address | own for own in rank_variables(n)] or [{}]
        inherited = inherited_environment()
        environments = [inherited | own | rank_env.get(i, {}) for i, own in enumerate(variables)]
        return run_processes(argv, environments, **options)


def launch(n: int, *argv) -> str:
    """Run `n` ranks of the script `argv[0]` with the flags that follow; if `n` is 0, one process that is no rank.

    Returns what they print, rank by rank. If one fails, the others are ended. Raises `RuntimeError` with the exit
    codes and with what each has said, those last that failed by themselves.
    """
    ranks = run_ranks(n, argv)
    codes = [rank.code for rank in ranks]
    if not any(codes):
        return "".join(rank.stdout for rank in ranks).strip()
    lines = [f"exit codes {codes}"]
    for i in sorted(range(len(ranks)), key=lambda i: codes[i] not in (0, -signal.SIGTERM)):
        if said := (ranks[i].stdout + ranks[i].stderr).strip():
            lines += [f"rank {i}, exit code {codes[i]}:", said] if n else [said]
    raise RuntimeError("\n".join(lines))
