"""Rank by score with one tie rule; read and write ranked lists, the submission format.

Tie rule: of two images with equal scores, the one with the smaller gallery id comes first. Columns
of a score matrix are sorted by gallery id, so the smaller id has the smaller column number.

torch is imported only in functions that need it, so commands on ranked lists start quickly.

Shape letters: ``Q`` queries, ``G`` gallery images, ``P`` (query, image) pairs.
"""

from __future__ import annotations

import io
import zipfile
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pab.core.counts import counted
from pab.core.errors import InputError
from pab.core.files import (
    DAMAGED_ARCHIVE,
    atomic_path,
    check_unpacked_size,
    existing_file,
    write_text,
)
from pab.core.notices import notice
from pab.core.progress import progress
from pab.core.text_files import read_text, text_of
from pab.formats.tables import is_trec_run

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK_ELEMENTS = 1 << 22  # scores per block: 16 MiB of float32, but at least one row
_NAMED_IDS = 5  # maximum number of ids of each kind that a mismatch message names
ANSWER = "answer.txt"  # the ranked list inside an answer.zip (AI City Challenge, Track 4)
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)  # constant, so that equal lists give equal bytes
_A_RANKED_LIST = "a ranked list (one line of gallery names per query)"
_NOT_SCORES = "pass the ranked list (.txt), not the score file (.pt)"


def top_k(scores: Tensor, k: int) -> Tensor:
    """Return the ``k`` best columns per row, best first; of equal scores, the smaller column first.

    Args:
        scores: ``[Q, G]``, columns in sorted gallery-id order, no NaN.
        k: number of places, at least 1.

    Returns:
        LongTensor ``[Q, min(k, G)]``, equal on all devices and for all block sizes.
    """
    import torch

    if scores.ndim != 2:
        raise ValueError(f"expected scores [Q, G], found {list(scores.shape)}")
    if k < 1:
        raise ValueError(f"expected k of at least 1, found {k}")
    n_queries, n_gallery = scores.shape
    k = min(k, n_gallery)
    best = torch.empty(n_queries, k, dtype=torch.long, device=scores.device)
    rows = max(1, _BLOCK_ELEMENTS // max(1, n_gallery))
    for start in progress(range(0, n_queries, rows), "ranking", "blocks of queries"):
        best[start : start + rows] = _top_k_block(scores[start : start + rows], k)
    return best


def _top_k_block(block: Tensor, k: int) -> Tensor:
    """Apply :func:`top_k` to a block of rows of ``[Q, G]``, with ``k <= G``."""
    import torch

    more = min(k + 1, block.shape[1])
    values, columns = torch.topk(block, more, dim=1)
    # topk does not specify its choice among columns equal to the k-th score. If the (k+1)-th score
    # is equal too, the whole row is sorted instead.
    cut_tie = values[:, k - 1] == values[:, -1] if more > k else None
    # topk does not specify the order of equal scores: sort the columns by id, then stably by score.
    columns, by_column = columns[:, :k].sort(dim=1)
    order = values[:, :k].gather(1, by_column).argsort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, order)
    if cut_tie is not None and cut_tie.any():
        columns[cut_tie] = block[cut_tie].argsort(dim=1, descending=True, stable=True)[:, :k]
    return columns


