"""Reciprocal rank fusion with exact sums, so that ties do not depend on the order of the members.

An image that stands at place r of a member's ranking (from 1) gets 1 / (k + r) from it (Cormack,
Clarke and Buettcher, SIGIR 2009). Equal scores of a member share the mean of their places, so
places are whole or half numbers, and every part of a sum is 2 / n for a whole number n.

The sums are first taken as whole numbers of 62 bits. Sums that lie within rounding of each other
are then compared as fractions.

Shape letters: `M` members, `q` rows of a block, `C` images of a row.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

MOST_RANK_K = 1_000_000  # far above it, 64 bits would not tell neighbouring places apart
_LARGEST = 1 << 62  # so that the sums, of parts of at most half of it, fit 64 bits


def halves(places: Tensor, k: int) -> Tensor:
    """Return the whole numbers n for which 2 / n is what a member gives its images.

    Args:
        places: from 0 for the best, whole or half numbers, float32 [q, C].
        k: the constant of the rule.

    Returns:
        int64 [q, C], at least 2.
    """
    return (2.0 * places).long() + 2 * (k + 1)


def exact_scores(parts: Tensor) -> Tensor:
    """Return scores that rank each row exactly as the sums of its fractions do.

    Args:
        parts: n of each part 2 / n, int64 [M, q, C]; 0 where a member gives nothing.

    Returns:
        float32 [q, C], the sums within a few float32 steps. Equal sums have equal scores, and
        unequal ones have scores in their order, also where float32 would not tell them apart.
    """
    # Sums of whole numbers do not depend on the order of the members, as sums of floats do.
    unit = _LARGEST // len(parts)
    sums = torch.where(parts > 0, unit // parts.clamp_min(1), 0).sum(dim=0)  # [q, C]
    order = torch.from_numpy(np.argsort(-sums.numpy(), axis=1))  # many times faster than torch's
    values = sums.gather(1, order)
    gaps = values[:, :-1] - values[:, 1:]
    falls = torch.ones_like(values, dtype=torch.bool)  # [q, C], whether a new value begins
    falls[:, 1:] = gaps > 0
    doubtful = (gaps <= len(parts)) & (values[:, 1:] > 0)  # each part was cut by less than 1
    for row in doubtful.any(dim=1).nonzero()[:, 0].tolist():
        _settle(parts[:, row], order[row], falls[row], doubtful[row])
    in_order = (sums.gather(1, order).double() * (2.0 / unit)).float()
    return torch.empty_like(in_order).scatter_(1, order, _falling(in_order, falls))


def _settle(parts: Tensor, order: Tensor, falls: Tensor, doubtful: Tensor) -> None:
    """Put runs of sums that lie within rounding of each other into their exact order, in place.

    Args:
        parts: of one row, int64 [M, C].
        order: columns by falling sum [C]; mended.
        falls: whether the sum is smaller than the one before [C]; mended.
        doubtful: whether the sum after this one lies within rounding of it [C - 1].
    """
    linked = np.flatnonzero(doubtful.numpy())
    breaks = np.flatnonzero(np.diff(linked) > 1) + 1
    for run in np.split(linked, breaks):
        start, stop = int(run[0]), int(run[-1]) + 2
        columns = order[start:stop].tolist()
        exact = {
            column: sum(Fraction(2, part) for part in parts[:, column].tolist() if part)
            for column in columns
        }
        columns.sort(key=lambda column: -exact[column])
        order[start:stop] = torch.tensor(columns)
        for place in range(start + 1, stop):
            before, after = columns[place - start - 1], columns[place - start]
            falls[place] = exact[after] != exact[before]


def _falling(values: Tensor, falls: Tensor) -> Tensor:
    """Raise float32 values as little as needed, so that they fall where they should and only there.

    Args:
        values: not negative, nearly falling along a row [q, C].
        falls: whether a value has to be below the one before it [q, C]; else it is equal to it.
    """
    numbers = torch.arange(values.shape[1]).expand_as(falls)
    begins = torch.where(falls, numbers, 0).cummax(dim=1).values
    # The bits of floats that are not negative, read as whole numbers, keep their order.
    bits = values.view(torch.int32).long().gather(1, begins)
    level = falls.long().cumsum(dim=1)
    raised = (bits + level).flip(1).cummax(dim=1).values.flip(1) - level
    return raised.int().view(torch.float32)
