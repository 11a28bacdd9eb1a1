"""CLIP as an encoder, for scoring and validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from pab.data.images import ImageReader
from pab.encoders.clip.model import ClipModel
from pab.scoring.encoder import UNKNOWN, AnyImage, Origin, as_captions, cosine
from pab.scoring.encoding import Compute


@dataclass(frozen=True)
class ClipEncoder:
    """OpenCLIP model as an encoder (:class:`pab.scoring.encoder.Encoder`).

    Attributes:
        clip: the model, on the device of ``compute``.
        compute: device, dtype and batch size.
        origin, fingerprint: see the interface.
    """

    clip: ClipModel
    compute: Compute
    origin: Origin = UNKNOWN
    fingerprint: Mapping[str, str] = field(default_factory=dict)
    similarity = staticmethod(cosine)

    def encode_images(
        self, images: Sequence[AnyImage], *, reader: ImageReader | None = None
    ) -> Tensor:
        """Encode G images to unit vectors of width D, float32 [G, D] on the CPU."""
        return self.compute.images(self.clip.encode_image, images, self.clip.transform, reader)

    def encode_texts(self, captions: Sequence[str]) -> Tensor:
        """Encode Q captions to unit vectors, float32 [Q, D] on the CPU."""
        ids = self.clip.tokenize(as_captions(captions))
        lengths = self.clip.lengths(ids)
        return self.compute.captions(
            lambda positions: self.clip.encode_text(ids[positions].to(self.compute.device)),
            [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)],
            longest=ids.shape[1],
        )
