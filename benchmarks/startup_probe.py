"""Runs ddp_sample.py, as it is, up to its first step, and says when each part of the start was over.

`startup_probe.py FOLDER SCRIPT FLAGS` leaves FOLDER/RANK.json: {part: seconds}, in order. $STARTED is when the
command was given, on the clock that Linux counts from the boot of the machine.
"""

import json
import os
import runpy
import sys
import time
from pathlib import Path


def now() -> float:
    """Seconds since the boot of the machine."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def created() -> float:
    """When this process was, on the same clock; psutil's begins with a whole second."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return ticks / os.sysconf("SC_CLK_TCK")


marks = [("torchrun", created()), ("Python", now())]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

marks.append(("import torch", now()))


def timed(owner, name: str, before: str, part: str) -> None:
    """From now on a call of `owner.name` ends two parts: what came before it, and itself."""
    function = getattr(owner, name)

    def wrapper(*args, **options):
        marks.append((before, now()))
        result = function(*args, **options)
        marks.append((part, now()))
        return result

    setattr(owner, name, wrapper)


def leave() -> None:
    """Write down how long each part has taken, and end this process at once."""
    marks.append(("first step", now()))
    parts, start = {}, float(os.environ["STARTED"])
    for part, moment in marks:
        parts[part], start = parts.get(part, 0.0) + max(0.0, moment - start), max(start, moment)
    Path(folder, f"{os.environ.get('RANK', 0)}.json").write_text(json.dumps(parts))
    os._exit(0)


if __name__ == "__main__":
    folder, *sys.argv = sys.argv[1:]
    from ddp_tutorial import flags

    timed(flags, "parse", "other imports", "other imports")
    timed(dist, "init_process_group", "look at the data", "the ranks meet")
    timed(torch.nn.parallel.DistributedDataParallel, "__init__", "sampler, model", "wrap in DDP")
    timed(torch.optim.SGD, "__init__", "sampler, model", "optimizer (imports dynamo, unless DDP has)")
    step = torch.optim.SGD.step
    torch.optim.SGD.step = lambda *args, **options: (step(*args, **options), leave())
    runpy.run_path(sys.argv[0], run_name="__main__")
