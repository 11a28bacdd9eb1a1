"""Pictures of a report: ranked images with their marks, and one thumbnail per image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pab.data.images import load_image
from pab.data.records import GalleryImage, Retrieval
from pab.data.thumbnails import data_url
from pab.ranking import top_k
from pab.scores import ScoreFile

LARGE_PX, SMALL_PX = 192, 128  # longer side of thumbnails in ranked lists: of the main one, others
QUALITY = 60  # WebP; the report of the mini test set then stays below 3 MB


@dataclass(frozen=True)
class Picture:
    """Gallery image at its place in a query's ranking."""

    name: str  # id of the image
    rank: int  # from 1
    score: float  # in this ranking
    mark: str  # right, twin or empty
    number: int  # index of its thumbnail in :attr:`Album.thumbnails`


class Album:
    """Create the pictures of a page; several pictures of an image share one thumbnail."""

    def __init__(self, gallery: Sequence[GalleryImage], retrieval: Retrieval) -> None:
        self._paths = {image.gallery_id: image.path for image in gallery}
        self._relevant = retrieval.relevant or {}
        self._twins = retrieval.twins
        self._numbers: dict[str, int] = {}
        self.thumbnails: list[str] = []  # data URLs

    def ranked(
        self, scores: ScoreFile, row: int, ranks: Sequence[int], side: int = LARGE_PX
    ) -> list[Picture]:
        """Return the pictures at some ranks of a query.

        Args:
            scores: the ranking.
            row: row of the query.
            ranks: from 1 to the size of the gallery.
            side: longer side in pixels of thumbnails that do not exist yet.

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
