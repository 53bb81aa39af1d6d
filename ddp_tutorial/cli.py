"""Mistakes of the user's that are one line: on the command line, in the environment, in files."""

import argparse
import os
import socket
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
from tqdm import tqdm

TIMEOUT = timedelta(seconds=300)


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
    return os.environ.get("RANK", "0") == "0"


def say(text: str, file=None) -> None:
    """Print `text`, a line, if this is the first rank."""
    if is_first_rank():
        print(one_line(text), file=file, flush=True)


def progress(batches: Iterable, title: str) -> Iterable:
    """`batches`, with a progress bar if they take long, this is the first rank and there is a terminal."""
    return tqdm(batches, title, leave=False, delay=1, disable=None if is_first_rank() else True)


def fail(mistake: str) -> NoReturn:
    """Print `mistake` after the program's name and leave with 2."""
    print(f"{Path(sys.argv[0]).name}: error: {one_line(mistake)}", file=sys.stderr, flush=True)
    sys.exit(2)


def check_environment(env: dict = os.environ) -> None:
    """Leave with one line and 2 if RANK and the variables that go with it are not all there or do not fit."""
    if "RANK" not in env:
        for name in ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            if name in env:  # a single process would train on its share only
                fail(f"{name} is set and RANK is not: launch with torchrun, or unset {name} for one process")
        return
    defaults = {"LOCAL_WORLD_SIZE": env.get("WORLD_SIZE"), "TORCHELASTIC_RESTART_COUNT": "0"}
    remedy = "launch with torchrun, or unset RANK for one process"
    number = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", *defaults):
        text = env.get(name, defaults.get(name))
        if text is None:
            fail(f"RANK is set and {name} is not: {remedy}")
        if not (text.isascii() and text.isdecimal() and len(text) < 10):
            fail(f"{name}={text!r} is not a whole number: {remedy}")
        number[name] = int(text)
    if not env.get("MASTER_ADDR"):
        fail(f"RANK is set and MASTER_ADDR is not: {remedy}")
    for low, high in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if number[low] >= number[high]:
            fail(f"{low}={number[low]} is not below {high}={number[high]}: {remedy}")
    if number["LOCAL_WORLD_SIZE"] > number["WORLD_SIZE"]:
        fail("LOCAL_WORLD_SIZE={LOCAL_WORLD_SIZE} is above WORLD_SIZE={WORLD_SIZE}: ".format(**number) + remedy)
    port = number["MASTER_PORT"]
    if not 0 < port < 65536:
        fail(f"MASTER_PORT={port} is not a port, 1 to 65535: {remedy}")
    if number["RANK"] == 0 and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # else the agent listens there
        try:
            with socket.create_server(("", port)):
                pass
        except OSError as error:
            fail(f"MASTER_PORT={port} cannot be used ({reason(error)}): choose another port")


@contextmanager
def meeting(timeout: timedelta) -> Iterator[None]:
    """The ranks meet in here, for which torch gives them twice the `timeout`: else leave with one line and 2."""

    def fail_because(why: str) -> NoReturn:
        where = "{RANK} of {WORLD_SIZE} did not meet the others at {MASTER_ADDR}:{MASTER_PORT}".format(**os.environ)
        fail(f"rank {where} ({why}): start all of them, or give them more --timeout")

    def give_up() -> None:  # torch has no timeout for a program that listens at the port and never answers
        with suppress(SystemExit):
            fail_because("no answer")
        os._exit(2)

    watchdog = threading.Timer(2 * timeout.total_seconds() + 5, give_up)
    watchdog.daemon = True
    watchdog.start()
    try:
        yield
    except (RuntimeError, ValueError) as error:  # of which are torch's own
        fail_because(reason(error))
    finally:
        watchdog.cancel()


class ArgumentParser(argparse.ArgumentParser):
    """Raises `UserError` for a bad command line instead of leaving; of several ranks, the first prints the help."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str):
        raise UserError(f"{message}: see --help")

    def print_help(self, file=None) -> None:
        if is_first_rank():
            super().print_help(file)


def positive_int(text: str) -> int:
    """An argparse type."""
    if not (text.isdecimal() and 0 < int(text) < 2**63):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def positive_float(text: str) -> float:
    """An argparse type."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e38:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0 that float32 can hold")
    return value


def seconds(text: str) -> timedelta:
    """An argparse type: what a process group takes as its timeout, up to a year."""
    if not 0.001 <= (value := positive_float(text)) < 3.2e7:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds between 0.001 and a year")
    return timedelta(seconds=value)


def seed(text: str) -> int:
    """An argparse type: what `torch.manual_seed` takes."""
    if not (text.isdecimal() and int(text) < 2**63):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to 2**63 - 1")
    return int(text)


def parse_args(description: str, n_gpus: int = 1) -> argparse.Namespace:
    """The flags of `ddp_sample.py`, and `use_gpu`: whether `--device` and the `n_gpus` that are needed say so.

    A mistake is not raised but kept for `check` to raise, so that several ranks can report it together.
    """
    parser = ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--data-dir", help="folder of the four files; else $DDP_DATA_DIR, else /mnt/ddp/sample")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/ddp_sample"), help="folder for the results (%(default)s)"
    )
    parser.add_argument("--epochs", type=positive_int, default=100, help="passes over the training set (%(default)s)")
    parser.add_argument(
        "--batch-size", type=positive_int, default=256, help="samples of a step, over all ranks (%(default)s)"
    )
    parser.add_argument("--lr", type=positive_float, default=1.0, help="learning rate (%(default)s)")
    parser.add_argument("--seed", type=seed, default=0, help="of weights and shuffling (%(default)s)")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (%(default)s)"
    )
    parser.add_argument("--timeout", type=seconds, default=TIMEOUT, help="seconds to wait for another rank (300)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    try:
        args = parser.parse_args()
        n_found = torch.cuda.device_count()
        if args.device == "cuda" and n_found < n_gpus:
            raise UserError(f"--device cuda: {n_gpus} GPUs needed, {n_found} found: use --device auto")
    except UserError as error:
        return argparse.Namespace(mistake=error, use_gpu=False, timeout=TIMEOUT)
    args.mistake, args.use_gpu = None, args.device != "cpu" and n_found >= n_gpus
    return args


def check(args: argparse.Namespace) -> None:
    """Raise the mistake that `parse_args` has found, if any."""
    if args.mistake:
        raise args.mistake


def settings(args: argparse.Namespace, train_set, val_set) -> dict:
    """What a resumed run must not change, by the names that the user knows, for `checkpoint.save`."""
    return {
        "--batch-size": args.batch_size,
        "--lr": args.lr,
        "--seed": args.seed,
        "X_train.npy of shape": tuple(train_set.X.shape),
        "X_val.npy of shape": tuple(val_set.X.shape),
        "classes": train_set.n_classes,
    }
