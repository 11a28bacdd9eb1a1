"""Re-rank the first images of each query with a cross encoder.

A reranker reads files. The candidates are therefore written to a temporary folder, upright, so that
images of archives and videos, and all photo formats, can be re-ranked.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from pab.core.config import load_config
from pab.core.errors import InputError
from pab.core.progress import progress
from pab.data.records import GalleryImage
from pab.search.index import Index
from pab.search.query import Hit, Query
from pab.search.sources import load_picture

if TYPE_CHECKING:
    from pab.scoring.rerank import Reranker

FASTEST_PNG = 1  # compression level


class RerankerConfig(Protocol):
    """Settings class with a method that opens a reranker."""

    def open_reranker(self) -> Reranker:
        """Load the model."""


def open_reranker(name: str, **settings: Any) -> Reranker:
    """Open a reranker by the name of its member, or by a YAML file of its settings.

    Args:
        name: name of a member with a reranker, such as ``uit``, or a file that one of them accepts.
        settings: settings that override the file, such as ``device``.

    Raises:
        InputError: no such reranker, or settings or weights are invalid.
    """
    known = rerankers()
    if name in known:
        return load_config(known[name], None, settings).open_reranker()  # type: ignore[type-var]
    if not Path(name).suffix:
        shown = ", ".join(known)
        raise InputError("--rerank", f"expected {shown} or a YAML file, found {name!r}")
    problems: list[InputError] = []
    for cls in known.values():
        try:
            config = load_config(cls, name, settings)  # type: ignore[type-var]
        except InputError as error:
            problems.append(error)
        else:
            return config.open_reranker()
    raise problems[0]


def rerankers() -> dict[str, type[RerankerConfig]]:
    """Return the settings classes of the members that can re-rank, by name."""
    from pab.scoring.members import member_config, members

    found: dict[str, type[RerankerConfig]] = {}
    for name in members():
        cls: Any = member_config(name)
        if hasattr(cls, "open_reranker"):
            found[name] = cls
    return found


def reranked(
    index: Index,
    queries: Sequence[Query],
    hits: Sequence[list[Hit]],
    reranker: Reranker,
    depth: int,
) -> list[list[Hit]]:
    """Order the first images of each query by the reranker's scores; the others keep their order.

    Only the text of a query is read. Of equal scores, the earlier image stays first.

    Args:
        index: the searched index.
        queries: the queries, each with a text.
        hits: results per query, best first.
        reranker: model that scores pairs.
        depth: images per query to re-rank, at least 1.

    Raises:
        InputError: a query has no text, or an image cannot be read.
    """
    if depth < 1:
        raise InputError("--rerank_depth", f"must be at least 1, found {depth}")
    captions = [query.text for query in queries if query.text is not None]
    if len(captions) < len(queries):
        raise InputError("--rerank", "needs a text in every query", todo="add --text")
    rows = sorted({hit.row for one in hits for hit in one[:depth]})
    if not rows:
        return [list(one) for one in hits]
    with tempfile.TemporaryDirectory(prefix="pab-rerank-") as folder:
        images = []
        for row in progress(rows, "reading candidates", "images"):
            path = Path(folder, f"{row:012}.png")
            load_picture(index.entry(row)).save(path, compress_level=FASTEST_PNG)
            images.append(GalleryImage(path.stem, path))
        place = {row: number for number, row in enumerate(rows)}
        found: list[list[Hit]] = []
        for caption, query, one in zip(captions, queries, hits, strict=True):
            if not one:
                found.append([])
                continue
            candidates = torch.tensor([[place[hit.row] for hit in one[:depth]]])
            scores = reranker.rerank([caption], images, candidates)[0].tolist()
            if not all(map(_is_finite, scores)):
                raise InputError(
                    reranker.origin.checkpoint, "the reranker's scores are not finite",
                    item=f"query {query.text!r}", todo="check the checkpoint, or use --dtype fp32",
                )  # fmt: skip
            first = [
                replace(hit, rerank_score=score)
                for hit, score in zip(one[:depth], scores, strict=True)
            ]
            first.sort(key=lambda hit: -(hit.rerank_score or 0.0))
            found.append(first + one[depth:])
    return found


def _is_finite(score: float) -> bool:
    return score - score == 0
