"""The model of the tutorial."""

import torch
from torch import Tensor, nn


class SimpleModel(nn.Module):
    """One linear layer followed by a softmax, kept in log space."""

    def __init__(self, n_features: int, n_classes: int):
        super().__init__()
        self.linear = nn.Linear(n_features, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Log-probabilities (B, C) of features x (B, F) float32."""
        return self.linear(x).log_softmax(dim=1)


class ScaleInputs(nn.Module):
    """Brings raw features to one scale: x -> (x - mean) / (std * sqrt(F)). Nothing in it is trained.

    `mean` and `std` (F,) are those of the training set. They are buffers, so a saved model holds them
    and takes raw arrays.

    Afterwards a sample's mean squared length is at most 1, so no curvature of the mean negative
    log-likelihood of a linear layer and a softmax exceeds 1/2, whatever the data, and steps of one size
    are stable for all files (the bound: Boehning, "Multinomial logistic regression algorithm", 1992).
    """

    def __init__(self, mean: Tensor, std: Tensor):
        super().__init__()
        # A feature that varies by less than float32 can tell apart is only centred; its rounding errors stay small.
        rounding = torch.finfo(torch.float32).eps * mean.abs()
        spread = torch.where(std > rounding, std, rounding.clamp(min=1))
        self.register_buffer("mean", mean.float())
        self.register_buffer("scale", (spread * len(std) ** 0.5).float())

    def forward(self, x: Tensor) -> Tensor:
        """Raw features x (B, F) float32 to standardized ones of the same shape."""
        return (x - self.mean) / self.scale
