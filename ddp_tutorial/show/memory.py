"""What a step of training keeps and allocates, as PyTorch's hooks and its profiler see it."""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile, record_function

STEP = "the step"
BEGINNINGS = {"backward": "autograd::engine", "optimizer": "Optimizer.step"}  # of a part: what the profiler calls it


class Allocations(NamedTuple):
    """What is allocated in a step. `curve` is (changes, 2), float64: milliseconds since its start, bytes there are."""

    curve: Tensor
    parts: dict[str, float]  # when backward and the optimizer's step begin, in milliseconds
    before: int  # bytes at the start
    end: int  # bytes when the recording ends

    def shifted(self, n_bytes: int) -> "Allocations":
        """The same with `n_bytes` less, but for `end`: what another thread has let go of, unseen."""
        curve = self.curve - torch.tensor([0, n_bytes], dtype=torch.float64)
        return self._replace(curve=curve, before=self.before - n_bytes)

    def peak(self, part: str | None = None) -> float:
        """The most bytes in the step, or from the beginning of a part on."""
        begins = self.parts[part] if part else 0.0
        return self.curve[self.curve[:, 0] >= begins, 1].max().item()


@contextmanager
def kept_by_forward() -> Iterator[dict[int, int]]:
    """Yields a dict in which each memory that forward keeps for backward is noted: its address, and its bytes."""
    kept = {}

    def note(tensor):
        memory = tensor.untyped_storage()  # several tensors may be views of the same memory
        kept[memory.data_ptr()] = memory.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        yield kept


def recording() -> profile:
    """To be entered before the model is made: PyTorch's profiler, with each allocation of this thread."""
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


def step() -> AbstractContextManager:
    """To be entered around the step that counts."""
    return record_function(STEP)


def allocations(recorded: profile, path: Path) -> Allocations:
    """What the step of a recording has allocated. The profiler's trace is written to `path`."""
    recorded.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if "ts" in event]
    events.sort(key=lambda event: event["ts"])
    (span,) = (event for event in events if event["name"] == STEP)
    start, end = span["ts"], span["ts"] + span["dur"]
    bytes_now, before, curve, parts = 0, 0, [], {}
    for event in events:
        if event["name"] == "[memory]":
            bytes_now += event["args"]["Bytes"]  # what is let go of counts as negative
        if event["ts"] < start:
            before = bytes_now
        elif event["ts"] <= end:
            curve.append(((event["ts"] - start) / 1e3, bytes_now))
            for part, name in BEGINNINGS.items():
                if event["name"].startswith(name):
                    parts.setdefault(part, curve[-1][0])
    return Allocations(torch.tensor(curve, dtype=torch.float64), parts, before, bytes_now)
