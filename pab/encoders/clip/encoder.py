"""CLIP as an encoder, for scoring and validation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from pab.data.images import ImageTransform
from pab.encoders.clip.model import ClipModel
from pab.scoring.encoder import as_captions
from pab.scoring.encoding import BatchEncoder


@dataclass(frozen=True)
class ClipEncoder(BatchEncoder):
    """OpenCLIP model as an encoder.

    Attributes:
        clip: the model, on the device of ``compute``.
    """

    clip: ClipModel

    def image_encoder(self) -> tuple[Callable[[Tensor], Tensor], ImageTransform]:
        """See :class:`BatchEncoder`; the vectors have unit length."""
        return self.clip.encode_image, self.clip.transform

    def encode_texts(self, captions: Sequence[str]) -> Tensor:
        """Encode Q captions to unit vectors of width D, float32 [Q, D] on the CPU."""
        ids = self.clip.tokenize(as_captions(captions))
        lengths = self.clip.lengths(ids)
        return self.compute.captions(
            lambda positions: self.clip.encode_text(ids[positions]),
            [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)],
            longest=ids.shape[1],
        )
