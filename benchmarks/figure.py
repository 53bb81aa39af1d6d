"""The figures that the README and chapters 3 and 8 show."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks import gpu_probe, network_probe
from benchmarks.sections import OURS
from ddp_tutorial.show import figures

HOW = {  # by the end of a program's name in `sections.PEERS`: how it gets its batches, and how that is drawn
    "per sample": ("a tensor per sample", {"color": figures.COLORS[0]}),
    "TensorDataset": ("TensorDataset: an index per sample", {"color": figures.COLORS[1], "hatch": "//"}),
    "": ("a gather per batch, as the script", {"color": figures.COLORS[2]}),
}


def peers(rows: list[dict]) -> Figure:
    """How many times as long as the script each program takes for an epoch on one process."""
    figures.use_style()
    ratios = {row["by"]: row["epoch, times ours"] for row in rows if row["features"] == 20 and row["epoch, times ours"]}
    del ratios[OURS]
    names = sorted(ratios, key=lambda name: ratios[name][0])
    figure, ax = plt.subplots(figsize=(9, 1.4 + 0.36 * len(names)))
    for y, name in enumerate(names):
        median, low, high = ratios[name]
        style = next(style for end, (_, style) in HOW.items() if name.endswith(end))
        error = {"xerr": [[median - low], [high - median]], "ecolor": "#333333"}
        ax.barh(y, median, height=0.65, edgecolor="white", **error, **style)
        ax.text(high + 0.1, y, f"{median:.1f}", va="center")
    ax.axvline(1, color="#333333", lw=1.2, ls="--")
    ax.text(1, -0.75, f" {OURS} = 1", va="center", size=9)
    slow = [ratios[name][0] for name in names if "per sample" in name]
    title = f"Fetched sample by sample, batches take {min(slow):.0f} to {max(slow):.0f} times as long, whoever wrote the loop"
    figure.suptitle(title, x=0.01, ha="left", weight="bold", size=11)
    ax.set(xlabel="time of an epoch on one process, in times of the script's (median; lines: lowest to highest)")
    ax.set_yticks(range(len(names)), [name.removesuffix(", our Dataset") for name in names])
    ax.set(xlim=(0, 1.12 * max(high for *_, high in ratios.values())), ylim=(len(names) - 0.4, -1.1))
    ax.grid(axis="y", visible=False)
    ax.legend(handles=[Patch(label=how, **style) for how, style in reversed(HOW.values())], loc="upper right")
    return figure


def gpu(rows: list[dict]) -> Figure | None:
    """How long an epoch takes on one GPU, 784 features in batches of 1,024, for each way to feed and to launch it."""
    figures.use_style()
    case = [row for row in rows if (row["ranks"], row["features"], row["batch"]) == (1, 784, 1024)]
    ways = {row["by"]: row["epoch ms"] for row in case if row["by"] in gpu_probe.WAYS}
    if not ways:
        return None
    figure, ax = plt.subplots(figsize=(9, 3.6))
    for y, (name, ms) in enumerate(ways.items()):
        color = figures.COLORS[0 if name in gpu_probe.WAYS[:3] else 2]
        ax.plot([1, ms], [y, y], lw=2.5, color=color)
        ax.plot(ms, y, marker="o" if name in gpu_probe.WAYS[:3] else "s", ms=8, color=color)
        ax.text(1.12 * ms, y, f"{ms:.0f} ms" if ms >= 10 else f"{ms:.1f} ms", va="center")
    moved, recorded = (ways[slow] / ways[fast] for slow, fast in ((gpu_probe.PINNED, gpu_probe.OURS), (gpu_probe.LOOP, gpu_probe.GRAPH)))  # fmt: skip
    title = f"Data on the GPU: {moved:.1f} times as fast; the step as a graph: {recorded:.1f} times more ({case[0]['card']})"
    figure.suptitle(title, x=0.01, ha="left", weight="bold", size=11)
    ax.set(xlabel="time of an epoch of 64 steps (ms, logarithmic)", xscale="log", xlim=(1, 2.5 * max(ways.values())))
    ax.set_yticks(range(len(ways)), list(ways))
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    return figure


def network(rows: list[dict]) -> Figure | None:
    """What a batch takes against the bandwidth, for each way to exchange: measured, and by the alpha-beta model."""
    if not rows:
        return None
    figures.use_style()
    figure, ax = plt.subplots(figsize=(9, 4.2))
    rates = sorted({row["Mbit/s"] for row in rows if row["Mbit/s"]})
    no_limit, line = 4 * rates[-1], np.geomspace(rates[0], rates[-1], 100)
    ways = (network_probe.PLAIN, network_probe.HALF, network_probe.RARE)
    for i, way in enumerate(ways):
        color, marker, ls = figures.COLORS[i], figures.MARKERS[i], ("-", "--", ":")[i]
        mine = sorted((row["Mbit/s"] or no_limit, *row["ms a batch"], row["of the model, ms"]) for row in rows if row["by"] == way)  # fmt: skip
        x, median, low, high, model = np.array(mine).T
        ax.plot(
            line, np.interp(-1 / line, -1 / x[:-1], model[:-1]), ls=ls, color=color
        )  # it is linear in 1 / bandwidth
        x[-1] *= 1.12 ** (i - 1)  # side by side: they are nearly the same there
        ax.errorbar(x, median, (median - low, high - median), fmt=marker, color=color, ms=7, elinewidth=1.2, capsize=3)
        ax.plot([], [], marker=marker, ls=ls, ms=7, color=color, label=way)
    (silent,) = (row["ms a batch"][0] for row in rows if row["by"] == network_probe.SILENT and not row["Mbit/s"])
    ax.axhline(silent, color="#555555", lw=1.2, ls=(0, (6, 2, 1, 2)), label=network_probe.SILENT)
    plain, half, rare = (row["ms a batch"][0] for row in rows if row["Mbit/s"] == rates[0] and row["by"] in ways)
    title = f"At {rates[0]} Mbit/s: fp16 gradients {plain / half:.1f} times as fast, one exchange for 4 batches {plain / rare:.1f} times"  # fmt: skip
    figure.suptitle(title, x=0.01, ha="left", weight="bold", size=11)
    ax.set(xscale="log", yscale="log", xlim=(rates[0] / 1.3, no_limit * 1.5))
    ax.set(xlabel="bandwidth of the network (Mbit/s, logarithmic)", ylabel="time of a batch (ms, logarithmic)")
    ax.set_xticks([*rates, no_limit], [*(f"{rate:,}" for rate in rates), "no limit"])
    ticks = [ms for ms in (5, 10, 20, 50, 100, 200, 500, 1000) if ax.get_ylim()[0] <= ms <= ax.get_ylim()[1]]
    ax.set_yticks(ticks, ticks)
    ax.minorticks_off()
    note = f"two ranks, {rows[0]['cores']} cores; lines: the model;\npoints: measured (median, least, most)"
    ax.legend(loc="upper right", title=note, alignment="left")
    return figure
