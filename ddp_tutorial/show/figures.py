"""One style for every figure of the series. Lines differ in lightness and dash too, so they survive greyscale."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.animation import FuncAnimation
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.figure import Figure

COLORS = ("#12355b", "#d1495b", "#e9a23b", "#5fa08a")
MARKERS = ("o", "^", "s", "D")


def use_style() -> None:
    """Set matplotlib's defaults for the series."""
    plt.rc("figure", figsize=(7, 3.8), dpi=100)
    plt.rc("figure.constrained_layout", use=True)
    plt.rc("axes", prop_cycle=plt.cycler(color=COLORS), grid=True, axisbelow=True)
    plt.rc("axes", titlelocation="left", titleweight="bold", titlesize=11)
    plt.rc("axes.spines", top=False, right=False)
    plt.rc("grid", color="#e4e4e4")
    plt.rc("legend", frameon=False)
    plt.rc("lines", linewidth=2)


def loss_curves(curves: Mapping[str, Sequence[float]], floors: Mapping[str, float], title: str) -> Figure:
    """Losses (nats) against the epoch, from 1; `floors` has the loss of the true probabilities on the same samples."""
    figure, ax = plt.subplots()
    for (label, losses), color, line in zip(curves.items(), COLORS, ("-", (0, (4, 1.5))), strict=False):
        ax.plot(range(1, len(losses) + 1), losses, color=color, ls=line, label=label)
        ax.axhline(floors[label], color=color, lw=1.2, ls=(0, (6, 2, 1, 2)), label=f"its floor: {floors[label]:.4f}")
    ax.set(title=title, xlabel="epoch", ylabel="loss (nats)")
    ax.legend(loc="upper right")
    return figure


def bars(values: Mapping[str, float], title: str, xlabel: str) -> Figure:
    """Horizontal bars, each with its value to two digits."""
    figure, ax = plt.subplots(figsize=(7, 0.8 + 0.5 * len(values)))
    drawn = ax.barh(list(values), list(values.values()), color=COLORS[0], height=0.6)
    ax.bar_label(drawn, labels=[f"{float(f'{v:.2g}'):,.0f}" for v in values.values()], padding=4)
    ax.set(title=title, xlabel=xlabel, xlim=(0, max(values.values()) * 1.1))
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


def dealt_samples(shares: Mapping[str, np.ndarray], per_step: int, title: str) -> Figure:
    """For each label, say "epoch 1", each rank's samples in its order, (ranks, samples); a frame is a step's batch."""
    figure, axes = plt.subplots(len(shares), figsize=(8, 1.6 * len(shares)), sharex=True)
    for ax, (label, share) in zip(axes, shares.items(), strict=True):
        for (rank, i), sample in np.ndenumerate(share):
            _cell(ax, i + 0.03, rank + 0.05, sample, COLORS[rank])
        for i in range(0, share.shape[1], per_step):
            ax.add_patch(plt.Rectangle((i, 0), per_step, len(share), fill=False, lw=2.5, ec="black", clip_on=False))
        ax.set(xlim=(0, share.shape[1]), ylim=(len(share), 0), ylabel=label, xticks=[])
        ax.set_yticks(np.arange(len(share)) + 0.5, [f"rank {rank}" for rank in range(len(share))], size=8)
        ax.tick_params(length=0)
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)
    n_steps = share.shape[1] // per_step
    ax.set_xticks((np.arange(n_steps) + 0.5) * per_step, [f"step {k + 1}" for k in range(n_steps)])
    figure.suptitle(title, x=0.01, ha="left", weight="bold", size=11)
    return figure


