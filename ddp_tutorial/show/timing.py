"""Timing on a machine that does other things too."""

import time
from collections.abc import Callable, Mapping


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
