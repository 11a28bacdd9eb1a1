"""Matrix of scores with the ids of its rows and columns: rules, checks, and saving.

Shape letters: ``Q`` queries, ``G`` gallery images.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pab.core.errors import InputError
from pab.core.progress import progress
from pab.core.tensor_files import release_pages, write_tensors
from pab.data.id_lists import check_ids

RECIPROCAL_RANKS = "reciprocal ranks"  # value of meta["scores_are"] for a form without scores
BLOCK_ELEMENTS = 1 << 22  # scores processed at a time: 16 MiB of float32 for any file size


@dataclass(frozen=True)
class ScoreFile:
    """Score matrix with the ids of its rows and columns.

    Attributes:
        scores: float32 ``[Q, G]``, finite, higher is better.
        query_ids: ``Q`` distinct ids, in row order.
        gallery_ids: ``G`` distinct ids, sorted.
        meta: metadata, such as model, checkpoint hash, dtype, data hash and project version. For a
            form that lists only some images per query, ``listed`` maps a query id to its
            number of listed images. The other images get the next float32 below the query's
            smallest listed score.
    """

    scores: Tensor
    query_ids: list[str]
    gallery_ids: list[str]
    meta: dict[str, Any] = field(default_factory=dict)
    _bounds: dict[int | None, tuple[float, float]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )  # version of the scores -> their bounds

    @property
    def bounds(self) -> tuple[float, float]:
        """Minimum and maximum score; NaN if any score is NaN. Cached until the scores change."""
        scores = self.scores.detach()
        version = None if scores.is_inference() else scores._version  # counts changes in place
        known = self._bounds.get(version)
        if known is not None:
            return known
        rows = max(1, BLOCK_ELEMENTS // scores.shape[1])
        found = [torch.aminmax(block) for block in scores.split(rows)]
        low = torch.stack([pair.min for pair in found]).min()
        high = torch.stack([pair.max for pair in found]).max()
        self._bounds.clear()
        if version is not None:
            self._bounds[version] = float(low), float(high)
        return float(low), float(high)

    @property
    def listed(self) -> dict[str, int] | None:
        """Number of listed images per query id; None if all images have their own scores."""
        return self.meta.get("listed")

    @property
    def is_order_alone(self) -> bool:
        """True if the scores are reciprocal ranks (1 / r), read from a format without scores."""
        return self.meta.get("scores_are") == RECIPROCAL_RANKS

    def listed_counts(self, query_ids: Sequence[str] | None = None) -> Tensor:
        """Count the listed images per query, int64 ``[Q]``; ``G`` if all have their own scores.

        Args:
            query_ids: order of the result; None uses the order of the rows.
        """
        listed, n_gallery = self.listed or {}, len(self.gallery_ids)
        order = self.query_ids if query_ids is None else query_ids
        return torch.tensor([listed.get(query_id, n_gallery) for query_id in order])


def save_scores(path: str | Path, score_file: ScoreFile) -> None:
    """Write a score file atomically.

    Raises:
        InputError: the content violates a rule of :class:`ScoreFile` (for instance, a score is
            NaN), or the file cannot be written.
    """
    check_scores(score_file, path)
    scores = score_file.scores.detach().cpu().contiguous()
    if scores.untyped_storage().nbytes() != scores.nbytes:
        scores = scores.clone()  # saving a slice would write all of its storage
    ids = {name: list(getattr(score_file, name)) for name in ("query_ids", "gallery_ids")}
    write_tensors(path, {"scores": scores, **ids, "meta": score_file.meta})


def float32_columns(scores: Tensor, order: list[int]) -> Tensor:
    """Reorder columns and convert to float32 ``[Q, G]``; copy only if something changes."""
    in_order = order == list(range(len(order)))
    if in_order and scores.dtype == torch.float32:
        return scores
    columns = torch.tensor(order)
    result = torch.empty(scores.shape, dtype=torch.float32)
    rows = max(1, BLOCK_ELEMENTS // scores.shape[1])
    starts = progress(range(0, scores.shape[0], rows), "sorting columns", "blocks of queries")
    for number, start in enumerate(starts, start=1):
        block = scores[start : start + rows]
        result[start : start + rows] = block if in_order else block.index_select(1, columns)
        if number % 16 == 0 and scores.is_contiguous():
            release_pages(scores)  # the pages of a mapped file need not stay in memory
    return result


def one_less(scores: Tensor) -> Tensor:
    """Return the next float32 below each score."""
    return torch.nextafter(scores, torch.tensor(-math.inf))


def check_scores(score_file: ScoreFile, where: str | Path) -> None:
    """Check a score file against the rules of :class:`ScoreFile`.

    Raises:
        InputError: a rule is violated; the message names ``where``, and the field or the score.
    """
    scores = score_file.scores
    if not isinstance(scores, Tensor):
        raise InputError(where, f"expected a tensor, found {type(scores).__name__}", item="scores")
    if scores.ndim != 2 or scores.dtype != torch.float32 or scores.layout != torch.strided:
        found = f"{scores.dtype} {list(scores.shape)}"
        problem = f"expected a float32 matrix [queries, gallery], found {found}"
        raise InputError(where, problem, item="scores")
    axes = (("query_ids", "row"), ("gallery_ids", "column"))
    for (name, axis), size in zip(axes, scores.shape, strict=True):
        ids = getattr(score_file, name)
        check_ids(where, name, ids)
        if len(ids) != size:
            problem = f"expected one id per {axis} of scores ({size}), found {len(ids)}"
            raise InputError(where, problem, item=name)
    ids = score_file.gallery_ids
    if ids != sorted(ids):
        before, after = next(pair for pair in itertools.pairwise(ids) if pair[0] > pair[1])
        problem = f"expected sorted ids, found {before!r} before {after!r}"
        raise InputError(where, problem, item="gallery_ids")
    meta = score_file.meta
    if not isinstance(meta, dict) or any(not isinstance(key, str) for key in meta):
        raise InputError(where, "expected a dict with string keys", item="meta")
    _check_listed(score_file, where)
    _check_finite(score_file, where)


def _check_listed(score_file: ScoreFile, where: str | Path) -> None:
    listed = score_file.meta.get("listed")
    if listed is None:
        return
    n_gallery = len(score_file.gallery_ids)
    fits = isinstance(listed, dict) and listed.keys() == set(score_file.query_ids)
    if not fits or any(type(n) is not int or not 1 <= n <= n_gallery for n in listed.values()):
        problem = f"expected a number of images from 1 to {n_gallery} for every query id"
        raise InputError(where, problem, item="meta, 'listed'")


def _check_finite(score_file: ScoreFile, where: str | Path) -> None:
    if all(map(math.isfinite, score_file.bounds)):
        return
    rows = max(1, BLOCK_ELEMENTS // score_file.scores.shape[1])
    for start in range(0, len(score_file.query_ids), rows):
        finite = torch.isfinite(score_file.scores[start : start + rows])
        if not finite.all():
            row, column = (~finite).nonzero()[0].tolist()
            found = score_file.scores[start + row, column].item()
            image = repr(score_file.gallery_ids[column])
            problem = f"expected finite scores, found {found} for image {image}"
            item = f"query {score_file.query_ids[start + row]!r}"
            todo = "score again; NaN usually comes from a damaged checkpoint or from fp16"
            raise InputError(where, problem, item=item, todo=todo)
