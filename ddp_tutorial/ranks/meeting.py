"""Where ranks meet: a store that holds each rank's address, and outlives the group of those that have met there."""

import os
import re
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from ddp_tutorial import process
from ddp_tutorial.console import UserError, reason
from ddp_tutorial.ranks.environment import fail


def end_with(torchrun: int) -> None:
    """End this rank once the process `torchrun` has: one that was killed cannot end its ranks; they would train on."""
    while os.getppid() == torchrun:
        time.sleep(1)
    mistake = UserError(f"the torchrun of rank {os.environ['RANK']} has ended, and so does the rank")
    process.leave(process.ORPHANED, mistake)


class NotMet(RuntimeError):
    """Another rank has not come."""


def is_of_the_meeting(error: Exception) -> bool:
    """Whether `error` says that ranks have not met, and not that something else is wrong. gloo's have no type."""
    no_connection = re.search(r"connect|time(d|-)? ?out|reset by peer|refused|closed", str(error), re.IGNORECASE)
    return isinstance(error, (NotMet, dist.DistError)) or bool(no_connection)


class SignOn:
    """The keys under which the ranks agree on the number of their group.

    torchrun's store outlives a group, and no rank may call an address that a dead one has left there. Restarts do not
    tell groups apart: each torchrun counts its own. The store does: it counts each rank's starts, and those of the
    first rank are the groups. The others sign on for the newest group until the first rank confirms this very start,
    which a dead one does not. No dead rank signs on: each torchrun ends its ranks before it takes part in a new round.
    """

    def __init__(self, store: dist.Store):
        self.store = store

    def starts(self, rank: int, one_more: bool = False) -> int:
        """How often `rank` has started; with this start, if it is `one_more`."""
        return self.store.add(f"starts of rank {rank}", int(one_more))

    def sign(self, group: int, rank: int, start: int) -> None:
        """`rank`, in this `start` of it, wants to be of the `group`."""
        self.store.set(f"group {group}, rank {rank}", str(start))

    def confirm(self, group: int, rank: int) -> None:
        """What the first rank does: it waits until `rank` has signed on for the `group`, and confirms that start."""
        start = self.store.get(f"group {group}, rank {rank}").decode()
        self.store.set(self._confirmed(group, rank, start), "")

    def is_confirmed(self, group: int, rank: int, start: int) -> bool:
        return self.store.check([self._confirmed(group, rank, start)])

    @staticmethod
    def _confirmed(group: int, rank: int, start: int | str) -> str:
        return f"group {group}, rank {rank}, start {start}"


def group_number(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> int:
    """How many groups of ranks have met at this `store`, with this one: the same number on all ranks.

    Raises `NotMet` if the first rank has not come after the `timeout`; see `SignOn` for how they agree.
    """
    keys = SignOn(store)
    start = keys.starts(rank, one_more=True)
    if rank == 0:
        for other in range(1, world_size):
            keys.confirm(start, other)
        return start
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        group = keys.starts(0)
        keys.sign(group, rank, start)
        time.sleep(0.05)
        if keys.is_confirmed(group, rank, start):
            return group
    raise NotMet("the first rank has not come")


@contextmanager
def rendezvous(args: Namespace) -> Iterator[dist.Store]:
    """The ranks meet in here, at the store that it gives, or leave with one line and 2, after twice `args.timeout`.

    Sets `args.restarted` if other groups have met there before: of the launch, not only of this machine.
    """
    timeout = args.timeout

    def fail_because(why: str) -> NoReturn:
        place = "{RANK} of {WORLD_SIZE} did not meet the others at {MASTER_ADDR}:{MASTER_PORT}".format(**os.environ)
        fail(f"rank {place} ({why}): start all of them, or give them more --timeout")

    # When a rank fails, NCCL's watchdog would ask all to write down what they did last, and wait for that: four times
    # 15 s. It asks through torchrun's store, past any prefix: a restarted group would find it there, and stand still.
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
    os.environ.setdefault("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", "1000")
    if process.by_torchrun():
        threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    # torch has no timeout for a program that listens at the port and never answers.
    watchdog = threading.Timer(2 * timeout.total_seconds() + 5, fail_because, args=("no answer",))
    watchdog.daemon = True
    watchdog.start()
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        group = group_number(store, rank, world_size, timeout)
        args.restarted |= group > 1
        yield dist.PrefixStore(f"group {group}", store)
    except (RuntimeError, ValueError) as error:  # of which are torch's own
        if not is_of_the_meeting(error):
            raise
        fail_because(reason(error))
    finally:
        watchdog.cancel()
