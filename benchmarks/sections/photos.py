"""How fast photos come that must be decoded: by chapter 12's stream, a `Dataset`, and a library.

The photos are crops of scikit-learn's two, in shards, and the page's own functions read them. A step of DDP waits as
long as decoding takes, as for a GPU: so one worker for each rank is enough, and none is not.
"""

import io
import json
import random
import statistics
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from benchmarks import launch
from benchmarks.page import write_scripts
from benchmarks.plan import Plan
from benchmarks.report import Row, Spread, column
from benchmarks.store import ROOT
from ddp_tutorial.launcher import run_ranks

PROBE = ROOT / "benchmarks" / "photos_probe.py"
LOOP = "a loop"  # without a loader
PIXELS = 256  # of a crop's side


@dataclass(frozen=True)
class PhotoRow(Row):
    """How fast photos come, one way; on several ranks, to all of them."""

    by: str
    ranks: int
    samples_per_second: int = column("samples/s")
    of_loop: Spread = column("times the loop")


def rows(plan: Plan) -> list[PhotoRow]:
    """Decoded photos per second of an epoch, beside a loop that decodes; a step of DDP waits as long as decoding."""
    folder = plan.folder / ("photos_quick" if plan.quick else "photos")
    n_shards, n_each, rounds = (8, 12, 2) if plan.quick else (24, 32, 7)
    write_scripts("12", folder, "image_shards.py")
    photos, draw = load_sample_images().images, random.Random(0)
    write_shards(folder / "photos", n_shards, n_each, lambda number: crop(photos[number % 2], draw))
    n_samples = n_shards * n_each
    alone = plan.measure("one process", measure, folder, 0, rounds)
    wait = statistics.median(alone[LOOP]) / n_samples
    trained = plan.measure("two ranks", measure, folder, 2, rounds, wait)
    return [row(way, 1, times, alone[LOOP], n_samples) for way, times in alone.items()] + [
        row(way, 2, times, alone[LOOP], n_samples) for way, times in trained.items()
    ]


def row(way: str, n_ranks: int, times: list[float], loop: list[float], n_samples: int) -> PhotoRow:
    """`times` and `loop` are seconds of an epoch over `n_samples`, in each round."""
    return PhotoRow(way, n_ranks, round(n_samples / statistics.median(times)), Spread.of_ratios(loop, times))


def measure(folder: Path, n_ranks: int, *words) -> dict[str, list[float]]:
    """What the probe prints: seconds of each epoch of each way."""
    ranks = run_ranks(n_ranks, [PROBE, *words], folder=folder, fork=False, time_limit=launch.TIMEOUT)
    for rank in ranks:
        if rank.code:
            raise RuntimeError(f"{PROBE.name} left with {rank.code}:\n{rank.stderr}")
    return json.loads("".join(rank.stdout for rank in ranks))


def crop(photo: np.ndarray, draw: random.Random) -> np.ndarray:
    """A square somewhere in a photo (height, width, 3)."""
    y, x = (draw.randrange(size - PIXELS) for size in photo.shape[:2])
    return photo[y : y + PIXELS, x : x + PIXELS]


def write_shards(folder: Path, n_shards: int, n_each: int, picture: Callable[[int], np.ndarray]) -> None:
    """The page's shards, in other numbers, of pictures (height, width, 3) of uint8. Classes alternate."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(n_shards):
        with tarfile.open(folder / f"{shard:02}.tar", "w") as tar:
            for number in range(shard * n_each, (shard + 1) * n_each):
                jpeg = io.BytesIO()
                Image.fromarray(picture(number)).save(jpeg, "jpeg", quality=90)
                for name, content in (("jpg", jpeg.getvalue()), ("cls", str(number % 2).encode())):
                    entry = tarfile.TarInfo(f"{number:06}.{name}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
