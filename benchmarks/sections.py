"""What is measured. Each section returns a table of the results file and prints it."""

import contextlib
import io
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import nll_loss
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from benchmarks import gpu_probe, launch, network_probe
from benchmarks.kept import Kept
from benchmarks.launch import Ratio, Run
from benchmarks.peers import PerSampleDataset
from data_gen.__main__ import main as data_gen
from ddp_tutorial.data import NpyDataset
from ddp_tutorial.model import SimpleModel, Standardize
from ddp_tutorial.show.timing import seconds, take_turns
from ddp_tutorial.training import train_one_epoch

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
OURS, RESILIENT = "ddp_sample.py", "ddp_resilient.py"
SLOWEST = "hand-written, per sample"
TOLERANCE = 0.03  # of the validation loss: every program shuffles in its own way
QUICK = {"epochs": 5, "batch_size": 64, "lr": 0.1}  # of every run with --quick, so that sections can share it
PEERS = {
    RESILIENT: (),
    "bare loop in memory (the limit)": ("limit",),
    SLOWEST: ("hand_written", "per-sample"),
    "hand-written, TensorDataset": ("hand_written", "tensor"),
    "hand-written, our Dataset": ("hand_written", "gather"),
    "Accelerate, per sample": ("with_accelerate", "per-sample"),
    "Accelerate, our Dataset": ("with_accelerate", "gather"),
    "Fabric, per sample": ("with_fabric", "per-sample"),
    "Fabric, our Dataset": ("with_fabric", "gather"),
    "Lightning, per sample": ("with_lightning", "per-sample"),
    "Lightning, our Dataset": ("with_lightning", "gather"),
}


@dataclass
class Plan:
    """How much to measure, where files may lie, and what has been measured."""

    folder: Path
    quick: bool
    kept: Kept
    section: str = ""  # whose turn it is
    shared: dict[tuple, Run] = field(default_factory=dict)

    def measure(self, name: str, function: Callable, *args, **options):
        """What `function` returns, as JSON gives it back, or has returned before the last call was stopped."""
        return self.kept.measure(self.section, name, function, *args, **options)

    def run(self, n_ranks: int, program: list, data: Path, **flags) -> Run:
        """`launch.run`. With --quick one launch serves every section that asks for it."""
        flags = {"device": "cpu"} | flags  # all programs on the same one
        if not self.quick:
            return launch.run(n_ranks, program, data, **flags)
        key = (n_ranks, *program, data, *flags.items())
        if key not in self.shared:
            self.shared[key] = launch.run(n_ranks, program, data, **flags)
        return self.shared[key]

    def data(self, n_features: int, n_samples: int) -> Path:
        out = self.folder / "data" / f"{n_samples}x{n_features}"
        sizes = {"features": n_features, "train": n_samples, "val": 4096, "classes": 4 if n_features < 100 else 10}
        flags = [word for name, size in sizes.items() for word in (f"--n-{name}", str(size))]
        with contextlib.redirect_stdout(io.StringIO()):
            if data_gen(["gaussian", "--out", str(out), "--reuse", *flags]):
                raise RuntimeError(f"no data in {out}")
        return out


