"""Rank and evaluate scores from Python: ``from pab import rank, evaluate``.

Both functions accept a loaded :class:`ScoreFile`, or the path of a file in any form of
:mod:`pab.formats.forms` that contains query and gallery ids.

Shape letters: ``Q`` queries, ``G`` gallery images.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pab.core.errors import InputError
from pab.data.id_lists import id_text, id_texts
from pab.data.records import Query, Retrieval
from pab.evaluate import Evaluation, read_labels
from pab.evaluate import evaluate as evaluate_score_file
from pab.formats.conversion import given_ids
from pab.formats.export import ranking_of
from pab.formats.score_file import check_scores
from pab.scores import ScoreFile, load_scores


def rank(
    scores: ScoreFile | str | Path | Tensor | NDArray[Any],
    gallery_ids: Sequence[str] | None = None,
    *,
    top_k: int = 10,
) -> list[list[str]]:
    """Rank the gallery for each query; of equal scores, the smaller gallery id comes first.

    Args:
        scores: a score file, its path, or a matrix ``[Q, G]`` of any float type, of torch or
            NumPy; higher is better.
        gallery_ids: one distinct id per column, in column order; only for a matrix.
        top_k: number of images per query.

    Returns:
        ``Q`` lists of ``min(top_k, G)`` gallery ids, best first, in the order of the rows. A list
        is shorter if the source of the scores lists fewer images.

    Raises:
        InputError: the file cannot be read or has no ids, the scores or ids are invalid or do not
            match, or ``top_k`` is below 1.
    """
    if top_k < 1:
        raise InputError("top_k", f"must be at least 1, found {top_k}")
    if isinstance(scores, np.ndarray) and scores.dtype.kind in "fiu":
        scores = torch.from_numpy(scores.astype(np.float32))
    if not isinstance(scores, Tensor):
        if gallery_ids is not None and isinstance(scores, ScoreFile | str | os.PathLike):
            raise InputError("gallery_ids", "expected None for a score file, which has its own ids")
        return [list(names) for names, _ in ranking_of(checked(scores), top_k)]
    if scores.ndim != 2 or gallery_ids is None or len(gallery_ids) != scores.shape[1]:
        found = "none" if gallery_ids is None else str(len(gallery_ids))
        found = f"{found} for shape {list(scores.shape)}"
        problem = f"expected one id per column of scores [Q, G], found {found}"
        raise InputError("gallery_ids", problem)
    given = given_ids(gallery_ids, "rank", "gallery_ids") or []
    columns = sorted(range(len(given)), key=given.__getitem__)
    query_ids = [f"row {row}" for row in range(len(scores))]
    names = [given[column] for column in columns]
    score_file = ScoreFile(scores.detach().float().cpu()[:, columns], query_ids, names)
    return [list(names) for names, _ in ranking_of(checked(score_file), top_k)]


def evaluate(
    scores: ScoreFile | str | Path,
    annotation: Retrieval | Mapping[str, Iterable[str]] | str | Path,
    *,
    answers: str | Path | None = None,
    image_folder: str | Path | None = None,
) -> Evaluation:
    """Evaluate scores against labels: R@1, R@5, R@10, mAP, mAP@10 and mINP in percent.

    Args:
        scores: a score file or its path; ``Q`` queries in any order.
        annotation: a labelled annotation or its path, a name-masked ``query.json`` with
            ``answers``, or the right gallery ids of each query: ``{query id: ids}``. Ids may be
            strings or whole numbers.
        answers: answer key of a name-masked set; used only if ``annotation`` is a path.
        image_folder: used only if ``annotation`` is a path. For a name-masked set, the gallery's
            folder, if the scores must cover all its images; otherwise, root of the image paths.

    Returns:
        Metrics per query. ``.summary()`` returns the means, ``.intervals()`` the 95 % bootstrap
        intervals of the means, and ``.table()`` the text that ``python -m pab.evaluate`` prints.

    Raises:
        InputError: a file cannot be read, the scores are invalid, there are no labels, or the query
            ids or image ids do not match.
    """
    if isinstance(annotation, Mapping):
        relevant = _relevant(annotation)
        annotation = Retrieval([Query(query_id, "") for query_id in relevant], None, relevant, {})
    elif not isinstance(annotation, Retrieval):
        annotation = read_labels(annotation, answers=answers, image_folder=image_folder)
    where = "scores" if isinstance(scores, ScoreFile) else scores
    return evaluate_score_file(checked(scores), annotation, where=where)


def _relevant(annotation: Mapping[Any, Any]) -> dict[str, frozenset[str]]:
    """Convert the right images per query, given as one id or several, to sets of strings."""
    found: dict[str, frozenset[str]] = {}
    for query, right in annotation.items():
        fault = partial(InputError, "annotation", item=f"query {query!r}")
        query_id = id_text(query, fault)
        if query_id in found:
            raise fault("expected every query once, found it as a string and as a number")
        is_one = isinstance(right, str) or not isinstance(right, Iterable)
        found[query_id] = frozenset(id_texts([right] if is_one else right, fault))
    return found


def checked(scores: object, where: str = "scores") -> ScoreFile:
    """Return a valid score file on the CPU, without gradients; if ``scores`` is a path, load it.

    Raises:
        InputError: the file cannot be read or has no ids, or a rule of
            :class:`pab.scores.ScoreFile` is violated. The message names the path, or ``where`` for
            a loaded score file.
    """
    if isinstance(scores, str | os.PathLike):
        return load_scores(os.fspath(scores))
    if not isinstance(scores, ScoreFile):
        problem = f"expected a score file or its path, found {type(scores).__name__}"
        todo = "pass a matrix as ScoreFile(scores, query_ids, gallery_ids)"
        raise InputError(where, problem, todo=todo)
    matrix = scores.scores
    if isinstance(matrix, Tensor) and (matrix.requires_grad or not matrix.is_cpu):
        scores = replace(scores, scores=matrix.detach().cpu())
    check_scores(scores, where)
    return scores
