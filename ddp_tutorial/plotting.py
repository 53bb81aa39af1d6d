"""One style for every figure of the series. Lines differ in lightness and dash too, so they survive greyscale."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

COLORS = ("#12355b", "#d1495b", "#e9a23b", "#5fa08a")
MARKERS = ("o", "^", "s", "D")


def use_style() -> None:
    """Set matplotlib's defaults for the series."""
    plt.rcParams.update(
        {
            "figure.figsize": (7, 3.8),
            "figure.dpi": 100,
            "figure.constrained_layout.use": True,
            "axes.prop_cycle": plt.cycler(color=COLORS),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.titlelocation": "left",
            "axes.titleweight": "bold",
            "axes.titlesize": 11,
            "grid.color": "#e4e4e4",
            "legend.frameon": False,
            "lines.linewidth": 2,
        }
    )


def loss_curves(
    curves: Mapping[str, Sequence[float]],
    title: str,
    floor: float | None = None,
    ylabel: str = "validation loss (nats)",
) -> Figure:
    """Losses against the epoch, from 1 on. Equal curves stay visible: the first is broad, the later ones dashed."""
    figure, ax = plt.subplots()
    styles = ({"lw": 7, "alpha": 0.35}, {"lw": 3}, {"lw": 2, "ls": (0, (4, 3))}, {"lw": 1.5, "ls": ":"})
    for (label, losses), style, color in zip(curves.items(), styles[len(curves) < 3 :], COLORS, strict=False):
        ax.plot(range(1, len(losses) + 1), losses, color=color, label=label, **style)
    if floor is not None:
        ax.axhline(floor, color="#555555", lw=1.2, ls="-.", label=f"Bayes floor: {floor:.4f}")
    ax.set(title=title, xlabel="epoch", ylabel=ylabel)
    ax.legend(loc="upper right")
    return figure


def bars(values: Mapping[str, float], title: str, xlabel: str, log: bool = True) -> Figure:
    """Horizontal bars, each with its value to two digits."""
    figure, ax = plt.subplots(figsize=(7, 0.8 + 0.5 * len(values)))
    drawn = ax.barh(list(values), list(values.values()), color=COLORS[0], height=0.6)
    ax.bar_label(drawn, labels=[f"{float(f'{v:.2g}'):,.0f}" for v in values.values()], padding=4)
    if log:
        ax.set_xscale("log")
    limits = (min(values.values()) / 3, max(values.values()) * 4) if log else (0, max(values.values()) * 1.1)
    ax.set(title=title, xlabel=xlabel, xlim=limits)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    return figure


def scatter_classes(ax: Axes, x: np.ndarray, y: np.ndarray) -> None:
    """Points x (N, 2) of classes y (N,), each class with a colour and a marker of its own."""
    for c in np.unique(y):
        ax.scatter(*x[y == c].T, s=14, color=COLORS[c], marker=MARKERS[c], ec="white", lw=0.3, label=f"class {c}")


def decision_regions(predict, x: np.ndarray, y: np.ndarray, title: str) -> Figure:
    """The class that `predict` ((N, 2) tensor to (N, C) scores) gives to each point of the plane, under the points."""
    figure, ax = plt.subplots(figsize=(6, 4.6))
    low, high = x.min(0) - 0.5, x.max(0) + 0.5
    across, up = np.meshgrid(np.linspace(low[0], high[0], 300), np.linspace(low[1], high[1], 300))
    plane = torch.tensor(np.column_stack((across.ravel(), up.ravel())), dtype=torch.float32)
    with torch.no_grad():
        regions = predict(plane).argmax(1).reshape(across.shape).numpy()
    ax.pcolormesh(across, up, regions, cmap=ListedColormap(COLORS), vmin=0, vmax=3, alpha=0.25, rasterized=True)
    scatter_classes(ax, x, y)
    ax.set(title=title, xlabel="feature 0", ylabel="feature 1")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def sample_assignment(ranks: np.ndarray, title: str, xlabel: str, ylabel: str) -> Figure:
    """Which rank (0 to 3) reads each cell of `ranks` (rows, columns); the number stands in the cell."""
    figure, ax = plt.subplots(figsize=(7, 0.9 + 0.38 * len(ranks)))
    ax.imshow(ranks, cmap=ListedColormap(COLORS), vmin=0, vmax=3, aspect="auto", alpha=0.8)
    for (row, column), rank in np.ndenumerate(ranks):
        ax.text(column, row, rank, ha="center", va="center", color="white" if rank < 2 else "black")
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel, xticks=range(0, ranks.shape[1], 4), yticks=range(len(ranks)))
    ax.grid(visible=False)
    return figure


def times_by_size(sizes: Sequence[float], times: Mapping[str, Sequence[float]], title: str, ylabel: str) -> Figure:
    """How long messages of some sizes (bytes) take, on logarithmic axes, a curve for each way to send them."""
    figure, ax = plt.subplots()
    for (label, values), color, marker in zip(times.items(), COLORS, MARKERS, strict=False):
        ax.loglog(sizes, values, color=color, marker=marker, label=label)
    ax.set(title=title, xlabel="bytes (logarithmic)", ylabel=ylabel)
    ax.legend(loc="upper left")
    return figure


def confusion(matrix: np.ndarray, title: str) -> Figure:
    """`matrix[i, j]` counts the samples of class i that were taken for class j."""
    figure, ax = plt.subplots(figsize=(5, 4.6))
    ax.imshow(np.log1p(matrix), cmap="Blues")
    for (true, predicted), n in np.ndenumerate(matrix):
        if n:
            ax.text(predicted, true, n, ha="center", va="center", color="white" if n > matrix.max() / 4 else "black")
    ax.set(title=title, xlabel="predicted digit", ylabel="true digit", xticks=range(10), yticks=range(10))
    ax.grid(visible=False)
    return figure


def timeline(spans: Mapping[str, tuple[float, float]], title: str, xlabel: str) -> Figure:
    """A bar from start to end for each span, one below the other, with its name and its length in seconds."""
    figure, ax = plt.subplots(figsize=(7, 0.9 + 0.45 * len(spans)))
    starts, ends = np.array(list(spans.values())).T
    drawn = ax.barh(list(spans), ends - starts, left=starts, color=COLORS[0], height=0.6)
    ax.bar_label(drawn, labels=[f"{length:.2f} s" for length in ends - starts], padding=4)
    ax.set(title=title, xlabel=xlabel, xlim=(starts[0] - 0.3, ends[-1] + 0.15 * (ends[-1] - starts[0])))
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    return figure
