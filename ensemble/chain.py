"""Stages from the fused matrix to the ranking: reranking, then decodings in order.

Every stage returns a score matrix with the ranking of that stage. A saved matrix, its metrics and
the written list therefore always agree.

Shape letters: `Q` queries, `G` gallery images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ensemble.decode import CONVERGED, LOGARITHMS, DecodeSettings, decode, sinkhorn_errors
from ensemble.rerank_prior import Evidence, Reranking
from pab.core.notices import notice


@dataclass(frozen=True)
class Stage:
    """Ranking after one stage.

    Attributes:
        name: name of the stage in tables.
        scores: float32 [Q, G]; they rank as the stage does.
        facts: settings and measurements of the stage, for ``meta``.
    """

    name: str
    scores: Tensor
    facts: dict[str, Any]


def stages(
    fused: Tensor,
    query_ids: Sequence[str],
    gallery_ids: Sequence[str],
    reranking: Reranking | None,
    decodings: Sequence[DecodeSettings],
) -> Iterator[Stage]:
    """Yield the fused matrix, then the result of every stage; each stage uses the previous one.

    Margins and utilities come from the reranker. Without one, they come from the scores before the
    first ``margin`` or ``assignment``, because these stages change only top-1 images.

    Args:
        fused: [Q, G].
        query_ids: ids of the rows.
        gallery_ids: ids of the columns, sorted.
        reranking: the reranker; None for none.
        decodings: decodings in order of application.

    Raises:
        InputError: see :func:`ensemble.decode.decode`.
    """
    yield Stage("fused", fused, {})
    scores, evidence = fused, None
    if reranking is not None:
        scores, evidence = reranking.reorder(scores)
        yield Stage(f"reranked by {reranking.name}", scores, {})
    for settings in decodings:
        if settings.method in LOGARITHMS:
            scores, facts = decoded(scores, query_ids, gallery_ids, settings)
            evidence = evidence if reranking is not None else None
        else:
            before = scores
            scores, facts = decoded(scores, query_ids, gallery_ids, settings, evidence)
            evidence = evidence or Evidence(before)
        yield Stage(settings.method, scores, facts)


def decoded(
    scores: Tensor,
    query_ids: Sequence[str],
    gallery_ids: Sequence[str],
    settings: DecodeSettings,
    evidence: Evidence | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Return :func:`ensemble.decode.decode` and its facts; report if sinkhorn did not converge."""
    found = decode(scores, query_ids, gallery_ids, settings, evidence)
    facts = settings.facts()
    if settings.method == "sinkhorn":
        row, column = sinkhorn_errors(found)
        facts |= {"row_error": row, "column_error": column}
        if max(row, column) > CONVERGED:
            notice(
                "--decode sinkhorn",
                f"has not converged after {settings.steps} steps at factor {settings.factor:g}: "
                f"the plan's sums are off by up to {row:.2g} in rows and {column:.2g} in columns; "
                "raise --sinkhorn_steps or lower --decode_factor",
            )
    return found, facts
