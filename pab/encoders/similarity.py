"""Similarities of captions and a gallery with CLIP and with BLIP-2, for scoring and validation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from pab.annotations import GalleryImage, Query
from pab.encoders.captions import CaptionIds
from pab.encoders.compute import Compute
from pab.encoders.pooling import Pooling, pooled_similarity
from pab.images import ImageTransform
from pab.wordpiece import Tokenizer

CAPTION_IDS = 64  # ids a caption of the processor's 50 words may have: what a batch makes room for

if TYPE_CHECKING:  # one model's library need not be there, or loaded, for the other
    from pab.encoders.blip2 import ImageTextModel
    from pab.encoders.clip import ClipEncoder


def clip_scores(
    clip: ClipEncoder, queries: Sequence[Query], gallery: Sequence[GalleryImage], compute: Compute
) -> Tensor:
    """Cosine similarities float32 [queries, gallery]."""
    ids = clip.tokenize([query.caption for query in queries])
    images = compute.images(clip.encode_image, gallery, clip.transform)
    texts = compute.captions(
        lambda positions: clip.encode_text(ids[positions].to(compute.device)),
        [row[:length].tolist() for row, length in zip(ids, clip.lengths(ids), strict=True)],
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
        pooling: see :func:`pab.encoders.pooling.pooled_similarity`.

    Raises:
        InputError: a vocabulary that does not know the captions' words.
    """
    encode_ids = CaptionIds(tokenizer)
    rows = [encode_ids(query.caption) for query in queries]
    tokenizer.check_known(rows)
    found = compute.images(
        lambda pixels: model.encode_queries(pixels).flatten(1), gallery, transform
    )

    def encode(positions: list[int]) -> Tensor:
        ids, mask = tokenizer.pad_rows([rows[i] for i in positions])
        return model.encode_text(ids.to(compute.device), mask.to(compute.device))

    texts = compute.captions(encode, rows, longest=CAPTION_IDS)
    return pooled_similarity(found.view(len(found), -1, texts.shape[1]), texts, pooling)
