"""Re-rank with any :class:`Reranker`: select candidates, score pairs, fill the score matrix.

Shape letters: `Q` queries, `G` gallery, `K` candidates per query.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pab.core import processes
from pab.core.errors import InputError
from pab.core.notices import notice
from pab.data.records import GalleryImage
from pab.formats.contents import Listing
from pab.formats.conversion import to_score_file
from pab.formats.forms import read_form
from pab.formats.parts import PART, PART_OF, Part
from pab.ranking import top_k
from pab.scores import (
    ScoreFile,
    align,
    respell,
    save_scores,
    warn_on_data_mismatch,
    with_all_images,
)
from pab.scoring.encoder import Origin
from pab.scoring.job import (
    ScoringConfig,
    ScoringJob,
    check_same_model,
    finish,
    prepare,
    score_file_of,
)


class Reranker(Protocol):
    """Model that scores pairs of a caption and an image."""

    @property
    def origin(self) -> Origin:
        """Source of the scores."""

    def first_scores(self, captions: Sequence[str], images: Sequence[GalleryImage]) -> Tensor:
        """Compute the similarities that select candidates if no file is given, float32 [Q, G].

        Raises:
            InputError: the model has no such similarities, or an input is invalid.
        """
        raise InputError("--candidates", "expected a score file or a ranked list, found none")

    def rerank(
        self, captions: Sequence[str], images: Sequence[GalleryImage], candidates: Tensor
    ) -> Tensor:
        """Score each query's candidates, float32 [Q, K] on the CPU; higher is better.

        Args:
            captions: Q captions.
            images: G images.
            candidates: int64 [Q, K], positions in ``images``.

        Raises:
            InputError: an image cannot be read, or a caption is invalid.
        """


def score_candidates(
    config: ScoringConfig,
    open_reranker: Callable[[], Reranker],
    *,
    candidates: str | None,
    k: int,
    save_first: str | None = None,
    part: Part | None = None,
) -> None:
    """Run a re-ranking command: check the inputs, select candidates, score them, write outputs.

    Args:
        config: settings of the run.
        open_reranker: function that loads the model; called after the inputs are checked.
        candidates: file that selects the candidates; None uses the model's first scores.
        k: candidates per query.
        save_first: score file for the model's first scores, written only without ``candidates``;
            None writes none.
        part: part of the queries to score; None scores all.

    Raises:
        InputError: data, candidates or weights are invalid, or an output cannot be written.
    """
    job = prepare(config)
    chosen = read_candidates(candidates, job, k) if candidates else None
    facts: dict[str, Any] = {"kind": "itm", "k_test": k, "candidates": candidates or "itc"}
    if part is not None:
        rows = part.rows(len(job.query_ids))
        facts |= {PART: str(part), PART_OF: len(job.query_ids)}
        job = job.with_rows(rows)
        chosen = None if chosen is None else chosen[rows.start : rows.stop]
    reranker = open_reranker()
    check_same_model(reranker.origin)
    if chosen is None:
        found = reranker.first_scores(job.captions, job.gallery)
        first = score_file_of(job, reranker.origin, found, kind="itc")
        if save_first and processes.is_main():
            save_scores(save_first, first)
        chosen = first.scores
    scores = rerank_best(reranker, job.captions, job.gallery, chosen, k)
    finish(config, job, score_file_of(job, reranker.origin, scores, **facts))


def rerank_best(
    reranker: Reranker,
    captions: Sequence[str],
    images: Sequence[GalleryImage],
    scores: Tensor,
    k: int,
    flag: str = "--k_test",
) -> Tensor:
    """Re-rank the k best images of each query; return the full score matrix, float32 [Q, G].

    Args:
        scores: [Q, G], scores that select the candidates.
        k: candidates per query.
        flag: flag that sets k, for the notice of :func:`choose_candidates`.
    """
    candidates = choose_candidates(scores, k, flag)
    return fill(reranker.rerank(captions, images, candidates), candidates, len(images))


def choose_candidates(scores: Tensor, k: int, flag: str = "--k_test") -> Tensor:
    """Select the k best images per query, int64 [Q, K]; ties go to the earlier column.

    If k exceeds the gallery size, all images are selected, with a notice. All processes use the
    selection of rank 0, because GPUs of different types round differently.

    Args:
        scores: [Q, G].
        k: candidates per query.
        flag: flag that sets k, for the notice.
    """
    gallery = scores.shape[1]
    if k > gallery:
        notice(flag, f"{k} exceeds the size of the gallery ({gallery}): all images are candidates")
    return processes.broadcast_object(top_k(scores, min(k, gallery)))


def fill(match: Tensor, candidates: Tensor, gallery: int) -> Tensor:
    """Build the full score matrix; images that are not candidates rank below all candidates.

    Args:
        match: float32 [Q, K].
        candidates: int64 [Q, K].
        gallery: G.

    Returns:
        float32 [Q, G]. Images that are not candidates get the largest float32 below the lowest
        candidate of the row, so that they never tie with a candidate.
    """
    below = torch.nextafter(match.amin(dim=1, keepdim=True), torch.tensor(-torch.inf))
    return below.expand(-1, gallery).contiguous().scatter_(1, candidates, match)


def read_candidates(path: str, job: ScoringJob, k: int) -> Tensor:
    """Read the scores that select candidates, with the job's rows and columns.

    All forms of scores and lists are accepted. The lines of a ranked list without query ids must be
    in the order of this run's ranked list.

    Args:
        path: score file or ranked list.
        job: scoring job whose queries and images the file must contain.
        k: candidates per query.

    Raises:
        InputError: the file cannot be read, its ids differ from the job's, or it lists too few
            images for a query.
    """
    found = read_form(path)
    lists = isinstance(found, Listing)
    file = to_score_file(
        found,
        path,
        query_ids=job.order if lists else None,
        gallery_ids=job.gallery_ids if lists else None,
        id_flags=False,
    )
    if processes.is_main():
        warn_on_data_mismatch({"the annotation": {"data_sha256": job.data_sha256}, path: file.meta})
    if file.listed is not None:
        few, needed = min(file.listed, key=file.listed.__getitem__), min(k, len(job.gallery_ids))
        if file.listed[few] < needed:
            raise InputError(
                path,
                f"expected at least {needed} images for every query (--k_test), found "
                f"{file.listed[few]}",
                item=f"query {few!r}",
                todo=f"use --k_test {file.listed[few]}, or a file that lists more images",
            )
        file = respell(file, job.query_ids, job.gallery_ids, where=path)
        file = with_all_images(file, job.gallery_ids)
    ids = ScoreFile(torch.empty(0, 0), job.query_ids, job.gallery_ids)
    return align(file, ids, where=path, reference_name="the annotation").scores
