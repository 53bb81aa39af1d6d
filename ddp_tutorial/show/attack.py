"""Run a program, print what matters of what it says, and send a signal to one of its ranks on the way."""

import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ddp_tutorial import launcher

MATTERS = re.compile(r"^(epoch|attack|ranks |ddp_|[0-9] x |runs/)|exitcode|closing signal")
NOISE = re.compile(r"(?<= )[WE]\d+.*?\] |( \(pid: \d+\))?( of binary.*)?$")  # in torchrun's own lines


class Attacked(NamedTuple):
    """All lines of a program, each with its time in s, and its exit code on each node: 128 + n if signal n ended it."""

    lines: list[str]
    codes: list[int]


def attack(
    name: str,
    victim: str,
    epoch: int,
    command: str,
    nodes: Mapping[str, Mapping[str, str]] | None = None,
    say: Callable[[str], None] = print,
) -> Attacked:
    """Run `command`, a script or torchrun with its flags; soon after the epoch, send the signal `name` to the victim.

    The victim is a rank, such as "3", or a node: its torchrun and all its ranks. `nodes` maps the names of nodes, on
    each of which the command runs, to their variables; for one node it need not be given. `say` gets the lines that
    matter, as they come. Raises `RuntimeError` if there was no attack, or if another node than the victim has failed:
    then the rest is ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        job = Job(command, nodes or {"": launcher.inherited_environment()}, Path(folder), say)
        attacked = False
        try:
            for line in job.follow(victim):
                if line.startswith(f"epoch {epoch:>3} ") and not attacked:
                    attacked = True
                    time.sleep(0.05)  # into one of the next epochs
                    job.strike(name, victim)
        finally:
            job.end()
    if not attacked or job.others_failed(victim):
        raise RuntimeError("\n".join([f"exit codes {list(job.codes().values())}", *job.lines]))
    return Attacked(job.lines, [code if code >= 0 else 128 - code for code in job.codes().values()])


class Job:
    """A command that runs on each of some nodes, and what it says. The processes are copies of one with PyTorch."""

    def __init__(self, command: str, nodes: Mapping[str, Mapping[str, str]], folder: Path, say: Callable[[str], None]):
        program, *flags = command.split()
        self.is_torchrun, self.say, self.start, self.lines = program == "torchrun", say, time.perf_counter(), []
        self.files, self.processes, self.ranks = {}, {}, {}
        for i, (node, variables) in enumerate(nodes.items()):
            path = folder / f"{i}.txt"
            self.files[node] = path.open("w+")
            argv = [shutil.which("torchrun") if self.is_torchrun else program, *flags]
            self.processes[node] = launcher.start(argv, dict(variables), Path.cwd(), (path, path), fork=True)

    def end(self) -> None:
        launcher.end(list(self.processes.values()), signal.SIGTERM)
        for file in self.files.values():
            file.close()

    def codes(self) -> dict[str, int | None]:
        return dict(zip(self.processes, launcher.exit_codes(list(self.processes.values())), strict=True))

    def others_failed(self, victim: str) -> bool:
        """Whether a node has failed that is not the victim, and not the only one."""
        return len(self.files) > 1 and any(code for node, code in self.codes().items() if node != victim)

    def follow(self, victim: str) -> Iterator[str]:
        """Its lines as they come, until all nodes have ended, or one that is not the victim has failed."""
        rest, codes, failed = dict.fromkeys(self.files, ""), [None], False
        while True:
            is_over = failed or None not in codes  # known before the last lines are read
            for node, file in self.files.items():
                *whole, rest[node] = (rest[node] + file.read()).split("\n")
                for line in whole:
                    self.note(node, line)
                    if re.match(r"\d x ", line):  # rank 0 has met the others
                        self.find_ranks()
                    yield line
            if is_over:
                return
            time.sleep(0.01)
            codes, failed = list(self.codes().values()), self.others_failed(victim)

    def note(self, node: str, line: str) -> None:
        self.lines.append(f"{time.perf_counter() - self.start:6.2f} s {node} {line}")
        if MATTERS.search(line):
            self.say(NOISE.sub("", self.lines[-1]))

    def find_ranks(self) -> None:
        """Node -> rank -> process."""
        of = children if self.is_torchrun else lambda process: {"0": process}
        self.ranks = {node: of(process.pid) for node, process in self.processes.items()}
        if len(self.ranks) > 1:
            each = (f"ranks on {node}: {' '.join(sorted(ranks)) or 'none'}" for node, ranks in self.ranks.items())
            self.note(" ", "; ".join(each))

    def strike(self, name: str, victim: str) -> None:
        is_node = victim in self.processes
        of_all = {rank: process for ranks in self.ranks.values() for rank, process in ranks.items()}
        for process in (self.processes[victim].pid, *self.ranks[victim].values()) if is_node else (of_all[victim],):
            os.kill(process, getattr(signal, name))
        blank = " " * (len(self.files) > 1)
        self.note(blank, f"attack: {name} to {'node' if is_node else 'rank'} {victim}")


def children(agent: int) -> dict[str, int]:
    """Rank -> process, of the ranks that the process `agent` has started."""
    found = {}
    with suppress(OSError):  # one has ended
        for pid in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
            if rank := re.search(r"\0RANK=(\d+)\0", Path(f"/proc/{pid}/environ").read_text()):
                found[rank[1]] = int(pid)
    return found
