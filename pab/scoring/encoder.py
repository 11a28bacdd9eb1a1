"""The verbs of a model that embeds images and captions separately."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pab.data.annotations import GalleryImage
from pab.data.images import ImageReader


class EncodeImages(Protocol):
    """Images -> vectors float32 [G, D] on the CPU, in the order of the images."""

    def __call__(
        self, images: Sequence[GalleryImage], /, *, reader: ImageReader | None = None
    ) -> Tensor: ...


class EncodeTexts(Protocol):
    """Captions -> unit vectors float32 [Q, D] on the CPU, in their order."""

    def __call__(self, captions: Sequence[str], /) -> Tensor: ...


class Similarity(Protocol):
    """Vectors of captions and of images -> scores float32 [Q, G]."""

    def __call__(self, texts: Tensor, images: Tensor, /) -> Tensor: ...


def cosine(texts: Tensor, images: Tensor) -> Tensor:
    """Cosine similarities [Q, G] of unit vectors [Q, D] and [G, D]."""
    return texts @ images.T


@dataclass(frozen=True)
class Encoder:
    """The verbs of a loaded model; vectors are cached where its settings say so.

    Attributes:
        encode_images: see :class:`EncodeImages`. A model with several vectors per image puts their
            values side by side in one row.
        encode_texts: see :class:`EncodeTexts`.
        similarity: see :class:`Similarity`.
    """

    encode_images: EncodeImages
    encode_texts: EncodeTexts
    similarity: Similarity = cosine

    def scores(self, captions: Sequence[str], gallery: Sequence[GalleryImage]) -> Tensor:
        """Scores float32 [Q, G]; captions are encoded first, so that their faults end it early."""
        texts = self.encode_texts(captions)
        return self.similarity(texts, self.encode_images(gallery))


@dataclass(frozen=True)
class OpenEncoder:
    """An encoder with its origin; what ``open_encoder(config)`` of a member's module gives.

    Attributes:
        encoder: the verbs.
        architecture: name of the architecture.
        checkpoint: where the weights came from.
        checkpoint_sha256: their hash; empty where they are no single file.
        dtype: number format of the model.
    """

    encoder: Encoder
    architecture: str
    checkpoint: str
    checkpoint_sha256: str
    dtype: str
