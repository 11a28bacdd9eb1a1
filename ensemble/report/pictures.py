"""Pictures of a report: ranked images and their thumbnails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pab.data.images import load_image
from pab.data.records import GalleryImage
from pab.data.thumbnails import data_url

THUMBNAIL_PX = 128  # pixels of the longer side
JPEG_QUALITY = 70


@dataclass(frozen=True)
class Picture:
    """Gallery image at its place in a query's ranking; ``mark`` is right, twin or empty."""

    name: str
    rank: int
    score: float
    mark: str
    source: str


class Thumbnails:
    """Map gallery ids to data URLs of thumbnails, created on first use."""

    def __init__(self, gallery: Sequence[GalleryImage]) -> None:
        self._paths = {image.gallery_id: image.path for image in gallery}
        self._made: dict[str, str] = {}

    def __getitem__(self, gallery_id: str) -> str:
        if gallery_id not in self._made:
            image = load_image(self._paths[gallery_id])
            self._made[gallery_id] = data_url(image, THUMBNAIL_PX, JPEG_QUALITY)
        return self._made[gallery_id]
