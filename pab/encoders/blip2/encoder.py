"""BLIP-2 as an encoder, for scoring and validation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from pab.data.images import ImageTransform
from pab.data.wordpiece import Tokenizer
from pab.encoders.blip2.model import ImageTextModel
from pab.encoders.captions import CaptionIds
from pab.encoders.pooling import Pooling, similarity_of_rows
from pab.scoring.encoder import as_captions
from pab.scoring.encoding import BatchEncoder

CAPTION_IDS = 64  # expected maximum number of ids in 50 words; sets the batch size


@dataclass(frozen=True)
class Blip2Encoder(BatchEncoder):
    """BLIP-2 as an encoder.

    The K query vectors of an image, each of width E, are concatenated into one row [K * E].

    Attributes:
        model: the model, on the device of ``compute``.
        tokenizer: BERT's tokenizer.
        transform: preprocessing of the model.
        pooling: see :func:`pab.encoders.pooling.pooled_similarity`.
    """

    model: ImageTextModel
    tokenizer: Tokenizer
    transform: ImageTransform
    pooling: Pooling

    def image_encoder(self) -> tuple[Callable[[Tensor], Tensor], ImageTransform]:
        """See :class:`BatchEncoder`; each image has K unit vectors, in one row [K * E]."""
        return lambda pixels: self.model.encode_queries(pixels).flatten(1), self.transform

    def encode_texts(self, captions: Sequence[str]) -> Tensor:
        """Encode Q captions to unit vectors, float32 [Q, E] on the CPU.

        Raises:
            InputError: there is no caption, or the vocabulary lacks too many of the words.
        """
        encode_ids = CaptionIds(self.tokenizer)
        rows = [encode_ids(caption) for caption in as_captions(captions)]
        self.tokenizer.check_known(rows)

        def encode(positions: list[int]) -> Tensor:
            padded = self.tokenizer.pad_rows([rows[i] for i in positions])
            ids, mask = (part.to(self.compute.device, non_blocking=True) for part in padded)
            return self.model.encode_text(ids, mask)

        return self.compute.captions(encode, rows, longest=CAPTION_IDS)

    def similarity(self, texts: Tensor, images: Tensor) -> Tensor:
        """Compute pooled cosine similarities of Q captions and G images, float32 [Q, G]."""
        return similarity_of_rows(texts, images, pooling=self.pooling)
