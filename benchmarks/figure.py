"""The figure that the README shows."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from benchmarks.sections import OURS
from ddp_tutorial import plotting


def peers(rows: list[dict]) -> Figure:
    """How many times as long as ours each program takes for an epoch: on one process, and on the most ranks."""
    plotting.use_style()
    rows = [row for row in rows if row["features"] == 20 and row["by"] != OURS]
    counts = sorted({row["ranks"] for row in rows})
    counts = [counts[0], counts[-1]]
    names = [row["by"] for row in rows if row["ranks"] == counts[-1]]
    figure, axes = plt.subplots(1, 2, figsize=(9, 0.9 + 0.36 * len(names)), sharey=True)
    for ax, n_ranks in zip(axes, counts, strict=True):
        ratios = {row["by"]: row["epoch, times ours"] for row in rows if row["ranks"] == n_ranks}
        median, low, high = np.array([ratios[name] for name in names]).T
        colors = [plotting.COLORS[1 if "our Dataset" in name or "limit" in name else 0] for name in names]
        ax.barh(names, median, xerr=(median - low, high - median), color=colors, height=0.6, ecolor="#333333")
        for i, value in enumerate(median):
            ax.text(high[i] + 0.02 * high.max(), i, f"{value:.1f}", va="center")
        ax.axvline(1, color="#333333", lw=1.2, ls="--")
        ax.set(
            title="one process" if n_ranks == 1 else f"{n_ranks} ranks, gloo",
            xlabel="time of an epoch, times ddp_sample.py's",
        )
        ax.set_xlim(0, 1.15 * high.max())
        ax.grid(axis="y", visible=False)
    axes[0].invert_yaxis()
    figure.suptitle("A gather per batch and a short way for few numbers: the script beside its peers")
    return figure
