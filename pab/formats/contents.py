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
    """A matrix of scores as a file holds it.

    Attributes:
        form: what the file is (``"a bare tensor"``).
        scores: floating point ``[Q, G]``, on disk where the form allows it.
        query_ids: ids of the rows; None if the file has none.
        gallery_ids: ids of the columns, in any order; None if the file has none.
        meta: what the file says of itself.
        own: whether it is a score file of this project, whose ids are kept as they stand.
        remarks: what was assumed or ignored, for notices.
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
    """Images listed per query, as runs and ranked lists hold them.

    Attributes:
        form: what the file is (``"a TREC run"``).
        names: image names of each query, distinct; best first where there are no scores.
        query_ids: the query of each entry of ``names``; None if the file has none.
        scores: a score for each name; None if the order is all there is.
        remarks: what was assumed or ignored, for notices.
    """

    form: str
    names: list[list[str]]
    query_ids: list[str] | None = None
    scores: list[list[float]] | None = None
    remarks: tuple[str, ...] = ()


def id_text(value: Any, where: str | Path, item: str) -> str:
    """Return an id as text: a whole number becomes its decimal digits.

    Raises:
        InputError: neither a text nor a whole number.
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
    """Return ids as texts; see :func:`id_text`."""
    return [id_text(value, where, item) for value in values]
