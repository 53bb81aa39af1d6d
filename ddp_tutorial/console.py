"""What a program says: one line for a mistake or a warning, progress on long work."""

import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

quiet = False  # `process` sets it in all but one of several processes that would say the same


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


def print_line(text: str, file: TextIO | None = None) -> None:
    """Print `text` as one line, to stdout unless `file` says otherwise; see `print_text`."""
    print_text(one_line(text) + "\n", file)


def print_text(text: str, file: TextIO | None = None) -> None:
    """Print `text` as it is. If nobody reads it any more, what cannot be said is left unsaid: the work goes on."""
    file = file or sys.stdout
    try:
        print(text, end="", file=file, flush=True)
    except (OSError, ValueError):  # `| head` has read enough, `| tee` was ended with its terminal, the disk is full
        let_go(file)


def let_go(file: TextIO) -> None:
    """Send whatever `file` still holds, and all that follows, to nowhere."""
    with suppress(OSError, ValueError):  # a file without a descriptor, or a closed one, holds nothing
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, file.fileno())
        os.close(nowhere)


def open_closed_streams() -> None:
    """Give a process that was started without stdin, stdout or stderr (`2>&-`) one that goes nowhere.

    Otherwise the next file that it opens is taken for it, and gets what torch writes there.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))


def announce(text: str) -> None:
    """Print a line, unless this process is to be quiet."""
    if not quiet:
        print_line(text)


def warn(text: str) -> None:
    """Print a warning to stderr, unless this process is to be quiet."""
    if not quiet:
        print_line(f"warning: {text}", sys.stderr)


def report(mistake: UserError) -> None:
    """Print `mistake` after the program's name, to stderr."""
    print_line(f"{Path(sys.argv[0]).name}: {mistake.kind}: {mistake}", sys.stderr)


def progress(batches: Iterable, title: str) -> Iterable:
    """`batches`, with a progress bar if they take long and somebody watches at a terminal."""
    return tqdm(batches, title, leave=False, delay=1, disable=True if quiet else None)
