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


class Run(NamedTuple):
    """What a run took: seconds as a whole, the seconds of its epochs, its last validation loss, bytes for each rank."""

    wall: float
    epochs: list[float]
    val_loss: float
    pss: float

    @property
    def epoch(self) -> float:
        """The median epoch, less the first, which warms up."""
        return statistics.median(self.epochs[1:] or self.epochs)


def command(n_ranks: int, program: list) -> list[str]:
    """`program`, a path or "-m" and a module, with its flags: by plain Python on one process, by torchrun on more."""
    options = ["--standalone", f"--nproc-per-node={n_ranks}", "--nnodes=1"] if n_ranks > 1 else []
    launcher = ["-m", "torch.distributed.run", *options] if n_ranks > 1 else []
    return [sys.executable, *launcher, *map(str, program)]


def call(words: list[str], environment: dict | None = None) -> tuple[float, float, str]:
    """Seconds, the largest memory of its ranks (see `pss`), and what it printed.

    Raises `RuntimeError` if it fails, or has not ended after `TIMEOUT` seconds.
    """
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/output", "w+") as output:
        settings = ENVIRONMENT | {"TMPDIR": folder} | (environment or {})
        start = time.perf_counter()
        process = subprocess.Popen(words, env=settings, stdout=output, stderr=subprocess.STDOUT)
        largest = [0.0]
        watch = threading.Thread(target=watch_memory, args=(process, largest))
        watch.start()
        try:
            code = process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun then ends its ranks
            code = f"nothing after {TIMEOUT} s"
        seconds = time.perf_counter() - start
        watch.join()
        output.seek(0)
        text = output.read()
    if code:
        raise RuntimeError(f"{' '.join(words)} left with {code}:\n{text}")
    return seconds, largest[0], text


def run(n_ranks: int, program: list, data: Path, **flags) -> Run:
    """Train with `program` and read its `history.jsonl`."""
    with tempfile.TemporaryDirectory() as out:
        options = {"data-dir": data, "out": out} | {key.replace("_", "-"): value for key, value in flags.items()}
        words = [word for key, value in options.items() for word in (f"--{key}", value)]
        for attempt in (1, 2, 3):  # some peers abort or hang at their end, once in a while
            try:
                seconds, memory, _ = call(command(n_ranks, [*program, *words]))
                break
            except RuntimeError as error:
                if attempt == 3:
                    raise
                print(f"again, for {str(error).partition(chr(10))[0]}", flush=True)
        lines = [json.loads(line) for line in Path(out, "history.jsonl").read_text().splitlines()]
    return Run(seconds, [line["seconds"] for line in lines], lines[-1]["val_loss"], memory)


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
    def of(cls, values: Iterable[float]) -> "Ratio":
        values = list(values)
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        digits = 2 if self.median < 10 else 1
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"
