"""What ranks are told: the variables that a launcher sets, and the flags."""

import argparse
import math
import os
import socket
from datetime import timedelta
from typing import NoReturn

from ddp_tutorial import flags, process
from ddp_tutorial.console import UserError, reason

TIMEOUT = timedelta(seconds=300)


def fail(mistake: str) -> NoReturn:
    """End this rank with one line: for what it meets before it knows the others."""
    process.leave(process.NOT_MET, UserError(mistake))


def check_environment(env: dict = os.environ) -> None:
    """Leave with one line and 2 if RANK and the variables that go with it are not all there or do not fit."""
    process.start(env)
    if "RANK" not in env:
        for name in ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            if name in env:  # a single process would train on its share only
                fail(f"{name} is set and RANK is not: launch with torchrun, or unset {name} for one process")
        return
    defaults = {"LOCAL_WORLD_SIZE": env.get("WORLD_SIZE"), "GROUP_WORLD_SIZE": "1", "TORCHELASTIC_RESTART_COUNT": "0"}
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
    check_network(env, number["RANK"], port)


def check_network(env: dict, rank: int, port: int) -> None:
    """Leave with one line and 2 if this machine lacks the network card that `env` names, or cannot use the port."""
    cards = {name for _, name in socket.if_nameindex()}
    card = env.get("GLOO_SOCKET_IFNAME", "")
    if card and not cards.intersection(card.split(",")):
        what = f"GLOO_SOCKET_IFNAME={card}: this machine has no such network card"
        fail(f"{what}: name one of {', '.join(sorted(cards))}")
    if rank == 0 and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # else the agent listens there
        try:
            with socket.create_server(("", port)):
                pass
        except OSError as error:
            fail(f"MASTER_PORT={port} cannot be used ({reason(error)}): choose another port")


def seconds(text: str) -> timedelta:
    """An argparse type: what a process group takes as its timeout, up to a year."""
    what = "a number of seconds between 0.001 and a year"
    return timedelta(seconds=flags.number(text, float, 0.001, 3.2e7, what))


def nodes(text: str) -> range:
    """An argparse type: "2", or "1:3" for any number from 1 to 3; the numbers of nodes, as torchrun writes them."""
    low, colon, high = text.partition(":")
    words = (low, high if colon else low)
    numbers = [int(word) for word in words if word.isascii() and word.isdecimal() and len(word) < 6]
    if len(numbers) < 2 or not 0 < numbers[0] <= numbers[1]:
        raise argparse.ArgumentTypeError(f"{text} is not a number of nodes, or two of them such as 1:3")
    return range(numbers[0], numbers[1] + 1)


def parse(description: str | None, n_gpus: int = 1) -> argparse.Namespace:
    """`flags.parse` with four flags more. A mistake is kept as `mistake`, to be raised where all ranks agree on it.

    `restarted` says whether this is a later group of its launch; `rendezvous` may know more of that.
    """
    parser = flags.make_parser(description)
    add = parser.add_argument
    add("--timeout", type=seconds, default=TIMEOUT, help="seconds to wait for another rank (300)")
    add("--nnodes", type=nodes, help="what torchrun was told with its flag of this name: with fewer nodes, refuse")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--new-lr", action="store_true", help="go on with another --lr than that of the checkpoint, on purpose")
    try:
        args, mistake = flags.parse(description, n_gpus, parser), None
    except UserError as error:
        args, mistake = argparse.Namespace(use_gpu=False, timeout=TIMEOUT), error
    args.restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    args.mistake = mistake
    return args


def check_flags(args: argparse.Namespace) -> None:
    """Raise the mistake that `parse` has kept, if any, or that fewer nodes take part than --nnodes says."""
    if args.mistake:
        raise args.mistake
    world_size, local_world_size = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    n_nodes = int(os.environ.get("GROUP_WORLD_SIZE", world_size // local_world_size))
    if args.nnodes and n_nodes < args.nnodes[0]:  # torchrun takes a node for dead whose clock is 15 s off
        so_many = f"{n_nodes} node{'s take' if n_nodes > 1 else ' takes'} part"
        why = "most likely because their clocks differ: set all of them by NTP, and start again"
        raise UserError(f"--nnodes {args.nnodes[0]}: {so_many}, {why}")


def check_shares(args: argparse.Namespace, n_samples: int) -> None:
    """Raise a `UserError` unless --batch-size divides among the ranks of each number of nodes that --nnodes allows."""
    n_local, batch_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), min(args.batch_size, n_samples)
    numbers = [n_nodes * n_local for n_nodes in args.nnodes or ()]
    if any(batch_size % n_ranks for n_ranks in numbers):
        multiple = math.lcm(*numbers)
        largest = n_samples // multiple * multiple
        remedy = f"use a multiple of {multiple}" if largest else "allow fewer nodes"
        if largest:
            remedy += f", such as {min(max(multiple, batch_size // multiple * multiple), largest)}"
        ranks = ", ".join(map(str, numbers))
        raise UserError(f"--batch-size {batch_size} does not divide among {ranks} ranks, one after the other: {remedy}")
