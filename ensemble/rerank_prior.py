"""Reorder the first images of each query by a reranker's scores, with a prior for the fused order.

A reranker, such as a vision-language model, judges one image and one caption at a time. It scores
only the first images of each query. These images are sorted by reranker score minus prior times
place, as in Protocol-Aware Assignment.

Shape letters: `Q` queries, `G` gallery images, `K` places.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ensemble.fuse import Fusion, row_order
from ensemble.members import RANKED_LIST, Member, scored_counts
from pab.core.counts import counted
from pab.core.errors import InputError
from pab.core.notices import notice
from pab.ranking import top_k
from pab.scores import ScoreFile, check_same_ids

_DIGITS = 9  # blended scores are rounded, so that equal decimals compare equal


@dataclass(frozen=True)
class Evidence:
    """Scores from which margins and utilities are computed."""

    scores: Tensor  # of the reranker or of an earlier stage, float32 [Q, G]
    columns: Tensor | None = None  # reordered images, int64 [Q, K]; None without reranker

    def of(self, columns: Tensor) -> Tensor:
        """Return the scores of the given columns [Q, K], float64 [Q, K]."""
        values = self.scores.gather(1, columns)
        return values.double() if self.columns is None else as_written(values)

    def margins(self) -> list[float]:
        """Return the best minus the second-best score per query; 0 if there is only one image.

        With a reranker, only reordered images count.
        """
        columns = top_k(self.scores, 2) if self.columns is None else self.columns
        values = self.of(columns)
        if values.shape[1] < 2:
            return [0.0] * len(values)
        best = values.topk(2, dim=1).values
        margins: list[float] = (best[:, 0] - best[:, 1]).tolist()
        return margins


@dataclass(frozen=True)
class Reranking:
    """Scores of a reranker, and the settings of reranking.

    The reranker scored ``listed`` images per query; all other images share one lower score.
    """

    name: str
    path: str
    scores: Tensor  # float32 [Q, G], with the rows and columns of the fused matrix
    listed: Tensor  # int64 [Q]
    depth: int  # images per query to reorder
    prior: float  # penalty per place, in the unit of the reranker's scores

    @property
    def stage(self) -> str:
        """Name of the stage in tables."""
        return f"reranked by {self.name}"

    def reorder(self, fused: Tensor, *, quiet: bool = False) -> tuple[Tensor, Evidence]:
        """Reorder the first images of each query; images beyond the depth keep their places.

        Among equal blended scores, the earlier place in the fused order wins. An image that the
        reranker did not score has a lower reranker score than all scored images of its query; a
        notice reports such images.

        Args:
            fused: [Q, G].
            quiet: omit the notice.

        Returns:
            Scores with the new order, float32 [Q, G], and the evidence for later stages.
        """
        columns = top_k(fused, self.depth)
        values = self.scores.gather(1, columns)
        if not quiet:
            self._warn_on_unscored(values)
        places = torch.arange(columns.shape[1], dtype=torch.float64)
        blended = (as_written(values) - self.prior * places).numpy().round(_DIGITS)
        order = torch.from_numpy(np.argsort(-blended, axis=1, kind="stable"))
        return reordered(fused, columns.gather(1, order)), Evidence(self.scores, columns)

    def _warn_on_unscored(self, values: Tensor) -> None:
        partly = self.listed < self.scores.shape[1]  # [Q]
        if not bool(partly.any()):
            return
        lowest = self.scores.amin(dim=1)
        unscored = (values == lowest[:, None]) & partly[:, None]
        queries = int(unscored.any(dim=1).sum())
        if queries:
            notice(
                self.path,
                "images without a score in this file are treated as the worst of their query: "
                f"{int(unscored.sum())} in {counted(queries, 'query', 'queries')}, each among the "
                f"query's first {values.shape[1]}",
            )


def reranking_of(
    reranker: Member, file: ScoreFile, fusion: Fusion, depth: int, prior: float
) -> Reranking:
    """Return the reranker's scores, aligned with the fusion, and its settings.

    Args:
        reranker: name and path.
        file: the reranker's scores, loaded with the members.
        fusion: the fusion whose first images are reordered.
        depth: images per query to reorder.
        prior: penalty per place, in the unit of the reranker's scores.

    Raises:
        InputError: a ranked list, or ids that differ from the members'.
    """
    if file.meta.get("model") == RANKED_LIST:
        raise InputError(
            reranker.path, "expected a reranker's scores, found a ranked list without scores",
            todo="pass its score file, or its JSON lines with scores",
        )  # fmt: skip
    check_same_ids(file, fusion.files[0], reranker.path, fusion.members[0].path)
    rows = row_order(file, fusion.query_ids, reranker.path)
    return Reranking(
        name=reranker.name,
        path=reranker.path,
        scores=file.scores if rows is None else file.scores[rows],
        listed=scored_counts(file, fusion.query_ids),
        depth=depth,
        prior=prior,
    )


def as_written(values: Tensor) -> Tensor:
    """Convert float32 numbers to their shortest decimal representation, as float64.

    A text file's score of 12.0768 is not exact in float32. Restoring the decimals makes differences
    of such scores exact to float64 precision.
    """
    return torch.from_numpy(values.numpy().astype(str).astype(np.float64))


def reordered(scores: Tensor, columns: Tensor) -> Tensor:
    """Return scores that rank each query's first K images in the given order, float32 [Q, G].

    The images exchange scores, so that each place keeps its score. Equal scores of neighbouring
    places are separated by one float32 step, because ids would decide a tie. Rankings whose order
    does not change keep their scores.

    Args:
        scores: [Q, G].
        columns: the first K images of the current ranking in their new order, int64 [Q, K].
    """
    count = columns.shape[1]
    before = top_k(scores, count + 1)
    values = scores.gather(1, before)
    for place in reversed(range(min(count, values.shape[1] - 1))):
        least = torch.nextafter(values[:, place + 1], torch.tensor(torch.inf))
        values[:, place] = torch.maximum(values[:, place], least)
    moved = (columns != before[:, :count]).any(dim=1)
    result = scores.clone()
    result[moved] = scores[moved].scatter(1, columns[moved], values[moved, :count])
    return result
