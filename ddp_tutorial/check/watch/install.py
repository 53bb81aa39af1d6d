"""The watcher's hooks: torch's public ones, and the functions that are replaced where it has none."""

import functools
import importlib
import sys
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode

from ddp_tutorial.check.watch import calls, files, model, process, samples
from ddp_tutorial.check.watch.record import SETTINGS, log_file, safely

inside: Counter = Counter()  # in how many functions of a kind this process is


class Replaced(NamedTuple):
    """A function of torch, or of Python, in whose place another one looks on."""

    name: str  # with the module or class in which it is looked up
    before: Callable | None = None  # is given its arguments
    after: Callable | None = None  # is given what it returns, and its arguments
    instead: Callable | None = None  # is given the function itself, and its arguments
    kind: str = ""  # functions of a kind that call each other are seen once, from outside
    also: str = ""  # another module that has taken the name


COLLECTIVES = """all_reduce broadcast reduce all_gather gather scatter reduce_scatter all_to_all all_to_all_single
    barrier monitored_barrier all_gather_into_tensor reduce_scatter_tensor all_gather_object broadcast_object_list
    gather_object
    scatter_object_list all_reduce_coalesced all_gather_coalesced new_group""".split()
DIST, C10D, DATA = "torch.distributed", "torch.distributed.distributed_c10d", "torch.utils.data"
ITERATOR, SCHEDULES = f"{DATA}.dataloader._BaseDataLoaderIter", "torch.optim.lr_scheduler"
DDP, FUNCTIONAL = "torch.nn.parallel.DistributedDataParallel", "torch.nn.functional"

REPLACED = [  # every one
    Replaced(f"{DIST}.init_process_group", after=process.met, instead=process.initialize, also=C10D),
    Replaced("multiprocessing.process.BaseProcess.run", instead=process.run_child),
    Replaced(f"{DDP}.__init__", model.wraps, model.has_wrapped),
    Replaced(f"{DDP}.forward", model.forward, kind="forward"),
    Replaced("torch.autograd.backward", model.backward),
    Replaced("torch.nn.utils.clip_grad_norm_", after=model.clipped, also="torch.nn.utils.clip_grad"),
    Replaced("torch.nn.utils.clip_grad_value_", instead=model.clips_values, also="torch.nn.utils.clip_grad"),
    Replaced("torch.amp.GradScaler.step", model.scales),
    Replaced("torch.amp.GradScaler.load_state_dict", model.loads),
    Replaced("torch.optim.Optimizer.load_state_dict", model.loads),
    Replaced(f"{SCHEDULES}.LRScheduler.load_state_dict", model.loads),
    Replaced(f"{SCHEDULES}.LRScheduler.step", model.scheduled, kind="schedule"),
    Replaced(f"{SCHEDULES}.CosineAnnealingWarmRestarts.step", model.scheduled, kind="schedule"),
    Replaced(f"{SCHEDULES}.SequentialLR.step", model.scheduled, kind="schedule"),
    Replaced(f"{SCHEDULES}.ChainedScheduler.step", model.scheduled, kind="schedule"),
    Replaced(f"{SCHEDULES}.ReduceLROnPlateau.step", model.plateau),
    *(Replaced(f"{FUNCTIONAL}.{name}", model.drops) for name in ("dropout", "dropout2d", "alpha_dropout")),
    Replaced(f"{FUNCTIONAL}.scaled_dot_product_attention", model.attends),
    Replaced(f"{DATA}.DataLoader.__init__", after=samples.new_loader),
    Replaced(f"{ITERATOR}.__init__", samples.begins),
    Replaced(f"{ITERATOR}._reset", samples.resets),
    Replaced(f"{ITERATOR}._next_index", after=samples.index_drawn),
    Replaced(f"{ITERATOR}.__next__", after=samples.has_batch, instead=samples.next_batch),
    Replaced(f"{DATA}._utils.fetch._MapDatasetFetcher.fetch", instead=samples.fetch),
    Replaced(f"{DIST}.algorithms.join.Join.__enter__", calls.joins),
    Replaced(f"{DIST}.all_gather", calls.called("all_gather"), calls.has_gathered, kind="call", also=C10D),
    *(
        Replaced(f"{DIST}.{name}", calls.called(name), kind="call", also=C10D)
        for name in COLLECTIVES
        if name != "all_gather"
    ),
    *(
        Replaced(f"{DIST}.{name}", calls.point_to_point, kind="call", also=C10D)
        for name in ("send", "recv", "isend", "irecv", "batch_isend_irecv")
    ),
    Replaced("torch.save", files.saves, also="torch.serialization"),
]


def owner_of(name: str):
    """The module or class that has the last part of `name`, and that part."""
    path, _, last = name.rpartition(".")
    parts = path.split(".")
    for n in range(len(parts), 0, -1):
        try:
            owner = importlib.import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        return functools.reduce(getattr, parts[n:], owner), last
    raise ModuleNotFoundError(name)


def replace(row: Replaced) -> None:
    owner, name = owner_of(row.name)
    original = getattr(owner, name)

    @functools.wraps(original)
    def watched(*args, **kwargs):
        if torch.compiler.is_compiling() or (row.kind and inside[row.kind]):
            return original(*args, **kwargs)
        safely(row.before, *args, **kwargs)
        inside[row.kind] += 1
        try:
            result = row.instead(original, *args, **kwargs) if row.instead else original(*args, **kwargs)
        finally:
            inside[row.kind] -= 1
        safely(row.after, result, *args, **kwargs)
        return result

    setattr(owner, name, watched)
    if row.also:
        setattr(importlib.import_module(row.also), name, watched)


class FollowGathered(TorchFunctionMode):
    """Sees each torch function; only for a script in whose text there is an `all_gather`."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not torch.compiler.is_compiling():
            safely(calls.used, function, (*args, *(kwargs or {}).values()), result)
        return result


def on_forward(module, args) -> None:
    if not torch.compiler.is_compiling():
        safely(model.any_forward, module, inside["forward"] > 0)


def install() -> None:
    """In the process of a rank, a worker, or what starts them; torch has just been imported."""
    log_file()
    if SETTINGS["gpu"] == "made-up":
        from ddp_tutorial.check.made_up import gpus

        gpus.install()
    for row in REPLACED:
        try:
            replace(row)
        except (AttributeError, ImportError) as error:  # another release of torch
            safely(unknown, row.name, error)
    register_module_forward_pre_hook(on_forward)
    register_optimizer_step_pre_hook(lambda *args: safely(model.before_step, *args))
    register_optimizer_step_post_hook(lambda *args: safely(model.after_step, *args))
    process.install()
    sys.addaudithook(files.audit)
    if SETTINGS["gathers"]:
        FollowGathered().__enter__()


def unknown(name: str, error: Exception) -> None:
    raise RuntimeError(f"{name} is not watched") from error
