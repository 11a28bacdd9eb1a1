"""Similarities of captions and a gallery with CLIP and BLIP-2, for scoring and validation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from pab.data.images import ImageReader, ImageTransform
from pab.data.records import GalleryImage, Query
from pab.data.wordpiece import Tokenizer
from pab.encoders.captions import CaptionIds
from pab.encoders.compute import Compute
from pab.encoders.pooling import Pooling, similarity_of_rows
from pab.scoring.encoder import Encoder

CAPTION_IDS = 64  # maximum ids of a caption with the processor's 50 words; sizes a batch

if TYPE_CHECKING:  # one model must not require or load the other model's library
    from pab.encoders.blip2.model import ImageTextModel
    from pab.encoders.clip.model import ClipEncoder


def clip_encoder(clip: ClipEncoder, compute: Compute) -> Encoder:
    """Create the encoder of a CLIP model on the device of ``compute``."""

    def images(gallery: Sequence[GalleryImage], *, reader: ImageReader | None = None) -> Tensor:
        return compute.images(clip.encode_image, gallery, clip.transform, reader)

    def texts(captions: Sequence[str]) -> Tensor:
        ids = clip.tokenize(captions)
        return compute.captions(
            lambda positions: clip.encode_text(ids[positions].to(compute.device)),
            [row[:length].tolist() for row, length in zip(ids, clip.lengths(ids), strict=True)],
            longest=ids.shape[1],
        )

    return Encoder(images, texts)


def clip_scores(
    clip: ClipEncoder, queries: Sequence[Query], gallery: Sequence[GalleryImage], compute: Compute
) -> Tensor:
    """Cosine similarities float32 [queries, gallery]."""
    return clip_encoder(clip, compute).scores([query.caption for query in queries], gallery)


def blip2_encoder(
    model: ImageTextModel,
    tokenizer: Tokenizer,
    transform: ImageTransform,
    pooling: Pooling,
    compute: Compute,
) -> Encoder:
    """Create the encoder of a BLIP-2 model on the device of ``compute``.

    Args:
        transform: preprocessing of the model.
        pooling: see :func:`pab.encoders.pooling.pooled_similarity`.

    The encoder raises :class:`InputError` if the vocabulary does not cover the captions.
    """
    encode_ids = CaptionIds(tokenizer)

    def images(gallery: Sequence[GalleryImage], *, reader: ImageReader | None = None) -> Tensor:
        return compute.images(
            lambda pixels: model.encode_queries(pixels).flatten(1), gallery, transform, reader
        )

    def texts(captions: Sequence[str]) -> Tensor:
        rows = [encode_ids(caption) for caption in captions]
        tokenizer.check_known(rows)

        def encode(positions: list[int]) -> Tensor:
            ids, mask = tokenizer.pad_rows([rows[i] for i in positions])
            return model.encode_text(ids.to(compute.device), mask.to(compute.device))

        return compute.captions(encode, rows, longest=CAPTION_IDS)

    return Encoder(images, texts, partial(similarity_of_rows, pooling=pooling))


def blip2_scores(
    model: ImageTextModel,
    tokenizer: Tokenizer,
    transform: ImageTransform,
    queries: Sequence[Query],
    gallery: Sequence[GalleryImage],
    pooling: Pooling,
    compute: Compute,
) -> Tensor:
    """Cosine similarities float32 [queries, gallery]; see :func:`blip2_encoder`."""
    encoder = blip2_encoder(model, tokenizer, transform, pooling, compute)
    return encoder.scores([query.caption for query in queries], gallery)
