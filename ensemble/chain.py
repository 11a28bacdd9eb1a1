"""Run the stages from the fused matrix to the ranking: reranking, then decodings in order.

Every stage returns a score matrix whose order is the stage's ranking, so the saved matrix, the
metrics and the written list always agree. `ladder_table` formats the metrics after every stage.

Shape letters: `Q` queries, `G` gallery images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from torch import Tensor

from ensemble.decode import CONVERGED, LOGARITHMS, DecodeSettings, decode, sinkhorn_errors
from ensemble.listed import listed_images, ranked_file
from ensemble.rerank_prior import Evidence, Reranking
from pab.core.counts import counted
from pab.core.notices import notice
from pab.evaluate import text_table
from pab.metrics import MAP_DEPTH, Metrics, paired_bootstrap

LADDER_METRICS = ("R@1", f"mAP@{MAP_DEPTH}")


@dataclass(frozen=True)
class Stage:
    """Result of one stage."""

    name: str  # shown in tables
    scores: Tensor  # float32 [Q, G]; their order is the stage's ranking
    facts: dict[str, Any]  # settings and measurements of the stage, for ``meta``
    listed: Tensor | None = None  # listed images, bool [Q, G]; None if all are listed


def stages(
    fused: Tensor,
    query_ids: Sequence[str],
    gallery_ids: Sequence[str],
    reranking: Reranking | None,
    decodings: Sequence[DecodeSettings],
    listed: Tensor | None = None,
) -> Iterator[Stage]:
    """Yield the fused matrix, then the result of every stage; each stage uses the previous one.

    Margins and utilities come from the reranker. Without one, they come from the scores before the
    first of consecutive ``margin`` and ``assignment`` stages. The scores after these stages are not
    used, because a new top-1 image is only one float32 step ahead.

    Args:
        fused: [Q, G].
        query_ids: ids of the rows.
        gallery_ids: ids of the columns, sorted.
        reranking: reranker's scores and settings; None skips reranking.
        decodings: decodings in order of application.
        listed: images that a member lists, bool [Q, G]; None if all are listed.

    Raises:
        InputError: see :func:`ensemble.decode.decode`.
    """
    yield Stage("fused", fused, {}, listed)
    ranking = Ranking(fused, listed=listed)
    if reranking is not None:
        ranking = reranked(ranking, reranking)
        yield Stage(reranking.stage, ranking.scores, {}, ranking.listed)
    for settings in decodings:
        ranking, facts = decoded(ranking, query_ids, gallery_ids, settings)
        yield Stage(settings.method, ranking.scores, facts, ranking.listed)


@dataclass(frozen=True)
class Ranking:
    """Scores after a stage, and the evidence of the next ``margin`` or ``assignment`` stage."""

    scores: Tensor  # float32 [Q, G]
    evidence: Evidence | None = None  # None: the scores themselves
    is_reranked: bool = False  # the evidence comes from the reranker and is kept in later stages
    listed: Tensor | None = None  # listed images, bool [Q, G]; None if all are listed


def reranked(ranking: Ranking, reranking: Reranking, *, quiet: bool = False) -> Ranking:
    """Rerank; ``quiet`` omits the notice about images without a reranker score.

    Reordered images that the reranker scored become listed.
    """
    scores, evidence = reranking.reorder(ranking.scores, quiet=quiet)
    listed, columns = ranking.listed, evidence.columns
    if listed is not None and columns is not None:
        scored = listed_images(reranking.scores, reranking.listed)
        listed = listed.scatter(1, columns, (listed | scored).gather(1, columns))
    return Ranking(scores, evidence, is_reranked=True, listed=listed)


def decoded(
    ranking: Ranking,
    query_ids: Sequence[str],
    gallery_ids: Sequence[str],
    settings: DecodeSettings,
    *,
    quiet: bool = False,
) -> tuple[Ranking, dict[str, Any]]:
    """Apply a decoding; return the ranking and facts.

    ``quiet`` omits the notice about a sinkhorn decoding that has not converged.
    """
    scores, evidence, listed = ranking.scores, ranking.evidence, ranking.listed
    scores = ranked_file(scores, query_ids, gallery_ids, listed).scores  # unlisted images are last
    found = decode(scores, query_ids, gallery_ids, settings, evidence)
    facts = settings.facts()
    if settings.method == "sinkhorn":
        row, column = sinkhorn_errors(found)
        facts |= {"row_error": row, "column_error": column}
        if not quiet:
            warn_on_sinkhorn(settings, row, column)
    if settings.method not in LOGARITHMS:
        evidence = evidence or Evidence(scores)
    elif not ranking.is_reranked:
        evidence = None
    if listed is not None and settings.method in ("margin", "assignment"):
        first = found.argmax(dim=1, keepdim=True)  # the image that the method gives the query
        listed = listed.scatter(1, first, True)
    return replace(ranking, scores=found, evidence=evidence, listed=listed), facts


def warn_on_sinkhorn(settings: DecodeSettings, row: float, column: float) -> None:
    """Print a notice if a plan with these errors (:func:`sinkhorn_errors`) has not converged."""
    if max(row, column) > CONVERGED:
        notice(
            "--decode sinkhorn",
            f"has not converged after {counted(settings.steps, 'step')} at factor "
            f"{settings.factor:g}: "
            f"the plan's sums are off by up to {row:.2g} in rows and {column:.2g} in columns; "
            "increase --sinkhorn_steps or reduce --decode_factor",
        )


def ladder_table(rungs: Sequence[tuple[str, Metrics]], seed: int = 0) -> str:
    """Format R@1 and mAP@10 after every stage as lines of text, in percent.

    Args:
        rungs: name and metrics per stage, with the same queries in the same order.
        seed: seed of the bootstrap.

    Returns:
        A header, then one line per stage. The last cell of a line is the gain in R@1 over the
        previous stage, in percentage points, with its paired 95 % bootstrap interval.
    """
    gains = ["-"]
    for (_, before), (_, after) in pairwise(rungs):
        gains.append(str(paired_bootstrap(before.values["R@1"], after.values["R@1"], seed)))
    rows = [["stage", *LADDER_METRICS, "R@1 over the previous stage"]]
    for (name, metrics), gain_cell in zip(rungs, gains, strict=True):
        means = metrics.mean()
        rows.append([name, *(f"{means[metric]:.2f}" for metric in LADDER_METRICS), gain_cell])
    return text_table(rows)
