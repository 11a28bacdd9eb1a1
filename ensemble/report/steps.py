"""Select examples of the queries that each fusion step won or lost, with their images."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ensemble.report.findings import Change, change
from ensemble.report.inputs import UNLISTED, NamedScores, best_ranks
from ensemble.report.pictures import Album, Picture
from pab.data.records import Query

STEP_EXAMPLES = 3  # maximum number of examples per step, for won and for lost queries


@dataclass(frozen=True)
class Example:
    """Query won or lost by a step, with its top-1 images before and after, and its right image."""

    query: Query
    before: Picture
    after: Picture
    right: Picture | None  # None if the file after the step does not list it


@dataclass(frozen=True)
class StepShown:
    """Fusion step with examples of won and lost queries."""

    change: Change
    won: list[Example]
    lost: list[Example]


def steps_shown(
    rankings: Sequence[NamedScores],
    names: Sequence[str],
    queries: dict[str, Query],
    album: Album,
    seed: int,
) -> list[StepShown]:
    """List the changes of each step, with examples of won and lost queries."""
    ranks = dict(best_ranks(rankings))
    scores = {ranking.name: ranking.scores for ranking in rankings}

    def examples(found: Change, rows: list[int], sample: random.Random) -> list[Example]:
        before, after = scores[found.before], scores[found.after]
        shown = []
        for row in sorted(sample.sample(rows, min(len(rows), STEP_EXAMPLES))):
            (first,) = album.ranked(before, row, [1])
            rank = int(ranks[found.after][row])
            top, *right = album.ranked(after, row, [1] if rank == UNLISTED else [1, rank])
            query = queries[after.query_ids[row]]
            shown.append(Example(query, first, top, right[0] if right else None))
        return shown

    shown = []
    for before, after in pairwise(names):
        found = change((before, ranks[before]), (after, ranks[after]), seed)
        sample = random.Random(seed)
        won, lost = (examples(found, rows, sample) for rows in (found.won, found.lost))
        shown.append(StepShown(found, won, lost))
    return shown
