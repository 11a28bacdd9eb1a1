"""Score files, the interface between the models and all later steps.

A score file is written by ``torch.save`` and contains ``{"scores", "query_ids", "gallery_ids",
"meta"}``. The scores are a float32 matrix ``[Q, G]`` (query by gallery image, higher is better),
always stored with the ids of its rows and columns. Gallery ids are sorted, so a tie goes to the
smaller column everywhere. Files are memory-mapped, and none of their code runs
(:mod:`pab.core.tensor_files`).

For files of other tools, see the forms in :mod:`pab.formats.forms`.

Command line::

    python -m pab.scores import FILE [--queries FILE] [--gallery FILE|FOLDER] --out FILE.pt
    python -m pab.scores show FILE
    python -m pab.scores export FILE --format FORMAT [--top_k N] --out FILE
    python -m pab.scores export FILE --bare [--out PREFIX]
"""

from __future__ import annotations

import codecs
import itertools
import json
import math
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pab import __version__
from pab.core.config import CommandParser
from pab.core.errors import InputError, run_cli
from pab.core.files import existing_file, sha256_of_file
from pab.core.notices import notice
from pab.core.tensor_files import release_pages, write_tensors
from pab.core.text_files import read_text
from pab.data.annotations import read_id_list, read_retrieval
from pab.data.names import plain_names, respelt
from pab.formats.contents import Listing, Matrix, id_texts
from pab.formats.forms import read_form
from pab.ranking import rows_in_order

RECIPROCAL_RANKS = "reciprocal ranks"  # value of meta["scores_are"] for a form without scores
_BLOCK_ELEMENTS = 1 << 22  # scores checked at a time: 16 MiB of float32 for any file size


