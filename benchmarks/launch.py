"""Runs a program on some ranks as its user would, and watches the time and the memory it takes."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "DDP_DATA_DIR"} | {"OMP_NUM_THREADS": "1"}


TIMEOUT = 300  # seconds
ATTEMPTS = 3  # for a peer: some abort or hang, once in a while


class End(NamedTuple):
    """How a command ended: its exit code, or why it has none; seconds, largest memory (see `pss`), what it printed."""

    code: int | str
    seconds: float
    memory: float
    output: str


class Run(NamedTuple):
    """What a run took: seconds as a whole, the seconds of its epochs, its last validation loss, bytes for each rank.

    A run that `died` after its last epoch has no `wall`: that of its death is not what a whole run takes.
    """

    wall: float | None
    epochs: list[float]
    val_loss: float
    pss: float
    died: bool = False

    @property
    def epoch(self) -> float:
        """The median epoch, less the first, which warms up."""
        return statistics.median(self.epochs[1:] or self.epochs)


def command(n_ranks: int, program: list) -> list[str]:
    """`program`, a path or "-m" and a module, with its flags: by plain Python on one process, by torchrun on more."""
    options = ["--standalone", f"--nproc-per-node={n_ranks}", "--nnodes=1"] if n_ranks > 1 else []
    launcher = ["-m", "torch.distributed.run", *options] if n_ranks > 1 else []
    return [sys.executable, *launcher, *map(str, program)]


def call(words: list[str], environment: dict | None = None) -> End:
    """How a command ends that must not fail. Raises `RuntimeError` if it does."""
    end = watch(words, environment)
    if end.code:
        raise RuntimeError(f"{' '.join(words)} left with {end.code}:\n{end.output}")
    return end


def watch(words: list[str], environment: dict | None = None) -> End:
    """How a command ends, at the latest after `TIMEOUT` seconds."""
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/output", "w+") as output:
        settings = ENVIRONMENT | {"TMPDIR": folder} | (environment or {})
        start = time.perf_counter()
        process = subprocess.Popen(words, env=settings, stdout=output, stderr=subprocess.STDOUT)
        largest = [0.0]
        memory = threading.Thread(target=watch_memory, args=(process, largest))
        memory.start()
        try:
            code = process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun then ends its ranks
            code = f"nothing after {TIMEOUT} s"
        seconds = time.perf_counter() - start
        memory.join()
        output.seek(0)
        return End(code, seconds, largest[0], output.read())


def run(n_ranks: int, program: list, data: Path, **flags) -> Run:
    """Train with `program` and read its `history.jsonl`.

    A peer ("-m" and a module) that dies after its last epoch has been measured; one that dies before is tried again.
    Raises `RuntimeError` after `ATTEMPTS`, or if a script of ours dies, whenever that is.
    """
    is_peer, epochs = program[0] == "-m", flags["epochs"]
    for attempt in range(1, 1 + (ATTEMPTS if is_peer else 1)):
        with tempfile.TemporaryDirectory() as out:
            options = {"data-dir": data, "out": out} | {key.replace("_", "-"): value for key, value in flags.items()}
            words = [word for key, value in options.items() for word in (f"--{key}", value)]
            words = command(n_ranks, [*program, *words])
            end, lines = watch(words), read_history(Path(out))
        if len(lines) == epochs and (is_peer or not end.code):
            wall = None if end.code else end.seconds
            return Run(wall, [line["seconds"] for line in lines], lines[-1]["val_loss"], end.memory, bool(end.code))
        failure = f"{' '.join(words)} left with {end.code} after {len(lines)} of {epochs} epochs, attempt {attempt}"
        print(failure, flush=True)
    raise RuntimeError(f"{failure}:\n{end.output}")


def read_history(out: Path) -> list[dict]:
    """The epochs of the `history.jsonl` that a program leaves, less a line that is cut short."""
    lines = []
    with suppress(FileNotFoundError, json.JSONDecodeError):
        for line in (out / "history.jsonl").read_text().splitlines():
            lines.append(json.loads(line))
    return lines


def watch_memory(process: subprocess.Popen, largest: list[float]) -> None:
    """Keep in `largest[0]` the most that `pss` has found while the process runs."""
    while process.poll() is None:
        found = pss(process.pid)
        largest[0] = max(largest[0], found)
        time.sleep(0.5)


def pss(agent: int) -> float:
    """Bytes that each rank holds on average: its own and its share of what it shares (PSS, proportional set size).

    The ranks are the children of the process `agent`, or it itself if it has none. RSS would count a page of
    a mapped file once for each rank.
    """
    with suppress(OSError):
        children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
        sizes = []
        for pid in children or [agent]:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            sizes += [1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")]
        return statistics.mean(sizes)
    return 0.0


class Ratio(NamedTuple):
    """Of several rounds: the median, the least and the largest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Ratio | None":
        """None of no round."""
        values = list(values)
        return cls(statistics.median(values), min(values), max(values)) if values else None

    def __str__(self) -> str:
        digits = 2 if self.median < 10 else 1
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"
