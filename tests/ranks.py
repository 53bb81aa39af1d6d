"""Real ranks for the tests: started by torchrun, or by the package's launcher from a server that has imported torch.

A test of the launch itself takes `torchrun`, whose agents are copies of the server, and whose ranks are new processes.
`start_ranks` is faster by far and gives every rank's own exit code and output, which torchrun hides behind its summary.
A forked rank ends without the interpreter's shutdown, and inherits imports that a fresh one makes itself: where either
matters, use `torchrun` or `fork=False`.
"""

import json
import os
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
from ddp_tutorial import launcher
from ddp_tutorial.launcher import Rank

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
SINGLE, DDP, RESILIENT = (NOTEBOOKS / f"{name}.py" for name in ("single_sample", "ddp_sample", "ddp_resilient"))
HANG = launcher.TIME_LIMIT  # on a machine that does nothing else: less than the 300 s of --timeout
os.environ["OMP_NUM_THREADS"] = "1"  # for whatever is started from here
launcher.IMPORTED_BY_SERVER += [
    "numpy.ma",  # np.percentile imports it
    "pytest",  # the program that asks for the fork: multiprocessing imports it in each
]


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


def patience() -> float:
    """The seconds after which a launch hangs: `HANG`, times the programs that share a core of this machine just now."""
    return HANG * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def torchrun(n: int, script: Path, *flags, timeout: float | None = None) -> subprocess.CompletedProcess:
    """`torchrun --standalone --nproc-per-node=n --nnodes=1 script flags`. Raises `subprocess.TimeoutExpired`."""
    with Launch(n, script, *flags) as launch:
        return launch.wait(timeout)


class Launch:
    """`torchrun` in the background, a copy of the server; what is left of it at the end of the `with` block is ended.

    With `n_agents` it is that many of them, as if each were on a machine of its own, for `n` ranks in all; `nnodes` is
    their flag, and `agent` the one that holds the meeting. `options` are torchrun's, besides. Without `fork` it is a
    new process, which inherits from this one, not from the server, which signals are ignored.
    """

    def __init__(
        self,
        n: int,
        script: Path,
        *flags,
        restarts: int = 0,
        n_agents: int = 1,
        nnodes: str = "",
        options: tuple = (),
        fork: bool = True,
    ):
        program = shutil.which("torchrun", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])))
        place = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--local-addr=127.0.0.1"]
        options = [*(place if n_agents > 1 else ["--standalone"]), f"--nproc-per-node={n // n_agents}", *options]
        options += [f"--nnodes={nnodes or n_agents}"] + [f"--max-restarts={restarts}"] * (restarts > 0)
        self.command = [program, *options, *map(str, (script, *flags))]
        self._temporary, self._port = tempfile.TemporaryDirectory(), None
        self.folder = Path(self._temporary.name)  # in the environment of each of its processes, as TMPDIR
        self._words = tempfile.TemporaryDirectory()
        self._outputs = tuple(Path(self._words.name, stream) for stream in ("stdout", "stderr"))
        for path in self._outputs:
            path.touch()
        self.agents, self._fork = [], fork
        for i in range(n_agents):
            self.start_agent(is_host=i == 0)
        self.agent = self.agents[0]

    def start_agent(self, is_host: bool = False) -> None:
        """One more `torchrun`, as on one more machine."""
        program, *words = self.command
        if "--standalone" not in words:
            words = ["--rdzv-conf", f"is_host={int(is_host)},last_call_timeout=15", *words]
        env = environment(self._temporary.name) | {"PYTHONFAULTHANDLER": "1"}  # for `where_ranks_stand`
        self.agents.append(launcher.start([program, *words], env, self.folder, self._outputs, self._fork))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for agent in self.agents:
            agent.send_signal(signal.SIGTERM)  # it then ends its ranks; SIGKILL would leave them alive
        for agent in self.agents:
            with suppress(subprocess.TimeoutExpired):
                agent.wait(40)
            agent.send_signal(signal.SIGKILL)
            agent.wait()
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._words.cleanup()
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
        return Path(self._words.name, stream).read_text()

    def wait(self, timeout: float | None = None) -> subprocess.CompletedProcess:
        """Its end; of several agents, the first exit code that is not 0.

        Raises `subprocess.TimeoutExpired` after `patience()`, or `timeout` seconds, with where each rank stood.
        """
        start = time.monotonic()
        while None in (codes := [agent.poll() for agent in self.agents]):
            if (seconds := time.monotonic() - start) > (timeout or patience()):
                raise subprocess.TimeoutExpired(self.command, seconds, self.said("stdout"), self.where_ranks_stand())
            time.sleep(0.1)
            if not self._port:
                self.ranks()
        outputs = [self.said(path.name) for path in self._outputs]
        return subprocess.CompletedProcess(self.command, next(filter(None, codes), 0), *outputs)

    def where_ranks_stand(self) -> str:
        """End the ranks so that each says where its threads are; returns what went to stderr so far, with that."""
        for pid in self.ranks(None).values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGABRT)  # Python's faulthandler answers, whatever the rank does
        time.sleep(1)
        return self.said("stderr")

    def left(self) -> list[str]:
        """What it has left although it has ended: processes, its port, files in TMPDIR that are not torch's own."""
        left = [f"process {pid}, rank {env.get('RANK')}" for pid, env in self.processes().items()]
        torchs_own = ("torchelastic_", "torchinductor_")
        files = [path for path in self.folder.iterdir() if not path.name.startswith(torchs_own)]
        left += [path.name for path in files if not is_pythons_own(path)]
        try:
            with socket.create_server(("", self._port or 0)):
                pass
        except OSError as error:
            left.append(f"port {self._port}: {error}")
        return left


