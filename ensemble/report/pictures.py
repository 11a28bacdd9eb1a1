"""Create thumbnails for a report, one per image, and mark right images and twins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pab.data.images import load_image
from pab.data.records import GalleryImage, Retrieval
from pab.data.thumbnails import data_url
from pab.ranking import top_k
from pab.scores import ScoreFile

# Longer side of thumbnails, pixels; the small side is for images that are only in collapsed lists.
LARGE_PX, SMALL_PX = 192, 128
QUALITY = 60  # WebP; the report of the mini test set then stays below 3 MB


@dataclass(frozen=True)
class Picture:
    """Gallery image at a rank of a query's ranking."""

    name: str  # id of the image
    rank: int  # from 1
    score: float  # in this ranking
    mark: str  # right, twin or empty
    number: int  # index of its thumbnail in :attr:`Album.thumbnails`


class Album:
    """Thumbnails of a page; an image that is ranked more than once has one thumbnail."""

    def __init__(self, gallery: Sequence[GalleryImage], retrieval: Retrieval) -> None:
        self._paths = {image.gallery_id: image.path for image in gallery}
        self._relevant = retrieval.relevant or {}
        self._twins = retrieval.twins
        self._numbers: dict[str, int] = {}
        self.thumbnails: list[str] = []  # data URLs

    def ranked(
        self, scores: ScoreFile, row: int, ranks: Sequence[int], side: int = LARGE_PX
    ) -> list[Picture]:
        """Return the images at the given ranks of a query, with marks; add missing thumbnails.

        Args:
            scores: score file of the ranking.
            row: row of the query.
            ranks: ranks, 1 to the size of the gallery.
            side: longer side of new thumbnails, pixels.

        Raises:
            InputError: an image is missing or unreadable.
        """
        query = scores.query_ids[row]
        columns = top_k(scores.scores[row][None], max(ranks))[0].tolist()
        pictures = []
        for rank in ranks:
            name = scores.gallery_ids[columns[rank - 1]]
            right = name in self._relevant.get(query, ())
            mark = "right" if right else "twin" if name == self._twins.get(query) else ""
            if name not in self._numbers:
                self._numbers[name] = len(self.thumbnails)
                self.thumbnails.append(
                    data_url(load_image(self._paths[name]), side, QUALITY, "webp")
                )
            score = float(scores.scores[row, columns[rank - 1]])
            pictures.append(Picture(name, rank, score, mark, self._numbers[name]))
        return pictures
