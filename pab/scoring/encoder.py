"""Interface of models that embed images and captions separately."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pab.data.images import ImageReader
from pab.data.records import GalleryImage


class EncodeImages(Protocol):
    """Map images to vectors, float32 [G, D] on the CPU, in the order of the images."""

    def __call__(
        self, images: Sequence[GalleryImage], /, *, reader: ImageReader | None = None
    ) -> Tensor: ...


class EncodeTexts(Protocol):
    """Map captions to unit vectors, float32 [Q, D] on the CPU, in the order of the captions."""

    def __call__(self, captions: Sequence[str], /) -> Tensor: ...


class Similarity(Protocol):
    """Map vectors of captions and images to scores, float32 [Q, G]."""

    def __call__(self, texts: Tensor, images: Tensor, /) -> Tensor: ...


def cosine(texts: Tensor, images: Tensor) -> Tensor:
    """Cosine similarities [Q, G] of unit vectors [Q, D] and [G, D]."""
    return texts @ images.T


@dataclass(frozen=True)
class Encoder:
    """Encoding and similarity functions of a loaded model, cached if its settings say so.

    Attributes:
        encode_images: see :class:`EncodeImages`. A model with several vectors per image
            concatenates them into one row.
        encode_texts: see :class:`EncodeTexts`.
        similarity: see :class:`Similarity`.
    """

    encode_images: EncodeImages
    encode_texts: EncodeTexts
    similarity: Similarity = cosine

    def scores(self, captions: Sequence[str], gallery: Sequence[GalleryImage]) -> Tensor:
        """Score captions against a gallery, float32 [Q, G]; captions go first, to fail early."""
        texts = self.encode_texts(captions)
        return self.similarity(texts, self.encode_images(gallery))


@dataclass(frozen=True)
class OpenEncoder:
    """Encoder with its origin; returned by ``open_encoder(config)`` of a member's module.

    Attributes:
        encoder: the encoding and similarity functions.
        architecture: name of the architecture.
        checkpoint: source of the weights.
        checkpoint_sha256: hash of the checkpoint; empty if the weights are not a single file.
        dtype: number format of the model.
    """

    encoder: Encoder
    architecture: str
    checkpoint: str
    checkpoint_sha256: str
    dtype: str
