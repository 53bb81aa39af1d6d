"""The figures that the README and chapters 3 and 8 show."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks import gpu_probe, network_probe
from benchmarks.peers import DatasetKind
from benchmarks.programs import OTHERS, OURS
from benchmarks.sections.gpu import GpuRow
from benchmarks.sections.network import NetworkRow
from benchmarks.sections.training import TrainingRow
from ddp_tutorial.show import figures

GATHER_STYLE = {"color": figures.COLORS[2]}
STYLES = {
    DatasetKind.PER_SAMPLE: {"color": figures.COLORS[0]},
    DatasetKind.TENSOR: {"color": figures.COLORS[1], "hatch": "//"},
    DatasetKind.GATHER: GATHER_STYLE,
    None: GATHER_STYLE,  # a program without a choice gathers, too
}
LEGEND = {
    DatasetKind.GATHER: "a gather per batch, as the script",
    DatasetKind.TENSOR: "TensorDataset: an index per sample",
    DatasetKind.PER_SAMPLE: "a tensor per sample",
}


def peers(rows: Sequence[TrainingRow]) -> Figure:
    """How many times as long as the script each program takes for an epoch on one process, with 20 features.

    A program that failed in all rounds has no bar.
    """
    figures.use_style()
    compared = [row.comparison for row in rows if row.features == 20]
    ratios = {row.by: row.epoch_ratio for row in compared if row.epoch_ratio}
    programs = sorted((program for program in OTHERS if program.name in ratios), key=lambda p: ratios[p.name].median)
    figure, ax = plt.subplots(figsize=(9, 1.4 + 0.36 * len(programs)))
    for y, program in enumerate(programs):
        median, low, high = ratios[program.name]
        error = {"xerr": [[median - low], [high - median]], "ecolor": "#333333"}
        ax.barh(y, median, height=0.65, edgecolor="white", **error, **STYLES[program.dataset])
        ax.text(high + 0.1, y, f"{median:.1f}", va="center")
    ax.axvline(1, color="#333333", lw=1.2, ls="--")
    ax.text(1, -0.75, f" {OURS.name} = 1", va="center", size=9)
    slow = [ratios[program.name].median for program in programs if program.dataset is DatasetKind.PER_SAMPLE]
    times = f"{min(slow):.0f} to {max(slow):.0f} times"
    set_title(figure, f"Fetched sample by sample, batches take {times} as long, whoever wrote the loop")
    ax.set(xlabel="time of an epoch on one process, in times of the script's (median; lines: lowest to highest)")
    ax.set_yticks(range(len(programs)), [program.name.removesuffix(", our Dataset") for program in programs])
    ax.set(xlim=(0, 1.12 * max(ratio.high for ratio in ratios.values())), ylim=(len(programs) - 0.4, -1.1))
    ax.grid(axis="y", visible=False)
    ax.legend(handles=[Patch(label=label, **STYLES[kind]) for kind, label in LEGEND.items()], loc="upper right")
    return figure


def gpu(rows: Sequence[GpuRow]) -> Figure | None:
    """How long an epoch takes on one GPU, 784 features in batches of 1,024, for each loop; None if not measured."""
    figures.use_style()
    rows = [row for row in rows if (row.case.ranks, row.case.features, row.case.batch) == (1, 784, 1024)]
    epoch_ms = {row.by: row.epoch_ms for row in rows if row.by in gpu_probe.LOOPS}
    if not epoch_ms:
        return None
    figure, ax = plt.subplots(figsize=(9, 3.6))
    for y, (name, ms) in enumerate(epoch_ms.items()):
        color, marker = (figures.COLORS[0], "o") if name in gpu_probe.COPIES_BATCHES else (figures.COLORS[2], "s")
        ax.plot([1, ms], [y, y], lw=2.5, color=color)
        ax.plot(ms, y, marker=marker, ms=8, color=color)
        ax.text(1.12 * ms, y, f"{ms:.0f} ms" if ms >= 10 else f"{ms:.1f} ms", va="center")
    moved = f"{epoch_ms[gpu_probe.PINNED] / epoch_ms[gpu_probe.ON_GPU]:.1f} times"
    recorded = f"{epoch_ms[gpu_probe.LOOP] / epoch_ms[gpu_probe.GRAPH]:.1f} times"
    card = rows[0].case.card
    set_title(figure, f"Data on the GPU: {moved} as fast; the step as a graph: {recorded} more ({card})")
    ax.set(xlabel="time of an epoch of 64 steps (ms, logarithmic)")
    ax.set(xscale="log", xlim=(1, 2.5 * max(epoch_ms.values())))
    ax.set_yticks(range(len(epoch_ms)), list(epoch_ms))
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    return figure


def network(rows: Sequence[NetworkRow]) -> Figure:
    """What a batch takes against the bandwidth, for each scheme that exchanges: measured, and by the model."""
    figures.use_style()
    figure, ax = plt.subplots(figsize=(9, 4.2))
    rates = sorted({row.mbit_per_second for row in rows if row.mbit_per_second})
    no_limit = 4 * rates[-1]  # where times without a limit are drawn
    names = (network_probe.PLAIN, network_probe.HALF, network_probe.RARE)
    for i, name in enumerate(names):
        draw_scheme(ax, [row for row in rows if row.by == name], i, no_limit)
    silent = next(row for row in rows if row.by == network_probe.SILENT and row.mbit_per_second is None)
    ax.axhline(silent.batch_ms.median, color="#555555", lw=1.2, ls=(0, (6, 2, 1, 2)), label=network_probe.SILENT)
    slowest = {row.by: row.batch_ms.median for row in rows if row.mbit_per_second == rates[0]}
    plain, half, rare = (slowest[name] for name in names)
    gains = f"fp16 gradients {plain / half:.1f} times as fast, one exchange for 4 batches {plain / rare:.1f} times"
    set_title(figure, f"At {rates[0]} Mbit/s: {gains}")
    ax.set(xscale="log", yscale="log", xlim=(rates[0] / 1.3, no_limit * 1.5))
    ax.set(xlabel="bandwidth of the network (Mbit/s, logarithmic)", ylabel="time of a batch (ms, logarithmic)")
    ax.set_xticks([*rates, no_limit], [*(f"{rate:,}" for rate in rates), "no limit"])
    ticks = [ms for ms in (5, 10, 20, 50, 100, 200, 500, 1000) if ax.get_ylim()[0] <= ms <= ax.get_ylim()[1]]
    ax.set_yticks(ticks, ticks)
    ax.minorticks_off()
    note = f"two ranks, {rows[0].cores} cores; lines: the model;\npoints: measured (median, least, most)"
    ax.legend(loc="upper right", title=note, alignment="left")
    return figure


def draw_scheme(ax: Axes, rows: Sequence[NetworkRow], i: int, no_limit: int) -> None:
    """The points and the line of the `i`-th of three schemes; times without a limit stand at `no_limit` Mbit/s."""
    style = {"color": figures.COLORS[i], "marker": figures.MARKERS[i], "ls": ("-", "--", ":")[i], "ms": 7}
    points = sorted((row.mbit_per_second or no_limit, *row.batch_ms, row.model_ms) for row in rows)
    rates, median, low, high, model = np.array(points).T
    line = np.geomspace(rates[0], rates[-2], 100)
    line_ms = np.interp(-1 / line, -1 / rates[:-1], model[:-1])  # the model is linear in 1 / bandwidth
    ax.plot(line, line_ms, ls=style["ls"], color=style["color"])
    rates[-1] *= 1.12 ** (i - 1)  # side by side: the schemes are nearly the same there
    ax.errorbar(rates, median, (median - low, high - median), elinewidth=1.2, capsize=3, **style | {"ls": "none"})
    ax.plot([], [], label=rows[0].by, **style)


def set_title(figure: Figure, title: str) -> None:
    """What the figure shows, as a finding."""
    figure.suptitle(title, x=0.01, ha="left", weight="bold", size=11)
