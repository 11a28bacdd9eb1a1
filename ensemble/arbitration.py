"""Arbitrate duplicate top-1 images by margin (HFUT-LMC, WWW 2025; Protocol-Aware Assignment).

Among queries with the same top-1 image, the query with the largest margin keeps the image. Each
other query moves to the next image of its ranking if its margin is smaller by more than tau.

Shape letters: `Q` queries, `K` ranked images per query.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from pab.core.progress import progress

PASSES = 10
_DIGITS = 9  # margin differences are rounded, so that rounding errors do not push them above tau


def arbitrate(
    columns: Tensor,
    margins: Sequence[float],
    query_ids: Sequence[str],
    tau: float,
    passes: int = PASSES,
) -> Tensor:
    """Return each query's top-1 image after arbitration, int64 [Q].

    Each query points at a place of its ranking, initially the first. In each pass, among queries
    that point at the same image, those with the largest margin stay. Each other query moves one
    place down if its margin is smaller by more than ``tau``, unless it is at the last place. All
    moves of a pass are simultaneous, and margins never change.

    Args:
        columns: rankings, best first, int64 [Q, K]; no query moves beyond place K - 1.
        margins: margins of the queries [Q].
        query_ids: ids of the rows.
        tau: threshold, in the unit of the margins.
        passes: maximum number of passes; arbitration stops earlier if no query moves.
    """
    last = columns.shape[1] - 1
    rankings = columns.tolist()
    places = [0] * len(rankings)
    for _ in progress(range(passes), "arbitrating", "passes"):
        rows_of: dict[int, list[int]] = defaultdict(list)
        for row, ranking in enumerate(rankings):
            rows_of[ranking[places[row]]].append(row)
        moves = []
        for rows in rows_of.values():
            owner = max(rows, key=lambda row: (margins[row], query_ids[row]))
            moves += [
                row
                for row in rows
                if round(margins[owner] - margins[row], _DIGITS) > tau and places[row] < last
            ]
        if not moves:
            break
        for row in moves:
            places[row] += 1
    return columns.gather(1, torch.tensor(places)[:, None])[:, 0]
