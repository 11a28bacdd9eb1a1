"""Rank and evaluate scores from Python: ``from pab import rank, evaluate``.

Both functions accept a loaded :class:`ScoreFile`, or the path of a file in any form of
:mod:`pab.formats.forms` that contains query and gallery ids.

Shape letters: ``Q`` queries, ``G`` gallery images.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from pab.core.errors import InputError
from pab.data.records import Query, Retrieval
from pab.evaluate import Evaluation, read_labels
from pab.evaluate import evaluate as evaluate_score_file
from pab.formats.export import ranking_of
from pab.formats.score_file import check_scores
from pab.scores import ScoreFile, load_scores


def rank(
    scores: ScoreFile | str | Path | Tensor,
    gallery_ids: Sequence[str] | None = None,
    *,
    top_k: int = 10,
) -> list[list[str]]:
    """Rank the gallery for each query; of equal scores, the smaller gallery id comes first.

    Args:
        scores: a score file, its path, or a matrix ``[Q, G]`` of any float type, higher is better.
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
    if not isinstance(scores, Tensor):
        if gallery_ids is not None:
            raise InputError("gallery_ids", "expected None for a score file, which has its own ids")
        return [list(names) for names, _ in ranking_of(checked(scores), top_k)]
    if scores.ndim != 2 or gallery_ids is None or len(gallery_ids) != scores.shape[1]:
        found = "none" if gallery_ids is None else str(len(gallery_ids))
        found = f"{found} for shape {list(scores.shape)}"
        problem = f"expected one id per column of scores [Q, G], found {found}"
        raise InputError("gallery_ids", problem)
    columns = sorted(range(len(gallery_ids)), key=gallery_ids.__getitem__)
    query_ids = [f"row {row}" for row in range(len(scores))]
    names = [gallery_ids[column] for column in columns]
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
            ``answers``, or the right gallery ids of each query: ``{query id: ids}``.
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
        relevant = {
            query_id: frozenset([right] if isinstance(right, str) else right)
            for query_id, right in annotation.items()
        }
        annotation = Retrieval([Query(query_id, "") for query_id in relevant], None, relevant, {})
    elif not isinstance(annotation, Retrieval):
        annotation = read_labels(annotation, answers=answers, image_folder=image_folder)
    where = "scores" if isinstance(scores, ScoreFile) else scores
    return evaluate_score_file(checked(scores), annotation, where=where)


def checked(scores: ScoreFile | str | Path, where: str = "scores") -> ScoreFile:
    """Return a valid score file; if ``scores`` is a path, load it.

    Raises:
        InputError: the file cannot be read or has no ids, or a rule of
            :class:`pab.scores.ScoreFile` is violated. The message names the path, or ``where`` for
            a loaded score file.
    """
    if not isinstance(scores, ScoreFile):
        return load_scores(scores)
    check_scores(scores, where)
    return scores
