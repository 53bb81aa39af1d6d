"""The command line of the three scripts."""

import argparse
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from ddp_tutorial.console import UserError, check_launcher, is_first_rank


class ArgumentParser(argparse.ArgumentParser):
    """Raises `UserError` for a bad command line instead of leaving; of several ranks, the first prints the help."""

    def error(self, message: str):
        old = "--local" in message  # an older launcher sets that flag
        raise UserError(f"{message}: {'launch with torchrun, which needs no such flag' if old else 'see --help'}")

    def print_help(self, file=None) -> None:
        if is_first_rank():
            super().print_help(file)


def number(text: str, kind: type, low: float, high: float, what: str) -> float:
    """An argparse type, once the others are given: a number of the type `kind`, from `low` to below `high`."""
    with suppress(ValueError):
        if low <= (value := kind(text)) < high:
            return value
    raise argparse.ArgumentTypeError(f"{text} is not {what}")


positive_int = partial(number, kind=int, low=1, high=2**63, what="a whole number above 0")
positive_float = partial(number, kind=float, low=1e-45, high=1e38, what="a number above 0 that float32 can hold")
seed = partial(number, kind=int, low=0, high=2**63, what="a whole number from 0 to 2**63 - 1")


def make_parser(description: str) -> ArgumentParser:
    """The flags that all scripts have, for a script whose docstring is `description`."""
    parser = ArgumentParser(description=description.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--data-dir", help="folder of the four files; else $DDP_DATA_DIR, else /mnt/ddp/sample")
    add("--out", type=Path, default=Path("runs/ddp_sample"), help="folder for the results (%(default)s)")
    add("--epochs", type=positive_int, default=100, help="passes over the training set (%(default)s)")
    add("--batch-size", type=positive_int, default=256, help="samples of a step, over all ranks (%(default)s)")
    add("--lr", type=positive_float, default=1.0, help="learning rate (%(default)s)")
    add("--seed", type=seed, default=0, help="of weights and shuffling (%(default)s)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (%(default)s)")
    add("--data-on", choices=("auto", "cpu", "gpu"), default="auto", help="whose memory holds the data; auto: the GPU's, if half of what is free is enough")  # fmt: skip
    return parser


def parse(description: str, n_gpus: int = 1, parser: ArgumentParser | None = None) -> argparse.Namespace:
    """The flags, and `use_gpu`: whether `--device` and the `n_gpus` needed here say so. Raises `UserError`."""
    check_launcher()
    args = (parser or make_parser(description)).parse_args()
    n_found = torch.cuda.device_count()
    if args.device == "cuda" and n_found < n_gpus:
        raise UserError(f"--device cuda: {n_gpus} GPUs needed, {n_found} found: use --device auto")
    args.use_gpu = args.device != "cpu" and n_found >= n_gpus
    if args.data_on == "gpu" and not args.use_gpu:
        raise UserError("--data-on gpu: the computing is done on the CPU: use --data-on auto")
    return args


def split_batch(batch_size: int, n_samples: int, world_size: int = 1) -> int:
    """The samples of a step that each of `world_size` ranks takes: an equal share of `batch_size`.

    A batch larger than the training set of `n_samples` is all of it. Raises `UserError` if the shares are not equal.
    """
    if n_samples < world_size:
        raise UserError(f"X_train.npy: {n_samples} samples cannot be shared by {world_size} ranks: start at most {n_samples}")  # fmt: skip
    all_of_them = " (all samples)" if batch_size >= n_samples else ""
    batch_size = min(batch_size, n_samples)
    if batch_size % world_size:
        nearest = max(world_size, batch_size // world_size * world_size)
        raise UserError(f"--batch-size {batch_size}{all_of_them} does not divide among {world_size} ranks: use a multiple of {world_size}, such as {nearest}")  # fmt: skip
    return batch_size // world_size
