"""The loop of one epoch, in plain PyTorch: it knows nothing of ranks."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import nll_loss


def train_one_epoch(
    model: nn.Module,
    loader: Iterable,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    sums: Sequence[float] = (0.0, 0.0),
) -> Tensor:
    """One pass over `loader`, a step of `optimizer` for each batch.

    Returns (2,) float64 on `device`: the summed loss (nats, each sample's before its batch's step) and the
    number of samples. Sums, unlike means, can be added over ranks. `sums` are those of the epoch's earlier
    batches, for an epoch that goes on. The number stops at the first batch whose loss is not finite.
    """
    model.train()
    losses, sizes = [], []
    for x, y in loader:
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)  # at once, where the loader pins memory
        loss = nll_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())  # its value is asked for at the end: a GPU would stop for it here
        sizes.append(len(y))
    loss_sum, n_samples = sums
    losses = torch.stack(losses).tolist() if losses else []
    for loss, size in zip(losses, sizes, strict=True):
        loss_sum += loss * size  # one after the other, so that an epoch in two parts adds as a whole one
        n_samples += size if math.isfinite(loss_sum) else 0
    return torch.tensor((loss_sum, n_samples), dtype=torch.float64, device=device)


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
