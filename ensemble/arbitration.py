"""Margin arbitration of duplicate first places (HFUT-LMC, WWW 2025; Protocol-Aware Assignment).

Among queries that share a first image, the one with the largest margin keeps it. The others take
the next image of their rankings if their margin is smaller by more than tau.

Shape letters: `Q` queries, `K` places of the rankings.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

PASSES = 10
_DIGITS = 9  # differences of margins are rounded, so that a gap of exactly tau is not above it


def arbitrate(
    columns: Tensor,
    margins: Sequence[float],
    query_ids: Sequence[str],
    tau: float,
    passes: int = PASSES,
) -> Tensor:
    """Return the image that is to be first for each query, int64 [Q].

    Each query points at a place of its ranking, first at place 0. In every pass, of the queries
    that point at one image, the one with the largest margin keeps it (of equal margins, the larger
    query id). Each other one whose margin is smaller by more than ``tau`` then points one place
    further down, unless its ranking ends. All moves of a pass happen together. Margins stay as they
    are.

    Args:
        columns: rankings, best first, int64 [Q, K]; no query moves beyond place K - 1.
        margins: of the queries [Q].
        query_ids: of the rows.
        tau: in the unit of the margins.
        passes: at most; the arbitration ends earlier if nobody moves.
    """
    last = columns.shape[1] - 1
    rankings = columns.tolist()
    places = [0] * len(rankings)
    for _ in range(passes):
        claims: dict[int, list[int]] = defaultdict(list)
        for row, ranking in enumerate(rankings):
            claims[ranking[places[row]]].append(row)
        moves = []
        for rows in claims.values():
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
