"""Device and number format of an encoder, and batched encoding with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pab.data.images import ImageReader, ImageTransform
from pab.data.records import GalleryImage
from pab.scoring.encoding import caption_vectors, image_vectors
from pab.scoring.feature_cache import FeatureCache


@dataclass(frozen=True)
class Compute:
    """Device, number format and batching of a model.

    Attributes:
        device: device of the model.
        dtype: number format of matrix products.
        weights: number format of the model's weights.
        batch_size: images (or captions) per batch.
        num_workers: loader processes.
        cache: feature cache, if enabled.
    """

    device: torch.device
    dtype: torch.dtype
    weights: torch.dtype
    batch_size: int
    num_workers: int
    cache: FeatureCache | None = None

    def images(
        self,
        encode: Callable[[Tensor], Tensor],
        gallery: Sequence[GalleryImage],
        transform: ImageTransform,
        reader: ImageReader | None = None,
    ) -> Tensor:
        """Encode a gallery (:func:`pab.scoring.encoding.image_vectors`)."""
        return image_vectors(
            encode, gallery, transform, batch_size=self.batch_size, num_workers=self.num_workers,
            device=self.device, dtype=self.dtype, weights=self.weights,
            cache=self.cache, reader=reader,
        )  # fmt: skip

    def captions(
        self,
        encode: Callable[[list[int]], Tensor],
        rows: Sequence[Sequence[int | str]],
        longest: int,
    ) -> Tensor:
        """Encode captions (:func:`pab.scoring.encoding.caption_vectors`)."""
        return caption_vectors(
            encode, rows, token_budget=self.batch_size * longest, device=self.device,
            dtype=self.dtype, cache=self.cache,
        )  # fmt: skip
