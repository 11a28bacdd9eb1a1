"""Where and how an encoder runs, and its vectors of a gallery and of captions there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pab.data.annotations import GalleryImage
from pab.data.images import ImageReader, ImageTransform
from pab.scoring.encoding import caption_vectors, image_vectors
from pab.scoring.feature_cache import FeatureCache


@dataclass(frozen=True)
class Compute:
    """Where and how a model runs.

    Attributes:
        device: where it is.
        dtype: number format of matrix products.
        weights: number format of its weights.
        batch_size: images (or captions) at a time.
        num_workers: loader processes.
        cache: of the vectors, where they are kept.
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
        """Vectors of a gallery (:func:`pab.scoring.encoding.image_vectors`)."""
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
        """Vectors of captions (:func:`pab.scoring.encoding.caption_vectors`)."""
        return caption_vectors(
            encode, rows, token_budget=self.batch_size * longest, device=self.device,
            dtype=self.dtype, cache=self.cache,
        )  # fmt: skip
