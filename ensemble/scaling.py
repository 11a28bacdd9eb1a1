"""Scale members' scores before they are added.

All methods work on a block of rows, so that matrices larger than memory can be fused. Only the
published `minmax` depends on the whole matrix, through its bounds.

Shape letters: `q` rows of a block, `G` gallery images.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pab.core.errors import InputError

Scaling = Literal["minmax", "minmax_query", "zscore", "rank"]

_FIRST = 16  # scores per row to compare first; a row is compared completely if these are equal


def scaled_block(
    block: Tensor, scaling: Scaling, bounds: tuple[float, float], where: str
) -> Tensor:
    """Scale a block of a member's rows, float32 [q, G].

    Args:
        block: scores [q, G].
        scaling: ``minmax`` uses the bounds of the whole matrix (published), ``minmax_query`` the
            bounds of each row, ``zscore`` the mean and standard deviation of each row. ``rank``
            maps the first place to 1 and the last to 0; equal scores share the mean of their
            places. The result for a row of equal scores (:func:`flat_rows`) has no meaning; the
            fusion replaces it with 0.
        bounds: minimum and maximum of the whole matrix.
        where: file of the member, for error messages.

    Raises:
        InputError: ``minmax`` of a constant matrix of several images, or scores whose range exceeds
            float32 (except with ``rank``).
    """
    low, high = bounds
    if scaling != "rank" and high - low > torch.finfo().max:
        raise InputError(
            where,
            f"the range of its scores, {low:g} to {high:g}, overflows float32 with "
            f"--scaling {scaling}",
            todo="divide them by a constant, or fuse with --scaling rank",
        )
    if scaling == "minmax":
        if low == high and block.shape[1] == 1:
            return torch.zeros_like(block)  # one image per query: there is only one ranking
        if low == high:
            raise InputError(where, f"all scores are {low:g}: there is no ranking")
        return (block - low).div_(high - low)
    if scaling == "rank":
        return 1.0 - mean_places(block) / max(1, block.shape[1] - 1)
    if scaling == "minmax_query":
        low_high = torch.aminmax(block, dim=1, keepdim=True)
        shift, spread = low_high.min, low_high.max - low_high.min
    else:
        spread, shift = torch.std_mean(block, dim=1, correction=0, keepdim=True)
    return (block - shift) / torch.where(spread == 0, 1.0, spread)


def flat_rows(scores: Tensor) -> Tensor:
    """Mark rows in which all images have the same score; such rows have no ranking.

    Args:
        scores: [q, G]. A row is read completely only if its first scores are equal.

    Returns:
        bool [q]; false for a gallery of one image, which needs no ranking.
    """
    flat = (scores[:, :_FIRST] == scores[:, :1]).all(dim=1)
    if scores.shape[1] == 1:
        return torch.zeros_like(flat)
    for row in flat.nonzero()[:, 0].tolist():
        flat[row] = bool((scores[row] == scores[row, 0]).all())
    return flat


def mean_places(block: Tensor) -> Tensor:
    """Return each score's place in its row, 0 for the best; equal scores share their mean place.

    Without the mean, image names would decide between equal scores.

    Args:
        block: scores [q, G].

    Returns:
        float32 [q, G].
    """
    order = torch.from_numpy(np.argsort(-block.numpy(), axis=1))  # much faster than torch's
    values = block.gather(1, order)
    count = block.shape[1]
    numbers = torch.arange(count).expand_as(order)
    begins = torch.ones_like(values, dtype=torch.bool)
    begins[:, 1:] = values[:, 1:] != values[:, :-1]
    first = torch.where(begins, numbers, 0).cummax(dim=1).values
    ends = torch.ones_like(begins)
    ends[:, :-1] = begins[:, 1:]
    last = torch.where(ends, numbers, count).flip(1).cummin(dim=1).values.flip(1)
    return torch.empty_like(block).scatter_(1, order, (first + last).float() / 2)
