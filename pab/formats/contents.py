"""Contents of other tools' score files: a matrix, or ranked images per query.

Shape letters: ``Q`` queries, ``G`` gallery images.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pab.core.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

QUERY_ID_KEYS = ("query_ids", "query_id", "query_index", "queries", "query", "qids", "qid")
GALLERY_ID_KEYS = (
    "gallery_ids", "gallery_id", "gallery", "gallery_names", "image_ids", "images", "names",
)  # fmt: skip


@dataclass(frozen=True)
class Matrix:
    """Score matrix as stored in a file.

    Attributes:
        form: kind of file (``"a bare tensor"``).
        scores: floating point ``[Q, G]``, on disk if the form allows it.
        query_ids: ids of the rows; None if the file has none.
        gallery_ids: ids of the columns, in any order; None if the file has none.
        meta: metadata of the file.
        own: true for a score file of this project, whose ids are kept unchanged.
        remarks: assumptions and ignored parts, for notices.
    """

    form: str
    scores: Tensor
    query_ids: list[str] | None = None
    gallery_ids: list[str] | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    own: bool = False
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Listing:
    """Images listed per query, as in runs and ranked lists.

    Attributes:
        form: kind of file (``"a TREC run"``).
        names: distinct image names per query; best first if there are no scores.
        query_ids: query id per entry of ``names``; None if the file has none.
        scores: score per name; None if the file has only an order.
        remarks: assumptions and ignored parts, for notices.
    """

    form: str
    names: list[list[str]]
    query_ids: list[str] | None = None
    scores: list[list[float]] | None = None
    remarks: tuple[str, ...] = ()


def id_text(value: Any, where: str | Path, item: str) -> str:
    """Convert an id to text; an integer becomes its decimal digits.

    Raises:
        InputError: neither text nor an integer.
    """
    if isinstance(value, str):
        return str(value)
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if whole and not isinstance(value, bool):
        return str(int(value))
    raise InputError(
        where,
        f"expected a list of strings or whole numbers as ids, found {value!r:.60}",
        item=item,
    )


def id_texts(values: Iterable[Any], where: str | Path, item: str) -> list[str]:
    """Convert ids to text; see :func:`id_text`."""
    return [id_text(value, where, item) for value in values]
