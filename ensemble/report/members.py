"""The score files of a report, with what the labels say of them."""

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
    """One score file of the report: its name, its scores, its evaluation if there are labels."""

    name: str
    scores: ScoreFile
    evaluation: Evaluation | None


def ranks_of_members(members: Sequence[Member]) -> list[tuple[str, np.ndarray]]:
    """Name and best rank of every query's right image, of the members that have labels."""
    return [
        (member.name, np.asarray(member.evaluation.metrics.best_rank))
        for member in members
        if member.evaluation is not None
    ]
