"""Where the time of a training step goes.

Every program takes the same few hundred steps of SimpleModel with SGD, on batches that are in memory, and the programs
take turns: parts of the step, `train_one_epoch`, two variants of it, and the same training in plain NumPy with the
gradient as a formula, which is what all others are compared with, round by round.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import nll_loss

from benchmarks.peers import MOMENTUM
from benchmarks.plan import Plan
from benchmarks.report import Row, Spread, column
from ddp_tutorial.model import ScaleInputs, SimpleModel
from ddp_tutorial.show.timing import seconds, take_turns
from ddp_tutorial.training import train_one_epoch

N_FEATURES, N_CLASSES, BATCH_SIZE, LR = 20, 4, 128, 0.1
BY_HAND = "by hand in NumPy, no autograd"

Batches = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class StepRow(Row):
    """What one step takes, one way."""

    step: str
    microseconds: float = column("us")
    times_by_hand: Spread = column("times by hand")


def rows(plan: Plan) -> list[StepRow]:
    """A training step on one process, 20 features, batches of 128, beside the same gradients written by hand."""
    n_steps = 100 if plan.quick else 300
    batches = [(torch.randn(BATCH_SIZE, N_FEATURES), torch.randint(N_CLASSES, (BATCH_SIZE,))) for _ in range(n_steps)]
    programs = {
        BY_HAND: epoch_by_hand(batches),
        **parts_of_a_step(batches),
        "train_one_epoch (ours)": epoch_of_ours(batches),
        "ours, with SGD(fused=True)": epoch_of_ours(batches, fused=True),
        "ours, not standardized": epoch_of_ours(batches, standardize=False),
    }
    timers = {name: lambda epoch=epoch: seconds(epoch) / n_steps for name, epoch in programs.items()}
    times = plan.measure("steps", take_turns, timers, 5 if plan.quick else 21)
    return [
        StepRow(
            step=name,
            microseconds=round(1e6 * statistics.median(values), 1),
            times_by_hand=Spread.of_ratios(values, times[BY_HAND]),
        )
        for name, values in times.items()
    ]


def new_training(standardize: bool = True, fused: bool = False) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and its optimizer."""
    scale = [ScaleInputs(torch.zeros(N_FEATURES), torch.ones(N_FEATURES))] if standardize else []
    model = nn.Sequential(*scale, SimpleModel(N_FEATURES, N_CLASSES))
    return model, torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, fused=fused)


def epoch_of_ours(batches: Batches, **options: bool) -> Callable[[], None]:
    """All steps by the scripts' own function; `options` are those of `new_training`."""
    model, optimizer = new_training(**options)
    return lambda: train_one_epoch(model, batches, optimizer, torch.device("cpu"))


def parts_of_a_step(batches: Batches) -> dict[str, Callable[[], None]]:
    """All steps, as far as their forward pass, their backward pass, and with the gradients cleared by the optimizer."""
    model, optimizer = new_training()

    def forward() -> None:
        for x, y in batches:
            nll_loss(model(x), y)

    def forward_and_backward() -> None:
        for x, y in batches:
            for parameter in model.parameters():
                parameter.grad = None
            nll_loss(model(x), y).backward()

    def forward_zero_grad_and_backward() -> None:
        for x, y in batches:
            optimizer.zero_grad()
            nll_loss(model(x), y).backward()

    return {
        "forward": forward,
        "forward, backward": forward_and_backward,
        "forward, zero_grad, backward": forward_zero_grad_and_backward,
    }


def epoch_by_hand(batches: Batches) -> Callable[[], None]:
    """All steps of softmax regression in NumPy: the gradient of the loss by the logits is (softmax - one-hot) / B."""
    arrays = [(x.numpy(), y.numpy()) for x, y in batches]
    shapes = ((N_FEATURES, N_CLASSES), (N_CLASSES,))
    W, b = (np.zeros(shape, np.float32) for shape in shapes)
    W_momentum, b_momentum = (np.zeros(shape, np.float32) for shape in shapes)
    samples = np.arange(BATCH_SIZE)

    def epoch() -> None:
        for x, y in arrays:
            p = x @ W + b
            p -= p.max(axis=1, keepdims=True)
            np.exp(p, out=p)
            p /= p.sum(axis=1, keepdims=True)
            p[samples, y] -= 1
            p /= BATCH_SIZE
            for weights, momentum, gradient in ((W, W_momentum, x.T @ p), (b, b_momentum, p.sum(axis=0))):
                momentum *= MOMENTUM
                momentum += gradient
                weights -= LR * momentum

    return epoch