def ranks_of(scores: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the rank of each image in the full ranking of its query, by the tie rule.

    Args:
        scores: ``[Q, G]``, columns in sorted gallery-id order, no NaN.
        rows: LongTensor ``[P]``, query of each pair.
        columns: LongTensor ``[P]``, image of each pair.

    Returns:
        LongTensor ``[P]``, 1 for the first place.
    """
    import torch

    n_gallery = scores.shape[1]
    column_numbers = torch.arange(n_gallery, device=scores.device)
    ranks = torch.empty_like(rows)
    pairs = max(1, _BLOCK_ELEMENTS // max(1, n_gallery))
    for start in progress(range(0, len(rows), pairs), "finding ranks", "blocks of pairs"):
        row, column = rows[start : start + pairs], columns[start : start + pairs]
        line = scores[row]  # [pairs, G]
        own = line.gather(1, column[:, None])
        ahead = (line > own) | ((line == own) & (column_numbers < column[:, None]))
        ranks[start : start + pairs] = ahead.sum(dim=1) + 1
    return ranks


def ranked_names(scores: Tensor, gallery_ids: Sequence[str], k: int = 10) -> list[list[str]]:
    """Return the ``min(k, G)`` best gallery names per query, best first."""
    return [[gallery_ids[column] for column in row] for row in top_k(scores, k).tolist()]


def rows_in_order(
    ids: Sequence[str],
    order: Sequence[str],
    *,
    where: str | Path = "ids",
    order_name: str = "the requested order",
) -> list[int]:
    """Return row numbers that reorder ``ids`` to ``order``: ``ids[rows[i]] == order[i]``.

    Args:
        ids: ids of the existing rows.
        order: the same ids in the requested order.
        where: file of ``ids``, for the message.
        order_name: source of ``order``, for the message.

    Raises:
        InputError: missing, extra or duplicate ids; the message names up to five of each.
    """
    row_of = {one: row for row, one in enumerate(ids)}
    wanted = set(order)
    faults = [
        (f"ids of {order_name} that are missing", [i for i in order if i not in row_of]),
        (f"ids that are not in {order_name}", [i for i in ids if i not in wanted]),
        ("duplicate ids", [i for i, n in Counter(ids).items() if n > 1]),
        (f"duplicate ids of {order_name}", [i for i, n in Counter(order).items() if n > 1]),
    ]
    found = [f"{what}: {some(faulty)}" for what, faulty in faults if faulty]
    if found:
        problem = f"expected exactly the ids of {order_name}, found {'; '.join(found)}"
        raise InputError(where, problem)
    return [row_of[one] for one in order]


def order_queries(
    query_ids: Sequence[str], order: Sequence[str] | None, *, where: str | Path = "--query_order"
) -> list[str]:
    """Check ``order`` against the query ids and return it; if it is None, return the query ids.

    Raises:
        InputError: the ids of ``order`` and ``query_ids`` differ or repeat.
    """
    if order is None:
        return list(query_ids)
    rows_in_order(order, query_ids, where=where, order_name="the annotation")
    return list(order)


def some(ids: Sequence[str]) -> str:
    """Format the first ids for a message, with the number of further ids."""
    named = ", ".join(repr(i) for i in ids[:_NAMED_IDS])
    return named if len(ids) <= _NAMED_IDS else f"{named} and {len(ids) - _NAMED_IDS} more"


def check_names(path: str | Path, names: Sequence[Sequence[str]]) -> None:
    """Reject names that a ranked list cannot represent.

    Raises:
        InputError: a name is empty or contains whitespace.
    """
    for number, line in enumerate(names, start=1):
        for name in line:
            if name.split() != [name]:
                rule = "a ranked list separates names by spaces"
                problem = f"{rule}, so the gallery name {name!r} cannot be written"
                item = f"line {number}"
                raise InputError(path, problem, item=item, todo="rename that image")


def write_ranked_list(path: str | Path, names: Sequence[Sequence[str]]) -> None:
    """Write one line per query, atomically: gallery names, best first, separated by spaces.

    For a ``.zip`` path, write an archive that contains the list as ``answer.txt``. Equal lists
    produce equal bytes.

    Raises:
        InputError: a name is empty or contains whitespace, or the file cannot be written.
    """
    check_names(path, names)
    text = "".join(" ".join(line) + "\n" for line in names)
    if Path(path).suffix.lower() != ".zip":
        write_text(path, text)
        return
    entry = zipfile.ZipInfo(ANSWER, _ZIP_TIME)
    entry.create_system = 3  # Unix, on all systems
    entry.external_attr = 0o644 << 16
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        archive.writestr(entry, text, zipfile.ZIP_DEFLATED)


def is_list_archive(path: str | Path) -> bool:
    """Return true if a zip file holds a ranked list: ``answer.txt``, or a single text file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return _list_member(archive) is not None
    except DAMAGED_ARCHIVE:
        return False


def _list_member(archive: zipfile.ZipFile) -> str | None:
    texts = [
        name
        for name in archive.namelist()
        if name.lower().endswith(".txt") and not name.startswith("__MACOSX/")
    ]
    answers = [name for name in texts if name.rpartition("/")[2] == ANSWER]
    return (answers or texts)[0] if 1 in (len(answers), len(texts)) else None


def _archived_text(path: Path) -> str:
    """Read the text of the ranked list in a zip file."""
    try:
        with zipfile.ZipFile(path) as archive:
            member = _list_member(archive)
            if member is None:
                problem = f"expected a zip file with {ANSWER}, found one without"
                raise InputError(path, problem, todo=_NOT_SCORES)
            check_unpacked_size(path, [archive.getinfo(member)])
            raw = archive.read(member)
    except DAMAGED_ARCHIVE as error:
        problem = f"expected a zip file with {ANSWER}, found a damaged one ({error})"
        raise InputError(path, problem) from error
    if member != ANSWER:
        notice(path, f"its file {member!r} is read as {ANSWER}")
    return text_of(raw, path)


def read_ranked_list(path: str | Path) -> list[list[str]]:
    """Read a ranked list as a list of gallery names per line.

    From a zip file, read ``answer.txt`` or the only text file. Byte-order marks and Windows line
    ends are removed.

    Raises:
        InputError: the file cannot be read as a ranked list, a line is empty or repeats a name, or
            the lines have different numbers of names.
    """
    path = existing_file(path, _A_RANKED_LIST)
    if zipfile.is_zipfile(path):
        text = _archived_text(path)
    else:
        text = read_text(path, _A_RANKED_LIST, todo=_NOT_SCORES)
    names: list[list[str]] = []
    for number, line in enumerate(io.StringIO(text), start=1):
        fault = partial(InputError, path, item=f"line {number}")
        found = line.split()
        if not found:
            raise fault("expected gallery names, found an empty line")
        if not names:
            _check_is_list(path, text, found)
        elif len(found) != len(names[0]):
            wanted = counted(len(names[0]), "name")
            raise fault(f"expected {wanted} as in line 1, found {len(found)}")
        if len(set(found)) < len(found):
            twice = next(name for name, n in Counter(found).items() if n > 1)
            raise fault(f"expected distinct names, found {twice!r} twice")
        names.append(found)
    if not names:
        raise InputError(path, "expected a line per query, found an empty file")
    return names


def _check_is_list(path: Path, text: str, first: Sequence[str]) -> None:
    """Reject a file in another format; its words would otherwise be read as names."""
    other = None
    if first[0].startswith(('{"', "[{")) or first[0] in ("{", "["):
        other = "JSON"
    elif is_trec_run(io.StringIO(text)) or (len(first) == 6 and first[1].upper() == "Q0"):
        other = "a TREC run"
    if other is not None:
        todo = "make the list with: python -m ensemble.run --beit3_score FILE --output_file LIST"
        raise InputError(path, f"expected {_A_RANKED_LIST}, found {other}", todo=todo)
