"""Records returned by the annotation readers: training pairs, queries, images, retrieval tasks.

Field meanings: Yang et al., "Beyond Walking: A Large-Scale Image-Text Benchmark for Text-based
Person Anomaly Search", arXiv 2411.17776.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Relevance = Literal["image_id", "same_caption"]


@dataclass(frozen=True, slots=True)
class TrainPair:
    """Training pair; ``image`` is relative to the data root, ``hard_i`` to ``train/`` in it."""

    image: str
    caption: str
    image_id: str
    hard_i: str | None = None
    hard_c: str | None = None
    hard_i_id: str | None = None
    source_id: str | None = None
    source_caption: str | None = None
    normal: str | None = None
    anomaly: str | None = None
    scene: str | None = None

    @property
    def action(self) -> str | None:
        """Text of ``normal`` or ``anomaly``; None if the line has neither field."""
        return self.normal if self.normal is not None else self.anomaly

    @property
    def is_normal(self) -> bool | None:
        """True if the line has ``normal``; None if it has neither ``normal`` nor ``anomaly``."""
        return is_normal(self.normal, self.anomaly)

    @property
    def source_video(self) -> str | None:
        """Source video from ``source_id``; None if absent. See :func:`video_of`."""
        return None if self.source_id is None else video_of(self.source_id)

    @property
    def captioned_image(self) -> tuple[str, str] | None:
        """``(X, image)`` if ``image_id`` is ``X#n``, the n-th caption of image X; else None.

        Validation joins the captions of an image by :func:`image_keys`.
        """
        if "#" not in self.image_id:
            return None
        base, _, number = self.image_id.rpartition("#")
        return (base, self.image) if base and number.isdecimal() else None


def image_keys(pairs: Sequence[TrainPair]) -> list[tuple[str, str] | None]:
    """Return a key per pair, equal for captions of one image: ``(X, image)`` for ``X#n``.

    The key is None for other ids. It is also None if several images have the same X, such as the
    frames ``clip#1`` and ``clip#2``, or if X is the ``image_id`` of another pair.
    """
    keys = [pair.captioned_image for pair in pairs]
    taken = {pair.image_id for pair in pairs}
    images: dict[str, str] = {}
    for base, image in filter(None, keys):
        if images.setdefault(base, image) != image:
            taken.add(base)
    return [None if key is None or key[0] in taken else key for key in keys]


@dataclass(frozen=True, slots=True)
class Query:
    """Query caption. ``image_id`` is None if the right image is unknown."""

    query_id: str
    caption: str
    image_id: str | None = None
    action: str | None = None
    is_normal: bool | None = None


@dataclass(frozen=True, slots=True)
class GalleryImage:
    """Gallery image, with id and file."""

    gallery_id: str
    path: Path


@dataclass(frozen=True)
class Retrieval:
    """Queries, gallery and labels of one annotation file.

    Attributes:
        queries: in file order; all captions of an image follow its first one. Ids are unique.
        gallery: sorted by id; None for name-masked queries (their gallery is an image folder).
        relevant: query id -> ids of the right images; None without labels.
        twins: query id -> id of the right image's twin; only twins in the gallery whose captions
            differ from the query's.
        relevance: rule of ``relevant``: the query's own ``image_id`` (as published), or every image
            with the same caption.
        images: labelled images, in file order; empty for name-masked queries.
    """

    queries: list[Query]
    gallery: list[GalleryImage] | None
    relevant: dict[str, frozenset[str]] | None
    twins: dict[str, str]
    relevance: Relevance = "image_id"
    images: Sequence[LabelledImage] = ()


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """Image with its captions and labels; paths as in :class:`TrainPair`."""

    image: str
    image_id: str
    captions: tuple[str, ...]
    twin_id: str | None = None
    action: str | None = None
    is_normal: bool | None = None
    hard_i: str | None = None
    hard_c: str | None = None


def video_of(source_id: str) -> str:
    """Return x for a ``source_id`` ``x_y`` with a number y, otherwise the whole ``source_id``.

    ``17`` and ``17_0`` therefore share a video, so that possibly related pairs stay on the same
    side of a split.
    """
    video, _, number = source_id.rpartition("_")
    return video if video and number.isdecimal() else source_id


def is_normal(normal: str | None, anomaly: str | None) -> bool | None:
    """Return true if the action is normal, false if abnormal; None if both fields are None."""
    if normal is not None:
        return True
    return None if anomaly is None else False
