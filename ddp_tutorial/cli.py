"""Command lines whose mistakes are one line."""

import argparse
import os
from pathlib import Path


class UserError(Exception):
    """A mistake of the user's. The message is one line: what is wrong, where, and what to do."""


class ArgumentParser(argparse.ArgumentParser):
    """Raises `UserError` for a bad command line instead of leaving; of several ranks, the first prints the help."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str):
        raise UserError(f"{message}: see --help")

    def print_help(self, file=None) -> None:
        if os.environ.get("RANK", "0") == "0":
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


def seed(text: str) -> int:
    """An argparse type: what `torch.manual_seed` takes."""
    if not (text.isdecimal() and int(text) < 2**63):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to 2**63 - 1")
    return int(text)


def parse_args(description: str) -> argparse.Namespace:
    """The flags of `ddp_sample.py`. Raises `UserError`."""
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
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    return parser.parse_args()