def is_pythons_own(path: Path) -> bool:
    """Whether it is the file by which `tempfile` tries a folder, which a SIGKILL in that moment leaves."""
    return len(path.name) == 8 and path.is_file() and path.read_bytes() in (b"", b"blat")


def start_ranks(n: int, script: Path, *flags, rank_env: dict[int, dict] | None = None, **options) -> list[Rank]:
    """`n` ranks of one machine; with `n` 0, one process that knows nothing of ranks, as `python script flags`.

    `rank_env` holds environment variables of single ranks; for `options` see `start`.
    """
    if n == 0:
        return start([(rank_env or {}).get(0, {})], script, flags, **options)
    with launcher.meeting_point() as address:
        variables = launcher.rank_variables(n)
        settings = [address | variables[rank] | (rank_env or {}).get(rank, {}) for rank in range(n)]
        return start(settings, script, flags, **options)


def reports_of(n: int, program: str, folder: Path, *flags) -> list:
    """The JSON that each of `n` ranks prints, of a program whose text is written into `folder`; all leave with 0."""
    (folder / "program.py").write_text(program)
    ranks = start_ranks(n, folder / "program.py", *flags)
    assert [rank.code for rank in ranks] == [0] * n, ranks
    return [json.loads(rank.stdout) for rank in ranks]


def start(
    settings: list[dict],
    script: Path,
    flags: tuple,
    timeout: float | None = None,
    fork: bool = True,
    stuck: tuple = (),
) -> list[Rank]:
    """A process of the script with each of the environments `settings`.

    Fails after `patience()`, or `timeout` seconds, with what they said.

    Those of the indices in `stuck` are killed once the others have ended: they need not end by themselves.
    """

    def others_have_ended(codes: list[int | None]) -> bool:
        return all(code is not None for i, code in enumerate(codes) if i not in stuck)

    with tempfile.TemporaryDirectory() as folder:
        environments = [environment(folder) | {key: str(value) for key, value in own.items()} for own in settings]
        options = {"enough": others_have_ended, "end_by": signal.SIGKILL}
        ranks = launcher.run_processes((script, *flags), environments, folder, fork, timeout or patience(), **options)
    assert not any(launcher.TIME_IS_UP in rank.stderr for rank in ranks), ranks
    return ranks


def environment(folder: str) -> dict:
    """This process's, less what would make it a rank or lend it data. torchrun leaves files in TMPDIR."""
    kept = {key: value for key, value in launcher.inherited_environment().items() if key != "DDP_DATA_DIR"}
    return kept | {"TMPDIR": folder}


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