def data_path(plan: Plan) -> list[dict]:
    """Samples per second of an epoch's batches, beside the limit: gathers from memory by a loop over indices."""
    rows = []
    for n_features, n in ((20, 65_536), (784, 16_384)):
        n = 4096 if plan.quick else n
        folder = plan.data(n_features, n)
        files = [folder / f"{name}_train.npy" for name in "Xy"]
        ours, X, y = NpyDataset(*files), *(torch.from_numpy(np.load(file)) for file in files)

        def through_loader(dataset, batch_size, **options):
            for _ in DataLoader(dataset, batch_size, shuffle=True, drop_last=True, **options):
                pass

        def as_the_script(batch_size, dataset=ours):
            sampler = DistributedSampler(dataset, 1, 0, drop_last=True)
            for _ in DataLoader(dataset, batch_size, sampler=sampler, drop_last=True, collate_fn=NpyDataset.collate):
                pass

        def limit(batch_size, X=X, y=y):
            for index in torch.randperm(len(X)).split(batch_size):
                _ = X.index_select(0, index), y.index_select(0, index)  # held until the next, as a training loop does

        per_sample, tensors = PerSampleDataset(*files), TensorDataset(X, y)
        for batch_size in (128,) if plan.quick else (32, 128, 1024):
            functions = {
                "limit": lambda b=batch_size: limit(b),
                "per sample": lambda b=batch_size, d=per_sample: through_loader(d, b),
                "TensorDataset": lambda b=batch_size, d=tensors: through_loader(d, b),
                "ours": lambda b=batch_size: as_the_script(b),
            }
            timers = {name: lambda f=f: seconds(f) for name, f in functions.items()}
            name = f"{n_features} features, batches of {batch_size}"
            times = plan.measure(name, take_turns, timers, 3 if plan.quick else 9)
            for name, values in times.items():
                ratio = Ratio.of(base / value for base, value in zip(times["limit"], values, strict=True))
                rate = round(n / statistics.median(values), -3)
                rows.append({"features": n_features, "batch": batch_size, "by": name, "samples/s": int(rate), "of the limit": ratio})  # fmt: skip
    return rows


