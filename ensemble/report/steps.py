"""Queries won and lost by each fusion step, with pictures."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ensemble.report.findings import Change, change
from ensemble.report.members import Member, ranks_of_members
from ensemble.report.pictures import Picture, Thumbnails
from pab.data.records import Query, Retrieval
from pab.ranking import top_k

STEP_EXAMPLES = 3  # examples shown per step, of won and of lost queries each


@dataclass(frozen=True)
class Example:
    """Query won or lost in a step: top-1 image before and after, and the right image."""

    query: Query
    before: Picture
    after: Picture
    right: Picture


@dataclass(frozen=True)
class StepShown:
    """Fusion step with examples of won and lost queries."""

    change: Change
    won: list[Example]
    lost: list[Example]


def steps_shown(
    members: Sequence[Member],
    names: Sequence[str],
    retrieval: Retrieval,
    queries: dict[str, Query],
    thumbnails: Thumbnails,
    seed: int,
) -> list[StepShown]:
    """List the changes of each step, with pictures of some queries that it won and lost."""
    ranks = dict(ranks_of_members(members))
    by_name = {member.name: member for member in members}
    ids = members[0].scores.query_ids

    def first(name: str, row: int) -> Picture:
        scores = by_name[name].scores
        column = int(top_k(scores.scores[row][None], 1)[0, 0])
        return picture(name, row, column, 1)

    def picture(name: str, row: int, column: int, rank: int) -> Picture:
        scores = by_name[name].scores
        image = scores.gallery_ids[column]
        right = (retrieval.relevant or {}).get(ids[row], frozenset())
        mark = (
            "right" if image in right else "twin" if image == retrieval.twins.get(ids[row]) else ""
        )
        return Picture(image, rank, float(scores.scores[row, column]), mark, thumbnails[image])

    def example(found: Change, row: int) -> Example:
        rank = int(ranks[found.after][row])
        after = by_name[found.after].scores
        column = int(top_k(after.scores[row][None], rank)[0, -1])
        return Example(
            queries[ids[row]], first(found.before, row), first(found.after, row),
            picture(found.after, row, column, rank),
        )  # fmt: skip

    shown = []
    for before, after in pairwise(names):
        found = change((before, ranks[before]), (after, ranks[after]), seed)
        sample = random.Random(seed)
        examples = [
            [
                example(found, row)
                for row in sorted(sample.sample(rows, min(len(rows), STEP_EXAMPLES)))
            ]
            for rows in (found.won, found.lost)
        ]
        shown.append(StepShown(found, *examples))
    return shown
