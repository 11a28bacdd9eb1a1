"""Retrieval metrics with per-query values, and bootstrap intervals over queries.

All values are percentages in float64. Ranks start at 1; ties favour the smaller gallery id. A query
has a set ``R`` of right images (usually one; several if a caption fits several images), with
``n = |R|`` and ranks ``r_1 < ... < r_n``:

* ``R@K``: 100 if ``r_1 <= K``, else 0. This is the usual recall of image-text retrieval (Karpathy
  and Fei-Fei, CVPR 2015): one right image among the first K is enough.
* ``mAP``: average precision, the mean over ``j`` of ``j / r_j`` (as in Zheng et al., ICCV 2015).
* ``mAP@10``: the sum of ``j / r_j`` over the ``r_j <= 10``, divided by ``min(n, 10)``. A list of
  ten that starts with as many right images as possible scores 100 (AI City Challenge, Track 4).
* ``mINP``: ``n / r_n``, the inverse negative penalty, which measures the rank of the last right
  image (Ye et al., TPAMI 2021, "Deep learning for person re-identification").
* twin preference: 100 if the best right image ranks above the query's twin (the same person and
  scene, but abnormal instead of normal, or the reverse), else 0; defined for queries with a twin.

A right image that is missing from a list or run counts as not found: it adds nothing to mAP, and
mINP is 0 for its query. A query that is missing from a run counts as a miss in every metric, as in
ir-measures and in ``trec_eval -c``.

The value for a set of queries is the mean over the queries. Intervals are percentile bootstrap
intervals (Efron and Tibshirani, 1993): queries are resampled with replacement, and the bounds are
the 2.5th and 97.5th percentiles of the resampled means.

Shape letters: ``Q`` queries, ``G`` gallery images, ``P`` (query, right image) pairs, ``M`` metrics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pab.core.errors import InputError
from pab.core.progress import progress
from pab.ranking import ranks_of

if TYPE_CHECKING:
    from pab.formats.score_file import ScoreFile

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

RECALL_AT = (1, 5, 10)
MAP_DEPTH = 10
RESAMPLES = 10_000
_NOT_FOUND = np.iinfo(np.int64).max  # rank of a right image that is not in the list
_BLOCK_ELEMENTS = 1 << 22  # query indices drawn at a time


@dataclass(frozen=True)
class Metrics:
    """Per-query metric values.

    Attributes:
        query_ids: ``Q`` ids, in the order of the arrays.
        values: metric name -> float64 ``[Q]`` in percent.
        best_rank: int64 ``[Q]``, rank of the best right image; 0 if a list does not contain one.
    """

    query_ids: list[str]
    values: dict[str, FloatArray]
    best_rank: IntArray

    def mean(self, chosen: NDArray[np.bool_] | None = None) -> dict[str, float]:
        """Average each metric over the queries of a mask ``[Q]`` (None: all), in percent."""
        rows = slice(None) if chosen is None else chosen
        return {name: float(values[rows].mean()) for name, values in self.values.items()}

    def with_misses(self, query_ids: Sequence[str]) -> Metrics:
        """Return a copy with further queries, which score 0 in every metric."""
        more = len(query_ids)
        return Metrics(
            [*self.query_ids, *query_ids],
            {name: np.pad(values, (0, more)) for name, values in self.values.items()},
            np.pad(self.best_rank, (0, more)),
        )


def evaluate_scores(
    score_file: ScoreFile,
    relevant: Mapping[str, frozenset[str]],
    *,
    where: str | Path = "score file",
) -> Metrics:
    """Compute all metrics of a score file.

    In a form that lists only some images, an unlisted right image counts as not found.

    Args:
        score_file: scores ``[Q, G]`` with ids.
        relevant: query id -> right gallery ids.
        where: path of the score file, for messages.

    Raises:
        InputError: a query has no right image, or a right image is not in a completely scored
            gallery.
    """
    pairs = [
        (row, gallery_id)
        for row, query_id in enumerate(score_file.query_ids)
        for gallery_id in _right_images(query_id, relevant, where)
    ]
    rows = np.array([row for row, _ in pairs], dtype=np.int64)
    ranks = _ranks(score_file, pairs, where)
    found, n_right = ranks < _NOT_FOUND, np.bincount(rows, minlength=len(score_file.query_ids))
    return _metrics(score_file.query_ids, n_right, rows[found], ranks[found], complete=True)


def _ranks(score_file: ScoreFile, pairs: Sequence[tuple[int, str]], where: str | Path) -> IntArray:
    """Find the rank of each (row, gallery id) pair, ``[P]``; ``_NOT_FOUND`` if unlisted."""
    import torch

    column_of = {gallery_id: column for column, gallery_id in enumerate(score_file.gallery_ids)}
    ranks = np.full(len(pairs), _NOT_FOUND)
    known = np.array([gallery_id in column_of for _, gallery_id in pairs], dtype=bool)
    if score_file.listed is None and not known.all():
        row, gallery_id = pairs[int(np.argmin(known))]
        problem = f"expected its image {gallery_id!r} in the scored gallery, found no such id"
        todo = "use the annotation that belongs to the score file"
        item = f"query {score_file.query_ids[row]!r}"
        raise InputError(where, problem, item=item, todo=todo)
    there = [pair for pair, is_known in zip(pairs, known, strict=True) if is_known]
    rows = torch.tensor([row for row, _ in there], dtype=torch.long)
    columns = torch.tensor([column_of[gallery_id] for _, gallery_id in there], dtype=torch.long)
    places = ranks_of(score_file.scores, rows, columns)
    is_listed = places <= score_file.listed_counts()[rows]
    ranks[known] = np.where(is_listed.numpy(), places.numpy(), _NOT_FOUND)
    return ranks


def evaluate_lists(
    names: Sequence[Sequence[str]],
    query_ids: Sequence[str],
    relevant: Mapping[str, frozenset[str]],
    *,
    n_gallery: int | None = None,
    where: str | Path = "ranked list",
) -> Metrics:
    """Compute ``R@K`` and ``mAP@10`` of ranked lists; all metrics if the lists rank all images.

    Args:
        names: ``Q`` lists, best first.
        query_ids: query id of each list.
        relevant: query id -> right gallery ids.
        n_gallery: number of images in the gallery; None if unknown.
        where: path of the list, for messages.

    Raises:
        InputError: a query has no right image.
    """
    rows, ranks = [], []
    n_right = np.zeros(len(names), dtype=np.int64)
    for row, (line, query_id) in enumerate(zip(names, query_ids, strict=True)):
        right = _right_images(query_id, relevant, where)
        n_right[row] = len(right)
        for rank, name in enumerate(line, start=1):
            if name in right:
                rows.append(row)
                ranks.append(rank)
    complete = n_gallery is not None and all(len(line) >= n_gallery for line in names)
    found = (np.array(numbers, dtype=np.int64) for numbers in (rows, ranks))
    return _metrics(list(query_ids), n_right, *found, complete=complete)


def _right_images(
    query_id: str, relevant: Mapping[str, frozenset[str]], where: str | Path
) -> list[str]:
    right = relevant.get(query_id)
    if not right:
        problem = "expected a right image in the labels, found none"
        raise InputError(where, problem, item=f"query {query_id!r}")
    return sorted(right)


def _metrics(
    query_ids: list[str], n_right: IntArray, rows: IntArray, ranks: IntArray, *, complete: bool
) -> Metrics:
    """Compute metrics from the ranks of the right images that were found.

    Args:
        query_ids: ``Q`` ids.
        n_right: ``[Q]``, number of right images per query, found or not.
        rows: ``[P]``, row of the query of each right image that was found.
        ranks: ``[P]``, ranks of these images.
        complete: true to compute mAP and mINP too, which need the ranks of all right images.
    """
    n_queries = len(query_ids)
    order = np.lexsort((ranks, rows))
    rows, ranks = rows[order], ranks[order]
    first = np.searchsorted(rows, rows)  # index of the first pair of the same query
    precision: FloatArray = (np.arange(len(rows)) - first + 1) / ranks  # j / r_j

    def per_query(values: FloatArray) -> FloatArray:
        return np.bincount(rows, weights=values, minlength=n_queries).astype(np.float64)

    worst = np.zeros(n_queries, dtype=np.int64)
    np.maximum.at(worst, rows, ranks)
    best = np.full(n_queries, _NOT_FOUND)
    np.minimum.at(best, rows, ranks)

    values: dict[str, FloatArray] = {f"R@{k}": np.where(best <= k, 100.0, 0.0) for k in RECALL_AT}
    if complete:
        values["mAP"] = 100.0 * per_query(precision) / n_right
    at_ten = per_query(precision * (ranks <= MAP_DEPTH))
    values[f"mAP@{MAP_DEPTH}"] = 100.0 * at_ten / np.minimum(n_right, MAP_DEPTH)
    if complete:
        all_found = np.bincount(rows, minlength=n_queries) == n_right
        values["mINP"] = np.where(all_found, 100.0 * n_right / np.maximum(worst, 1), 0.0)
    return Metrics(query_ids, values, np.where(best == _NOT_FOUND, 0, best))


def twin_preference(
    score_file: ScoreFile,
    metrics: Metrics,
    twins: Mapping[str, str],
    *,
    where: str | Path = "score file",
) -> FloatArray:
    """Give each query with a twin 100 if its best right image ranks above the twin, else 0.

    In a form that lists only some images, an unlisted twin ranks below all listed images.

    Args:
        score_file: the scores.
        metrics: :func:`evaluate_scores` of the same scores.
        twins: query id -> gallery id of its twin; a query may lack one.
        where: path of the score file, for messages.

    Returns:
        float64 ``[Q]``: 100 or 0, NaN for a query without a twin.

    Raises:
        InputError: a twin is not in a completely scored gallery.
    """
    pairs = [
        (row, twins[query_id])
        for row, query_id in enumerate(score_file.query_ids)
        if query_id in twins
    ]
    preference = np.full(len(score_file.query_ids), np.nan)
    if pairs:
        rows = np.array([row for row, _ in pairs])
        best = metrics.best_rank[rows]
        is_above = (best > 0) & (best < _ranks(score_file, pairs, where))
        preference[rows] = 100.0 * is_above
    return preference


def bootstrap_interval(
    values: FloatArray, seed: int = 0, n: int = RESAMPLES
) -> tuple[FloatArray, FloatArray]:
    """Compute the 95 % bootstrap interval of the mean over queries.

    Args:
        values: ``[Q]`` or ``[Q, M]``; the metrics of a query are resampled together.
        seed: seed of the resampling.
        n: number of resamples.

    Returns:
        Lower and upper bound, each of shape ``[]`` or ``[M]``.
    """
    low, high = np.percentile(_resampled_means(values, seed, n), (2.5, 97.5), axis=0)
    return np.asarray(low), np.asarray(high)


@dataclass(frozen=True)
class Difference:
    """Paired difference of means in percentage points, with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def paired_bootstrap(a: FloatArray, b: FloatArray, seed: int = 0, n: int = RESAMPLES) -> Difference:
    """Compute the mean of ``b - a`` with its interval, for two arrays ``[Q]`` in the same order."""
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"expected two arrays [Q] of equal length, found {a.shape} and {b.shape}")
    low, high = bootstrap_interval(b - a, seed, n)
    return Difference(float((b - a).mean()), float(low), float(high))


def _resampled_means(values: FloatArray, seed: int, n: int) -> FloatArray:
    """Compute the means ``[n]`` or ``[n, M]`` of ``n`` resamples of ``[Q]`` or ``[Q, M]``."""
    n_queries = len(values)
    if n_queries == 0:
        raise ValueError("expected the values of at least one query, found none")
    generator = np.random.default_rng(seed)
    means = np.empty((n, *values.shape[1:]))
    block = max(1, _BLOCK_ELEMENTS // n_queries)
    for start in progress(range(0, n, block), "resampling queries", "blocks"):
        size = min(block, n - start)
        drawn = generator.integers(n_queries, size=(size, n_queries))
        # Count the draws of each query; the product of counts and values is the resampled sum.
        drawn += n_queries * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * n_queries).reshape(size, n_queries)
        means[start : start + size] = counts.astype(np.float64) @ values / n_queries
    return means
