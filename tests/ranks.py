"""Real ranks for the tests: started by torchrun, or forked from a server that has imported torch already.

A test of the launch itself takes `torchrun`. `start_ranks` is ten times faster and gives every rank's own exit
code and output, which torchrun hides behind its summary. A forked rank ends without the interpreter's shutdown,
and inherits imports that a fresh one makes itself: where either matters, use `torchrun` or `fork=False`.
"""

import fcntl
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data_gen.__main__ import main as data_gen_main

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
SINGLE, DDP, RESILIENT = (NOTEBOOKS / f"{name}.py" for name in ("single_sample", "ddp_sample", "ddp_resilient"))
SET_BY_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
HANG = 200.0  # seconds: ten times what the longest launch here takes, and less than the 300 of --timeout
IMPORTED_BY_SERVER = [
    "torch._dynamo",  # the first optimizer would import it: a second for each rank
    "torch.distributed.nn.functional",
    "torch.distributed.elastic.multiprocessing.errors",
    "ddp_tutorial.data",
    "ddp_tutorial.flags",
    "ddp_tutorial.history",
    "ddp_tutorial.model",
    "ddp_tutorial.ranks",
    "ddp_tutorial.training",
    "numpy.ma",  # np.percentile imports it
    "pytest",  # the program that asks for the fork: multiprocessing imports it in each
    "tests.ranks",
    "tqdm",
]


class Rank(NamedTuple):
    """How a rank ended: its exit code (negative: the signal that ended it) and what it said."""

    code: int
    stdout: str
    stderr: str


class Result(NamedTuple):
    """What a run left: history.jsonl without the seconds, model.pt, and checkpoint.pt without the name of its launch.

    Only ddp_resilient.py makes checkpoints.
    """

    history: list[dict]
    model: dict
    checkpoint: dict | None


