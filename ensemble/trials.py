"""Trying weights: a judge of fused matrices, and the two ways through the space of weights.

Shape letters: `Q` queries, `G` gallery images, `M` members.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ensemble.fuse import Fusion, blend, shares_of
from pab.core.errors import InputError
from pab.core.files import write_text
from pab.core.notices import notice
from pab.metrics import Difference, Metrics, evaluate_scores, paired_bootstrap
from pab.scores import ScoreFile

MOST_SIMPLEX_TRIALS = 20_000
GRID_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Judge:
    """Judges fused matrices by labelled queries.

    Attributes:
        query_ids, gallery_ids: of rows and columns.
        relevant: query id -> ids of the right images.
        counted: the queries that choices are made by [Q]; None is all.
    """

    query_ids: list[str]
    gallery_ids: list[str]
    relevant: Mapping[str, frozenset[str]]
    counted: NDArray[np.bool_] | None = None

    def counting(self, queries: NDArray[np.bool_]) -> Judge:
        """The same judge, choosing by some queries."""
        return replace(self, counted=queries)

    def __call__(self, scores: Tensor) -> Metrics:
        """Metrics of a matrix [Q, G], of every query."""
        return evaluate_scores(ScoreFile(scores, self.query_ids, self.gallery_ids), self.relevant)

    def key(self, metrics: Metrics) -> tuple[float, float]:
        """Selection key: R@1, with mAP as the tie-breaker."""
        mean = metrics.mean(self.counted)
        return mean["R@1"], mean["mAP"]

    def figures(self, metrics: Metrics) -> str:
        """Both in words."""
        first, second = self.key(metrics)
        return f"R@1 {first:.2f}, mAP {second:.2f}"

    def difference(self, before: Metrics, after: Metrics, seed: int) -> str:
        """The gain in R@1, percentage points, with its paired bootstrap interval."""
        gain: Difference = paired_bootstrap(before.values["R@1"], after.values["R@1"], seed)
        return f"in R@1 {gain.mean:+.2f} [{gain.low:+.2f}, {gain.high:+.2f}]"


@dataclass(frozen=True)
class Trial:
    """One thing tried: the member that came in, what `S` kept, metrics in percent.

    A trial of the simplex has all shares as its member and no weight.
    """

    member: str
    weight: float | None
    metrics: dict[str, float]


@dataclass(frozen=True)
class Step:
    """Gain of a member at its best weight."""

    member: str
    weight: float
    before: Metrics
    after: Metrics


@dataclass(frozen=True)
class Found:
    """The best weights.

    Attributes:
        shares: of each member in the fused sum, in the members' own order.
        scores: the fused matrix [Q, G].
        metrics: of every query.
        first: what the steps start with: a member's name and its metrics.
        steps: in the order in which members came in; none for the simplex.
        trials: all of them.
    """

    shares: list[float]
    scores: Tensor
    metrics: Metrics
    first: tuple[str, Metrics]
    steps: list[Step] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)

    def described(self, judge: Judge, seed: int) -> str:
        """The steps, or the shares, in words."""
        name, metrics = self.first
        lines = [f"{name}: {judge.figures(metrics)}"]
        for step in self.steps:
            gain = judge.difference(step.before, step.after, seed)
            lines.append(
                f"+ {step.member}, keep {step.weight:g}: {judge.figures(step.after)}; gain {gain}"
            )
        if not self.steps:
            gain = judge.difference(metrics, self.metrics, seed)
            shares = ", ".join(f"{share:.4g}" for share in self.shares)
            lines.append(f"shares {shares}: {judge.figures(self.metrics)}; gain {gain}")
        return "\n".join(lines)


def grid(step: float) -> list[float]:
    """Weights from 1 down to 0; 0 is among them whatever the step."""
    count = int(round(1.0 / step, 9))
    weights = [round(1.0 - i * step, 9) for i in range(count + 1)]
    return weights if weights[-1] == 0.0 else [*weights, 0.0]


def by_steps(
    fusion: Fusion, judge: Judge, weights: Sequence[float], *, greedy: bool = False
) -> Found:
    """Each member's weight in turn.

    Args:
        fusion: the members; their own weights are not looked at.
        judge: of trials.
        weights: to try, in the order that breaks ties of R@1 and mAP.
        greedy: start with the best member, and let the one come in next that gives most; else the
            members come in as they are given.
    """
    members, scaled = fusion.members, fusion.scaled_members
    alone = [judge(scores) for scores in (scaled if greedy else scaled[:1])]
    start = max(range(len(alone)), key=lambda n: judge.key(alone[n]))
    trials = [Trial(members[n].name, 1.0, found.mean()) for n, found in enumerate(alone)]
    fused, best = scaled[start], alone[start]
    order, keeps, steps = [start], [], []
    waiting = [number for number in range(len(members)) if number != start]
    while waiting:
        found: tuple[tuple[float, float], int, float, Metrics] | None = None
        for number in waiting if greedy else waiting[:1]:
            for weight in weights:
                metrics = judge(blend(fused, scaled[number], weight))
                trials.append(Trial(members[number].name, weight, metrics.mean()))
                key = judge.key(metrics)
                if found is None or key > found[0]:
                    found = key, number, weight, metrics
        assert found is not None
        _, number, weight, metrics = found
        steps.append(Step(members[number].name, weight, best, metrics))
        fused, best = blend(fused, scaled[number], weight), metrics
        order.append(number)
        keeps.append(weight)
        waiting.remove(number)
    shares = [0.0] * len(members)
    for number, share in zip(order, shares_of(keeps), strict=True):
        shares[number] = share
    return Found(shares, fused, best, (members[start].name, alone[start]), steps, trials)


@dataclass(frozen=True)
class Simplex:
    """Every point of a grid on the simplex, tried once; any queries may then choose among them.

    Attributes:
        fusion: the members; their own weights are not looked at.
        points: shares and metrics of every query.
        first: metrics of the first member alone.
    """

    fusion: Fusion
    points: list[tuple[list[float], Metrics]]
    first: Metrics

    @classmethod
    def tried(cls, fusion: Fusion, judge: Judge, step: float) -> Simplex:
        """Try all shares of the grid.

        Args:
            fusion: the members.
            judge: of trials.
            step: distance of neighbouring shares; 1 / step is rounded to a whole number.

        Raises:
            InputError: more trials than anybody waits for.
        """
        count, parts = len(fusion.members), max(1, round(1.0 / step))
        if abs(parts * step - 1.0) > GRID_TOLERANCE:
            notice("--grid_step", f"{step:g} does not divide 1: shares in steps of 1/{parts}")
        needed = math.comb(parts + count - 1, count - 1)
        if needed > MOST_SIMPLEX_TRIALS:
            raise InputError(
                "--grid_step", f"{count} members in steps of {step:g} are {needed} trials",
                todo="take a larger step, such as 0.05",
            )  # fmt: skip
        points = []
        for whole in compositions(parts, count):
            shares = [part / parts for part in whole]
            points.append((shares, judge(shared_sum(fusion, shares))))
        return cls(fusion, points, points[0][1])

    def best(self, judge: Judge) -> Found:
        """The point that is best by the queries the judge counts; of equal ones the first."""
        names = [member.name for member in self.fusion.members]
        trials = [
            Trial(
                " ".join(f"{n}:{s:g}" for n, s in zip(names, shares, strict=True)), None, m.mean()
            )
            for shares, m in self.points
        ]
        shares, metrics = max(self.points, key=lambda point: judge.key(point[1]))
        scores = shared_sum(self.fusion, shares)
        return Found(shares, scores, metrics, (names[0], self.first), [], trials)


def shared_sum(fusion: Fusion, shares: Sequence[float]) -> Tensor:
    """The members' scaled matrices by their shares, [Q, G]."""
    scaled = fusion.scaled_members
    scores = shares[0] * scaled[0]
    for share, other in zip(shares[1:], scaled[1:], strict=True):
        if share:
            scores = scores + share * other
    return scores


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write a whole number as so many, the first as large as it can be first."""
    if parts == 1:
        yield (total,)
        return
    for first in range(total, -1, -1):
        for rest in compositions(total - first, parts - 1):
            yield (first, *rest)


def write_trials(path: str | Path, trials: Sequence[Trial]) -> None:
    """Every trial as CSV."""
    text = io.StringIO()
    names = list(trials[0].metrics)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["member", "weight", *names])
    for trial in trials:
        figures = [f"{trial.metrics[name]:.4f}" for name in names]
        weight = "" if trial.weight is None else f"{trial.weight:g}"
        writer.writerow([trial.member, weight, *figures])
    write_text(path, text.getvalue())
