"""The stages between the fused matrix and the ranking: reranking, then decodings in their order.

Every stage gives a score matrix that ranks as the stage does, so a saved matrix, its metrics and
the written list always agree.

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
    """The ranking after one stage.

    Attributes:
        name: as a table shows it.
        scores: float32 [Q, G]; they rank as the stage does.
        facts: its settings and what was measured, for ``meta``.
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
    """Yield the fused matrix, then the result of every stage, each made from the one before.

    Margins and utilities are those of the reranker. Without one, they come from the scores before
    the first ``margin`` or ``assignment``, for these change first places only.

    Args:
        fused: [Q, G].
        query_ids: of the rows.
        gallery_ids: of the columns, sorted.
        reranking: None for no reranker.
        decodings: in the order in which they are applied.

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
    """Return :func:`ensemble.decode.decode` and its facts; say if sinkhorn has not converged."""
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
