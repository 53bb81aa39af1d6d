"""Made-up GPUs: a script that asks for CUDA and NCCL runs on the CPU with gloo, and which GPU it uses is noted.

Devices in the arguments of torch's functions become the CPU. Questions about GPUs get an answer as if there were one
for each rank; torch's own code gets the true one.
"""

import functools
import os
import sys
import types
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode

from ddp_tutorial.check.watch.record import SETTINGS, emit, safely

TORCH = os.path.dirname(torch.__file__) + os.sep
MEMORY = 80 * 2**30  # bytes of a GPU, all of them free

chosen = [0]  # by set_device
used: set[int] = set()
seen_first: list[str] = []  # the GPUs that were visible when one was first used
seed: list[int | None] = [None]  # of the GPUs' generator, where the script has set it apart from the CPU's
has_synced_norms = [False]  # whether BatchNorm was converted to SyncBatchNorm


def visible() -> list[str]:
    """The GPUs that the process may use: those that the script has set, or one for each rank."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [name.strip() for name in names.split(",")] if names else [str(i) for i in range(SETTINGS["ranks"])]


def name_of(index: int) -> str:
    """Of the GPU that has this number among those that are visible when one is first used, as with CUDA."""
    if not seen_first:
        seen_first.extend(visible())
    return seen_first[index] if index < len(seen_first) else str(index)


def index_of(device) -> int | None:
    """The number of the GPU that `device` names; None for what is no GPU."""
    if isinstance(device, bool) or not isinstance(device, str | int | torch.device):
        return None
    named = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if named.type != "cuda":
        return None
    return chosen[0] if named.index is None else named.index


def on_cpu(device):
    """The CPU in place of a GPU, which is noted; anything else as it is."""
    index = index_of(device)
    if index is None:
        return device
    if index not in used:
        used.add(index)
        safely(lambda: emit("gpu", gpu=name_of(index)))
    return torch.device("cpu")


class Devices(TorchFunctionMode):
    """The CPU in place of GPUs in the arguments of each torch function."""

    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        if name == "cuda":
            on_cpu(kwargs.get("device") or (args[1] if len(args) > 1 else None) or "cuda")
            return args[0]
        if name == "pin_memory":
            return args[0]
        if "device" in kwargs:
            kwargs = {**kwargs, "device": on_cpu(kwargs["device"])}
        if name == "to":
            args = (args[0], *map(on_cpu, args[1:]))
        return function(*args, **kwargs)


class Event:
    """Of a stream: nothing is timed."""

    def __init__(self, *args, **kwargs):
        pass

    def record(self, *args) -> None:
        pass

    wait = synchronize = record

    def query(self) -> bool:
        return True

    def elapsed_time(self, other) -> float:
        return 1.0


class Stream(Event):
    wait_stream = wait_event = Event.record

    def record_event(self, *args) -> Event:
        return Event()

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        pass


@contextmanager
def device_context(device):
    before, chosen[0] = chosen[0], chosen[0] if device is None else index_of(device)
    try:
        yield
    finally:
        chosen[0] = before


def choose(device) -> None:
    """`set_device`: on its own it uses no GPU."""
    chosen[0] = index_of(device) or 0


def sow(value: int) -> None:
    seed[0] = int(value)


def constant(value) -> Callable:
    return lambda *args, **kwargs: value


PROPERTIES = types.SimpleNamespace(name="made-up GPU", total_memory=MEMORY, major=8, minor=0, multi_processor_count=100)
ANSWERS = {  # what is asked of torch.cuda -> the answer
    "is_available": constant(True),
    "is_initialized": constant(True),
    "device_count": lambda: len(visible()),
    "current_device": lambda: chosen[0],
    "set_device": choose,
    "device": device_context,
    "get_device_name": constant(PROPERTIES.name),
    "get_device_properties": constant(PROPERTIES),
    "get_device_capability": constant((8, 0)),
    "is_bf16_supported": constant(True),
    "mem_get_info": constant((MEMORY, MEMORY)),
    "manual_seed": sow,
    "manual_seed_all": sow,
    "get_rng_state": lambda *args: torch.get_rng_state(),
    "get_rng_state_all": lambda: [torch.get_rng_state()],
    "Event": Event,
    "Stream": Stream,
    "stream": lambda stream: Stream(),
    "current_stream": lambda *args: Stream(),
    "default_stream": lambda *args: Stream(),
    "memory_summary": constant(""),
    "memory_stats": constant({}),
    **dict.fromkeys(
        """memory_allocated max_memory_allocated memory_reserved max_memory_reserved utilization""".split(), constant(0)
    ),
    **dict.fromkeys(
        """synchronize empty_cache init reset_peak_memory_stats reset_max_memory_allocated ipc_collect seed seed_all
        set_rng_state set_rng_state_all set_per_process_memory_fraction""".split(),
        constant(None),
    ),
}
ANSWERS_OF_ACCELERATOR = {  # of torch.accelerator
    "is_available": constant(True),
    "device_count": lambda: len(visible()),
    "current_accelerator": lambda *args, **kwargs: torch.device("cuda"),
    "current_device_index": lambda: chosen[0],
    "current_device_idx": lambda: chosen[0],
    "set_device_index": choose,
    "set_device_idx": choose,
    "synchronize": constant(None),
    "empty_cache": constant(None),
    "current_stream": lambda *args: Stream(),
}


def meet(original, backend=None, *args, device_id=None, pg_options=None, **kwargs):
    if device_id is not None:
        on_cpu(device_id)
    return original("gloo", *args, **kwargs)


def new_group(original, ranks=None, timeout=None, backend=None, pg_options=None, **kwargs):
    kwargs.pop("device_id", None)
    return original(ranks, timeout, "gloo", **kwargs)


def wrap(original, ddp, module, device_ids=None, output_device=None, *args, **kwargs):
    for device in device_ids or ():
        on_cpu(device)
    return original(ddp, module, None, None, *args, **kwargs)


def move(original, module, *args, **kwargs):
    return original(module, *map(on_cpu, args), **{name: on_cpu(value) for name, value in kwargs.items()})


def autocast(original, self, device_type="cuda", dtype=None, *args, **kwargs):
    """The CPU's, in bfloat16: float16 is for GPUs."""
    dtype = torch.bfloat16 if dtype is torch.float16 else dtype
    return original(self, str(on_cpu(device_type)), dtype, *args, **kwargs)


