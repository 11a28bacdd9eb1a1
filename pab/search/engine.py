"""Rank photographs for each query with a loaded encoder.

Only photographs that are not in the feature cache are decoded and encoded. A file that cannot be
decoded is skipped, and the problem is recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pab.data.photos import photo_reader
from pab.data.records import GalleryImage
from pab.ranking import top_k as best_columns
from pab.scoring.encoder import Encoder
from pab.scoring.job import check_finite


@dataclass(frozen=True)
class Hit:
    """Photograph with its rank for a query, from 1, and its score."""

    name: str
    path: Path
    rank: int
    score: float


@dataclass(frozen=True)
class Answers:
    """Result of a search."""

    indexed: int  # number of ranked photographs
    unreadable: dict[str, str]  # name of each unreadable photograph -> problem
    hits: list[list[Hit]]  # best photographs per query, in the order of the queries


def search(
    encoder: Encoder, photos: Sequence[GalleryImage], queries: Sequence[str], top_k: int
) -> Answers:
    """Rank photographs for each query; ties go to the smaller name.

    Args:
        encoder: encoder of the member.
        photos: photographs, sorted by name.
        queries: descriptions.
        top_k: photographs per query.

    Raises:
        InputError: a score is not finite, or the encoder rejects an input.
    """
    if not photos:
        return Answers(0, {}, [[] for _ in queries])
    reader = photo_reader()
    assert reader.unreadable is not None
    texts = encoder.encode_texts(queries)  # first, so that bad queries fail early
    images = encoder.encode_images(photos, reader=reader)
    kept = [i for i, photo in enumerate(photos) if photo.gallery_id not in reader.unreadable]
    unreadable = {name: error.problem for name, error in sorted(reader.unreadable.items())}
    if not kept:
        return Answers(0, unreadable, [[] for _ in queries])
    if len(kept) < len(photos):
        images = images[kept]  # a copy, which memory-mapped vectors should not need
    scores = encoder.similarity(texts, images)  # [queries, photographs]
    check_finite(scores, encoder.origin.checkpoint, queries)
    columns = best_columns(scores, top_k)
    values = scores.gather(1, columns)
    hits = [
        [
            Hit(photos[kept[column]].gallery_id, photos[kept[column]].path, rank, value)
            for rank, (column, value) in enumerate(zip(*row, strict=True), start=1)
        ]
        for row in zip(columns.tolist(), values.tolist(), strict=True)
    ]
    return Answers(len(kept), unreadable, hits)
