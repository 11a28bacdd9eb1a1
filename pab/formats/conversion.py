"""Convert the parsed content of a file in any form to a score file."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pab.core.errors import InputError
from pab.core.notices import notice
from pab.core.tensor_files import release_pages
from pab.data.id_lists import check_ids
from pab.data.names import plain_names, respelt
from pab.formats.contents import Listing, Matrix
from pab.formats.forms import ids_of
from pab.formats.score_file import (
    RECIPROCAL_RANKS,
    ScoreFile,
    check_scores,
    float32_columns,
    one_less,
)


def to_score_file(
    found: Matrix | Listing,
    path: str | Path,
    *,
    query_ids: Sequence[str] | None = None,
    gallery_ids: Sequence[str] | None = None,
    keep_endings: bool = True,
    id_flags: bool = True,
) -> ScoreFile:
    """Build a checked score file from the result of :func:`pab.formats.forms.read_form`.

    Args:
        found: content of the file.
        path: the file, for notices and errors.
        query_ids: as in :func:`pab.scores.load_scores`.
        gallery_ids: as in :func:`pab.scores.load_scores`.
        keep_endings: keep image extensions of names in a score file of this project.
        id_flags: true if the command has the flags ``--queries`` and ``--gallery``, so that an
            error may recommend them.

    Raises:
        InputError: ids are missing, invalid or do not match; no image is listed; or a score is NaN
            or infinite. In files of other tools, -inf is accepted and means "not listed".
    """
    for remark in found.remarks:
        notice(path, remark)
    given = _Given(
        given_ids(query_ids, path, "query_ids"), given_ids(gallery_ids, path, "gallery_ids"),
        id_flags,
    )  # fmt: skip
    if isinstance(found, Listing):
        score_file = _of_listing(found, path, given)
    else:
        score_file = _of_matrix(found, path, given, keep_endings)
    check_scores(score_file, path)
    if score_file.scores.is_contiguous():
        release_pages(score_file.scores)  # the check has read all pages
    return score_file


def given_ids(ids: Iterable[Any] | None, where: str | Path, name: str) -> list[str] | None:
    """Convert ids that a caller passes, for instance as a NumPy array, to a list of strings.

    Raises:
        InputError: the ids are neither strings nor whole numbers; the message names ``where``.
    """
    if ids is None:
        return None
    is_plain = isinstance(ids, str) or hasattr(ids, "ndim")
    return ids_of(ids if is_plain else list(ids), where, name)


@dataclass(frozen=True)
class _Given:
    """Ids that the caller passes; see :func:`to_score_file`."""

    query_ids: Sequence[str] | None
    gallery_ids: Sequence[str] | None
    id_flags: bool

    def queries(self, ids: list[str], path: str | Path) -> list[str]:
        """Return the query ids of a file in the spelling of the passed ids."""
        if self.query_ids is None:
            return ids
        spelt = respelt(ids, self.query_ids, path, known_name="the given queries", endings=False)
        return [spelt[one] for one in ids]

    def todo(self, path: str | Path, advice: str, flags: str) -> str:
        """Format the remedy for missing ids: pass the id flags, if available, or convert."""
        file = shlex.quote(str(path))
        convert = f"convert it with: python -m pab.scores import {file} {flags} --out FILE"
        return f"pass {advice}, or {convert}" if self.id_flags else convert


def _of_matrix(found: Matrix, path: str | Path, given: _Given, keep_endings: bool) -> ScoreFile:
    """Build a score file from a matrix: float32, columns sorted by id."""
    rows, names = _ids_of(found, path, given)
    for key, ids in (("query_ids", rows), ("gallery_ids", names)):
        check_ids(path, key, ids)
    if found.gallery_ids is not None:
        names = _spelt(names, path, given.gallery_ids, keep=found.own and keep_endings)
    if found.query_ids is not None:
        rows = given.queries(rows, path)
    order = sorted(range(len(names)), key=names.__getitem__)
    if found.own and order != list(range(len(names))):
        notice(path, "the gallery ids are not sorted; the columns are sorted by id")
    meta = dict(found.meta) if found.own else {"model": "imported", "form": found.form}
    scores = float32_columns(found.scores, order)
    score_file = ScoreFile(scores, rows, [names[i] for i in order], meta)
    return score_file if found.own else _without_minus_infinity(score_file, path)


def _ids_of(found: Matrix, path: str | Path, given: _Given) -> tuple[list[str], list[str]]:
    """Return the ids of the rows and columns of a matrix, from the file or else from the caller.

    Raises:
        InputError: ids are missing, or their number does not match the rows or columns.
    """
    axes = (
        ("query_ids", "row", "--queries", found.query_ids, given.query_ids),
        ("gallery_ids", "column", "--gallery", found.gallery_ids, given.gallery_ids),
    )
    shape = list(found.scores.shape)
    missing = [f"{flag} FILE" for _, _, flag, own, known in axes if own is None and known is None]
    if missing:
        ids_found = "without any" if len(missing) == 2 else "with ids of one axis only"
        problem = f"expected scores with ids, found {found.form} {shape} {ids_found}"
        todo = given.todo(path, " and ".join(missing), " ".join(missing))
        raise InputError(path, problem, todo=todo)
    ids = [list(own if own is not None else known or []) for *_, own, known in axes]
    sizes = [len(one) for one in ids]
    if sizes == shape[::-1] != shape:
        todo = "the matrix is [gallery, queries]: transpose it (scores.T) and save it again"
        wanted = f"{sizes}, [queries, gallery]"
        raise InputError(path, f"expected a matrix {wanted}, found {shape}", todo=todo)
    for (name, kind, flag, own, _), size, number in zip(axes, sizes, shape, strict=True):
        if size != number and own is not None:
            problem = f"expected one id per {kind} of scores ({number}), found {size}"
            raise InputError(path, problem, item=name)
        if size != number:
            problem = f"expected one id per {kind} of {found.form} ({number}), found {size}"
            raise InputError(path, problem, item=flag)
    return ids[0], ids[1]


def _spelt(
    names: list[str], path: str | Path, known: Sequence[str] | None, *, keep: bool = False
) -> list[str]:
    """Respell names as in the known gallery; remove extensions of other names unless ``keep``.

    Raises:
        InputError: two names differ only in their extension or Unicode form.
    """
    if known is not None:
        spelt = respelt(names, known, path)
        names = [spelt[name] for name in names]
    if keep:
        return names
    known_names = set(known or ())
    plain = dict(zip(names, plain_names(names, path), strict=True))
    return [name if name in known_names else plain[name] for name in names]


def _without_minus_infinity(score_file: ScoreFile, path: str | Path) -> ScoreFile:
    """Interpret -inf as "not listed"; a matrix without -inf is returned unchanged."""
    low, _ = score_file.bounds
    if low != -math.inf:
        return score_file
    is_listed = score_file.scores != -math.inf
    counts = is_listed.sum(dim=1)
    kept = counts > 0
    if not kept.any():
        raise InputError(path, "expected finite scores, found only -inf")
    notice(path, f"scores of -inf: {int((~is_listed).sum())}; their images count as not listed")
    if not kept.all():
        notice(path, f"skipped queries without images: {int((~kept).sum())}")
    scores, is_listed, counts = score_file.scores[kept], is_listed[kept], counts[kept]
    least = scores.masked_fill(~is_listed, math.inf).amin(dim=1, keepdim=True)
    filled = torch.where(is_listed, scores, one_less(least))
    ids = [one for one, keep in zip(score_file.query_ids, kept.tolist(), strict=True) if keep]
    meta = {**score_file.meta, "listed": dict(zip(ids, counts.tolist(), strict=True))}
    return ScoreFile(filled, ids, score_file.gallery_ids, meta)


def _of_listing(found: Listing, path: str | Path, given: _Given) -> ScoreFile:
    """Build a score file from ranked images; without scores, the r-th image scores 1 / r.

    Raises:
        InputError: ids are missing or invalid, a name is not in the gallery, a score is NaN,
            +inf or outside float32, or no image is listed.
    """
    if not found.names:
        raise InputError(path, "expected ranked images per query, found none")
    gallery_ids, rows = given.gallery_ids, _query_ids_of(found, path, given)
    items = [
        f"line {number}" if found.query_ids is None else f"query {query_id!r}"
        for number, query_id in enumerate(rows, start=1)
    ]
    distinct = list(dict.fromkeys(name for listed in found.names for name in listed))
    spelt = dict(zip(distinct, _spelt(distinct, path, gallery_ids), strict=True))
    gallery = sorted(gallery_ids if gallery_ids is not None else set(spelt.values()))
    check_ids(path, "query_ids", rows)
    check_ids(path, "gallery_ids", gallery)
    column_of = {name: column for column, name in enumerate(gallery)}
    scores = torch.empty(len(rows), len(gallery))
    listed_images: dict[str, int] = {}
    left_out = 0
    for row, (query_id, names) in enumerate(zip(rows, found.names, strict=True)):
        unknown = next((name for name in names if spelt[name] not in column_of), None)
        if unknown is not None:
            raise InputError(path, f"the name {unknown!r} is not in the gallery", item=items[row])
        columns = torch.tensor([column_of[spelt[name]] for name in names])
        if found.scores is None:
            values = 1.0 / torch.arange(1, len(names) + 1, dtype=torch.float32)
        else:
            values = _finite(found.scores[row], names, path, items[row])
            scored = values != -math.inf
            left_out += int((~scored).sum())
            columns, values = columns[scored], values[scored]
        if len(values):
            scores[row] = one_less(values.min())
            scores[row, columns] = values
            listed_images[query_id] = len(values)
    if left_out:
        notice(path, f"scores of -inf: {left_out}; their images count as not listed")
    if len(listed_images) < len(rows):
        scores = scores[[row for row, query_id in enumerate(rows) if query_id in listed_images]]
        notice(path, f"skipped queries without images: {len(rows) - len(listed_images)}")
    if not listed_images:
        raise InputError(path, "expected ranked images per query, found none")
    meta: dict[str, Any] = {"model": "imported", "form": found.form, "listed": listed_images}
    if found.scores is None:
        meta["scores_are"] = RECIPROCAL_RANKS
    return ScoreFile(scores, list(listed_images), gallery, meta)


def _query_ids_of(found: Listing, path: str | Path, given: _Given) -> list[str]:
    if found.query_ids is not None:
        return given.queries(found.query_ids, path)
    if given.query_ids is None:
        form = f"{found.form}, which does not contain the query id of each line"
        order = "the query ids in the order of its lines: --queries FILE (one id per line)"
        todo = given.todo(path, order, "--queries FILE")
        raise InputError(path, f"expected scores with query ids, found {form}", todo=todo)
    queries, lines = len(given.query_ids), len(found.names)
    if queries != lines:
        raise InputError(path, f"expected one line per query ({queries}), found {lines}")
    return list(given.query_ids)


def _finite(values: list[float], names: list[str], path: str | Path, item: str) -> Tensor:
    """Convert the scores of a query to float32; reject NaN, +inf and overflow.

    The order stays as in float64: a score that only float32 rounds to the next higher one becomes
    the next float32 below it.
    """
    result = torch.tensor(values, dtype=torch.float64).float()
    if len(set(result.tolist())) < len(set(values)):
        result = torch.from_numpy(_descending(np.array(values)))
    for value, name, given in zip(result.tolist(), names, values, strict=True):
        if math.isnan(value) or value == math.inf or (value == -math.inf and given != value):
            problem = f"expected finite scores, found {given} for image {name!r}"
            raise InputError(path, problem, item=item)
    return result


def _descending(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """Convert scores to float32; distinct scores stay distinct, in the same order."""
    distinct, places = np.unique(values, return_inverse=True)  # ascending
    with np.errstate(over="ignore"):  # the caller reports infinite scores
        found = distinct.astype(np.float32)
    for place in range(len(found) - 2, -1, -1):
        if found[place] != -math.inf:
            below = np.nextafter(found[place + 1], np.float32(-math.inf))
            found[place] = min(found[place], below)
    return found[places]
