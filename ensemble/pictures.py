"""Pictures of a report: images at their ranks, and their thumbnails."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from pab.annotations import GalleryImage
from pab.images import load_image

THUMBNAIL_PX = 128  # longer side
JPEG_QUALITY = 70


@dataclass(frozen=True)
class Picture:
    """One gallery image at its place in a query's ranking; ``mark`` is right, twin or empty."""

    name: str
    rank: int
    score: float
    mark: str
    source: str


class Thumbnails:
    """Gallery id -> data URL of its thumbnail, made when first asked for."""

    def __init__(self, gallery: Sequence[GalleryImage]) -> None:
        self._paths = {image.gallery_id: image.path for image in gallery}
        self._made: dict[str, str] = {}

    def __getitem__(self, gallery_id: str) -> str:
        if gallery_id not in self._made:
            image = load_image(self._paths[gallery_id])
            image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
            stream = io.BytesIO()
            image.save(stream, "JPEG", quality=JPEG_QUALITY, optimize=True)
            code = base64.b64encode(stream.getvalue()).decode("ascii")
            self._made[gallery_id] = f"data:image/jpeg;base64,{code}"
        return self._made[gallery_id]
