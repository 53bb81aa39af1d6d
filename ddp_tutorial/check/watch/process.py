"""The life of a rank: how it meets the others, fails, and ends."""

import atexit
import faulthandler
import multiprocessing.util
import os
import re
import sys
import traceback
from types import TracebackType

import torch.distributed as dist

from ddp_tutorial.check.watch import model
from ddp_tutorial.check.watch.record import SETTINGS, emit, is_users, safely
from ddp_tutorial.launcher import pause_before_forks

ended: set[int] = set()  # process ids


def initialize(original, backend=None, init_method=None, *args, **kwargs):
    """`init_process_group`, at the doctor's own meeting point, whatever address the script has for it."""
    meeting = SETTINGS.get("meeting")
    if meeting and kwargs.get("store") is None:
        os.environ.update(meeting)
        if init_method and init_method.startswith("tcp:"):
            init_method = None
    return original(backend, init_method, *args, **kwargs)


def met(result, backend=None, *args, **kwargs) -> None:
    pid = os.getpid()
    os.environ["DDP_CHECK_OWNER"] = str(pid)
    faulthandler.register(SETTINGS["stacks"], open(f"{SETTINGS['log']}/{pid}.stack", "w"), all_threads=False)
    emit("met", pid=pid, rank=dist.get_rank(), world=dist.get_world_size(), backend=str(backend))
    multiprocessing.util.Finalize(None, at_exit, exitpriority=0)  # also in children of multiprocessing


def at_exit() -> None:
    if os.getpid() not in ended and os.environ.get("DDP_CHECK_OWNER") == str(os.getpid()):
        ended.add(os.getpid())
        safely(model.final)
        emit("exit", group_is_open=dist.is_initialized())


def crashed(kind: type[BaseException], error: BaseException, frames: TracebackType | None) -> None:
    lines = [[os.path.abspath(f.filename), f.lineno] for f in traceback.extract_tb(frames) if is_users(f.filename)]
    text = str(error)
    if inner := re.search(r"-- Process \d+ terminated .*?Traceback[^\n]*\n(.*)", text, re.S):  # of torch's spawn
        places = re.findall(r'File "([^"]+)", line (\d+)', inner[1])
        lines = [[os.path.abspath(file), int(line)] for file, line in places if is_users(file)] or lines
        text = re.findall(r"^\w.*", inner[1], re.M)[-1]
        kind = None
    emit("crash", error=(f"{kind.__name__}: {text}" if kind else text)[:1000], at=lines[-1] if lines else None)


def run_child(original, process) -> None:
    """`BaseProcess.run`: the failure of a child never comes to sys.excepthook."""
    try:
        original(process)
    except Exception:
        safely(crashed, *sys.exc_info())
        raise


def install() -> None:
    hook = sys.excepthook

    def excepthook(*error):
        if issubclass(error[0], Exception):
            safely(crashed, *error)
        hook(*error)

    sys.excepthook = excepthook
    pause_before_forks()
    atexit.register(at_exit)