def scaler(original, self, device="cuda", *args, **kwargs):
    return original(self, str(on_cpu(device)), *args, **kwargs)


def load(original, file, map_location=None, *args, **kwargs):
    return original(file, "cpu", *args, **kwargs)


def compile_nothing(original, model=None, **kwargs):
    return model if model is not None else lambda function: function


def convert(original, module, process_group=None):
    has_synced_norms[0] = True
    return module


def set_seed(original, value):
    seed[0] = None
    return original(value)


def run_barrier(original, *args, device_ids=None, **kwargs):
    return original(*args, **kwargs)


REPLACED = [  # where it is looked up, its name, what takes its place
    (torch.distributed, "init_process_group", meet),
    (torch.distributed, "new_group", new_group),
    (torch.distributed, "barrier", run_barrier),
    (torch.distributed, "get_default_backend_for_device", lambda original, device: "gloo"),
    (torch.nn.parallel.DistributedDataParallel, "__init__", wrap),
    (torch.nn.Module, "to", move),
    (torch.autocast, "__init__", autocast),
    (torch.amp.GradScaler, "__init__", scaler),
    (torch, "load", load),
    (torch, "compile", compile_nothing),
    (torch, "manual_seed", set_seed),
]


def is_torchs_own() -> bool:
    return sys._getframe(2).f_code.co_filename.startswith(TORCH)


def answer(module, name: str, new) -> None:
    """Answer the script's questions; torch's own code asks the original."""
    original = getattr(module, name, None)
    if original is None:
        return
    if isinstance(original, type):
        setattr(module, name, new)
        return

    @functools.wraps(original)
    def answered(*args, **kwargs):
        return (original if is_torchs_own() else new)(*args, **kwargs)

    setattr(module, name, answered)


def replace(owner, name: str, new) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def replaced(*args, **kwargs):
        return new(original, *args, **kwargs)

    setattr(owner, name, replaced)


def install() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible())
    for name, new in ANSWERS.items():
        answer(torch.cuda, name, new)
    for name, new in ANSWERS_OF_ACCELERATOR.items():
        answer(torch.accelerator, name, new)
    for owner, name, new in REPLACED:
        if hasattr(owner, name):
            replace(owner, name, new)
    torch.nn.SyncBatchNorm.convert_sync_batchnorm = staticmethod(functools.partial(convert, None))
    Devices().__enter__()