@dataclass(frozen=True)
class ScoreFile:
    """Score matrix with the ids of its rows and columns.

    Attributes:
        scores: float32 ``[Q, G]``, finite, higher is better.
        query_ids: ``Q`` distinct ids, in row order.
        gallery_ids: ``G`` distinct ids, sorted.
        meta: model, checkpoint hash, dtype, data hash, project version, and entries of the model.
            For a form that lists only some images per query, ``listed`` maps a query id to its
            number of listed images; the other images get the next float32 below the query's
            smallest listed score.
    """

    scores: Tensor
    query_ids: list[str]
    gallery_ids: list[str]
    meta: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def bounds(self) -> tuple[float, float]:
        """Minimum and maximum score; NaN if there is one. Reads the matrix once."""
        rows = max(1, _BLOCK_ELEMENTS // self.scores.shape[1])
        found = [torch.aminmax(block) for block in self.scores.split(rows)]
        low = torch.stack([pair.min for pair in found]).min()
        high = torch.stack([pair.max for pair in found]).max()
        return float(low), float(high)

    @property
    def listed(self) -> dict[str, int] | None:
        """Number of listed images per query id; None if all images have their own scores."""
        return self.meta.get("listed")

    @property
    def is_order_alone(self) -> bool:
        """True if the scores are reciprocal ranks (1 / r), read from a format without scores."""
        return self.meta.get("scores_are") == RECIPROCAL_RANKS

    def listed_counts(self, query_ids: Sequence[str] | None = None) -> Tensor:
        """Images listed per query, int64 ``[Q]``; ``G`` where all have scores of their own.

        Args:
            query_ids: the wanted order; None is that of the rows.
        """
        listed, n_gallery = self.listed or {}, len(self.gallery_ids)
        order = self.query_ids if query_ids is None else query_ids
        return torch.tensor([listed.get(query_id, n_gallery) for query_id in order])


def save_scores(path: str | Path, score_file: ScoreFile) -> None:
    """Write a score file atomically.

    Raises:
        InputError: the content violates a rule of :class:`ScoreFile` (for instance, NaN scores).
    """
    check_scores(score_file, path)
    scores = score_file.scores.detach().cpu().contiguous()
    if scores.untyped_storage().nbytes() != scores.nbytes:
        scores = scores.clone()  # saving a slice would write all of its storage
    write_tensors(
        path,
        {
            "scores": scores,
            "query_ids": list(score_file.query_ids),
            "gallery_ids": list(score_file.gallery_ids),
            "meta": score_file.meta,
        },
    )


def load_scores(
    path: str | Path,
    *,
    query_ids: Sequence[str] | None = None,
    gallery_ids: Sequence[str] | None = None,
    mmap: bool = True,
) -> ScoreFile:
    """Read and check scores in any form known to :mod:`pab.formats.forms`.

    Ids inside the file take precedence. Columns are sorted by gallery id, whatever their order.

    Args:
        path: the file.
        query_ids: ids of the rows, in order, for files without ids; for a ranked list, the query id
            of each line.
        gallery_ids: ids of the columns, in order, for files without ids. For a form that lists only
            some images per query, the whole gallery; None uses the images that it lists.
        mmap: leave the matrix of a score file on disk until it is used.

    Raises:
        InputError: the file is missing, damaged or of unknown form, has no ids and none are given,
            or violates a rule of :class:`ScoreFile`. For a file without ids, the message gives the
            command that converts it.
    """
    found = read_form(path, mmap=mmap)
    return to_score_file(found, path, query_ids=query_ids, gallery_ids=gallery_ids, id_flags=False)


def to_score_file(
    found: Matrix | Listing,
    path: str | Path,
    *,
    query_ids: Sequence[str] | None = None,
    gallery_ids: Sequence[str] | None = None,
    keep_endings: bool = True,
    id_flags: bool = True,
) -> ScoreFile:
    """Build a checked score file from the result of :func:`read_form`; see :func:`load_scores`.

    Args:
        found: content of the file.
        path: the file, for notices and errors.
        query_ids: as in :func:`load_scores`.
        gallery_ids: as in :func:`load_scores`.
        keep_endings: whether a score file of this project keeps the image endings of its names.
        id_flags: whether the command has the flags ``--queries`` and ``--gallery``, for the error.

    Raises:
        InputError: ids that are missing or do not match, or scores that are NaN or infinite.
    """
    for remark in found.remarks:
        notice(path, remark)
    if isinstance(found, Listing):
        score_file = _of_listing(found, path, query_ids, gallery_ids, id_flags)
    else:
        score_file = _of_matrix(found, path, query_ids, gallery_ids, keep_endings, id_flags)
    check_scores(score_file, path)
    if score_file.scores.is_contiguous():
        release_pages(score_file.scores)  # the check has read all pages
    return score_file


def _of_matrix(
    found: Matrix,
    path: str | Path,
    query_ids: Sequence[str] | None,
    gallery_ids: Sequence[str] | None,
    keep_endings: bool,
    id_flags: bool,
) -> ScoreFile:
    """A matrix with its ids, columns sorted, as float32."""
    rows, names = _ids_of(found, path, query_ids, gallery_ids, id_flags)
    for key, ids in (("query_ids", rows), ("gallery_ids", names)):
        _check_ids(path, key, ids)
    if found.gallery_ids is not None:
        names = _spelt(names, path, gallery_ids, keep=found.own and keep_endings)
    if query_ids is not None and found.query_ids is not None:
        spelt = respelt(rows, query_ids, path, known_name="the given queries", endings=False)
        rows = [spelt[one] for one in rows]
    order = sorted(range(len(names)), key=names.__getitem__)
    if found.own and order != list(range(len(names))):
        notice(path, "its gallery ids are not sorted; columns are aligned by id")
    meta = dict(found.meta) if found.own else {"model": "imported", "form": found.form}
    scores = _float32_columns(found.scores, order)
    score_file = ScoreFile(scores, rows, [names[i] for i in order], meta)
    return score_file if found.own else _without_minus_infinity(score_file, path)


def _ids_of(
    found: Matrix,
    path: str | Path,
    query_ids: Sequence[str] | None,
    gallery_ids: Sequence[str] | None,
    id_flags: bool,
) -> tuple[list[str], list[str]]:
    """Return the ids of a matrix's rows and columns, its own or the given ones.

    Raises:
        InputError: there are none, or their number does not match the rows or columns.
    """
    axes = (
        ("query_ids", "rows", "--queries", found.query_ids, query_ids),
        ("gallery_ids", "columns", "--gallery", found.gallery_ids, gallery_ids),
    )
    shape = list(found.scores.shape)
    missing = [f"{flag} FILE" for _, _, flag, own, given in axes if own is None and given is None]
    if missing:
        raise InputError(
            path,
            f"expected scores with ids, found {found.form} {shape} without "
            f"{'any' if len(missing) == 2 else 'all'}",
            todo=f"give {' and '.join(missing)}, or "
            * id_flags
            + f"convert it with: python -m pab.scores import {shlex.quote(str(path))} "
            f"{' '.join(missing)} --out FILE",
        )
    ids = [list(own if own is not None else given or []) for *_, own, given in axes]
    sizes = [len(one) for one in ids]
    if sizes == shape[::-1] != shape:
        raise InputError(
            path,
            f"expected a matrix {sizes} of {sizes[0]} queries and {sizes[1]} images, found {shape}",
            todo="it is [gallery, queries]: transpose it (scores.T) and save it again",
        )
    for (name, kind, flag, own, _), size, wanted in zip(axes, sizes, shape, strict=True):
        if size == wanted:
            continue
        if own is not None:
            problem = f"expected one id for each of {wanted} in scores, found {size}"
            raise InputError(path, problem, item=name)
        raise InputError(
            path, f"expected {wanted} ids for the {wanted} {kind} of {found.form}, found {size}",
            item=flag,
        )  # fmt: skip
    return ids[0], ids[1]


def _spelt(
    names: list[str], path: str | Path, known: Sequence[str] | None, *, keep: bool = False
) -> list[str]:
    """Match names to the spelling of the known gallery, or remove their image extensions.

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


def _float32_columns(scores: Tensor, order: list[int]) -> Tensor:
    """Reorder columns and convert to float32 [Q, G]; copy only if something changes."""
    in_order = order == list(range(len(order)))
    if in_order and scores.dtype == torch.float32:
        return scores
    columns = torch.tensor(order)
    result = torch.empty(scores.shape, dtype=torch.float32)
    rows = max(1, _BLOCK_ELEMENTS // scores.shape[1])
    for number, start in enumerate(range(0, scores.shape[0], rows), start=1):
        block = scores[start : start + rows]
        result[start : start + rows] = block if in_order else block.index_select(1, columns)
        if number % 16 == 0 and scores.is_contiguous():
            release_pages(scores)  # a mapped file need not stay in memory beside its copy
    return result


def _without_minus_infinity(score_file: ScoreFile, path: str | Path) -> ScoreFile:
    """Interpret -inf as "not listed"; a matrix without -inf is returned unchanged."""
    low, _ = score_file.bounds
    if low != -math.inf:
        return score_file
    is_listed = score_file.scores != -math.inf
    counts = is_listed.sum(dim=1)
    kept = counts > 0
    if not kept.any():
        raise InputError(path, "expected finite scores, found -inf alone")
    notice(path, f"{int((~is_listed).sum())} scores are -inf: those images count as not listed")
    if not kept.all():
        notice(path, f"{int((~kept).sum())} queries list no image and are left out")
    scores, is_listed, counts = score_file.scores[kept], is_listed[kept], counts[kept]
    least = scores.masked_fill(~is_listed, math.inf).amin(dim=1, keepdim=True)
    filled = torch.where(is_listed, scores, one_less(least))
    ids = [one for one, keep in zip(score_file.query_ids, kept.tolist(), strict=True) if keep]
    meta = {**score_file.meta, "listed": dict(zip(ids, counts.tolist(), strict=True))}
    return ScoreFile(filled, ids, score_file.gallery_ids, meta)


def one_less(scores: Tensor) -> Tensor:
    """Return the next smaller float32 of each score."""
    return torch.nextafter(scores, torch.tensor(-math.inf))


def _of_listing(
    found: Listing,
    path: str | Path,
    query_ids: Sequence[str] | None,
    gallery_ids: Sequence[str] | None,
    id_flags: bool,
) -> ScoreFile:
    """Build a score file from listed images, with their scores, or 1 / r for the r-th image."""
    if not found.names:
        raise InputError(path, "expected ranked images per query, found none")
    rows = _query_ids_of(found, path, query_ids, id_flags)
    items = [
        f"line {number}" if found.query_ids is None else f"query {query_id!r}"
        for number, query_id in enumerate(rows, start=1)
    ]
    distinct = list(dict.fromkeys(name for listed in found.names for name in listed))
    spelt = dict(zip(distinct, _spelt(distinct, path, gallery_ids), strict=True))
    gallery = sorted(gallery_ids if gallery_ids is not None else set(spelt.values()))
    _check_ids(path, "query_ids", rows)
    _check_ids(path, "gallery_ids", gallery)
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
        notice(path, f"{left_out} scores are -inf: those images count as not listed")
    if len(listed_images) < len(rows):
        scores = scores[[row for row, query_id in enumerate(rows) if query_id in listed_images]]
        notice(path, f"{len(rows) - len(listed_images)} queries list no image and are left out")
    if not listed_images:
        raise InputError(path, "expected ranked images per query, found none")
    meta: dict[str, Any] = {"model": "imported", "form": found.form, "listed": listed_images}
    if found.scores is None:
        meta["scores_are"] = RECIPROCAL_RANKS
    return ScoreFile(scores, list(listed_images), gallery, meta)


def _query_ids_of(
    found: Listing, path: str | Path, query_ids: Sequence[str] | None, id_flags: bool
) -> list[str]:
    if found.query_ids is not None:
        if query_ids is None:
            return found.query_ids
        spelt = respelt(
            found.query_ids, query_ids, path, known_name="the given queries", endings=False
        )
        return [spelt[one] for one in found.query_ids]
    if query_ids is None:
        raise InputError(
            path,
            f"expected scores with query ids, found {found.form}, which does not say which query "
            "a line is for",
            todo="give the order of its lines: --queries FILE (one id per line), or "
            * id_flags
            + f"convert it with: python -m pab.scores import {shlex.quote(str(path))} "
            "--queries FILE --out FILE",
        )
    if len(query_ids) != len(found.names):
        raise InputError(
            path,
            f"expected a line for each of {len(query_ids)} queries, found {len(found.names)}",
        )
    return list(query_ids)


def _finite(values: list[float], names: list[str], path: str | Path, item: str) -> Tensor:
    """Scores of a query as float32; rejects NaN, +inf and values that overflow float32."""
    result = torch.tensor(values, dtype=torch.float64).float()
    for value, name, given in zip(result.tolist(), names, values, strict=True):
        if math.isnan(value) or value == math.inf or (value == -math.inf and given != value):
            raise InputError(
                path, f"expected finite scores, found {given} for image {name!r}", item=item
            )
    return result


def check_scores(score_file: ScoreFile, where: str | Path) -> None:
    """Check a score file against the rules of :class:`ScoreFile`; errors name ``where``.

    Raises:
        InputError: names the field, or the query and image, and the expected and found values.
    """
    scores = score_file.scores
    if not isinstance(scores, Tensor):
        raise InputError(where, f"expected a tensor, found {type(scores).__name__}", item="scores")
    if scores.ndim != 2 or scores.dtype != torch.float32 or scores.layout != torch.strided:
        raise InputError(
            where,
            f"expected a float32 matrix [queries, gallery], found {scores.dtype} "
            f"{list(scores.shape)}",
            item="scores",
        )
    for name, ids, size in (
        ("query_ids", score_file.query_ids, scores.shape[0]),
        ("gallery_ids", score_file.gallery_ids, scores.shape[1]),
    ):
        _check_ids(where, name, ids)
        if len(ids) != size:
            raise InputError(
                where,
                f"expected one id for each of {size} in scores, found {len(ids)}",
                item=name,
            )
    ids = score_file.gallery_ids
    if ids != sorted(ids):
        before, after = next(pair for pair in itertools.pairwise(ids) if pair[0] > pair[1])
        raise InputError(
            where, f"expected sorted ids, found {before!r} before {after!r}", item="gallery_ids"
        )
    meta = score_file.meta
    if not isinstance(meta, dict) or any(not isinstance(key, str) for key in meta):
        raise InputError(where, "expected a dict with names as keys", item="meta")
    _check_listed(score_file, where)
    _check_finite(score_file, where)


def _check_ids(where: str | Path, name: str, ids: Any) -> None:
    if not isinstance(ids, list) or not set(map(type, ids)) <= {str}:
        raise InputError(where, "expected a list of strings", item=name)
    if not ids:
        raise InputError(where, "expected at least one id, found none", item=name)
    if "\n".join(ids).splitlines() != ids or list(map(str.strip, ids)) != ids or "" in ids:
        # Id lists have one id per line.
        one = next(one for one in ids if one.splitlines() != [one] or one != one.strip())
        raise InputError(
            where,
            f"expected ids of one line without blanks at their ends, found {one!r}",
            item=name,
        )
    if len(set(ids)) != len(ids):
        twice = next(one for one, count in Counter(ids).items() if count > 1)
        raise InputError(where, f"expected distinct ids, found {twice!r} twice", item=name)


def _check_listed(score_file: ScoreFile, where: str | Path) -> None:
    listed = score_file.meta.get("listed")
    if listed is None:
        return
    n_gallery = len(score_file.gallery_ids)
    fits = isinstance(listed, dict) and listed.keys() == set(score_file.query_ids)
    if not fits or any(type(n) is not int or not 1 <= n <= n_gallery for n in listed.values()):
        raise InputError(
            where,
            f"expected a number of images from 1 to {n_gallery} for every query id",
            item="meta, 'listed'",
        )


def _check_finite(score_file: ScoreFile, where: str | Path) -> None:
    if all(map(math.isfinite, score_file.bounds)):
        return
    rows = max(1, _BLOCK_ELEMENTS // score_file.scores.shape[1])
    for start in range(0, len(score_file.query_ids), rows):
        finite = torch.isfinite(score_file.scores[start : start + rows])
        if not finite.all():
            row, column = (~finite).nonzero()[0].tolist()
            raise InputError(
                where,
                f"expected finite scores, found {score_file.scores[start + row, column].item()} "
                f"for image {score_file.gallery_ids[column]!r}",
                item=f"query {score_file.query_ids[start + row]!r}",
                todo="score again; NaN usually comes from a damaged checkpoint or from fp16",
            )


def reorder(
    score_file: ScoreFile, query_ids: Sequence[str], *, where: str | Path = "score file"
) -> ScoreFile:
    """Reorder the rows of a score file to ``query_ids``.

    Raises:
        InputError: the ids differ from the file's; the message names missing, extra and duplicate
            ids.
    """
    if list(query_ids) == score_file.query_ids:
        return score_file  # already in order: a memory-mapped matrix stays on disk
    rows = rows_in_order(score_file.query_ids, query_ids, where=where)
    return replace(score_file, scores=score_file.scores[rows], query_ids=list(query_ids))


def align(
    score_file: ScoreFile,
    reference: ScoreFile,
    *,
    where: str | Path = "score file",
    reference_name: str = "the first score file",
) -> ScoreFile:
    """Reorder the rows of ``score_file`` to those of ``reference``, so that matrices can be added.

    Ids in other spellings (image extension, Unicode form) are matched first. Columns then need no
    reordering, because equal sets of sorted ids have equal order.

    Raises:
        InputError: the query ids or the gallery ids differ.
    """
    score_file = respell(
        score_file,
        reference.query_ids,
        reference.gallery_ids,
        where=where,
        known_name=reference_name,
    )
    if score_file.gallery_ids != reference.gallery_ids:
        rows_in_order(
            score_file.gallery_ids,
            reference.gallery_ids,
            where=f"{where}, gallery_ids",
            order_name=reference_name,
        )
    if score_file.query_ids != reference.query_ids:
        rows_in_order(
            score_file.query_ids,
            reference.query_ids,
            where=f"{where}, query_ids",
            order_name=reference_name,
        )
    return reorder(score_file, reference.query_ids, where=where)


def respell(
    score_file: ScoreFile,
    query_ids: Sequence[str],
    gallery_ids: Sequence[str],
    *,
    where: str | Path,
    known_name: str = "the gallery",
) -> ScoreFile:
    """Convert ids to the spelling of known ids (:func:`pab.data.names.respelt`).

    Raises:
        InputError: two ids of the file would become equal.
    """
    queries = respelt(score_file.query_ids, query_ids, where, known_name=known_name, endings=False)
    images = respelt(score_file.gallery_ids, gallery_ids, where, known_name=known_name)
    if all(before == after for spelt in (queries, images) for before, after in spelt.items()):
        return score_file
    names = [images[one] for one in score_file.gallery_ids]
    order = sorted(range(len(names)), key=names.__getitem__)
    meta = score_file.meta
    if score_file.listed is not None:
        meta = {**meta, "listed": {queries[one]: n for one, n in score_file.listed.items()}}
    return ScoreFile(
        _float32_columns(score_file.scores, order),
        [queries[one] for one in score_file.query_ids],
        [names[column] for column in order],
        meta,
    )


def with_all_images(file: ScoreFile, gallery_ids: Sequence[str]) -> ScoreFile:
    """Extend scores of a form that lists only some images to the whole gallery.

    Added images are unlisted for every query. A file with an image outside the gallery is returned
    unchanged; the later comparison of ids reports it.
    """
    wanted = sorted(gallery_ids)
    if file.gallery_ids == wanted:
        return file
    column_of = {name: column for column, name in enumerate(wanted)}
    unknown = [name for name in file.gallery_ids if name not in column_of]
    if unknown:
        return file
    columns = torch.tensor([column_of[name] for name in file.gallery_ids])
    counts = file.listed_counts()
    least = file.scores.amin(dim=1)  # score of unlisted images, or the smallest listed score
    below = torch.where(counts < len(file.gallery_ids), least, one_less(least))
    scores = below[:, None].repeat(1, len(wanted))
    scores[:, columns] = file.scores
    return ScoreFile(scores, file.query_ids, wanted, file.meta)


def read_query_ids(path: str | Path) -> list[str]:
    """Read query ids in row order: one per line, or those of an annotation file.

    A JSON array of ids is read too.

    Raises:
        InputError: neither kind of file, or a duplicate id.
    """
    path = existing_file(path, "a list of query ids, one per line")
    if _is_json(path):
        ids = _json_ids(path)
        if ids is not None:
            return ids
        return [query.query_id for query in read_retrieval(path).queries]
    return read_id_list(path, "a list of query ids, one per line")


def read_gallery_ids(path: str | Path) -> list[str]:
    """Read gallery ids in column order: one per line, or the images of a folder.

    Images of a folder are sorted by their full file names, as in ``sorted(os.listdir(folder))``,
    where ``a-1.jpg`` comes before ``a.jpg``.

    Raises:
        InputError: neither, a duplicate id, or two names that differ only in the image extension.
    """
    if Path(path).is_dir():
        from pab.data.images import list_gallery  # imports Pillow, which score files do not need

        images = sorted(list_gallery(path), key=lambda image: image.path.name)
        notice(path, f"its {len(images)} images are taken in the sorted order of their file names")
        return [image.gallery_id for image in images]
    path = existing_file(path, "a list of gallery ids, one per line, or a folder of images")
    if _is_json(path):
        ids = _json_ids(path)
        if ids is not None:
            return plain_names(ids, path)
        raise InputError(
            path, "expected gallery ids, one per line, or a folder of images, found other JSON"
        )
    return plain_names(read_id_list(path, "a list of gallery ids, one per line"), path)


def _is_json(path: Path) -> bool:
    with path.open("rb") as handle:
        return handle.read(64).removeprefix(codecs.BOM_UTF8).lstrip()[:1] in (b"{", b"[")


def _json_ids(path: Path) -> list[str] | None:
    """The ids of a JSON array of texts and whole numbers; None if the file is something else.

    Raises:
        InputError: an id twice.
    """
    try:
        values = json.loads(read_text(path, "a list of ids"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, list) or not values or {type(one) for one in values} - {str, int}:
        return None
    ids = id_texts(values, path, "ids")
    _check_ids(path, "ids", ids)
    return ids


def import_scores(
    path: str | Path,
    *,
    query_list: str | Path | None = None,
    gallery_list: str | Path | None = None,
) -> ScoreFile:
    """Convert scores in any form to a score file; image names lose their extensions.

    Args:
        path: the scores; ids inside the file take precedence.
        query_list: query ids in row order (:func:`read_query_ids`), for files without ids.
        gallery_list: gallery ids in column order (:func:`read_gallery_ids`), for files without ids;
            for a form that lists only some images per query, the whole gallery.

    Raises:
        InputError: the file is unreadable, or ids are missing or do not match.
    """
    path = Path(path)
    found = read_form(path)
    query_ids = read_query_ids(query_list) if query_list is not None else None
    gallery_ids = read_gallery_ids(gallery_list) if gallery_list is not None else None
    score_file = to_score_file(
        found, path, query_ids=query_ids, gallery_ids=gallery_ids, keep_endings=False
    )
    own_gallery = isinstance(found, Matrix) and found.gallery_ids is not None
    for own, given, ids, flag in (
        (found.query_ids is not None, query_ids, score_file.query_ids, "--queries"),
        (own_gallery, gallery_ids, score_file.gallery_ids, "--gallery"),
    ):
        if own and given is not None and set(given) != set(ids):
            missing = [one for one in given if one not in set(ids)]
            text = f"; it lacks {len(missing)}, such as {missing[0]!r}" if missing else ""
            notice(path, f"its own ids are used, which are not those of {flag}{text}")
    if isinstance(found, Listing) and gallery_ids is None:
        notice(path, only_named(len(score_file.gallery_ids)))
    if score_file.listed and min(score_file.listed.values()) < len(score_file.gallery_ids):
        notice(path, listed_in_part(score_file))
    dtype = str(found.scores.dtype) if isinstance(found, Matrix) else "text"
    meta = {
        **score_file.meta,
        "imported_file": path.name,
        "imported_sha256": sha256_of_file(path),
        "dtype": dtype.removeprefix("torch."),
        "project_version": __version__,
    }
    return replace(score_file, meta=meta)


def only_named(count: int) -> str:
    """Notice for a listing without a known gallery."""
    return (
        f"its gallery is taken to be the {count} images that it names; --gallery FILE or FOLDER "
        "gives the whole one"
    )


def listed_in_part(score_file: ScoreFile) -> str:
    """Notice for scores that list only some images per query."""
    counts = list((score_file.listed or {}).values())
    return (
        f"lists {_listed_text(counts)} of {len(score_file.gallery_ids)} per query; the others "
        "score just below the listed ones"
    )


def tell_other_data(metas: Mapping[str, Mapping[str, Any]]) -> None:
    """Warn about score files with equal ids but different captions, names or orders of them.

    Args:
        metas: path -> ``meta`` of the file. Files without ``data_sha256`` are not compared.
    """
    told = {path: meta["data_sha256"] for path, meta in metas.items() if meta.get("data_sha256")}
    first = next(iter(told), None)
    for path, sha256 in told.items():
        if first is not None and sha256 != told[first]:
            print(
                f"warning: {path} was made from other data than {first}: captions, names or their "
                "order differ (data_sha256)",
                file=sys.stderr,
            )


def describe(path: str | Path, found: Matrix | Listing, score_file: ScoreFile | None) -> str:
    """Describe a file of scores in lines of text.

    Args:
        path: the file.
        found: its content in its own form.
        score_file: the content as a score file; None if its rows or columns have no ids.
    """
    lines = [f"file      {path}", f"form      {found.form}"]
    if score_file is None:
        if isinstance(found, Matrix):
            rows, columns = found.scores.shape
            lines += [
                f"scores    {rows} rows x {columns} columns, "
                f"{str(found.scores.dtype).removeprefix('torch.')}",
                *_range_lines(ScoreFile(found.scores, [], [])),
            ]
        else:
            lines.append(f"lists     {len(found.names)} lines of {_listed_text(_counts(found))}")
        rest = "--queries FILE" + (" --gallery FILE" if isinstance(found, Matrix) else "")
        lines.append(
            f"ids       none for its rows{' and columns' * isinstance(found, Matrix)}; add them "
            f"with: python -m pab.scores import {shlex.quote(str(path))} {rest} --out FILE"
        )
        return "\n".join(lines)
    scores = score_file.scores
    lines += [
        f"scores    {scores.shape[0]} queries x {scores.shape[1]} images, float32, "
        f"{scores.nbytes / 2**20:.1f} MiB",
        *_range_lines(score_file),
        f"queries   {_first_and_last(score_file.query_ids)}",
        f"gallery   {_first_and_last(score_file.gallery_ids)}",
    ]
    if score_file.listed is not None:
        lines.append(f"listed    {_listed_text(list(score_file.listed.values()))} per query")
    lines.append("meta")
    lines += [
        f"  {key}: {json.dumps(value, default=str)}"
        for key, value in score_file.meta.items()
        if key != "listed"
    ]
    return "\n".join(lines)


def _range_lines(score_file: ScoreFile) -> list[str]:
    low, high = score_file.bounds
    mean = score_file.scores.mean(dtype=torch.float64).item()
    return [f"range     {low:.6g} to {high:.6g}, mean {mean:.6g}"]


def _counts(found: Listing) -> list[int]:
    return [len(names) for names in found.names]


def _listed_text(counts: list[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low} images" if low == high else f"{low} to {high} images"


def _first_and_last(ids: list[str]) -> str:
    return ids[0] if len(ids) == 1 else f"{ids[0]} ... {ids[-1]}"


def show(path: str | Path) -> str:
    """Describe a file of scores in any form, with or without ids.

    Raises:
        InputError: the file is unreadable, or scores are NaN or infinite.
    """
    path = Path(path)
    found = read_form(path)
    with_ids = found.query_ids is not None and (
        isinstance(found, Listing) or found.gallery_ids is not None
    )
    if not with_ids:
        for remark in found.remarks:
            notice(path, remark)
        return describe(path, found, None)
    return describe(path, found, to_score_file(found, path))


def main(argv: list[str] | None = None) -> None:
    """Convert, show and export scores in all forms."""
    from pab.formats import export as score_export

    parser = CommandParser(prog="python -m pab.scores")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("import", help="make a score file of scores in any form")
    command.add_argument(
        "file", type=Path, help="tensor, array, table, run or ranked list; the content tells which"
    )
    command.groups["data"].add_argument(
        "--queries",
        type=Path,
        help="for files without ids: query ids of the rows, one per line, or query.json",
    )
    command.groups["data"].add_argument(
        "--gallery",
        type=Path,
        help="for files without ids: image names of the columns, one per line, or the gallery "
        "folder (sorted names); for runs and lists: the whole gallery",
    )
    command.groups["output"].add_argument(
        "--out", type=Path, required=True, help="score file to write"
    )
    command = commands.add_parser("show", help="explain a file of scores")
    command.add_argument("file", type=Path)
    command = commands.add_parser("export", help="write a score file in the form of another tool")
    command.add_argument("file", type=Path, help="scores with ids, in any form")
    form = command.groups["output"].add_mutually_exclusive_group(required=True)
    form.add_argument("--format", choices=score_export.FORMATS, help="form to write")
    form.add_argument(
        "--bare", action="store_true", help="plain tensor without ids, plus two id lists"
    )
    command.groups["output"].add_argument(
        "--top_k",
        type=int,
        help="trec, ranx, rankings: images per query "
        f"(default: {score_export.DEFAULT_TOP_K} at most)",
    )
    command.groups["output"].add_argument(
        "--out",
        type=Path,
        help="file to write; --bare: PREFIX of PREFIX.pt, PREFIX.queries.txt, "
        "PREFIX.gallery.txt (default: FILE_bare)",
    )
    args = parser.parse_args(argv)
    if args.command == "import":
        score_file = import_scores(args.file, query_list=args.queries, gallery_list=args.gallery)
        save_scores(args.out, score_file)
        own = Matrix("a score file", score_file.scores)
        print(describe(args.out, own, score_file))
    elif args.command == "show":
        print(show(args.file))
    else:
        if args.out is None and not args.bare:
            raise InputError("--out", "expected the file to write")
        out = args.out or args.file.with_name(f"{args.file.stem}_bare")
        chosen = "prefix" if args.bare else args.format
        if args.file.resolve() in {path.resolve() for path in score_export.paths(chosen, out)}:
            raise InputError("--out", f"{out} would overwrite {args.file} itself")
        for path in score_export.export(load_scores(args.file), chosen, out, top_k=args.top_k):
            print(path)


if __name__ == "__main__":
    run_cli(main)
