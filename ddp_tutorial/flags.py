"""The command line of the three scripts."""

import argparse
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from ddp_tutorial import console
from ddp_tutorial.console import UserError


class ArgumentParser(argparse.ArgumentParser):
    """Raises `UserError` for a bad command line instead of leaving; a quiet process does not print the help."""

    def error(self, message: str):
        raise UserError(f"{message}: see --help")

    def print_help(self, file=None) -> None:
        if not console.quiet:
            console.print_text(self.format_help(), file)


def number(text: str, kind: type, low: float, high: float, what: str) -> float:
    """An argparse type, once the others are given: a number of the type `kind`, from `low` to below `high`."""
    with suppress(ValueError):
        if low <= (value := kind(text)) < high:
            return value
    raise argparse.ArgumentTypeError(f"{text} is not {what}")


positive_int = partial(number, kind=int, low=1, high=2**63, what="a whole number above 0")
positive_float = partial(number, kind=float, low=1e-45, high=1e38, what="a number above 0 that float32 can hold")
seed = partial(number, kind=int, low=0, high=2**63, what="a whole number from 0 to 2**63 - 1")


def make_parser(description: str | None) -> ArgumentParser:
    """The flags that all scripts have, for a script whose docstring is `description`: `python -OO` leaves none."""
    parser = ArgumentParser(description=(description or "").partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--data-dir", help="folder of the four files; else $DDP_DATA_DIR, else /mnt/ddp/sample")
    add("--out", type=Path, default=Path("runs/ddp_sample"), help="folder for the results (%(default)s)")
    add("--epochs", type=positive_int, default=100, help="passes over the training set (%(default)s)")
    add("--batch-size", type=positive_int, default=256, help="samples of a step, over all processes (%(default)s)")
    add("--lr", type=positive_float, default=1.0, help="learning rate (%(default)s)")
    add("--seed", type=seed, default=0, help="of weights and shuffling (%(default)s)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (%(default)s)")
    auto = "auto: the GPU's, if half of what is free is enough"
    add("--data-on", choices=("auto", "cpu", "gpu"), default="auto", help=f"whose memory holds the data; {auto}")
    return parser


def parse(description: str | None, n_gpus: int = 1, parser: ArgumentParser | None = None) -> argparse.Namespace:
    """The flags, and `use_gpu`: whether `--device` and the `n_gpus` needed here say so. Raises `UserError`."""
    args = (parser or make_parser(description)).parse_args()
    n_found = torch.cuda.device_count()
    if args.device == "cuda" and n_found < n_gpus:
        raise UserError(f"--device cuda: {n_gpus} GPUs needed, {n_found} found: use --device auto")
    args.use_gpu = args.device != "cpu" and n_found >= n_gpus
    if args.data_on == "gpu" and not args.use_gpu:
        raise UserError("--data-on gpu: the computing is done on the CPU: use --data-on auto")
    return args
