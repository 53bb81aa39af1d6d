"""Timing on a machine that does other things too."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path


def seconds(function: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def take_turns(functions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list]:
    """What each function returns in each round. They take turns, so that a busy moment of the machine hits them all."""
    found = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            found[name].append(function())
    return found


def trace_spans(path: str | Path, since: str) -> Callable[[str], list[tuple[float, float]]]:
    """Of a chrome trace of `torch.profiler`: a function from the start of a name to the spans of such events, sorted.

    A span is (start, end) in milliseconds since the one event named `since` began.
    """
    events = [event for event in json.loads(Path(path).read_text())["traceEvents"] if event.get("ph") == "X"]
    (zero,) = (event["ts"] for event in events if event["name"] == since)

    def spans(name: str) -> list[tuple[float, float]]:
        starts = ((event["ts"] - zero, event["dur"]) for event in events if event["name"].startswith(name))
        return sorted((start / 1e3, (start + length) / 1e3) for start, length in starts)

    return spans
