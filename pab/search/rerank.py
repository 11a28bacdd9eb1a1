"""Re-rank the first images of each query with a cross encoder.

A reranker reads files. The candidates are therefore written as upright PNG files to a temporary
folder. This also supports images of archives and videos.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from pab.core.config import load_config
from pab.core.errors import InputError
from pab.core.files import existing_file
from pab.core.progress import progress
from pab.core.resources import config_path
from pab.data.records import GalleryImage
from pab.encoders.st.rerank import RerankConfig
from pab.scoring.members import member_config, members
from pab.search.index import Entry, Index
from pab.search.query import Hit, Query, assigned
from pab.search.sources import load_picture

if TYPE_CHECKING:
    from pab.scoring.rerank import Reranker

FASTEST_PNG = 1  # compression level
ANY_THREAD = nullcontext()


def open_reranker(name: str, **settings: Any) -> Reranker:
    """Open a reranker by the name of its member, or by a YAML file of its settings.

    A member can re-rank if its settings class has a method ``open_reranker``. A file is read as the
    settings of the first such member that accepts all of them, or else of a vision-language model.

    Args:
        name: name of the member, such as ``uit``, or the file.
        settings: settings that override the file, such as ``device``.

    Raises:
        InputError: there is no such reranker, its class cannot be imported, or its settings or
            weights are invalid.
    """
    named = name in members()
    if not named and not Path(name).suffix:
        raise InputError("--rerank", f"expected a member or a YAML file, found {name!r}")
    if not named:
        existing_file(config_path(name), "a YAML file of a reranker")
    broken, refused = list[InputError](), list[InputError]()
    classes: list[Any] = []
    for member in [name] if named else members():
        try:
            classes.append(member_config(member))
        except InputError as error:
            broken.append(error)  # a broken member of another package must not disable the others
    for cls in classes if named else [*classes, RerankConfig]:
        if not hasattr(cls, "open_reranker"):
            continue
        try:
            config = load_config(cls, None if named else name, settings)
        except InputError as error:
            refused.append(error)
            continue
        reranker: Reranker = config.open_reranker()
        return reranker
    if refused or broken:
        # A class that refuses the name of the model is not the one that the file is meant for.
        raise next((one for one in refused if one.item != "model"), (refused or broken)[0])
    raise InputError("--rerank", f"expected a member with a cross encoder, found {name!r}")


def reranked(
    index: Index,
    queries: Sequence[Query],
    hits: Sequence[list[Hit]],
    reranker: Reranker,
    depth: int,
    *,
    one_to_one: bool = False,
) -> list[list[Hit]]:
    """Order the first images of each query by the reranker's scores; the others keep their order.

    The reranker reads only the text of a query. Images with equal scores keep their order.

    Args:
        index: the searched index.
        queries: the queries, each with a text.
        hits: results per query, best first.
        reranker: model that scores pairs.
        depth: images per query to re-rank, at least 1.
        one_to_one: assign the first places jointly, by the reranker's scores; see
            :func:`pab.search.query.assigned`.

    Raises:
        InputError: ``depth`` is too small, a query has no text, or :func:`pair_scores` fails.
    """
    check_depth(depth)
    if one_to_one and depth < len(queries):
        problem = f"must be at least the number of queries, {len(queries)}, found {depth}"
        raise InputError("--rerank_depth", problem, todo="raise it, or leave out --one_to_one")
    captions = [query.text for query in queries if query.text is not None]
    if len(captions) < len(queries):
        raise InputError("--rerank", "needs a text in every query", todo="add --text")
    scores = pair_scores(index, captions, [one[:depth] for one in hits], reranker)
    found = [ordered(one[:depth], of_one) for one, of_one in zip(hits, scores, strict=True)]
    if one_to_one:
        found = assigned(found)
    return [first + one[depth:] for first, one in zip(found, hits, strict=True)]


def check_depth(depth: int) -> None:
    """Reject a ``--rerank_depth`` below 1.

    Raises:
        InputError: see above.
    """
    if depth < 1:
        raise InputError("--rerank_depth", f"must be at least 1, found {depth}")


def pair_scores(
    index: Index,
    captions: Sequence[str],
    hits: Sequence[list[Hit]],
    reranker: Reranker,
    *,
    load: Callable[[Entry], Image.Image] = load_picture,
    lock: AbstractContextManager[object] = ANY_THREAD,
) -> list[list[float]]:
    """Score the images of each query with a reranker.

    Args:
        index: the searched index.
        captions: text of each query.
        hits: images per query.
        reranker: model that scores pairs.
        load: function that reads an image of the index, upright and in RGB.
        lock: lock to hold while the model runs, for a model that several threads use.

    Returns:
        Finite scores in the order of ``hits``.

    Raises:
        InputError: an image cannot be read, the reranker refuses a text or an image, or a score is
            not finite.
    """
    rows = sorted({hit.row for one in hits for hit in one})
    if not rows:
        return [[] for _ in hits]
    place = {row: number for number, row in enumerate(rows)}
    found: list[list[float]] = []
    with tempfile.TemporaryDirectory(prefix="pab-rerank-") as folder:
        images = []
        for row in progress(rows, "reading candidates", "images"):
            path = Path(folder, f"{row:012}.png")
            load(index.entry(row)).save(path, compress_level=FASTEST_PNG)
            images.append(GalleryImage(path.stem, path))
        for caption, one in zip(captions, hits, strict=True):
            if not one:
                found.append([])
                continue
            candidates = torch.tensor([[place[hit.row] for hit in one]])
            with lock:
                scores = reranker.rerank([caption], images, candidates)[0].tolist()
            if not all(map(math.isfinite, scores)):
                raise InputError(
                    reranker.origin.checkpoint, "the reranker's scores are not finite",
                    item=f"query {caption!r}",
                    todo="check the checkpoint, or set its dtype to fp32",
                )  # fmt: skip
            found.append(scores)
    return found


def ordered(hits: Sequence[Hit], scores: Sequence[float]) -> list[Hit]:
    """Order images by a reranker's scores; images with equal scores keep their order."""
    found = [replace(hit, rerank_score=score) for hit, score in zip(hits, scores, strict=True)]
    return sorted(found, key=lambda hit: -hit.rank_score)
