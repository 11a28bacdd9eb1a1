"""Similarities of captions and a gallery with CLIP and with BLIP-2, for scoring and validation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pab.annotations import GalleryImage, Query
from pab.encoders.blip2 import ImageTextModel, Pooling, similarity
from pab.encoders.captions import blip_caption
from pab.encoders.clip import ClipEncoder
from pab.encoding import caption_vectors, image_vectors
from pab.images import ImageTransform
from pab.wordpiece import Tokenizer

CAPTION_IDS = 64  # ids a caption of the processor's 50 words may have: what a batch makes room for


@dataclass(frozen=True)
class Compute:
    """Where and how a model runs.

    Attributes:
        device: where it is.
        dtype: number format of matrix products.
        weights: number format of its weights.
        batch_size: images (or captions) at a time.
        num_workers: loader processes.
    """

    device: torch.device
    dtype: torch.dtype
    weights: torch.dtype
    batch_size: int
    num_workers: int

    def images(
        self,
        encode: Callable[[Tensor], Tensor],
        gallery: Sequence[GalleryImage],
        transform: ImageTransform,
    ) -> Tensor:
        """Vectors of a gallery (:func:`pab.encoding.image_vectors`)."""
        return image_vectors(
            encode, gallery, transform, batch_size=self.batch_size, num_workers=self.num_workers,
            device=self.device, dtype=self.dtype, weights=self.weights,
        )  # fmt: skip

    def captions(
        self, encode: Callable[[list[int]], Tensor], lengths: Sequence[int], longest: int
    ) -> Tensor:
        """Vectors of captions (:func:`pab.encoding.caption_vectors`)."""
        return caption_vectors(
            encode, lengths, token_budget=self.batch_size * longest, device=self.device,
            dtype=self.dtype,
        )  # fmt: skip


def clip_scores(
    clip: ClipEncoder, queries: Sequence[Query], gallery: Sequence[GalleryImage], compute: Compute
) -> Tensor:
    """Cosine similarities float32 [queries, gallery]."""
    ids = clip.tokenize([query.caption for query in queries])
    images = compute.images(clip.encode_image, gallery, clip.transform)
    texts = compute.captions(
        lambda positions: clip.encode_text(ids[positions].to(compute.device)),
        clip.lengths(ids),
        longest=ids.shape[1],
    )
    return texts @ images.T


def blip2_scores(
    model: ImageTextModel,
    tokenizer: Tokenizer,
    transform: ImageTransform,
    queries: Sequence[Query],
    gallery: Sequence[GalleryImage],
    pooling: Pooling,
    compute: Compute,
) -> Tensor:
    """Cosine similarities float32 [queries, gallery].

    Args:
        transform: the model's preprocessing.
        pooling: see :func:`pab.encoders.blip2.similarity`.

    Raises:
        InputError: a vocabulary that does not know the captions' words.
    """
    rows = [tokenizer.encode(blip_caption(query.caption)) for query in queries]
    tokenizer.check_known(rows)
    found = compute.images(
        lambda pixels: model.encode_queries(pixels).flatten(1), gallery, transform
    )

    def encode(positions: list[int]) -> Tensor:
        ids, mask = tokenizer.pad_rows([rows[i] for i in positions])
        return model.encode_text(ids.to(compute.device), mask.to(compute.device))

    texts = compute.captions(encode, [len(row) for row in rows], longest=CAPTION_IDS)
    return similarity(found.view(len(found), -1, texts.shape[1]), texts, pooling)