def step(plan: Plan) -> list[dict]:
    """A training step on one process, 20 features, batches of 128, beside the same gradients written by hand."""
    size, n_steps = 128, 100 if plan.quick else 300
    data = [(torch.randn(size, 20), torch.randint(4, (size,))) for _ in range(n_steps)]
    arrays = [(x.numpy(), y.numpy()) for x, y in data]

    def by_hand():
        W, b, vW, vb = (np.zeros(shape, np.float32) for shape in ((20, 4), 4, (20, 4), 4))
        every = np.arange(size)
        for x, y in arrays:
            p = x @ W + b
            p -= p.max(axis=1, keepdims=True)
            np.exp(p, out=p)
            p /= p.sum(axis=1, keepdims=True)
            p[every, y] -= 1
            p /= size
            vW *= 0.9
            vW += x.T @ p
            vb *= 0.9
            vb += p.sum(axis=0)
            W -= 0.1 * vW
            b -= 0.1 * vb

    def trainer(standardize: bool, fused: bool):
        first = [Standardize(torch.zeros(20), torch.ones(20))] if standardize else []
        model = nn.Sequential(*first, SimpleModel(20, 4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused)
        return model, optimizer, lambda: train_one_epoch(model, data, optimizer, torch.device("cpu"))

    model, optimizer, ours = trainer(True, False)

    def forward():
        for x, y in data:
            nll_loss(model(x), y)

    def and_backward():
        for x, y in data:
            for parameter in model.parameters():
                parameter.grad = None
            nll_loss(model(x), y).backward()

    def and_zero_grad():
        for x, y in data:
            optimizer.zero_grad()
            nll_loss(model(x), y).backward()

    functions = {
        "by hand in NumPy, no autograd": by_hand,
        "forward": forward,
        "forward, backward": and_backward,
        "forward, zero_grad, backward": and_zero_grad,
        "train_one_epoch (ours)": ours,
        "ours, with SGD(fused=True)": trainer(True, True)[2],
        "ours, not standardized": trainer(False, False)[2],
    }
    timers = {name: lambda f=f: seconds(f) / n_steps for name, f in functions.items()}
    times = plan.measure("steps", take_turns, timers, 5 if plan.quick else 21)
    base = times["by hand in NumPy, no autograd"]
    return [
        {
            "step": name,
            "us": round(1e6 * statistics.median(values), 1),
            "times by hand": Ratio.of(v / b for v, b in zip(values, base, strict=True)),
        }  # fmt: skip
        for name, values in times.items()
    ]


def program(peer: str) -> list:
    if peer in (OURS, RESILIENT):
        return [NOTEBOOKS / peer]
    module, *dataset = PEERS[peer]
    return ["-m", f"benchmarks.peers.{module}", *(word for kind in dataset for word in ("--dataset", kind))]


def installed(peer: str) -> bool:
    return (
        peer in (OURS, RESILIENT) or not PEERS[peer][0].startswith("with_") or has(PEERS[peer][0].removeprefix("with_"))
    )


def has(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec("lightning" if package == "fabric" else package) is not None


def compare(plan: Plan, peers: list[str], n_ranks: int, data: Path, rounds: int, **flags) -> list[dict]:
    """Train with each program, in turns; assert that they end in one loss; ratios to ours."""
    everyone = [OURS, *peers]
    in_turns = ThreadPoolExecutor(2).map if plan.quick else map  # nobody reads the times of a quick call

    def train(peer: str) -> Run | None:
        try:
            return plan.run(n_ranks, program(peer), data, **flags)
        except RuntimeError as error:
            if peer in (OURS, RESILIENT):
                raise
            print(error, flush=True)  # the table says that it failed, and the others go on

    def train_everyone() -> dict[str, Run | None]:
        runs = dict(zip(everyone, in_turns(train, everyone), strict=True))
        check_losses({peer: run.val_loss for peer, run in runs.items() if run}, data)
        return runs

    name = f"{n_ranks} ranks, {data.name}, {', '.join(f'{key} {value}' for key, value in flags.items())}"
    found = [plan.measure(f"{name}, round {i}", train_everyone) for i in range(1, rounds + 1)]
    own = [Run(*runs[OURS]) for runs in found]
    return [summary(peer, [runs[peer] and Run(*runs[peer]) for runs in found], own) for peer in everyone]


def check_losses(losses: dict[str, float], data: Path) -> None:
    n_classes = len(np.unique(np.load(data / "y_train.npy")))
    target = losses[OURS]
    assert target < 0.75 * math.log(n_classes), f"{OURS} has not learned: {target}"
    for peer, loss in losses.items():
        assert abs(loss - target) < TOLERANCE * target, f"{peer}: validation loss {loss}, not {target}"


def summary(peer: str, runs: list[Run | None], own: list[Run]) -> dict:
    """Of a program's rounds, beside ours. A round without a run, or a table's cell without a number, is None."""
    measured = [(run, base) for run, base in zip(runs, own, strict=True) if run]
    ended = [(run, base) for run, base in measured if not run.died]
    return {
        "by": peer,
        "epoch ms": median(1, [1e3 * run.epoch for run, _ in measured]),
        "epoch, times ours": Ratio.of(run.epoch / base.epoch for run, base in measured),
        "whole s": median(1, [run.wall for run, _ in ended]),
        "whole, times ours": Ratio.of(run.wall / base.wall for run, base in ended),
        "validation loss": median(4, [run.val_loss for run, _ in measured[:1]]),
        "died": died(runs),
    }


def median(digits: int, values: list[float]) -> float | None:
    return round(statistics.median(values), digits) if values else None


def died(runs: list[Run | None]) -> str:
    """In how many of the rounds: at its end, when its epochs had been timed, or before, in each attempt."""
    at_end, before = sum(run.died for run in runs if run), runs.count(None)
    counts = {"at its end": at_end, f"failed {launch.ATTEMPTS} times": before}
    return ", ".join(f"{how} in {n} of {len(runs)}" for how, n in counts.items() if n) or "never"


def train_all(plan: Plan, cases: list[tuple[int, int, int, int, int]]) -> list[dict]:
    """`compare` for each of the cases: features, samples, ranks, epochs, rounds."""
    rows = []
    for n_features, n, n_ranks, epochs, rounds in cases:
        peers = [peer for peer in PEERS if installed(peer)]
        if n_ranks == 2:
            peers = [peer for peer in peers if "our" not in peer]
        if plan.quick:  # each framework once on one process, with our Dataset, and once on two ranks, with the other
            peers = [peer for peer in peers if peer == SLOWEST or peer.endswith("per sample") == (n_ranks > 1)]
        flags = {"epochs": epochs, "batch_size": 128, "lr": 0.1 if n_features < 100 else 1.0}
        flags = QUICK if plan.quick else flags
        for row in compare(plan, peers, n_ranks, plan.data(n_features, n), rounds, **flags):
            rows.append({"features": n_features, "ranks": n_ranks, "epochs": flags["epochs"]} | row)
    return rows


def training(plan: Plan) -> list[dict]:
    """Epochs and whole runs of the script and its peers on one process: the same files, batch and epochs."""
    return train_all(plan, [(20, 2048, 1, 5, 1)] if plan.quick else [(20, 40_960, 1, 5, 3), (784, 16_384, 1, 5, 3)])


def ranks(plan: Plan) -> list[dict]:
    """The same on two and four ranks, with the same global batch."""
    return train_all(plan, [(20, 2048, 2, 5, 1)] if plan.quick else [(20, 20_480, 2, 4, 3), (20, 20_480, 4, 3, 3)])


def whole(plan: Plan) -> list[dict]:
    """Whole runs, from the command to the prompt, of the script and of the per-sample script."""
    rows = []
    flags = QUICK if plan.quick else {"epochs": 100, "batch_size": 128, "lr": 0.1}
    for n_ranks, n in ((2, 2048),) if plan.quick else ((1, 40_960), (4, 4096)):
        data = plan.data(20, n)
        for row in compare(plan, [SLOWEST], n_ranks, data, 1 if plan.quick else 3, **flags):
            rows.append({"samples": n, "ranks": n_ranks, "epochs": flags["epochs"]} | row)
    return rows


def startup(plan: Plan) -> list[dict]:
    """Seconds from the command to the end of the first step, of the rank that is last."""
    rows, data = [], plan.data(20, 2048)
    for n_ranks in (2,) if plan.quick else (1, 2, 4):
        starts = range(1, 1 + (1 if plan.quick else 5))
        found = [plan.measure(f"{n_ranks} ranks, start {i}", start_once, n_ranks, data) for i in starts]
        for part in found[0]:
            rows.append({"ranks": n_ranks, "part": part, "s": round(statistics.median(f[part] for f in found), 2)})
        rows.append({"ranks": n_ranks, "part": "all", "s": round(statistics.median(sum(f.values()) for f in found), 2)})
    return rows


def start_once(n_ranks: int, data: Path) -> dict[str, float]:
    """The parts of a start."""
    with tempfile.TemporaryDirectory() as folder:
        words = [Path(__file__).with_name("startup_probe.py"), folder, NOTEBOOKS / OURS, "--data-dir", data]
        started = {"STARTED": str(time.clock_gettime(time.CLOCK_BOOTTIME))}
        launch.call(launch.command(n_ranks, [*words, "--out", folder]), started)
        ranks = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
    return max(ranks, key=lambda parts: sum(parts.values()))


def exchange(plan: Plan) -> list[dict]:
    """One exchange of gradients between gloo ranks, by several ways; then the DDP step of SimpleModel."""
    rows = []
    sizes = (84, 65_536) if plan.quick else (84, 4096, 65_536, 262_144, 1_048_576, 4_194_304)
    for n_ranks in (2,) if plan.quick else (2, 4):
        found = plan.measure(f"{n_ranks} ranks", exchange_once, n_ranks, 1 if plan.quick else 5, sizes)
        tables = [(f"{int(size):,} B", table) for size, table in found["exchanges"].items()] + [
            ("step", found["steps"])
        ]
        for what, table in tables:
            for name, (wall, cpu, waits, segments) in table.items():
                rows.append(
                    {"ranks": n_ranks, "what": what, "by": name, "ms": round(1e3 * wall, 2)}
                    | {
                        "CPU ms a rank": round(1e3 * cpu, 2),
                        "waits a rank": round(waits, 1),
                        "TCP segments": round(segments),
                    }  # fmt: skip
                )
    return rows


def exchange_once(n_ranks: int, rounds: int, sizes: tuple) -> dict:
    """What the probe prints."""
    end = launch.call(launch.command(n_ranks, ["-m", "benchmarks.exchange_probe", rounds, *sizes]))
    return json.loads(next(line for line in end.output.splitlines() if line.startswith("{")))


def memory(plan: Plan) -> list[dict]:
    """The most that a rank holds (PSS), with an X of 2 GB: mapped, as ours, and loaded; and with hardly any data."""
    n_ranks = 1 if plan.quick else 4
    sizes = ((20, 2048), (20, 2048)) if plan.quick else ((784, 4096), (784, 640_000))
    little, much = (plan.data(*size) for size in sizes)
    flags = QUICK if plan.quick else {"epochs": 1, "batch_size": 4096, "lr": 0.1}
    rows = []
    for peer, data in ((OURS, little), (OURS, much), ("hand-written, TensorDataset", much)):
        size = (data / "X_train.npy").stat().st_size
        run = Run(*plan.measure(f"{peer}, {data.name}", plan.run, n_ranks, program(peer), data, **flags))
        row = {"ranks": n_ranks, "X, MB": round(size / 1e6), "by": peer}
        rows.append(row | {"PSS MB a rank": round(run.pss / 1e6), "PSS MB, all": round(n_ranks * run.pss / 1e6)})
    return rows


def growth(plan: Plan) -> list[dict]:
    """What grows with the samples and with the ranks: 20 features, batches of 1024, the script's second epoch."""
    rows = []
    cases = [(2048, 1), (2048, 2)] if plan.quick else [(10**k, 1) for k in (4, 5, 6, 7)] + [(10**6, 2), (10**6, 4)]
    flags = QUICK if plan.quick else {"epochs": 2, "batch_size": 1024, "lr": 0.1}
    for n, n_ranks in cases:
        data = plan.data(20, n)
        run = Run(*plan.measure(f"{n_ranks} ranks, {data.name}", plan.run, n_ranks, program(OURS), data, **flags))
        rows.append(
            {"samples": n, "ranks": n_ranks, "epoch s": round(run.epochs[1], 3)}
            | {"us a step": round(1e6 * run.epochs[1] / (n // flags["batch_size"]), 1)}
            | {"PSS MB a rank": round(run.pss / 1e6)}
        )
    return rows


def gpu(plan: Plan) -> list[dict]:
    """Epochs on GPUs: one training, fed and launched in several ways; then whole programs, validation included."""
    if not torch.cuda.is_available():
        return []
    rows, rounds = [], 1 if plan.quick else 5
    shapes = [(20, 8192)] if plan.quick else [(20, 131_072), (784, 65_536)]
    sizes = (1024,) if plan.quick else (256, 1024, 4096)
    for n_ranks in (n for n in (1, 2, 4) if n <= torch.cuda.device_count()):
        for (n_features, n), size in itertools.product(shapes, sizes):
            name, data = f"{n_ranks} ranks, {n}x{n_features}, batches of {size}", plan.data(n_features, n)
            found = plan.measure(name, gpu_once, n_ranks, data, size, rounds)
            case = {"card": found["card"], "ranks": n_ranks, "features": n_features, "batch": size}
            rows += [case | row for row in ladder(found, n_features, size // n_ranks, n // size)]
        n_features, n = shapes[-1]
        peers = [peer for peer in PEERS if "bare" in peer or (peer not in (OURS, RESILIENT) and "hand" not in peer)]
        flags = {"epochs": 5, "batch_size": 1024, "lr": 0.1, "device": "cuda"}
        peers = [peer for peer in peers if installed(peer) and not (plan.quick and "sample" in peer)]
        for row in compare(plan, peers, n_ranks, plan.data(n_features, n), min(rounds, 3), **flags):
            case = {"card": rows[-1]["card"], "ranks": n_ranks, "features": n_features, "batch": 1024}
            step = row["epoch ms"] and round(1e3 * row["epoch ms"] / (n // 1024))
            rows.append(case | {"by": row["by"], "epoch ms": row["epoch ms"], "us a step": step, "times the scripts": row["epoch, times ours"]})  # fmt: skip
    return rows


def gpu_once(n_ranks: int, data: Path, size: int, rounds: int) -> dict:
    """What the probe prints."""
    end = launch.call(launch.command(n_ranks, ["-m", "benchmarks.gpu_probe", data, size, rounds]))
    return json.loads(next(line for line in end.output.splitlines() if line.startswith("{")))


def ladder(found: dict, n_features: int, size: int, n_steps: int) -> list[dict]:
    """A row for each way, and two for what no way can beat: the launches, or the kernels and the bytes, of a step."""
    ways, ours = found["rows"], found["rows"][gpu_probe.OURS]
    for name, way in ways.items():
        assert abs(way["val_loss"] - ours["val_loss"]) < 1e-3 * ours["val_loss"], f"{name}: {way['val_loss']}"
    rows = []
    for name, way in ways.items():
        ms = 1e3 * statistics.median(way["s"])
        ratio = Ratio.of(value / own for value, own in zip(way["s"], ours["s"], strict=True))
        rows.append({"by": name, "epoch ms": round(ms, 1), "us a step": round(1e3 * ms / n_steps), "times the scripts": ratio})  # fmt: skip
    if found["launches"]:
        launches, (alone, in_graph) = found["launches"] / n_steps, found["kernel s"]
        n_bytes = 4 * 4 * size * n_features  # of float32: read and written by the gather, read forward and backward
        floors = {
            f"floor: {launches:.0f} launches, one by one": launches * alone,
            f"floor: {launches:.0f} kernels in a graph, or {n_bytes / 1e6:.1f} MB": max(
                launches * in_graph, n_bytes / found["copy B/s"]
            ),  # fmt: skip
        }
        base = statistics.median(ours["s"])
        for name, value in floors.items():
            ratio = Ratio.of([n_steps * value / base])
            rows.append({"by": name, "epoch ms": round(1e3 * n_steps * value, 1), "us a step": round(1e6 * value), "times the scripts": ratio})  # fmt: skip
    return rows


def network(plan: Plan) -> list[dict]:
    """What a batch takes on two ranks that a slow network joins, one on each side, beside the alpha-beta model."""
    if not (prefix := network_probe.isolated()):
        return []
    rates, rounds = ((0, 100), 1) if plan.quick else ((0, 3000, 1000, 300, 100), 7)
    return beside_model(plan.measure("rates", network_once, prefix, rounds, rates))


def network_once(prefix: list[str], rounds: int, rates: tuple) -> dict:
    """What the probe prints."""
    words = map(str, (*prefix, sys.executable, "-m", "benchmarks.network_probe", rounds, *rates))
    end = launch.call(list(words))
    return json.loads(next(line for line in end.output.splitlines() if line.startswith("{")))


def beside_model(found: dict) -> list[dict]:
    """A row for each rate and way. Two times without a limit are all that the model is told: computing, and plain DDP."""
    times = {rate: {way: Ratio.of(round(1e3 * s, 2) for s, _ in steps) for way, steps in ways.items()} for rate, ways in found["rates"].items()}  # fmt: skip
    compute = times["0"][network_probe.SILENT].median
    alpha = times["0"][network_probe.PLAIN].median - compute
    rows = []
    for rate, ways in times.items():
        beta = 8 / (1e3 * int(rate)) if int(rate) else 0  # ms for each byte, of which a ring of two sends each once
        for way, ms in ways.items():
            hook, n_batches = network_probe.WAYS[way]
            cost = alpha + beta * found["bytes"] / (2 if hook else 1)
            model = compute + (0 if way == network_probe.SILENT else cost / n_batches)
            sent = statistics.median(n for _, n in found["rates"][rate][way])
            row = {"cores": len(os.sched_getaffinity(0)), "Mbit/s": int(rate) or None, "by": way, "ms a batch": ms}
            rows.append(row | {"of the model, ms": round(model, 1), "MB sent a batch": round(sent / 1e6, 3)})
    return rows


SECTIONS = {
    "data": data_path,
    "step": step,
    "exchange": exchange,
    "startup": startup,
    "training": training,
    "ranks": ranks,
    "whole": whole,
    "memory": memory,
    "growth": growth,
    "gpu": gpu,
    "network": network,
}
NEEDS = {  # what a section without rows has not found here
    "gpu": "a GPU",
    "network": "the commands unshare, ip and tc, and root, or a kernel that gives users namespaces of their own",
}
