"""The loop of one epoch, in plain PyTorch."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import nll_loss


def train_one_epoch(
    model: nn.Module, loader: Iterable, optimizer: torch.optim.Optimizer, device: torch.device
) -> Tensor:
    """One pass over `loader`, a step of `optimizer` for each batch x (B, F), y (B,).

    `model` maps x to log-probabilities (B, C), as `SimpleModel` does: the loss is their `nll_loss`. Returns
    (n_steps, 2) float64 on `device`, a row for each step: the summed loss (nats) of its samples, before the step, and
    their number.
    Sums, unlike means, can be added up: over steps, and over processes.
    """
    model.train()
    losses, sizes = [], []
    for x, y in loader:
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        loss = nll_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())  # its value is asked for at the end: a GPU would stop for it here
        sizes.append(len(y))
    sizes = torch.tensor(sizes, dtype=torch.float64, device=device)
    return torch.stack((torch.stack(losses) * sizes, sizes), dim=1)


@torch.no_grad()
def evaluate(model: nn.Module, loader: Iterable, device: torch.device) -> Tensor:
    """One pass over `loader` without training; `model` maps x to log-probabilities (B, C).

    Returns (3,) float64 on `device`: the summed loss (nats), the numbers of samples and of correct predictions.
    """
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for x, y in loader:
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        log_p = model(x)
        sums[0] += nll_loss(log_p.double(), y, reduction="sum")
        sums[1] += len(y)
        sums[2] += (log_p.argmax(dim=1) == y).sum()
    return sums
