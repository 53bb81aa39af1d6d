"""Runs a program on some ranks as its user would, and watches the time and the memory it takes."""

import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from ddp_tutorial.launcher import inherited_environment

ENVIRONMENT = inherited_environment() | {"OMP_NUM_THREADS": "1"}
ENVIRONMENT.pop("DDP_DATA_DIR", None)
TIMEOUT = 300  # seconds
ATTEMPTS = 3  # for a peer: some abort or hang, once in a while


class CommandResult(NamedTuple):
    """How a command ended."""

    code: int | str  # its exit code, or why it has none
    seconds: float
    pss: float  # bytes, the most that `mean_pss` has seen
    output: str


class TrainingFlags(NamedTuple):
    """The flags that every measured program takes, beside those for its folders."""

    epochs: int
    batch_size: int  # over all ranks
    lr: float
    device: str = "cpu"  # the same for all programs, whatever the machine has

    def words(self) -> list[str]:
        """As they stand on a command line."""
        return [word for name, value in self._asdict().items() for word in (f"--{name.replace('_', '-')}", str(value))]


class Run(NamedTuple):
    """What a training took. One that `died` after its last epoch has no `wall`: a whole run does not end so."""

    wall: float | None  # seconds, from the command to the prompt
    epochs: list[float]  # seconds of each
    val_loss: float  # of the last epoch
    pss: float  # bytes that a rank holds, at the most; see `mean_pss`
    died: bool = False

    @property
    def epoch(self) -> float:
        """The median epoch, less the first, which warms up."""
        return statistics.median(self.epochs[1:] or self.epochs)


def command_line(n_ranks: int, program: Sequence) -> list[str]:
    """`program`, a path or "-m" and a module, with its flags: by plain Python on one process, by torchrun on more."""
    options = ["--standalone", f"--nproc-per-node={n_ranks}", "--nnodes=1"] if n_ranks > 1 else []
    launcher = ["-m", "torch.distributed.run", *options] if n_ranks > 1 else []
    return [sys.executable, *launcher, *map(str, program)]


def run_checked(words: list[str], environment: dict[str, str] | None = None) -> CommandResult:
    """`run_watched`, of a command that must not fail. Raises `RuntimeError` if it does."""
    result = run_watched(words, environment)
    if result.code:
        raise RuntimeError(f"{' '.join(words)} left with {result.code}:\n{result.output}")
    return result


def run_probe(words: list[str]) -> Any:
    """The JSON object that a command prints, among other lines. Raises `RuntimeError` if it fails."""
    return json.loads(next(line for line in run_checked(words).output.splitlines() if line.startswith("{")))


def run_watched(words: list[str], environment: dict[str, str] | None = None) -> CommandResult:
    """How a command ends, at the latest after `TIMEOUT` seconds."""
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/output", "w+") as output:
        settings = ENVIRONMENT | {"TMPDIR": folder} | (environment or {})
        start = time.perf_counter()
        process = subprocess.Popen(words, env=settings, stdout=output, stderr=subprocess.STDOUT)
        samples = [0.0]
        sampler = threading.Thread(target=sample_pss, args=(process, samples))
        sampler.start()
        try:
            code = process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun then ends its ranks
            code = f"nothing after {TIMEOUT} s"
        seconds = time.perf_counter() - start
        sampler.join()
        output.seek(0)
        return CommandResult(code, seconds, max(samples), output.read())


def train(program: Sequence, n_ranks: int, data: Path, flags: TrainingFlags) -> Run:
    """Train with `program` and read its `history.jsonl`.

    A peer ("-m" and a module) that dies after its last epoch has been measured; one that dies before is tried again.
    Raises `RuntimeError` after `ATTEMPTS`, or if a script of ours dies, whenever that is.
    """
    is_peer = program[0] == "-m"
    for attempt in range(1, 1 + (ATTEMPTS if is_peer else 1)):
        with tempfile.TemporaryDirectory() as out:
            words = command_line(n_ranks, [*program, "--data-dir", data, "--out", out, *flags.words()])
            result, epochs = run_watched(words), read_history(Path(out))
        if len(epochs) == flags.epochs and (is_peer or not result.code):
            wall = None if result.code else result.seconds
            seconds = [epoch["seconds"] for epoch in epochs]
            return Run(wall, seconds, epochs[-1]["val_loss"], result.pss, bool(result.code))
        progress = f"after {len(epochs)} of {flags.epochs} epochs, attempt {attempt}"
        failure = f"{' '.join(words)} left with {result.code} {progress}"
        print(failure, flush=True)
    raise RuntimeError(f"{failure}:\n{result.output}")


def read_history(out: Path) -> list[dict]:
    """The epochs of the `history.jsonl` that a program leaves, less a line that is cut short."""
    epochs = []
    with suppress(FileNotFoundError, json.JSONDecodeError):
        for line in (out / "history.jsonl").read_text().splitlines():
            epochs.append(json.loads(line))
    return epochs


def sample_pss(process: subprocess.Popen, samples: list[float]) -> None:
    """Append `mean_pss` twice a second while the process runs."""
    while process.poll() is None:
        samples.append(mean_pss(process.pid))
        time.sleep(0.5)


def mean_pss(agent: int) -> float:
    """Bytes that each rank holds on average: its own and its share of what it shares (PSS, proportional set size).

    The ranks are the children of the process `agent`, or it itself if it has none. Less, or 0, once one of them has
    ended. RSS would count a page of a mapped file once for each rank.
    """
    with suppress(psutil.Error):
        process = psutil.Process(agent)
        return statistics.mean(rank.memory_full_info().pss for rank in process.children() or [process])
    return 0.0