def ddp_picture(title: str) -> Figure:
    """One step of DDP on four ranks: shards of a batch, replicas of a model, one averaged gradient."""
    figure, ax = plt.subplots(figsize=(8, 4.2))
    rows = {0.0: "64 samples\nof the batch of 256", 1.5: "replica of the model", 4.6: "step: the same\nnew weights"}
    for rank, color in enumerate(COLORS):
        x, ink = 2.5 * rank, "white" if rank < 2 else "black"
        ax.text(x + 1.1, -0.2, f"rank {rank}", ha="center", weight="bold", size=9)
        for y, text in rows.items():
            ax.add_patch(plt.Rectangle((x, y), 2.2, 0.9, facecolor=color))
            ax.text(x + 1.1, y + 0.45, text, ha="center", va="center", size=8.5, color=ink)
        for start, end, text in ((0.9, 1.5, ""), (2.4, 3.1, f"  gradient $g_{rank}$"), (4.0, 4.6, "  the mean")):
            ax.annotate("", (x + 1.1, end), (x + 1.1, start), arrowprops={"arrowstyle": "->", "lw": 1.5})
            ax.text(x + 1.1, (start + end) / 2, text, va="center", size=8.5)
    ax.add_patch(plt.Rectangle((0, 3.1), 9.7, 0.9, facecolor="#e4e4e4", edgecolor="black"))
    mean = "backward() averages over the ranks (all-reduce):  $(g_0 + g_1 + g_2 + g_3)\\,/\\,4$"
    ax.text(4.85, 3.55, mean, ha="center", va="center", size=9.5)
    ax.set(xlim=(-0.1, 9.8), ylim=(5.6, -0.6), title=title)
    ax.axis("off")
    return figure


def one_curve(curves: Mapping[str, Sequence[float]], title: str) -> Figure:
    """Validation losses against the epoch, and below how far each is from the first."""
    figure, (top, bottom) = plt.subplots(2, figsize=(7, 4.6), sharex=True, height_ratios=(3, 2))
    styles = ({"lw": 7, "alpha": 0.35}, {"lw": 2, "ls": (0, (4, 3))}, {"lw": 1.5, "ls": ":"})
    first = np.array(next(iter(curves.values())))
    for (label, losses), style, color, marker in zip(curves.items(), styles, COLORS, MARKERS, strict=False):
        top.plot(epochs := range(1, len(losses) + 1), losses, color=color, label=label, **style)
        if label != next(iter(curves)):
            bottom.semilogy(epochs, np.abs(losses - first), marker, ms=4, color=color, label=label)
    top.set(ylabel="validation loss (nats)", title=title)
    bottom.set(xlabel="epoch", ylabel="distance from\none process (nats)", ylim=(1e-12, 1e-5))
    top.legend(loc="upper right")
    bottom.legend(loc="upper right", ncols=2)
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


def _cell(ax: Axes, x: float, y: float, text: object, color: str, size: float = 9, **options) -> None:
    """A coloured cell, 1 x 1 with a gap, whose upper left corner is (x, y) where y points down."""
    ax.add_patch(plt.Rectangle((x, y), 0.94, 0.9, **{"facecolor": color, "edgecolor": "none"} | options))
    light = np.dot(to_rgb(color), (0.3, 0.59, 0.11)) > 0.47
    ax.text(x + 0.47, y + 0.45, text, ha="center", va="center", size=size, color="black" if light else "white")


