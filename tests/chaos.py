"""python -m tests.chaos [N]: N runs of ddp_resilient.py; in each of them something is killed at a random moment.

A run survives if it ends by itself after one restart for each kill, and is identical if its history and its last
checkpoint are those of a run that nothing befell: bit for bit, but for the last digits of the mean loss of an epoch
that was cut in two. With `--agents 2` the ranks are those of two agents, each a torchrun that takes the other's place
for one on another machine. After each kill the history must consist of whole lines, and at the end no process, no open
port and no file in TMPDIR may be left. Where torchrun is asked to stop, its checkpoint must be whole, and a run that
resumes must survive. A kill that comes too late is not counted but repeated.

Seconds from a kill on: "noticed", until torchrun starts to end the other ranks; "trains", until the first new epoch
of the restarted group is in the history.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from statistics import median

from ddp_tutorial.console import UserError
from ddp_tutorial.ranks import checkpoint
from tests.ranks import RESILIENT, Launch, assert_equal, data_gen, result

KINDS = {
    "one": "a rank, at any moment from its start to its end",
    "torn": "rank 0, within the write of a checkpoint",
    "two": "two ranks at once",
    "all": "all ranks at once",
    "machine": "all ranks of one agent (with several agents)",
    "again": "a rank, and then one of the restarted group before that trains",
    "SIGTERM": "torchrun is asked to stop, once there is a checkpoint",
    "SIGINT": "torchrun is interrupted, once there is a checkpoint",
}


class Late(Exception):
    """The run ended before what it was to be killed at."""


class Run:
    """A run, and what befell it."""

    def __init__(self, launch: Launch, out: Path, args: argparse.Namespace):
        self.launch, self.out, self.n_ranks, self.n_agents, self.all_epochs = (
            launch,
            out,
            args.ranks,
            args.agents,
            args.epochs,
        )
        self.kills, self.torn, self.noticed, self.trains, self.dead = [], set(), None, None, set()

    def until(self, condition, pause: float = 0.01):
        """What `condition` returns, once it is true."""
        while not (value := condition()):
            if any(agent.poll() is not None for agent in self.launch.agents):
                raise Late
            time.sleep(pause)
        return value

    def sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        self.until(lambda: time.monotonic() > end)

    def group(self) -> dict[int, int]:
        """The ranks' process ids, once all of them have started."""
        return self.until(
            lambda: (
                len(pids := self.launch.ranks(None)) == self.n_ranks and self.dead.isdisjoint(pids.values()) and pids
            )
        )

    def n_epochs(self) -> int:
        """How many epochs the history has, each in a whole line."""
        lines = read(self.out / "history.jsonl").splitlines(keepends=True)
        assert all(line.endswith("\n") for line in lines), f"torn line: {lines[-1]}"
        assert [json.loads(line)["epoch"] for line in lines] == list(range(1, len(lines) + 1)), "an epoch is missing"
        return len(lines)

    def stop_in_a_write(self, pid: int) -> None:
        """Hold rank 0 while a checkpoint's temporary file is there."""
        writing = self.out / "checkpoint.writing.pt"
        while not writing.exists():
            self.until(writing.exists, pause=0)
            os.kill(pid, signal.SIGSTOP)
            self.until(lambda: state(pid) in "TZ", pause=0)
            if not writing.exists():  # it was faster
                os.kill(pid, signal.SIGCONT)

    def kill(self, ranks: list[int], pids: dict[int, int]) -> None:
        """Kill them, wait until the others have been ended, and look at what is left."""
        if all(state(pids[rank]) == "Z" for rank in ranks):
            raise Late
        if self.n_agents > 1 and self.n_epochs() == self.all_epochs:  # an agent whose ranks are done meets no more
            raise Late
        self.moment = time.time()
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(pids[rank], signal.SIGKILL)
        self.dead |= set(pids.values())
        self.until(lambda: self.dead.isdisjoint(self.launch.ranks(None).values()))
        self.kills.append(f"{' and '.join(map(str, ranks))} after epoch {self.n_epochs()}")
        if key := identity(self.out / "checkpoint.writing.pt"):
            self.torn.add(key)

    def measure(self) -> None:
        """The times of the last kill, as far as it has them."""
        newest, begun = checkpoint.read(self.out / "checkpoint.pt"), identity(self.out / "history.jsonl")[:1]
        epoch = newest[1]["epoch"] if newest else 0
        with suppress(Late):  # nothing was left to train
            self.until(lambda: identity(self.out / "history.jsonl")[:1] != begun and self.n_epochs() > epoch)
            self.trains = time.time() - self.moment
        for stamp in re.findall(r"^W(\d{4} [\d:.]+) .* Sending process", self.launch.said("stderr"), re.MULTILINE):
            moment = datetime.strptime(f"{datetime.now().year}{stamp}", "%Y%m%d %H:%M:%S.%f").timestamp()
            if moment > self.moment:
                self.noticed = moment - self.moment
                break


