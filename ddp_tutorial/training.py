"""The loop of one epoch, in plain PyTorch: it knows nothing of ranks."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import nll_loss


def train_one_epoch(
    model: nn.Module, loader: Iterable, optimizer: torch.optim.Optimizer, device: torch.device
) -> Tensor:
    """One pass over `loader`, a step of `optimizer` for each batch.

    Returns (2,) float64 on `device`: the summed loss (nats, each sample's before its batch's step) and the
    number of samples. Sums, unlike means, can be added over ranks.
    """
    model.train()
    loss_sum, n_samples = torch.zeros((), dtype=torch.float64, device=device), 0
    for x, y in loader:
        x, y = x.to(device), y.to(device)
        loss = nll_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss_sum += loss.detach() * len(y)
        n_samples += len(y)
    return torch.stack((loss_sum, loss_sum.new_tensor(n_samples)))


@torch.no_grad()
def evaluate(model: nn.Module, loader: Iterable, device: torch.device) -> Tensor:
    """One pass over `loader` without training.

    Returns (3,) float64 on `device`: the summed loss (nats), the number of correct predictions and the
    number of samples.
    """
    model.eval()
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    n_correct, n_samples = torch.zeros_like(loss_sum), 0
    for x, y in loader:
        x, y = x.to(device), y.to(device)
        log_p = model(x)
        loss_sum += nll_loss(log_p.double(), y, reduction="sum")
        n_correct += (log_p.argmax(dim=1) == y).sum()
        n_samples += len(y)
    return torch.stack((loss_sum, n_correct, loss_sum.new_tensor(n_samples)))
