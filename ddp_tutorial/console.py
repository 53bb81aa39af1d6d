"""What a program says: one line for a mistake, from one rank; progress on long work."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn, TextIO

from tqdm import tqdm

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


def leave(code: int) -> NoReturn:
    """End the program. A rank ends at once: gloo's threads abort the shutdown of one whose group is still there."""
    if "RANK" in os.environ:
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def run(main: Callable[[], None]) -> None:
    """Call `main`; a `UserError` ends the program with one line and the error's exit code.

    All ranks find a mistake, and the first one speaks. torchrun terminates the others as soon as one has left, so
    none leaves before all have had the time to find it.
    """
    try:
        main()
    except KeyboardInterrupt:
        leave(130)  # what shells give a program that Ctrl-C has ended
    except UserError as mistake:
        code, by_torchrun = mistake.code, "TORCHELASTIC_RUN_ID" in os.environ
        if by_torchrun:
            signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
        if is_first_rank():
            report(mistake)
            time.sleep(2 * by_torchrun)
        elif by_torchrun:
            time.sleep(PATIENCE)
            report(mistake)  # the first rank has not found it: its machine has other files
        leave(code)
