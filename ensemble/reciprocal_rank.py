"""Fuse reciprocal ranks with exact sums, so that ties do not depend on the order of the members.

An image at rank r (from 1) of a member's ranking gets 1 / (k + r) (Cormack, Clarke and Buettcher,
SIGIR 2009). Images with equal scores share the mean of their ranks. Ranks are therefore integers or
half-integers, and every part of a sum is 2 / n with an integer n.

Sums are first computed in 62-bit integers. Sums that differ by no more than rounding are then
compared as fractions.

Shape letters: `M` members, `q` rows of a block, `C` images per row.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

MOST_RANK_K = 1_000_000  # for much larger values, 64 bits would not separate neighbouring ranks
_LARGEST = 1 << 62  # sums of integer parts stay below it, so they fit in 64 bits


def halves(ranks: Tensor, k: int) -> Tensor:
    """Convert ranks to the integers n of a member's parts 2 / n.

    Args:
        ranks: ranks from 0 for the best, integers or half-integers, float32 [q, C].
        k: constant of the rule.

    Returns:
        n, int64 [q, C], at least 2.
    """
    return (2.0 * ranks).long() + 2 * (k + 1)


def exact_scores(parts: Tensor) -> Tensor:
    """Return scores that rank each row exactly by the sums of its fractions.

    Args:
        parts: n of each part 2 / n, int64 [M, q, C]; 0 for no part.

    Returns:
        float32 [q, C], close to the sums. Equal sums have equal scores. Unequal sums have different
        scores, even if they round to the same float32.
    """
    # Unlike float sums, integer sums do not depend on the order of the members.
    unit = _LARGEST // len(parts)
    sums = torch.where(parts > 0, unit // parts.clamp_min(1), 0).sum(dim=0)  # [q, C]
    order = torch.from_numpy(np.argsort(-sums.numpy(), axis=1))  # much faster than torch's
    values = sums.gather(1, order)
    gaps = values[:, :-1] - values[:, 1:]
    falls = torch.ones_like(values, dtype=torch.bool)  # [q, C], true where a new value begins
    falls[:, 1:] = gaps > 0
    doubtful = (gaps <= len(parts)) & (values[:, 1:] > 0)  # truncation removed less than 1 per part
    for row in doubtful.any(dim=1).nonzero()[:, 0].tolist():
        _settle(parts[:, row], order[row], falls[row], doubtful[row])
    in_order = (sums.gather(1, order).double() * (2.0 / unit)).float()
    return torch.empty_like(in_order).scatter_(1, order, _falling(in_order, falls))


def _settle(parts: Tensor, order: Tensor, falls: Tensor, doubtful: Tensor) -> None:
    """Sort each run of sums that differ by no more than rounding, in place and by exact value.

    Args:
        parts: parts of one row, int64 [M, C].
        order: columns in descending order of sum [C]; corrected in place.
        falls: true where a sum is smaller than the previous sum [C]; corrected in place.
        doubtful: true where the next sum is within rounding error [C - 1].
    """
    linked = np.flatnonzero(doubtful.numpy())
    breaks = np.flatnonzero(np.diff(linked) > 1) + 1
    for run in np.split(linked, breaks):
        start, stop = int(run[0]), int(run[-1]) + 2
        columns = order[start:stop]
        found = list(zip(*parts[:, columns].tolist(), strict=True))  # parts of each image
        # Images that tie in every member have the same parts; each sum is computed once.
        exact = {one: sum(Fraction(2, part) for part in one if part) for one in set(found)}
        if len(exact) == 1:
            falls[start + 1 : stop] = False
            continue
        ranked = sorted(exact, key=exact.__getitem__, reverse=True)
        place_of = {ranked[0]: 0}
        for before, one in pairwise(ranked):
            place_of[one] = place_of[before] + (exact[one] != exact[before])
        places = torch.tensor([place_of[one] for one in found])
        places, sorting = places.sort(stable=True)
        order[start:stop] = columns[sorting]
        falls[start + 1 : stop] = places.diff() > 0


def _falling(values: Tensor, falls: Tensor) -> Tensor:
    """Raise float32 values minimally, so that they decrease exactly where ``falls`` is true.

    Args:
        values: not negative, nearly descending along a row [q, C].
        falls: true where a value must be below the previous value, false where both must be equal
            [q, C].
    """
    numbers = torch.arange(values.shape[1]).expand_as(falls)
    begins = torch.where(falls, numbers, 0).cummax(dim=1).values
    # The bit patterns of non-negative floats, read as integers, have the same order.
    bits = values.view(torch.int32).long().gather(1, begins)
    level = falls.long().cumsum(dim=1)
    raised = (bits + level).flip(1).cummax(dim=1).values.flip(1) - level
    return raised.int().view(torch.float32)