class Attack:
    """Unpickled, it writes to `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def torchrun(n: int, script: Path, *flags, timeout: float = HANG) -> subprocess.CompletedProcess:
    """`torchrun --standalone --nproc-per-node=n --nnodes=1 script flags`. Raises `subprocess.TimeoutExpired`."""
    with Launch(n, script, *flags) as launch:
        return launch.wait(timeout)


class Launch:
    """`torchrun` in the background; what is left of it at the end of the `with` block is ended.

    With `n_agents` it is that many of them, as if each were on a machine of its own, for `n` ranks in all; `nnodes` is
    their flag, and `agent` the one that holds the meeting. `options` are torchrun's, besides.
    """

    def __init__(
        self, n: int, script: Path, *flags, restarts: int = 0, n_agents: int = 1, nnodes: str = "", options: tuple = ()
    ):
        program = shutil.which("torchrun", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])))
        place = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--local-addr=127.0.0.1"]
        options = [*(place if n_agents > 1 else ["--standalone"]), f"--nproc-per-node={n // n_agents}", *options]
        options += [f"--nnodes={nnodes or n_agents}"] + [f"--max-restarts={restarts}"] * (restarts > 0)
        self.command = [program, *options, *map(str, (script, *flags))]
        self._temporary, self._port = tempfile.TemporaryDirectory(), None
        self.folder = Path(self._temporary.name)  # in the environment of each of its processes, as TMPDIR
        self._outputs = {stream: tempfile.TemporaryFile("a+") for stream in ("stdout", "stderr")}
        for file in self._outputs.values():  # an unnamed file has lost this flag: without it, `said` moves the writers
            fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) | os.O_APPEND)
        self.agents = []
        for i in range(n_agents):
            self.start_agent(is_host=i == 0)
        self.agent = self.agents[0]

    def start_agent(self, is_host: bool = False) -> None:
        """One more `torchrun`, as on one more machine."""
        program, *words = self.command
        if "--standalone" not in words:
            words = ["--rdzv-conf", f"is_host={int(is_host)},last_call_timeout=15", *words]
        env = environment(self._temporary.name)
        self.agents.append(subprocess.Popen([program, *words], cwd=self.folder, env=env, **self._outputs))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for agent in self.agents:
            agent.terminate()  # it then ends its ranks; SIGKILL would leave them alive
        for agent in self.agents:
            with suppress(subprocess.TimeoutExpired):
                agent.wait(40)
            agent.kill()
            agent.wait()
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for file in self._outputs.values():
            file.close()
        self._temporary.cleanup()

    def processes(self) -> dict[int, dict]:
        """The environment of each of its processes that runs, by process id."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):  # it has ended, or is not ours
                pairs = (pair.partition("=") for pair in path.read_bytes().decode(errors="replace").split("\0"))
                env = {key: value for key, _, value in pairs}
                if env.get("TMPDIR") == str(self.folder):
                    found[int(path.parent.name)] = env
        return found

    def ranks(self, restart: int | None = 0) -> dict[int, int]:
        """The process id of each rank of the group that was started after `restart` restarts, or of any with None."""
        found = {}
        for pid, env in self.processes().items():
            with suppress(ProcessLookupError):  # it has just ended
                if (
                    "RANK" in env
                    and restart in (None, int(env["TORCHELASTIC_RESTART_COUNT"]))
                    and os.getpgid(pid) == pid
                ):
                    found[int(env["RANK"])], self._port = pid, int(env["MASTER_PORT"])  # not a rank's child
        return found

    def said(self, stream: str) -> str:
        """What went to "stdout" or "stderr" so far."""
        self._outputs[stream].seek(0)  # it is written in append mode
        return self._outputs[stream].read()

    def wait(self, timeout: float = HANG) -> subprocess.CompletedProcess:
        """Its end; of several agents, the first exit code that is not 0. Raises `subprocess.TimeoutExpired`."""
        deadline = time.monotonic() + timeout
        while None in (codes := [agent.poll() for agent in self.agents]) and time.monotonic() < deadline:
            time.sleep(0.1)
            if not self._port:
                self.ranks()
        outputs = [self.said(stream) for stream in self._outputs]
        if None in codes:
            raise subprocess.TimeoutExpired(self.command, timeout, *outputs)
        return subprocess.CompletedProcess(self.command, next(filter(None, codes), 0), *outputs)

    def left(self) -> list[str]:
        """What it has left although it has ended: processes, its port, files in TMPDIR that are not torch's own."""
        left = [f"process {pid}, rank {env.get('RANK')}" for pid, env in self.processes().items()]
        torchs_own = ("torchelastic_", "torchinductor_")
        left += [path.name for path in self.folder.iterdir() if not path.name.startswith(torchs_own)]
        try:
            with socket.create_server(("", self._port or 0)):
                pass
        except OSError as error:
            left.append(f"port {self._port}: {error}")
        return left


def start_ranks(n: int, script: Path, *flags, rank_env: dict[int, dict] | None = None, **options) -> list[Rank]:
    """`n` ranks of one machine; with `n` 0, one process that knows nothing of ranks, as `python script flags`.

    `rank_env` holds environment variables of single ranks; for `options` see `start`.
    """
    if n == 0:
        return [start([(rank_env or {}).get(0, {})], script, flags, **options)[0]]
    common = {"WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    settings = [common | {"RANK": r, "LOCAL_RANK": r} | (rank_env or {}).get(r, {}) for r in range(n)]
    return start(settings, script, flags, **options)


def start(
    settings: list[dict], script: Path, flags: tuple, timeout: float = HANG, fork: bool = True, stuck: tuple = ()
) -> list[Rank]:
    """A process of the script with each of the environments `settings`; fails at the timeout with what they said.

    Those of the indices in `stuck` are killed once the others have ended: they need not end by themselves.
    """
    command = [str(word) for word in (script, *flags)]
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for i, setting in enumerate(settings):
            env = environment(folder) | {key: str(value) for key, value in setting.items()}
            if fork:
                for stream in ("stdout", "stderr"):
                    Path(folder, f"{i}.{stream}").touch()  # one that is killed before it runs has said nothing
                processes.append(server().Process(target=become, args=(command, env, folder, i)))
                processes[-1].start()
            else:
                outputs = {stream: open(f"{folder}/{i}.{stream}", "w") for stream in ("stdout", "stderr")}
                processes.append(subprocess.Popen([sys.executable, *command], cwd=folder, env=env, **outputs))
                for file in outputs.values():
                    file.close()
        deadline = time.monotonic() + timeout
        codes = [None if i in stuck else exit_code(process, deadline) for i, process in enumerate(processes)]
        for i, process in enumerate(processes):
            process.kill()
            code = exit_code(process, time.monotonic() + HANG)
            codes[i] = code if i in stuck else codes[i]
        outputs = [[Path(folder, f"{i}.{s}").read_text() for s in ("stdout", "stderr")] for i in range(len(codes))]
    ranks = [Rank(code, *output) for code, output in zip(codes, outputs, strict=True)]
    assert None not in codes, f"not ended after {timeout} s: {ranks}"
    return ranks


def exit_code(process, deadline: float) -> int | None:
    """Of a process of subprocess or multiprocessing; None if it still runs at the deadline."""
    left = max(0, deadline - time.monotonic())
    if isinstance(process, subprocess.Popen):
        with suppress(subprocess.TimeoutExpired):
            process.wait(left)
        return process.returncode
    process.join(left)
    return process.exitcode


def become(command: list[str], env: dict, folder: str, i: int) -> None:
    """Make this forked process what `python *command` would be."""
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    for stream, descriptor in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(f"{i}.{stream}", os.O_WRONLY), descriptor)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def server():
    """The process to fork from. It starts on first use."""
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, in the server
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_BY_SERVER)
    return context


