"""Write search results as an HTML page: each query with a grid of photographs.

The page is a single file. The thumbnails are upright, and each links to the photograph.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined

from pab.core.files import write_text
from pab.core.progress import progress
from pab.data.photos import load_photo
from pab.data.thumbnails import data_url
from pab.search.engine import Answers
from pab.search.query import Hit

THUMBNAIL_PX = 320  # longer side; the columns of the grid are about 200 CSS pixels wide
JPEG_QUALITY = 75


@dataclass(frozen=True)
class Picture:
    """Photograph in a grid: rank, hit, data URL of the thumbnail, address of the file."""

    rank: int
    hit: Hit
    source: str
    address: str


def write_page(path: str | Path, queries: Sequence[str], answers: Answers, unreadable: int) -> None:
    """Write the page of a search atomically.

    Args:
        path: file to write.
        queries: the queries, in order.
        answers: results of the search.
        unreadable: number of images that could not be read.

    Raises:
        InputError: the file cannot be written, or a photograph has become unreadable.
    """
    path = Path(path)
    thumbnails: dict[Path, str] = {}
    shown = dict.fromkeys(hit.path for hits in answers.hits for hit in hits)
    for photo in progress(shown, "making thumbnails", "images"):
        thumbnails[photo] = data_url(load_photo(photo), THUMBNAIL_PX, JPEG_QUALITY)
    sections = [
        (
            query,
            [
                Picture(rank, hit, thumbnails[hit.path], _address(hit.path, path))
                for rank, hit in enumerate(hits, start=1)
            ],
        )
        for query, hits in zip(queries, answers.hits, strict=True)
    ]
    facts = {"indexed": answers.indexed, "unreadable": unreadable}
    page = templates("pab.search").get_template("search.html.j2")
    write_text(path, page.render(title=" · ".join(queries), sections=sections, **facts))


def templates(package: str) -> Environment:
    """Load a package's templates, with autoescape; an undefined variable is an error."""
    return Environment(
        loader=PackageLoader(package), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip


def _address(photo: Path, page: Path) -> str:
    """Return the URL of a photograph, relative to the folder of the page."""
    relative = os.path.relpath(photo.absolute(), page.absolute().parent)
    return quote(os.fsencode(relative.replace(os.sep, "/")))
