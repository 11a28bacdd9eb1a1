"""Device and number format of an encoder, and batched encoding with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pab.core.devices import DTYPES
from pab.data.images import ImageReader, ImageRecipe, ImageTransform
from pab.scoring.encoder import AnyImage
from pab.scoring.encoding import caption_vectors, image_vectors
from pab.scoring.feature_cache import FeatureCache, made_by


@dataclass(frozen=True)
class Compute:
    """Device, number format and batching of a model.

    Attributes:
        device: device of the model.
        dtype: number format of matrix products.
        weights: number format of the model's weights.
        batch_size: images (or captions) per batch.
        num_workers: loader processes.
        cache_dir: folder of all feature caches; None disables caching.
        cache: feature cache of the model, see :meth:`with_cache`.
    """

    device: torch.device
    dtype: torch.dtype
    weights: torch.dtype
    batch_size: int
    num_workers: int
    cache_dir: str | None = None
    cache: FeatureCache | None = None

    @property
    def dtype_name(self) -> str:
        """Name of the number format: ``fp32``, ``bf16`` or ``fp16``."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)

    def fingerprint(self, **facts: object) -> dict[str, str]:
        """Facts that a model's vectors depend on: the given ones, device and number format.

        GPU and CPU vectors differ in rounding.
        """
        known = {name: str(fact) for name, fact in facts.items()}
        return {**known, "device": self.device.type, "dtype": self.dtype_name}

    def with_cache(self, fingerprint: Mapping[str, str]) -> Compute:
        """Open the feature cache of a model, unless :attr:`cache_dir` is None.

        Raises:
            InputError: the folder cannot be made.
        """
        if self.cache_dir is None:
            return self
        return replace(self, cache=FeatureCache(self.cache_dir, {**fingerprint, **made_by()}))

    def images(
        self,
        encode: Callable[[Tensor], Tensor],
        images: Sequence[AnyImage],
        transform: ImageRecipe | ImageTransform,
        reader: ImageReader | None = None,
        *,
        full_batches: bool = False,
    ) -> Tensor:
        """Encode images (:func:`pab.scoring.encoding.image_vectors`)."""
        return image_vectors(
            encode, images, transform, batch_size=self.batch_size, num_workers=self.num_workers,
            device=self.device, dtype=self.dtype, weights=self.weights,
            full_batches=full_batches, cache=self.cache, reader=reader,
        )  # fmt: skip

    def captions(
        self,
        encode: Callable[[list[int]], Tensor],
        rows: Sequence[Sequence[int | str]],
        longest: int,
    ) -> Tensor:
        """Encode captions (:func:`pab.scoring.encoding.caption_vectors`).

        Args:
            longest: maximum ids per caption; a batch holds :attr:`batch_size` such captions.
        """
        return caption_vectors(
            encode, rows, token_budget=self.batch_size * longest, device=self.device,
            dtype=self.dtype, cache=self.cache,
        )  # fmt: skip