def environment(folder: str) -> dict:
    """This process's, less what would make it a rank or lend it data. torchrun leaves files in TMPDIR."""
    kept = {key: value for key, value in os.environ.items() if key not in (*SET_BY_LAUNCHERS, "DDP_DATA_DIR")}
    return kept | {"OMP_NUM_THREADS": "1", "TMPDIR": folder}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def train(n: int, script: Path, data: Path, out: Path, *flags, **options) -> Result:
    """Run the script with `start_ranks`; every rank must leave with 0."""
    ranks = start_ranks(n, script, "--data-dir", data, "--out", out, *flags, **options)
    assert [rank.code for rank in ranks] == [0] * len(ranks), ranks
    return result(out)


def result(out: Path) -> Result:
    history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    for line in history:
        del line["seconds"]
    model, state = torch.load(out / "model.pt", weights_only=True), None
    if (out / "checkpoint.pt").exists():
        state = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True)
        del state["launch"]
        assert_same(model, dict(state["model"]))
    return Result(history, model, state)


def assert_same(one, other):
    """Bit for bit."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict | list | tuple):
        assert len(one) == len(other)
        for key in one if isinstance(one, dict) else range(len(one)):
            assert_same(one[key], other[key])
    else:
        assert one == other


def assert_equal(run: Result, expected: Result):
    """Bit for bit, but for the last digits of a printed mean: a sum that was cut in two is added in another order."""
    assert_same(run[1:], expected[1:])
    torch.testing.assert_close(run.history, expected.history, rtol=1e-12, atol=0)


def losses(history: list[dict]) -> list[dict]:
    """A history without the number of ranks it was made with."""
    return [{key: value for key, value in line.items() if key != "world_size"} for line in history]


def changed(script: Path, old: str, new: str, copy: Path) -> Path:
    """Write a copy of the script with its only `old` replaced by `new`."""
    text = script.read_text()
    assert text.count(old) == 1, f"{old!r} is in the script {text.count(old)} times"
    copy.write_text(text.replace(old, new))
    return copy


def save_data(folder: Path, **arrays) -> Path:
    """Each array to `folder`/NAME.npy."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return folder


def hundred_samples(folder: Path) -> Path:
    """A hundred training samples and sixty others, of three classes that nothing tells apart."""
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((160, 3)).astype(np.float32), np.arange(160) % 3
    arrays = {"X_train": X[:100], "y_train": y[:100], "X_val": X[100:], "y_val": y[100:]}
    return save_data(folder, **arrays)


def data_gen(*argv) -> int:
    """`python -m data_gen argv` in this process; returns its exit code."""
    return data_gen_main([str(word) for word in argv])
