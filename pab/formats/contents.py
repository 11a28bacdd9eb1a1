"""Content of a file of scores in any form: a matrix, or ranked images per query.

Shape letters: ``Q`` queries, ``G`` gallery images.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

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
        form: name of the form (``"a bare tensor"``).
        scores: floating point ``[Q, G]``, memory-mapped if the form allows it.
        query_ids: ids of the rows; None if the file has none.
        gallery_ids: ids of the columns, in any order; None if the file has none.
        meta: metadata of the file.
        own: true for a score file of this project, whose metadata is kept.
        remarks: assumptions and ignored fields, for notices.
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
    """Ranked images per query, as in runs and ranked lists.

    Attributes:
        form: name of the form (``"a TREC run"``).
        names: distinct image names per query; best first if there are no scores.
        query_ids: query id of each list in ``names``; None if the file has none.
        scores: score of each name; None if the file contains only an order.
        remarks: assumptions and ignored fields, for notices.
    """

    form: str
    names: list[list[str]]
    query_ids: list[str] | None = None
    scores: list[list[float]] | None = None
    remarks: tuple[str, ...] = ()
