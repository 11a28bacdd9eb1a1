"""Fuse score files from Python: ``from pab import fuse``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ensemble.fuse import RECIPROCAL_RANK_K, aligned
from ensemble.listed import ranked_file
from ensemble.members import Member, Rule, check_members, load_members
from ensemble.run import RunConfig, meta_of
from ensemble.scaling import Scaling
from pab.api import checked
from pab.core.config import load_config
from pab.core.counts import counted
from pab.core.errors import InputError
from pab.formats.conversion import given_ids
from pab.scores import ScoreFile


def fuse(
    scores: Sequence[ScoreFile | str | Path],
    weights: Sequence[float] = (),
    *,
    fusion: Rule = "iterative",
    scaling: Scaling = "minmax",
    rank_k: int = RECIPROCAL_RANK_K,
    query_ids: Sequence[str] | None = None,
) -> ScoreFile:
    """Fuse the scores of several models, with the settings of ``python -m ensemble.run``.

    Rows and columns are aligned by id. ``iterative`` and ``sum`` then scale each matrix. The
    published ``iterative`` fusion computes ``S = w S + (1 - w) T`` for each further matrix ``T``.

    Args:
        scores: score files or their paths, in fusion order; each has ``Q`` queries and ``G``
            images. A file may have any form that ``ensemble.run`` reads, including ranked lists.
        weights: numbers from 0 to 1. ``iterative``: the weight kept by the running sum as each file
            after the first is added. ``sum``: the shares of the files, which sum to 1.
            ``reciprocal_rank``: must be empty.
        fusion: ``iterative``, ``sum``, or ``reciprocal_rank`` (the sum of ``1 / (k + rank)``).
        scaling: ``minmax`` (published), ``minmax_query``, ``zscore`` or ``rank``;
            ``reciprocal_rank`` does not use it.
        rank_k: k of ``reciprocal_rank``.
        query_ids: query ids in the order of the fused rows, and of the lines of ranked lists; None
            uses the first file's order, or line numbers if all files are ranked lists.

    Returns:
        The fused score file, float32 ``[Q, G]``; ``meta`` records files and weights.

    Raises:
        InputError: settings or weights are invalid, a file cannot be read or fused, or ids do not
            match.
    """
    settings = {"fusion": fusion, "scaling": scaling, "rank_k": rank_k}
    config = load_config(RunConfig, None, settings)
    config.check()
    if isinstance(scores, ScoreFile | str | os.PathLike):
        raise InputError("scores", "expected a list of score files, found a single one")
    count = len(scores)
    wanted = {"iterative": max(0, count - 1), "sum": count, "reciprocal_rank": 0}[fusion]
    if len(weights) != wanted:
        raise InputError(
            "weights",
            f"expected {wanted} for {counted(count, 'score file')} and {fusion} fusion, found "
            f"{len(weights)}",
        )
    own = [1.0] * (count - wanted) + [_number(weight) for weight in weights]
    lines = given_ids(query_ids, "fuse", "query_ids")
    members: list[Member] = []
    given: dict[str, ScoreFile] = {}
    for number, (one, weight) in enumerate(zip(scores, own, strict=True), start=1):
        name = f"score file {number}"
        if not isinstance(one, str | os.PathLike):
            given[name] = checked(one, name)
        members.append(Member(name, name if name in given else str(one), weight))
    check_members(members, fusion)
    files = load_members(members, lines, loaded=given, id_flags=False)
    fused = aligned(members, files, lines, scaling=scaling, rule=fusion, rank_k=rank_k)
    meta = meta_of(config, members, None, files, ())
    ids, listed = (fused.query_ids, fused.gallery_ids), fused.listed_by_any
    result = ranked_file(fused.matrix(), *ids, listed)
    return replace(result, meta={**meta, **result.meta})


def _number(weight: Any) -> float:
    """Convert a weight, perhaps a number of NumPy or torch, to a float that any reader accepts."""
    try:
        return float(weight)
    except (TypeError, ValueError) as error:
        raise InputError("weights", f"expected numbers, found {weight!r}") from error
