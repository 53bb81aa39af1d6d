"""The options of `python -m ddp_tutorial.check`, and the plan that they make."""

import argparse
import os
from pathlib import Path

from ddp_tutorial.check.launch import Plan, file_of_module, spawns_ranks
from ddp_tutorial.check.scratch import MAX_ENTRIES
from ddp_tutorial.console import UserError

DESCRIPTION = """\
Check any DDP script: launch it, unchanged, on a few ranks, and say which rules of data-parallel training hold.

  python -m ddp_tutorial.check train.py --epochs 3
  python -m ddp_tutorial.check -m package.train --epochs 3

Options stand before the script. Its own arguments follow it; {{rank}} in them stands for the rank.

BROKEN   proven by what was seen       SUSPECT   likely, and may be meant      NOTE   worth knowing
holds    was looked at, and held       not seen  the run gave no occasion: silence is no proof

The script runs in a scratch copy of its folder, or of the current one if it is below that. A folder with more than
{entries:,} files and folders is not copied: then what it writes there stays, and the report says so. What it writes
elsewhere stays, too, and is listed.

Long epochs end early (--batches). With made-up GPUs, a script that asks for CUDA and NCCL runs on the CPU with gloo.
That cannot show NCCL itself, speed, memory, or rounding on a GPU.

Exit code 0: nothing is broken; 1: something is; 2: the script cannot be checked.
"""


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message}: see python -m ddp_tutorial.check --help")


def at_least(low: float, kind: type):
    """An argparse type: a number of this kind, from `low` on."""

    def parse(text: str):
        value = kind(text)
        if not value >= low:
            raise argparse.ArgumentTypeError(f"{text} is less than {low}")
        return value

    parse.__name__ = kind.__name__
    return parse


def parser() -> Parser:
    new = Parser(
        "python -m ddp_tutorial.check",
        description=DESCRIPTION.format(entries=MAX_ENTRIES),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python -m ddp_tutorial.check [options] SCRIPT [ARGS]",
    )
    add = new.add_argument
    add("--ranks", type=at_least(2, int), default=2, help="how many processes (%(default)s)")
    add("--seconds", type=at_least(1, float), default=60, help="when the script is ended (%(default)s)")
    add("--patience", type=at_least(1, float), default=10, help="seconds without a sign of life (%(default)s)")
    add(
        "--batches",
        type=at_least(0, int),
        default=8,
        help="an epoch more than four times as long ends after so many batches; 0: never (%(default)s)",
    )
    add(
        "--gpu",
        choices=("auto", "none", "made-up", "real"),
        default="auto",
        help="auto: none, and made-up ones if the script asks for them; real: those that are there",
    )
    add(
        "--data",
        choices=("real", "made-up"),
        default="real",
        help="made-up: torchvision's data sets hold made-up pixels",
    )
    add(
        "--starts",
        choices=("auto", "ranks", "itself"),
        default="auto",
        help="who starts the ranks: the doctor, as torchrun would, or the script (mp.spawn)",
    )
    add("--in-place", action="store_true", help="run in the script's own folder, not in a copy")
    add("--json", action="store_true", help="for programs")
    add("-m", dest="is_module", action="store_true", help="SCRIPT is the name of a module")
    add("script", metavar="SCRIPT")
    add("arguments", metavar="ARGS", nargs=argparse.REMAINDER)
    return new


def plan_of(args: argparse.Namespace) -> Plan:
    """Raises `UserError` if there is no such script."""
    script = file_of_module(args.script) if args.is_module else Path(os.path.abspath(args.script))
    if script is None:
        raise UserError(f"-m {args.script}: there is no such module here: is the current folder the right one?")
    if not script.is_file():
        raise UserError(f"{args.script}: there is no such file: name a script, or a module after -m")
    spawns = {"auto": spawns_ranks(script), "ranks": False, "itself": True}[args.starts]
    return Plan(
        script,
        tuple(args.arguments),
        args.script if args.is_module else None,
        args.ranks,
        args.seconds,
        args.patience,
        args.batches,
        data=args.data,
        spawns=spawns,
        in_place=args.in_place,
    )