def before_after(collectives: Mapping[str, tuple[Sequence, Sequence]], title: str) -> Figure:
    """What four ranks hold before and after some collectives: name -> (each rank's numbers before, after).

    The tens of a number tell whose it is, and so its colour; 40 and above are grey.
    """
    widths = [5.4 + max(map(len, after)) for _, after in collectives.values()]
    figure, axes = plt.subplots(1, len(collectives), figsize=(9, 2.4), width_ratios=widths)
    for ax, (name, sides), width in zip(axes, collectives.items(), widths, strict=True):
        for left, label, side in zip((0, 4.2), ("before", "after"), sides, strict=True):
            ax.text(left, -0.15, label, color="#555555")
            for rank, numbers in enumerate(side):
                for i, number in enumerate(numbers):
                    _cell(ax, left + i, rank, number, COLORS[number // 10] if number < 40 else "#dddddd")
        ax.annotate("", (4, 2), (2.2, 2), arrowprops={"arrowstyle": "->", "lw": 1.5})
        ax.set(xlim=(0, width), ylim=(4, -0.8), xticks=[], yticks=[])
        ax.set_title(name, weight="normal")
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)
    axes[0].set_yticks([rank + 0.45 for rank in range(4)], [f"rank {rank}" for rank in range(4)])
    axes[0].tick_params(length=0)
    figure.suptitle(title, x=0.01, ha="left", weight="bold", size=11)
    return figure


RING_COLORS = ("#e3e9f0", "#a9bbd0", "#6283a8", COLORS[0])  # a sum of one to four ranks' numbers


def ring_strip(states: Sequence, title: str) -> Figure:
    """Whose numbers are in each rank's chunks after each step: `states[step][rank][chunk]` is a set of four ranks."""
    figure, axes = plt.subplots(2, 4, figsize=(9, 4.7))
    for ax in axes.flat:
        ax.set(xlim=(-0.05, 4), ylim=(4, -0.05), xticks=[], yticks=[], aspect="equal")
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
    for step, (ax, state) in enumerate(zip(axes.flat, states, strict=False)):
        for rank, chunks in enumerate(state):
            for chunk, ranks in enumerate(chunks):
                _cell(ax, chunk, rank, "".join(map(str, sorted(ranks))), RING_COLORS[len(ranks) - 1], size=9)
        ax.set_title(f"step {step}" if step else "start", weight="normal", size=10)
        if step % 4 == 0:
            ax.set_yticks([rank + 0.45 for rank in range(4)], [f"rank {rank}" for rank in range(4)], size=9)
    axes[1, 3].text(0, 2.4, "Side by side: four chunks.\n\nA cell names the ranks\nwhose numbers it adds.", size=9)
    figure.suptitle(title, x=0.01, ha="left", weight="bold", size=11)
    return figure


def ring_animation(states: Sequence, moves: Sequence[Sequence[int]]) -> FuncAnimation:
    """The states of `ring_strip` as an animation; `moves[step][rank]` is the chunk that `rank` sends to its right."""
    corners = ((0.0, 0.0), (7.0, 0.0), (7.0, 3.2), (0.0, 3.2))
    figure = plt.figure(figsize=(5.2, 2.6), dpi=88, label="Four ranks in a ring: in each step each sends a chunk on")
    figure.set_layout_engine("none")
    ax = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    frames = [(0, 0.0)] + [(step, part) for step in range(len(moves)) for part in (0.3, 0.7, 1.0)]

    def draw(frame: tuple[int, float]) -> None:
        step, part = frame
        ax.clear()
        ax.set(xlim=(-0.1, 11.1), ylim=(4.3, -0.7))
        ax.axis("off")
        state = states[step + (part == 1)]
        for rank, (x, y) in enumerate(corners):
            ax.text(x, y - 0.15, f"rank {rank}", size=9)
            to = corners[(rank + 1) % 4]
            start, end = np.add((x, y), (2, 0.45)), np.add(to, (2, 0.45))
            gap = (end - start) * (0.37 if y == to[1] else 0.34)
            ax.annotate("", end - gap, start + gap, arrowprops={"arrowstyle": "->", "color": "#999999", "lw": 1.5})
            for chunk, ranks in enumerate(state[rank]):
                _cell(ax, x + chunk, y, "".join(map(str, sorted(ranks))), RING_COLORS[len(ranks) - 1], size=9)
        for rank, (x, y) in enumerate(corners if 0 < part < 1 else ()):
            chunk, ranks = moves[step][rank], state[rank][moves[step][rank]]
            x, y = np.add((x + chunk, y), np.subtract(corners[(rank + 1) % 4], (x, y)) * part)
            text, color = "".join(map(str, sorted(ranks))), RING_COLORS[len(ranks) - 1]
            _cell(ax, x, y, text, color, size=9, edgecolor=COLORS[1], lw=2, zorder=3)
        what = "add what arrives" if step < len(moves) / 2 else "keep what arrives"
        words = f"step {step + 1} of {len(moves)}:\n{what}" if part else "start"
        ax.text(5.5, 2.05, words, ha="center", va="center", size=9, weight="bold")

    animation = FuncAnimation(figure, draw, frames=frames, interval=500, init_func=lambda: draw(frames[0]))
    plt.close(figure)  # or the notebook shows it as well
    return animation


def lanes(
    spans: Mapping[str, Sequence[tuple[str, float, float]]], colors: Sequence[str], title: str, xlabel: str
) -> Figure:
    """What runs side by side: for each lane some (label, start, end). A label stands where there is room for it."""
    figure, ax = plt.subplots(figsize=(9, 0.9 + 0.4 * len(spans)))
    last = max(end for lane in spans.values() for *_, end in lane)
    for y, (lane, color) in enumerate(zip(spans.values(), colors, strict=True)):
        for label, start, end in lane:
            ax.barh(y, end - start, left=start, height=0.7, color=color, edgecolor="white")
            if end - start > 0.011 * last * len(label):
                ax.text((start + end) / 2, y, label, ha="center", va="center", size=8, color="white")
    ax.set(title=title, xlabel=xlabel, xlim=(0, last * 1.01), yticks=range(len(spans)), yticklabels=list(spans))
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    return figure
