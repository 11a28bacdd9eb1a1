"""Choose the parameters of reranking and decodings on labelled validation scores.

The stages are those of `ensemble.run`: a reranker, then decodings. Their parameters are chosen one
stage after another by R@1, with mAP as the tie-breaker; earlier values win remaining ties. A
reranker's depth and prior are chosen together. Every stage uses the previous stage's best ranking,
and all queries are decoded together, whichever queries count for the choice.

Shape letters: `Q` queries, `G` gallery images.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ensemble.chain import Ranking, decoded, reranked, warn_on_sinkhorn
from ensemble.decode import DecodeSettings, Decoding, sinkhorn_errors
from ensemble.rerank_prior import Reranking
from ensemble.trials import Judge, Trial
from pab.core.notices import notice
from pab.core.progress import progress
from pab.metrics import Metrics

# In the unit of fused scores, which are scaled to [0, 1].
TAUS = (0.0, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
SLACKS = (0.0, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, math.inf)  # inf: no query opts out
FACTORS = (5.0, 10.0, 20.0, 50.0, 100.0, 200.0)
# In the unit of a reranker's scores. Vision-language models score with differences of logits, for
# which Protocol-Aware Assignment uses a prior of 0.5, a tau of 0.5 and a slack of 1.
RERANKER_UNITS = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
DEPTHS = (5, 10, 20, 50)  # images per query
# Parameter that is chosen for these decodings; for all others, it is the factor.
NUMBERS: dict[Decoding, str] = {"assignment": "slack", "margin": "tau"}


def number_of(method: Decoding) -> str:
    """Return the field of :class:`DecodeSettings` that is chosen for a decoding."""
    return NUMBERS.get(method, "factor")


def usual_values(method: Decoding, *, after_reranker: bool) -> tuple[float, ...]:
    """Return the values of a decoding's parameter that are tried by default."""
    if method not in NUMBERS:
        return FACTORS
    if after_reranker:
        return RERANKER_UNITS
    return TAUS if method == "margin" else SLACKS


@dataclass(frozen=True)
class Choice:
    """Best settings of one stage."""

    stage: str  # name of the stage in tables
    settings: dict[str, Any]  # chosen parameters, as settings of `ensemble.run`
    ranking: Ranking
    metrics: Metrics
    trials: list[Trial]

    @property
    def numbers(self) -> str:
        """The chosen parameters with their values, as text."""
        return _named(self.settings)


@dataclass(frozen=True)
class Stages:
    """Stages after the fusion, and the values to try for their parameters."""

    query_ids: list[str]
    gallery_ids: list[str]
    reranking: Reranking | None  # its depth and prior are chosen
    depths: Sequence[int]
    priors: Sequence[float]
    decodings: Sequence[tuple[DecodeSettings, Sequence[float]]]  # each with values to try
    listed: Tensor | None = None  # images that a member lists, bool [Q, G]; None: all

    def __bool__(self) -> bool:
        return self.reranking is not None or bool(self.decodings)

    def choose(self, fused: Tensor, judge: Judge) -> list[Choice]:
        """Choose the parameters of every stage for the judge's counted queries.

        Args:
            fused: fused scores [Q, G].
            judge: evaluator of trials.

        Raises:
            InputError: see :func:`ensemble.decode.decode`.
        """
        choices = []
        ranking = Ranking(fused, listed=self.listed)
        if self.reranking is not None:
            choices.append(self._best(self.reranking.stage, self._reranked(ranking), judge))
            ranking = choices[-1].ranking
        for settings, values in self.decodings:
            tried = self._decoded(ranking, settings, values)
            choices.append(self._best(settings.method, tried, judge))
            ranking = choices[-1].ranking
        return choices

    def _reranked(self, ranking: Ranking) -> Iterable[tuple[dict[str, Any], Ranking]]:
        assert self.reranking is not None
        for depth, prior in itertools.product(self.depths, self.priors):
            tried = replace(self.reranking, depth=depth, prior=prior)
            numbers = {"rerank_depth": depth, "rerank_prior": prior}
            yield numbers, reranked(ranking, tried, quiet=True)

    def _decoded(
        self, ranking: Ranking, settings: DecodeSettings, values: Sequence[float]
    ) -> Iterable[tuple[dict[str, Any], Ranking]]:
        number = number_of(settings.method)
        everyone_fits = len(self.query_ids) <= len(self.gallery_ids) and settings.top is None
        for value in values:
            if math.isinf(value) and not everyone_fits:
                continue  # may be infeasible: each query would need an image of its own
            change: dict[str, Any] = {number: None if math.isinf(value) else value}
            tried = replace(settings, **change)
            found, _ = decoded(ranking, self.query_ids, self.gallery_ids, tried, quiet=True)
            yield {f"decode_{number}": change[number]}, found

    def _best(
        self, stage: str, tried: Iterable[tuple[dict[str, Any], Ranking]], judge: Judge
    ) -> Choice:
        """Return the best of the tried settings; the first one wins ties."""
        best, trials = None, []
        for settings, ranking in progress(tried, f"trying {stage}", "values"):
            metrics = judge(ranking.scores, ranking.listed)
            trials.append(Trial(f"{stage}: {_named(settings)}", None, metrics.mean()))
            key = judge.key(metrics)
            if best is None or key > best[0]:
                best = key, settings, ranking, metrics
        assert best is not None
        return Choice(stage, best[1], best[2], best[3], trials)

    def warn(self, choices: Sequence[Choice], fused: Tensor) -> None:
        """Print notices about the chosen settings.

        The notices report images without a reranker score, a sinkhorn decoding that has not
        converged, and values at the upper end of their grid.
        """
        chosen = {name: value for one in choices for name, value in one.settings.items()}
        grids: dict[str, Sequence[float]] = {
            "rerank_depth": self.depths,
            "rerank_prior": self.priors,
            **{f"decode_{number_of(one.method)}": values for one, values in self.decodings},
        }
        if self.reranking is not None:
            # Reordering prints the notice about images without a score.
            replace(self.reranking, depth=chosen["rerank_depth"]).reorder(fused)
            if chosen["rerank_depth"] >= int(self.reranking.listed.min()):
                del chosen["rerank_depth"]  # no larger depth has enough scores
        made = {choice.stage: choice.ranking.scores for choice in choices}
        for settings, _ in self.decodings:
            if settings.method == "sinkhorn":
                tried = replace(settings, factor=chosen["decode_factor"])
                warn_on_sinkhorn(tried, *sinkhorn_errors(made["sinkhorn"]))
        for name, value in chosen.items():
            if value is not None and len(grids[name]) > 1 and value == max(grids[name]):
                notice(f"--{name}", f"{value:g} is the largest value tried: try larger ones")


def _named(settings: dict[str, Any]) -> str:
    parts = (f"{name} {'inf' if v is None else format(v, 'g')}" for name, v in settings.items())
    return ", ".join(parts)
