"""What a program says: one line for a mistake, from one rank; progress on long work."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

LAUNCHERS = "SLURM_STEP_NUM_TASKS SLURM_PROCID, OMPI_COMM_WORLD_SIZE OMPI_COMM_WORLD_RANK, PMI_SIZE PMI_RANK, PMIX_SIZE PMIX_RANK"  # how many processes, and which of them this is: srun, Open MPI, MPICH and Intel MPI, PMIx  # fmt: skip
PATIENCE = 20.0  # seconds in which the first rank finds the mistake that another one has found


def one_line(text: str) -> str:
    """`text` with escapes in place of what is not printable: a line break in the name of a file, say."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


class UserError(Exception):
    """A mistake of the user's. The message is one line: what is wrong, where, and what to do."""

    kind, code = "error", 2

    def __str__(self) -> str:
        return one_line(super().__str__())


def reason(error: Exception) -> str:
    """The last line of what `error` says."""
    return (getattr(error, "strerror", None) or str(error).strip() or type(error).__name__).splitlines()[-1].strip()


def is_first_rank() -> bool:
    """Whether this process speaks: of several ranks, only the first does."""
    return os.environ.get("RANK", "0").lstrip("0") == ""  # "00" is 0 as well


def say(text: str, file: TextIO | None = None) -> None:
    """Print `text`, a line, if this is the first rank."""
    if is_first_rank():
        print(one_line(text), file=file, flush=True)


def progress(batches: Iterable, title: str) -> Iterable:
    """`batches`, with a progress bar if they take long, this is the first rank and there is a terminal."""
    return tqdm(batches, title, leave=False, delay=1, disable=None if is_first_rank() else True)


def report(mistake: UserError) -> None:
    """Print `mistake` after the program's name."""
    print(f"{Path(sys.argv[0]).name}: {mistake.kind}: {mistake}", file=sys.stderr, flush=True)


def check_launcher(env: Mapping = os.environ) -> None:
    """Leave with one line and 2 if this is one of several processes that a launcher has started without RANK."""
    for size, rank in map(str.split, LAUNCHERS.split(",")):
        if "RANK" not in env and (env.get(size, "1") != "1" or env.get(rank, "0") != "0"):
            n = env.get(size, "several")
            if env.get(rank, "0") == ("0" if size in env else "1"):  # one speaks; PMIx alone tells no number
                report(UserError(f"{n} processes without RANK ({size if size in env else rank} is set): each would train alone: let the launcher start one torchrun on each machine, which starts the ranks (chapter 8)"))  # fmt: skip
            time.sleep(2)  # once one has left, the launcher may kill the one that speaks
            sys.exit(2)


def run(main: Callable[[], None]) -> None:
    """Call `main`; a `UserError` ends the program with one line and the error's exit code.

    All ranks find a mistake, the first one speaks, and none leaves early: torchrun would then terminate the others.
    """
    try:
        return main()
    except KeyboardInterrupt:
        code = 130  # what shells give a program that Ctrl-C has ended
    except UserError as mistake:
        traceback.clear_frames(mistake.__traceback__)  # a notebook would keep them, and with them the lock on --out
        code, by_torchrun = mistake.code, "TORCHELASTIC_RUN_ID" in os.environ
        if by_torchrun:
            signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
        if is_first_rank():
            report(mistake)
            time.sleep(2 * by_torchrun)
        elif by_torchrun:
            time.sleep(PATIENCE)
            report(mistake)  # the first rank has not found it: its machine has other files
    if "RANK" in os.environ:  # a rank ends at once: gloo's threads abort the shutdown of one that still has its group
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
