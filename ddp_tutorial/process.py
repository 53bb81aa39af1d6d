"""How one process of several starts, speaks and ends. Nothing here communicates: a launcher's variables say enough."""

import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from enum import Enum
from typing import NamedTuple, NoReturn

from ddp_tutorial import console, npy
from ddp_tutorial.console import UserError, report


class Speaker(Enum):
    """Which of the ranks says why they end."""

    FIRST = "the first rank"
    FIRST_ELSE_OTHERS = "the first rank, or another that is still there when its wait is over"
    EACH = "each rank that ends so"
    NOBODY = "nobody"


class Ending(NamedTuple):
    """One way in which a process of several ends, other than by having finished (exit code 0)."""

    code: int  # the exit code
    speaker: Speaker
    why: str
    first_waits: float = 0  # seconds that the first rank stays after it has spoken
    others_wait: float = 0  # seconds that the others stay


MISTAKE = Ending(
    2,  # as argparse has it
    Speaker.FIRST_ELSE_OTHERS,
    "A mistake before the ranks meet. All find it. torchrun ends the others once one has left: so the first speaks "
    "before it leaves, and the others give it time. It may be fine on the first one's machine: then another speaks.",
    first_waits=2,
    others_wait=20,
)
MISTAKE_WITHOUT_TORCHRUN = Ending(
    2, Speaker.FIRST, "A mistake before the ranks meet, where nobody ends the others: nobody needs to wait."
)
AGREED = Ending(
    2,  # or what the `UserError` says: 75 for a run that was asked to stop
    Speaker.FIRST,
    "A mistake, or a stop, on which ranks that have met agree. They wait for each other in a barrier.",
)
NO_RANK = Ending(
    2,
    Speaker.FIRST,
    "Several processes without RANK. Once one has left, the launcher may kill the one that speaks.",
    first_waits=2,
    others_wait=2,
)
NOT_MET = Ending(
    2,
    Speaker.EACH,
    "A rank whose variables do not fit, or that has not met the others, cannot know whether another one speaks.",
)
FAILURE = Ending(
    1,
    Speaker.EACH,  # by its traceback
    "An error of the program's. The others fail when this rank's connections close, and torchrun, which compares whole "
    "seconds, is to name this rank as the first.",
    first_waits=1,
    others_wait=1,
)
ORPHANED = Ending(
    1, Speaker.EACH, "The torchrun of this rank was killed: nobody else ends it, and its place may be taken."
)
STANDING_STILL = Ending(
    128 + signal.SIGTERM,  # 143, as shells give it
    Speaker.NOBODY,
    "The rank was asked to stop and waits in a call for one that is dead.",
)
INTERRUPTED = Ending(130, Speaker.NOBODY, "Ctrl-C: whoever pressed it knows.")  # the code as shells give it


class Launcher(NamedTuple):
    """The variables by which a launcher that knows nothing of torch's RANK tells its processes apart."""

    name: str
    size: str  # how many processes there are; "" if it does not say
    rank: str  # which of them this is


