"""Evaluate fused matrices for trial weights, and search for the best weights with two methods.

Shape letters: `Q` queries, `G` gallery images.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ensemble.fuse import Fusion, blend, kept_weights, shares_from_weights
from ensemble.listed import listed_by_any, ranked_file
from pab.core.errors import InputError
from pab.core.files import write_text
from pab.core.notices import notice
from pab.core.progress import Progress, progress
from pab.metrics import Metrics, evaluate_scores, paired_bootstrap

MOST_SIMPLEX_TRIALS = 20_000
GRID_TOLERANCE = 1e-9
DIGITS = ".9g"  # of weights in a config


@dataclass(frozen=True)
class Judge:
    """Evaluator of fused matrices on labelled queries."""

    query_ids: list[str]  # of the rows
    gallery_ids: list[str]  # of the columns
    relevant: Mapping[str, frozenset[str]]  # query id -> ids of the right images
    where: str  # file of the first member, for errors
    counted: NDArray[np.bool_] | None = None  # queries used for choices [Q]; None uses all

    def __call__(self, scores: Tensor, listed: Tensor | None) -> Metrics:
        """Compute the metrics of every query.

        Args:
            scores: [Q, G].
            listed: listed images, bool [Q, G]; None if all are listed.
        """
        file = ranked_file(scores, self.query_ids, self.gallery_ids, listed)
        return evaluate_scores(file, self.relevant, where=self.where)

    def key(self, metrics: Metrics) -> tuple[float, float]:
        """Return the selection key: R@1, then mAP as the tie-breaker."""
        mean = metrics.mean(self.counted)
        return mean["R@1"], mean["mAP"]

    def figures(self, metrics: Metrics) -> str:
        """Format R@1 and mAP of the counted queries."""
        first, second = self.key(metrics)
        return f"R@1 {first:.2f}, mAP {second:.2f}"

    def difference(self, before: Metrics, after: Metrics, seed: int) -> str:
        """Format the gain in R@1, in percentage points, with its paired bootstrap interval."""
        return f"in R@1 {paired_bootstrap(before.values['R@1'], after.values['R@1'], seed)}"


@dataclass(frozen=True)
class Trial:
    """One trial: the added member, the weight kept by the running sum, and metrics in percent.

    Trials of the simplex and of stages have no weight. Their ``member`` lists all shares, or names
    the stage and its parameters.
    """

    member: str
    weight: float | None
    metrics: dict[str, float]


@dataclass(frozen=True)
class Step:
    """Chosen step: a member, its best weight, and the metrics before and after adding it."""

    member: str
    weight: float
    before: Metrics
    after: Metrics


@dataclass(frozen=True)
class Found:
    """Result of a search."""

    shares: list[float]  # of each member in the fused sum, in member order
    scores: Tensor  # the fused matrix [Q, G]
    metrics: Metrics  # of every query
    first: tuple[str, Metrics]  # starting member and its metrics
    steps: list[Step]  # in the order of the added members; empty for the simplex
    trials: list[Trial]
    weights: list[float]  # kept by the running sum, in member order, without the first member

    def fused_again(self, fusion: Fusion, judge: Judge) -> Found:
        """Fuse and evaluate again with the weights, as `ensemble.run` does.

        Another order of summation rounds differently, so that other images may tie.

        Args:
            fusion: members of the fusion; their weights are ignored.
            judge: evaluator of the result.
        """
        pairs = zip(fusion.members, [1.0, *self.weights], strict=True)
        members = [replace(member, weight=weight) for member, weight in pairs]
        scores = replace(fusion, members=members).matrix()
        metrics = judge(scores, fusion.listed_by_any)
        steps = [*self.steps[:-1], *(replace(step, after=metrics) for step in self.steps[-1:])]
        return replace(self, scores=scores, metrics=metrics, steps=steps)

    def described(self, judge: Judge, seed: int) -> str:
        """Describe the steps or the shares."""
        name, metrics = self.first
        lines = [f"{name}: {judge.figures(metrics)}"]
        for step in self.steps:
            gain = judge.difference(step.before, step.after, seed)
            lines.append(
                f"+ {step.member}, weight {step.weight:g}: {judge.figures(step.after)}; gain {gain}"
            )
        if not self.steps and len(self.shares) > 1:
            gain = judge.difference(metrics, self.metrics, seed)
            shares = ", ".join(f"{share:.4g}" for share in self.shares)
            lines.append(f"shares {shares}: {judge.figures(self.metrics)}; gain {gain}")
        return "\n".join(lines)


def grid(step: float) -> list[float]:
    """Return the weights from 1 down to 0 at intervals of ``step``; 0 is always included."""
    count = int(round(1.0 / step, 9))
    weights = [round(1.0 - i * step, 9) for i in range(count + 1)]
    return weights if weights[-1] == 0.0 else [*weights, 0.0]


def by_steps(
    fusion: Fusion, judge: Judge, weights: Sequence[float], *, greedy: bool = False
) -> Found:
    """Choose the members' weights one after another.

    Args:
        fusion: members of the fusion; their weights are ignored.
        judge: evaluator of trials.
        weights: weights to try; earlier ones win ties of R@1 and mAP.
        greedy: start with the best member, and add the member with the largest gain next; otherwise
            use the given order.
    """
    members, scaled = fusion.members, fusion.scaled_members
    numbers = range(len(members) if greedy else 1)
    alone = [judge(scaled[number], fusion.listed_by(number)) for number in numbers]
    start = max(range(len(alone)), key=lambda n: judge.key(alone[n]))
    trials = [Trial(members[n].name, 1.0, found.mean()) for n, found in enumerate(alone)]
    fused, best = scaled[start], alone[start]
    order, kept, steps = [start], [], []
    listed = [fusion.listed_by(number) for number in range(len(members))]
    waiting = [number for number in range(len(members)) if number != start]
    rounds = len(waiting) * (len(waiting) + 1) // 2 if greedy else len(waiting)
    shown = Progress(rounds * len(weights), "trying weights", "trials")
    while waiting:
        found: tuple[tuple[float, float], int, float, Metrics] | None = None
        for number in waiting if greedy else waiting[:1]:
            for weight in weights:
                used = listed_by_any([listed[n] for n in (*order, number)])
                metrics = judge(blend(fused, scaled[number], weight), used)
                trials.append(Trial(members[number].name, weight, metrics.mean()))
                shown.update()
                key = judge.key(metrics)
                if found is None or key > found[0]:
                    found = key, number, weight, metrics
        assert found is not None
        _, number, weight, metrics = found
        steps.append(Step(members[number].name, weight, best, metrics))
        fused, best = blend(fused, scaled[number], weight), metrics
        order.append(number)
        kept.append(weight)
        waiting.remove(number)
    shown.close()
    shares = [0.0] * len(members)
    for number, share in zip(order, shares_from_weights(kept), strict=True):
        shares[number] = share
    weights = kept_weights(shares) if greedy else kept
    first = members[start].name, alone[start]
    return Found(shares, fused, best, first, steps, trials, written(weights))


@dataclass(frozen=True)
class Simplex:
    """Evaluated grid of shares; the best point can be chosen for any subset of the queries."""

    fusion: Fusion  # its members' weights are ignored
    points: list[tuple[list[float], Metrics]]  # shares, metrics; the first point is member 0 alone

    @classmethod
    def tried(cls, fusion: Fusion, judge: Judge, step: float) -> Simplex:
        """Evaluate all shares of the grid.

        Args:
            fusion: members of the fusion.
            judge: evaluator of trials.
            step: difference of neighbouring shares; 1 / step is rounded to an integer.

        Raises:
            InputError: too many trials.
        """
        count, parts = len(fusion.members), max(1, round(1.0 / step))
        if abs(parts * step - 1.0) > GRID_TOLERANCE:
            notice("--grid_step", f"{step:g} does not divide 1; the shares use steps of 1/{parts}")
        needed = math.comb(parts + count - 1, count - 1)
        if needed > MOST_SIMPLEX_TRIALS:
            raise InputError(
                "--grid_step", f"{count} members in steps of {step:g} need {needed} trials, more "
                f"than {MOST_SIMPLEX_TRIALS}",
                todo="use a larger step, such as 0.05",
            )  # fmt: skip
        points = []
        for grid_parts in progress(compositions(parts, count), "trying shares", "trials", needed):
            shares = [part / parts for part in grid_parts]
            metrics = judge(shared_sum(fusion, shares), fusion.listed_by_any)
            points.append((shares, metrics))
        return cls(fusion, points)

    def best(self, judge: Judge) -> Found:
        """Return the best point for the judge's counted queries; the first one wins ties."""
        names = [member.name for member in self.fusion.members]
        trials = []
        for shares, metrics in self.points:
            point = " ".join(f"{n}:{s:g}" for n, s in zip(names, shares, strict=True))
            trials.append(Trial(point, None, metrics.mean()))
        shares, metrics = max(self.points, key=lambda point: judge.key(point[1]))
        scores = shared_sum(self.fusion, shares)
        first, weights = (names[0], self.points[0][1]), written(kept_weights(shares))
        return Found(shares, scores, metrics, first, [], trials, weights)


def written(weights: Sequence[float]) -> list[float]:
    """Round weights to the digits that a config shows."""
    return [float(f"{weight:{DIGITS}}") for weight in weights]


def shared_sum(fusion: Fusion, shares: Sequence[float]) -> Tensor:
    """Sum the members' scaled matrices, weighted by their shares, [Q, G]."""
    scaled = fusion.scaled_members
    scores = shares[0] * scaled[0]
    for share, other in zip(shares[1:], scaled[1:], strict=True):
        if share:
            scores = scores + share * other
    return scores


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Yield all tuples of ``parts`` integers >= 0 that sum to ``total``, in descending order."""
    if parts == 1:
        yield (total,)
        return
    for first in range(total, -1, -1):
        for rest in compositions(total - first, parts - 1):
            yield (first, *rest)


def write_trials(path: str | Path, trials: Sequence[Trial]) -> None:
    """Write all trials as CSV."""
    text = io.StringIO()
    names = list(trials[0].metrics)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["member", "weight", *names])
    for trial in trials:
        figures = [f"{trial.metrics[name]:.4f}" for name in names]
        weight = "" if trial.weight is None else f"{trial.weight:g}"
        writer.writerow([trial.member, weight, *figures])
    write_text(path, text.getvalue())
