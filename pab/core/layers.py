"""Layers shared by several models."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """Stochastic depth: in training, drop a sample's whole branch and rescale the others."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        shape = (len(x), *(1 for _ in x.shape[1:]))
        kept = torch.empty(shape, dtype=x.dtype, device=x.device).bernoulli_(keep)
        return x * kept / keep
