"""How ranks start: the variables that a launcher sets, the flags, and the store in which ranks leave their addresses."""

import argparse
import os
import socket
import sys
import threading
import time
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
    if not 0 < (port := number["MASTER_PORT"]) < 65536:
        fail(f"MASTER_PORT={port} is not a port, 1 to 65535: {remedy}")
    if number["RANK"] == 0 and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # else the agent listens there
        try:
            with socket.create_server(("", port)):
                pass
        except OSError as error:
            fail(f"MASTER_PORT={port} cannot be used ({reason(error)}): choose another port")


def seconds(text: str) -> timedelta:
    """An argparse type: what a process group takes as its timeout, up to a year."""
    what = "a number of seconds between 0.001 and a year"
    return timedelta(seconds=flags.number(text, float, 0.001, 3.2e7, what))


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


def end_with(torchrun: int) -> None:
    """End this rank once the process `torchrun` has: one that was killed cannot end its ranks, and they would train on."""
    while os.getppid() == torchrun:
        time.sleep(1)
    report(UserError(f"the torchrun of rank {os.environ['RANK']} has ended, and so does the rank"))
    os._exit(1)


def group_number(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> int:
    """How many groups of ranks have met at this `store`, with this one: the same number on all ranks.

    torchrun's store outlives a group, and no rank may call an address that a dead one has left there. Restarts do not
    tell groups apart: each torchrun counts its own. The store does: it counts each rank's starts, and those of the
    first rank are the groups. The others sign on for the newest group until the first rank confirms this very start,
    which a dead one does not. No dead rank signs on: each torchrun ends its ranks before it takes part in a new round.
    """
    group = start = store.add(f"starts of rank {rank}", 1)
    for other in range(1, world_size if rank == 0 else 1):
        key = f"group {group}, rank {other}"
        store.set(f"{key}, start {store.get(key).decode()}", "")
    deadline, confirmed = time.monotonic() + timeout.total_seconds(), rank == 0
    while not confirmed:
        if time.monotonic() > deadline:
            raise RuntimeError("the first rank has not come")
        group = store.add("starts of rank 0", 0)
        store.set(f"group {group}, rank {rank}", str(start))
        time.sleep(0.05)
        confirmed = store.check([f"group {group}, rank {rank}, start {start}"])
    return group


@contextmanager
def meeting(timeout: timedelta) -> Iterator[dist.Store]:
    """The ranks meet in here, at the store that it gives, or leave with one line and 2. They get twice the `timeout`."""

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
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    watchdog = threading.Timer(2 * timeout.total_seconds() + 5, give_up)
    watchdog.daemon = True
    watchdog.start()
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        group = group_number(store, rank, world_size, timeout)
        n_restarts = max(group - 1, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(n_restarts)  # of the launch, not only of this machine
        yield dist.PrefixStore(f"group {group}", store)
    except (RuntimeError, ValueError) as error:  # of which are torch's own
        fail_because(reason(error))
    finally:
        watchdog.cancel()
