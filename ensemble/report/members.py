"""Score files of a report, with their evaluation if there are labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pab.evaluate import Evaluation

if TYPE_CHECKING:
    from pab.scores import ScoreFile


@dataclass(frozen=True)
class Member:
    """Score file of the report: name, scores, and evaluation if there are labels."""

    name: str
    scores: ScoreFile
    evaluation: Evaluation | None


def ranks_of_members(members: Sequence[Member]) -> list[tuple[str, np.ndarray]]:
    """Name and best rank of every query's right image, for each member with labels."""
    return [
        (member.name, np.asarray(member.evaluation.metrics.best_rank))
        for member in members
        if member.evaluation is not None
    ]
