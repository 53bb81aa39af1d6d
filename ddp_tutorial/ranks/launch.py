"""How ranks start: the variables that a launcher sets, the flags, and the store in which ranks leave their addresses."""

import argparse
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from ddp_tutorial import flags
from ddp_tutorial.console import UserError, reason, report

TIMEOUT = timedelta(seconds=300)


def fail(mistake: str) -> NoReturn:
    """Print `mistake` after the program's name and leave with 2: for what a rank meets before it knows the others."""
    report(UserError(mistake))
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


def seconds(text: str) -> timedelta:
    """An argparse type: what a process group takes as its timeout, up to a year."""
    if not 0.001 <= (value := flags.positive_float(text)) < 3.2e7:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds between 0.001 and a year")
    return timedelta(seconds=value)


def parse(description: str, n_gpus: int = 1) -> argparse.Namespace:
    """`flags.parse` with two flags more. A mistake is kept as `mistake`, to be raised where all ranks agree on it."""
    parser = flags.make_parser(description)
    parser.add_argument("--timeout", type=seconds, default=TIMEOUT, help="seconds to wait for another rank (300)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    try:
        args, mistake = flags.parse(description, n_gpus, parser), None
    except UserError as error:
        args, mistake = argparse.Namespace(use_gpu=False, timeout=TIMEOUT), error
    args.mistake = mistake
    return args


def check_flags(args: argparse.Namespace) -> None:
    """Raise the mistake that `parse` has kept, if any."""
    if args.mistake:
        raise args.mistake


@contextmanager
def meeting(timeout: timedelta) -> Iterator[dist.Store]:
    """The ranks meet in here, at the store that it gives, or leave with one line and 2.

    torch gives them twice the `timeout`. torchrun's store outlives a dead group, so the names in it get a prefix that
    counts the restarts: else a new rank may call the address of a dead one. One torchrun counts them; several need
    not agree.
    """

    def fail_because(why: str) -> NoReturn:
        where = "{RANK} of {WORLD_SIZE} did not meet the others at {MASTER_ADDR}:{MASTER_PORT}".format(**os.environ)
        fail(f"rank {where} ({why}): start all of them, or give them more --timeout")

    def give_up() -> None:  # torch has no timeout for a program that listens at the port and never answers
        with suppress(SystemExit):
            fail_because("no answer")
        os._exit(2)

    # When a rank fails, NCCL's watchdog would ask all to write down what they did last, and wait for that: four times
    # 15 s. It asks through torchrun's store, past any prefix: a restarted group would find it there, and stand still.
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
    os.environ.setdefault("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", "1000")
    watchdog = threading.Timer(2 * timeout.total_seconds() + 5, give_up)
    watchdog.daemon = True
    watchdog.start()
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        if os.environ.get("LOCAL_WORLD_SIZE") in (None, os.environ["WORLD_SIZE"]):
            store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        yield store
    except (RuntimeError, ValueError) as error:  # of which are torch's own
        fail_because(reason(error))
    finally:
        watchdog.cancel()