def read(path: Path) -> str:
    with suppress(OSError):
        return path.read_text()
    return ""


def identity(path: Path) -> tuple:
    """The inode, which a file that replaces another does not share with it, and the time of the last write."""
    with suppress(FileNotFoundError):
        return path.stat().st_ino, path.stat().st_mtime_ns
    return ()


def state(pid: int) -> str:
    """The letter in /proc: T is stopped, Z has ended."""
    return (read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split() or ["Z"])[0]


def befall(run: Run, kind: str, rng: random.Random, start: float, end: float) -> None:
    """Do to the run what KINDS says; it is to train from `start` to `end`, in seconds from its ranks' start."""
    if kind.startswith("SIG"):
        run.group()
        run.until((run.out / "checkpoint.pt").exists)
        run.sleep(rng.uniform(0, end - start))
        run.launch.agent.send_signal(signal.Signals[kind])
        run.kills.append(f"torchrun after epoch {run.n_epochs()}")
        return
    pids = run.group()
    run.sleep(rng.uniform(0, end))
    if kind == "torn":
        run.stop_in_a_write(pids[0])
    each = run.n_ranks // run.n_agents
    chosen = rng.sample(range(run.n_ranks), {"two": 2, "all": run.n_ranks}.get(kind, 1))
    if kind == "two" and run.n_agents > 1:  # on different agents
        chosen = [agent * each + rng.randrange(each) for agent in rng.sample(range(run.n_agents), 2)]
    if kind == "machine":
        chosen = [rank for rank in range(run.n_ranks) if rank // each == chosen[0] // each]
    run.kill([0] if kind == "torn" else chosen, pids)
    if kind == "again":
        pids = run.group()
        run.sleep(rng.uniform(0, start))
        run.kill(rng.sample(range(run.n_ranks), 1), pids)
    run.measure()


class Chaos:
    """What all runs have in common; makes the run that nothing befalls."""

    def __init__(self, folder: Path, args: argparse.Namespace):
        self.folder, self.args, self.expected = folder, args, None
        data_gen("digits", "--out", folder / "data")
        with self.launch("whole") as launch:
            run = Run(launch, folder / "whole", args)
            run.group()
            begin = time.monotonic()
            run.until(run.n_epochs)
            self.start = time.monotonic() - begin
            run.until(lambda: not launch.ranks())
            self.end = time.monotonic() - begin
            if wrong := self.verdict(run):
                sys.exit(f"nothing befell a run, and yet: {wrong}")
        self.expected = result(folder / "whole")
        print(f"the ranks train from {self.start:.1f} to {self.end:.1f} s after their start", flush=True)

    def launch(self, name: str, *flags) -> Launch:
        paths = ("--data-dir", self.folder / "data", "--out", self.folder / name)
        flags = (*paths, "--epochs", self.args.epochs, "--batch-size", 64, *flags)
        return Launch(self.args.ranks, RESILIENT, *flags, restarts=3, n_agents=self.args.agents)

    def verdict(self, run: Run) -> list[str]:
        """What is wrong with a run that was to go to its end, with one restart for each kill."""
        done = run.launch.wait(300)
        wrong = [f"exit code {done.returncode}"] * (done.returncode != 0) + run.launch.left()
        if (n := done.stderr.count("failed (exitcode")) != len(run.kills) and run.n_agents == 1:
            wrong.append(f"{n} groups failed")
        try:
            if self.expected and not wrong:
                assert_equal(result(run.out), self.expected)
        except AssertionError:
            wrong.append("not identical")
        return wrong

    def stopped(self, run: Run) -> list[str]:
        """What is wrong with a run that was asked to stop, and with one that resumes."""
        if run.launch.wait(300).returncode == 0:
            raise Late
        if wrong := run.launch.left() + ["no checkpoint"] * (checkpoint.read(run.out / "checkpoint.pt") is None):
            return wrong
        run.n_epochs()
        with self.launch(run.out.name, "--resume") as launch:
            return self.verdict(Run(launch, run.out, self.args))

    def run(self, i: int, kind: str) -> tuple[Run, list[str]]:
        """The run, and what is wrong with it."""
        for attempt in range(20):
            rng, name = random.Random(f"{self.args.seed} {i} {attempt}"), f"{i}.{attempt}"
            shorter = 0.8**attempt  # each late run: the machine may be less busy than when `end` was measured
            with self.launch(name) as launch:
                run = Run(launch, self.folder / name, self.args)
                try:
                    befall(run, kind, rng, self.start * shorter, self.end * shorter)
                    wrong = self.stopped(run) if kind.startswith("SIG") else self.verdict(run)
                except Late:
                    if launch.wait(300).returncode == 0:
                        continue
                    wrong = ["failed by itself"]
                except (AssertionError, UserError, subprocess.TimeoutExpired) as error:
                    wrong = [str(error)]
                if wrong:
                    print(launch.said("stdout"), launch.said("stderr"), file=sys.stderr, flush=True)
                return run, wrong
        return run, ["late each time: use more --epochs"]


def table(kinds: list[str], runs: list[tuple[Run, list[str]]]) -> str:
    """A line for each kind and one for them all."""
    lines = [
        f"{'':8}{'runs':>6}{'kills':>7}{'survived':>10}{'identical':>11}{'torn':>6}  {'noticed':>15}{'trains':>15}"
    ]
    for kind in [*dict.fromkeys(kinds), "total"]:
        chosen = [run for k, run in zip(kinds, runs, strict=True) if kind in (k, "total")]
        numbers = [len(chosen), sum(len(run.kills) for run, _ in chosen)]
        numbers += [sum(set(wrong) <= {"not identical"} for _, wrong in chosen), sum(not wrong for _, wrong in chosen)]
        line = "{:8}{:6}{:7}{:10}{:11}".format(kind, *numbers) + f"{sum(len(run.torn) for run, _ in chosen):6}  "
        for times in ([run.noticed for run, _ in chosen], [run.trains for run, _ in chosen]):
            times = [seconds for seconds in times if seconds is not None]
            line += f"{f'{median(times):.2f}, {max(times):.2f}' if times else '':>15}"
        lines.append(line.rstrip())
    return "\n".join([*lines, "noticed, trains: median and maximum, in seconds"])


def main() -> int:
    description, notes = __doc__.split("\n", 1)
    notes += "\nkinds:\n" + "".join(f"  {kind:8} {what}\n" for kind, what in KINDS.items())
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m tests.chaos", description=description, epilog=notes, formatter_class=raw
    )
    parser.add_argument("n", nargs="?", type=int, default=50, help="runs (%(default)s)")
    parser.add_argument("--ranks", type=int, default=4, help="of each run (%(default)s)")
    parser.add_argument("--agents", type=int, default=1, help="that share the ranks (%(default)s)")
    parser.add_argument("--epochs", type=int, default=25, help="of each run (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of kinds, ranks and moments (%(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="which, in turn (all that fit)")
    args = parser.parse_args()
    fit = [kind for kind in KINDS if (not kind.startswith("SIG") if args.agents > 1 else kind != "machine")]
    args.kinds = args.kinds or fit
    kinds = [args.kinds[i % len(args.kinds)] for i in range(args.n)]
    random.Random(args.seed).shuffle(kinds)
    runs, begin = [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        chaos = Chaos(Path(folder), args)
        for i, kind in enumerate(kinds, 1):
            run, wrong = chaos.run(i, kind)
            runs.append((run, wrong))
            times = "".join(f", {key} {s:.1f} s" for key, s in (("noticed", run.noticed), ("trains", run.trains)) if s)
            torn = f", {len(run.torn)} torn" * bool(run.torn)
            print(
                f"{i}/{args.n} {kind}: {'; '.join(run.kills)}{torn}{times}: {'; '.join(wrong) or 'identical'}",
                flush=True,
            )
    print(table(kinds, runs), f"{time.monotonic() - begin:.0f} s", sep="\n")
    return int(any(wrong for _, wrong in runs))


if __name__ == "__main__":
    sys.exit(main())