LAUNCHERS = (
    Launcher("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    Launcher("Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    Launcher("MPICH, Intel MPI", "PMI_SIZE", "PMI_RANK"),
    Launcher("MVAPICH", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    Launcher("PMIx", "", "PMIX_RANK"),
)


def is_first_rank() -> bool:
    """Whether this is rank 0, or a process without ranks."""
    return os.environ.get("RANK", "0").lstrip("0") == ""  # "00" is 0 as well


def by_torchrun() -> bool:
    """Whether torchrun has started this process: it ends the other ranks once one has left."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def n_local_processes(env: Mapping[str, str]) -> int:
    """How many ranks this machine has, as the launcher says; 1 if it does not, or says what no number can be."""
    text = env.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(text)) if text.isdecimal() and len(text) < 10 else 1


def print_rank0(text: str) -> None:
    """Print `text`, a line, if this is the first rank: of several ranks that all say the same, one is enough."""
    if is_first_rank():
        console.print_line(text)


def per_rank_batch_size(batch_size: int, n_samples: int, world_size: int) -> int:
    """The samples of a step that each of `world_size` ranks takes: an equal share of `batch_size`.

    A batch larger than the training set of `n_samples` is all of it. Raises `UserError` if the shares are not equal.
    """
    if n_samples < world_size:
        shares = f"{n_samples} samples cannot be shared by {world_size} ranks"
        raise UserError(f"X_train.npy: {shares}: start at most {n_samples}")
    all_of_them = " (all samples)" if batch_size >= n_samples else ""
    batch_size = min(batch_size, n_samples)
    if batch_size % world_size:
        nearest = max(world_size, batch_size // world_size * world_size)
        shares = f"{batch_size}{all_of_them} does not divide among {world_size} ranks"
        raise UserError(f"--batch-size {shares}: use a multiple of {world_size}, such as {nearest}")
    return batch_size // world_size


def speak(ending: Ending, mistake: UserError | None) -> None:
    """Say what the `mistake` is, if that is this process's part in the `ending`."""
    if ending.speaker is Speaker.EACH or (is_first_rank() and ending.speaker is not Speaker.NOBODY):
        report(mistake)


def leave(ending: Ending, mistake: UserError | None = None) -> NoReturn:
    """End this process in that way: say what the `mistake` is if that is its part, wait, and leave."""
    code = mistake.code if mistake else ending.code
    first = is_first_rank()
    if by_torchrun() and threading.current_thread() is threading.main_thread():  # no other may set handlers
        signal.signal(signal.SIGTERM, lambda *_: os._exit(code))  # torchrun's, once another rank has left
    speak(ending, mistake)
    time.sleep(ending.first_waits if first else ending.others_wait)
    if ending.speaker is Speaker.FIRST_ELSE_OTHERS and not first:
        report(mistake)  # the first rank has not met it: its machine has other files
    leave_at_once(code)


def leave_at_once(code: int) -> NoReturn:
    """End this process. A rank skips the interpreter's shutdown, which gloo's threads abort while its group lives."""
    if "RANK" not in os.environ and threading.current_thread() is threading.main_thread():
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def fail(mistake: UserError) -> NoReturn:
    """End with a `mistake` that ranks find before they meet."""
    leave(MISTAKE if by_torchrun() else MISTAKE_WITHOUT_TORCHRUN, mistake)


def start(env: Mapping[str, str] = os.environ) -> None:
    """What a program does first: all ranks but one are quiet; what cannot start ranks is refused, with one line and 2.

    Refused are one of several processes of a launcher that sets no RANK, since each would train alone, and a rank of
    the launcher before torchrun, which passes a flag.
    """
    console.open_closed_streams()
    faulthandler.enable(sys.__stderr__ or sys.stderr, all_threads=False)  # names the place of a bus error
    console.quiet, npy.n_processes = not is_first_rank(), n_local_processes(env)
    flag = next((word for word in sys.argv[1:] if word.startswith(("--local-rank", "--local_rank"))), None)
    if flag:
        fail(UserError(f"{flag}: an older launcher passes this flag: launch with torchrun, which needs none"))
    for launcher in LAUNCHERS if "RANK" not in env else ():
        size, rank = env.get(launcher.size, "1"), env.get(launcher.rank, "0")
        if size == "1" and rank == "0":
            continue
        seen, n = (launcher.size, size) if launcher.size in env else (launcher.rank, "several")
        speaks = rank == ("0" if launcher.size in env else "1")  # without a size the first cannot know of the others
        mistake = UserError(
            f"{n} processes without RANK ({seen} is set): each would train alone: let the launcher start one torchrun "
            "on each machine, which starts the ranks (chapter 8)"
        )
        leave(NO_RANK if speaks else NO_RANK._replace(speaker=Speaker.NOBODY), mistake)


def run(main: Callable[[], None]) -> None:
    """Call `main`, the program of this process; a `UserError` ends it with one line and the error's exit code."""
    start()
    try:
        return main()
    except KeyboardInterrupt:
        leave(INTERRUPTED)
    except UserError as mistake:
        traceback.clear_frames(mistake.__traceback__)  # a notebook would keep them, and with them the lock on --out
        fail(mistake)
