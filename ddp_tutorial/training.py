"""The loop of one epoch, in plain PyTorch: it knows nothing of ranks."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import nll_loss


def train_one_epoch(
    model: nn.Module, loader: Iterable, optimizer: torch.optim.Optimizer, device: torch.device
) -> Tensor:
    """One pass over `loader`, a step of `optimizer` for each batch.

    Returns (n_steps, 2) float64 on `device`, a row for each step: the summed loss (nats) of its samples, before the
    step, and their number. Sums, unlike means, can be added up: over steps, and over ranks.
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
    """One pass over `loader` without training.

    Returns (3,) float64 on `device`: the summed loss (nats), the numbers of correct predictions and of samples.
    """
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for x, y in loader:
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        log_p = model(x)
        sums[0] += nll_loss(log_p.double(), y, reduction="sum")
        sums[1] += (log_p.argmax(dim=1) == y).sum()
        sums[2] += len(y)
    return sums
