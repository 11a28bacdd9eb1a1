"""Interface of models that embed images and captions separately.

Shape letters: `G` images, `Q` captions, `D` width of the vectors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from PIL import Image
from torch import Tensor

from pab.core.errors import InputError
from pab.data.images import ImageReader, ImageTransform, as_rgb
from pab.data.records import GalleryImage

EVERY_KIND = "a path, a PIL image or a tensor"
AnyImage = GalleryImage | str | Path | Image.Image | Tensor


@dataclass(frozen=True)
class Origin:
    """Source of a model's vectors or scores, as recorded in score files.

    Attributes:
        architecture: name of the architecture; empty if unknown.
        checkpoint: source of the weights; empty if unknown.
        checkpoint_sha256: hash of the checkpoint, or of the files of a model folder; empty if
            unknown.
        dtype: name of the dtype of matrix products.
        more: further entries of a score file's ``meta``.
    """

    architecture: str = ""
    checkpoint: str = ""
    checkpoint_sha256: str = ""
    dtype: str = "fp32"
    more: Mapping[str, Any] = field(default_factory=dict)


UNKNOWN = Origin()  # for a model in training


class Encoder(Protocol):
    """Model that embeds images and captions in one space.

    Subclasses inherit cosine similarity and an empty fingerprint.
    """

    @property
    def origin(self) -> Origin:
        """Source of the vectors."""

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """Facts that the vectors depend on: hash of the weights, preprocessing, dtype, device.

        The feature cache and search indexes use them to recognize the model. They may be empty if
        vectors are never stored.
        """
        return MappingProxyType({})

    def encode_images(
        self, images: Sequence[AnyImage], *, reader: ImageReader | None = None
    ) -> Tensor:
        """Encode images to vectors, [G, D] on the CPU, in the given order.

        The vectors are float32. A model with several vectors per image concatenates them into one
        row, and may return float16.

        Args:
            images: at least one path, gallery image, PIL image, or preprocessed tensor [3, H, W]
                with the model's height H and width W. Encoders of :mod:`pab.encoders.st` reject
                tensors.
            reader: decodes the files; None uses the reader of benchmark images.

        Raises:
            InputError: no image is passed, or an image cannot be read or is not supported.
        """

    def encode_texts(self, captions: Sequence[str]) -> Tensor:
        """Encode captions to vectors, float32 [Q, D] on the CPU, in the given order.

        Raises:
            InputError: no caption is passed, or the model does not accept a caption.
        """

    def similarity(self, texts: Tensor, images: Tensor) -> Tensor:
        """Compute scores, float32 [Q, G]; by default, cosine similarities of unit vectors."""
        return cosine(texts, images)


def cosine(texts: Tensor, images: Tensor) -> Tensor:
    """Compute cosine similarities [Q, G] of unit vectors [Q, D] and [G, D]."""
    return texts @ images.T


def scores_of(encoder: Encoder, captions: Sequence[str], gallery: Sequence[GalleryImage]) -> Tensor:
    """Score captions against a gallery, float32 [Q, G]; encode captions first, to fail early."""
    texts = encoder.encode_texts(captions)
    return encoder.similarity(texts, encoder.encode_images(gallery))


def as_images(
    images: Iterable[AnyImage], transform: ImageTransform | None
) -> list[GalleryImage | Image.Image | Tensor]:
    """Convert paths to gallery images, and PIL images to RGB; keep preprocessed tensors.

    Args:
        images: see :meth:`Encoder.encode_images`.
        transform: RGB image -> pixels; tensors must have the same shape as its outputs. None
            rejects tensors.

    Raises:
        InputError: no image is passed, an image has another type, or a tensor has another shape or
            is not of floating-point numbers.
    """
    if isinstance(images, (str, Path, Image.Image)):
        images = [images]
    found: list[GalleryImage | Image.Image | Tensor] = []
    shape = None
    for number, image in enumerate(images):
        if isinstance(image, (str, Path)):
            image = GalleryImage(str(image), Path(image))
        elif isinstance(image, Image.Image):
            image = as_rgb(image)
        elif isinstance(image, Tensor) and transform is not None:
            shape = shape or transform(Image.new("RGB", (8, 8))).shape
            if image.shape != shape or not image.is_floating_point():
                raise InputError(
                    "images", f"expected a preprocessed tensor {list(shape)} of floating-point "
                    f"numbers, found {image.dtype} {list(image.shape)}", item=f"position {number}",
                )  # fmt: skip
        elif not isinstance(image, GalleryImage):
            kinds = "a path or a PIL image" if transform is None else EVERY_KIND
            raise InputError(
                "images", f"expected {kinds}, found {type(image).__name__}",
                item=f"position {number}",
            )  # fmt: skip
        found.append(image)
    if not found:
        raise InputError("images", "expected at least one, found none")
    return found


def as_captions(captions: Sequence[str]) -> list[str]:
    """Convert captions to a list; a single text becomes a list of one caption.

    Raises:
        InputError: there is no caption, or one is not a text that can be encoded as UTF-8.
    """
    found = [captions] if isinstance(captions, str) else list(captions)
    if not found:
        raise InputError("captions", "expected at least one, found none")
    for number, caption in enumerate(found):
        item = f"position {number}"
        if not isinstance(caption, str):
            kind = type(caption).__name__
            raise InputError("captions", f"expected a string, found {kind}", item=item)
        try:
            caption.encode()
        except UnicodeEncodeError as error:
            problem = "expected text, found half a surrogate pair"
            raise InputError("captions", problem, item=item) from error
    return found
