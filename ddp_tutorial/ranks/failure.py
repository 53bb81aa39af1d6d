"""How ranks fail: all of them, with one line for a mistake, or with the traceback of the rank that failed first."""

import functools
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from ddp_tutorial import process
from ddp_tutorial.console import UserError
from ddp_tutorial.ranks import exchange


@contextmanager
def fail_together() -> Iterator[None]:
    """A `UserError` that any rank meets in here is raised on all of them: else the others would wait for that rank."""
    mistake = None
    try:
        yield
    except UserError as error:
        mistake = error
    if dist.is_initialized() and exchange.all_gather(torch.tensor(mistake is not None)).any():
        mistakes = [None] * dist.get_world_size()
        dist.all_gather_object(mistakes, mistake)
        mistake = next(filter(None, mistakes))  # the lowest rank's
    if mistake:
        raise mistake


def report_errors(function: Callable) -> Callable:
    """What all ranks run: a `UserError`, which all raise, ends them with one line, and a failure with its traceback."""

    @record  # hands the traceback to torchrun, whose summary shows that of the rank that failed first
    @functools.wraps(function)
    def run(*args):
        try:
            return function(*args)
        except UserError as mistake:
            traceback.clear_frames(mistake.__traceback__)  # they hold the model, and the model holds the group
            process.speak(process.AGREED, mistake)
            if dist.is_initialized():  # torchrun terminates the others once one has left,
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # but each is to leave with this code,
                dist.barrier()  # so no rank leaves before all are ready
            sys.exit(mistake.code)
        except Exception as error:
            traceback.clear_frames(error.__traceback__)
            if dist.is_initialized():
                time.sleep(process.FAILURE.first_waits)
            raise

    return run
