"""Ways to bring members' scores onto one scale before they are added.

Each works on a block of rows, so that matrices larger than memory can be fused; only `minmax`, the
published one, needs a fact about the whole matrix, its bounds.

Shape letters: `q` rows of a block, `G` gallery images.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pab.errors import InputError

Scaling = Literal["minmax", "minmax_query", "zscore", "rank"]


def scaled_block(
    block: Tensor, scaling: Scaling, bounds: tuple[float, float], where: str
) -> Tensor:
    """A block of a member's rows on the common scale, float32 [q, G].

    Args:
        block: scores [q, G].
        scaling: ``minmax`` by the whole matrix's bounds (published), ``minmax_query`` by each row's
            own, ``zscore`` by each row's mean and standard deviation, ``rank`` from 1 for the first
            place down to 0 for the last; equal scores share the mean of their places.
        bounds: least and largest score of the whole matrix.
        where: the member's file, for the error.

    Raises:
        InputError: what the scale is taken from is constant: it ranks nothing.
    """
    if scaling == "minmax":
        low, high = bounds
        if low == high:
            raise InputError(where, f"all its scores are {low:g}: they rank nothing")
        return (block - low).div_(high - low)
    if scaling == "rank":
        return 1.0 - mean_places(block) / max(1, block.shape[1] - 1)
    if scaling == "minmax_query":
        low_high = torch.aminmax(block, dim=1, keepdim=True)
        shift, spread = low_high.min, low_high.max - low_high.min
    else:
        spread, shift = torch.std_mean(block, dim=1, correction=0, keepdim=True)
    if bool((spread == 0).any()):
        raise InputError(
            where, f"a query's scores are all equal: --scaling {scaling} cannot scale them",
            todo="take --scaling minmax, as published",
        )  # fmt: skip
    return (block - shift) / spread


def mean_places(block: Tensor) -> Tensor:
    """Each score's place in its row, 0 for the best; equal scores share the mean of theirs.

    Else images that a member does not tell apart would be told apart by their names.

    Args:
        block: scores [q, G].

    Returns:
        float32 [q, G].
    """
    values, order = block.sort(dim=1, descending=True)
    count = block.shape[1]
    numbers = torch.arange(count).expand_as(order)
    begins = torch.ones_like(values, dtype=torch.bool)
    begins[:, 1:] = values[:, 1:] != values[:, :-1]
    first = torch.where(begins, numbers, 0).cummax(dim=1).values
    ends = torch.ones_like(begins)
    ends[:, :-1] = begins[:, 1:]
    last = torch.where(ends, numbers, count).flip(1).cummin(dim=1).values.flip(1)
    return torch.empty_like(block).scatter_(1, order, (first + last).float() / 2)
