"""Score files: the one thing that passes between the models and everything behind them.

A score file is ``torch.save`` of ``{"scores", "query_ids", "gallery_ids", "meta"}``: a float32
matrix ``[Q, G]`` (query by gallery image, higher is better) that never travels without the ids of
its rows and columns. Gallery ids are sorted, so that a tie goes to the smaller column everywhere.
Files are memory-mapped, and no code of theirs is run (:mod:`pab.tensor_files`).

Command line::

    python -m pab.scores import FILE --queries FILE --gallery FILE --out FILE
    python -m pab.scores show FILE
    python -m pab.scores export FILE --bare [--out PREFIX]
"""

from __future__ import annotations

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
from pab.annotations import read_id_list
from pab.config import CommandParser
from pab.errors import InputError, run_cli
from pab.files import sha256_of_file, write_text
from pab.ranking import rows_in_order
from pab.tensor_files import read_tensors, release_pages, write_tensors

KEYS = ("scores", "query_ids", "gallery_ids", "meta")
_BLOCK_ELEMENTS = 1 << 22  # scores checked together: 16 MiB of float32, whatever the file's size


@dataclass(frozen=True)
class ScoreFile:
    """A score matrix with the ids of its rows and columns.

    Attributes:
        scores: float32 ``[Q, G]``, finite, higher is better.
        query_ids: ``Q`` distinct ids, in row order.
        gallery_ids: ``G`` distinct ids, sorted.
        meta: model, checkpoint hash, dtype, data hash, project version, and what a model adds.
    """

    scores: Tensor
    query_ids: list[str]
    gallery_ids: list[str]
    meta: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def bounds(self) -> tuple[float, float]:
        """The least and the largest score; NaN if there is one. Reads the matrix once."""
        rows = max(1, _BLOCK_ELEMENTS // self.scores.shape[1])
        found = [torch.aminmax(block) for block in self.scores.split(rows)]
        low = torch.stack([pair.min for pair in found]).min()
        high = torch.stack([pair.max for pair in found]).max()
        return float(low), float(high)


def save_scores(path: str | Path, score_file: ScoreFile) -> None:
    """Write a score file, whole or not at all.

    Raises:
        InputError: the content breaks a rule of :class:`ScoreFile` (a model with NaN weights, say).
    """
    check_scores(score_file, path)
    scores = score_file.scores.detach().cpu().contiguous()
    if scores.untyped_storage().nbytes() != scores.nbytes:
        scores = scores.clone()  # a slice of something larger would be saved with all of it
    write_tensors(
        path,
        {
            "scores": scores,
            "query_ids": list(score_file.query_ids),
            "gallery_ids": list(score_file.gallery_ids),
            "meta": score_file.meta,
        },
    )


def load_scores(path: str | Path, *, mmap: bool = True) -> ScoreFile:
    """Read and check a score file; with ``mmap`` its matrix stays on disk until it is used.

    Raises:
        InputError: the file is missing, is no score file, or breaks a rule of :class:`ScoreFile`. A
            bare tensor is answered with the command that converts it.
    """
    path = Path(path)
    content = read_tensors(path, "a score file", mmap=mmap)
    if isinstance(content, Tensor):
        raise InputError(
            path,
            f"expected a score file with ids, found a bare tensor {list(content.shape)}",
            todo="convert it with: python -m pab.scores import "
            f"{shlex.quote(str(path))} --queries FILE --gallery FILE --out FILE",
        )
    if not isinstance(content, dict) or set(content) != set(KEYS):
        found = (
            f"keys {', '.join(sorted(map(str, content)))[:200] or '(none)'}"
            if isinstance(content, dict)
            else f"a {type(content).__name__}"
        )
        raise InputError(path, f"expected a dict of {', '.join(KEYS)}, found {found}")
    score_file = ScoreFile(**content)
    check_scores(score_file, path)
    release_pages(score_file.scores)  # the check has read all of it
    return score_file


def check_scores(score_file: ScoreFile, where: str | Path) -> None:
    """Hold a score file to the rules of :class:`ScoreFile`; ``where`` is named when it breaks one.

    Raises:
        InputError: naming the field or the query and image, what was expected and what was found.
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
    _check_finite(score_file, where)


def _check_ids(where: str | Path, name: str, ids: Any) -> None:
    if not isinstance(ids, list) or not set(map(type, ids)) <= {str}:
        raise InputError(where, "expected a list of strings", item=name)
    if not ids:
        raise InputError(where, "expected at least one id, found none", item=name)
    if "\n".join(ids).splitlines() != ids or list(map(str.strip, ids)) != ids or "" in ids:
        # The id lists are one id a line.
        one = next(one for one in ids if one.splitlines() != [one] or one != one.strip())
        raise InputError(
            where,
            f"expected ids of one line without blanks at their ends, found {one!r}",
            item=name,
        )
    if len(set(ids)) != len(ids):
        twice = next(one for one, count in Counter(ids).items() if count > 1)
        raise InputError(where, f"expected distinct ids, found {twice!r} twice", item=name)


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
    """The same scores with the rows in the order of ``query_ids``.

    Raises:
        InputError: ``query_ids`` are not exactly the file's; missing, extra and double ones are
            named.
    """
    if list(query_ids) == score_file.query_ids:
        return score_file  # nothing to move: a memory-mapped matrix stays on disk
    rows = rows_in_order(score_file.query_ids, query_ids, where=where)
    return replace(score_file, scores=score_file.scores[rows], query_ids=list(query_ids))


def align(
    score_file: ScoreFile,
    reference: ScoreFile,
    *,
    where: str | Path = "score file",
    reference_name: str = "the first score file",
) -> ScoreFile:
    """``score_file`` with the rows in ``reference``'s order, so that the matrices can be added.

    Columns need no moving: equal sets of sorted ids are in equal order.

    Raises:
        InputError: the two do not hold exactly the same query ids and gallery ids.
    """
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


def import_scores(
    path: str | Path, *, query_list: str | Path, gallery_list: str | Path
) -> ScoreFile:
    """Make a score file of a bare matrix and its two id lists.

    The lists are in the matrix's row and column order; columns are then sorted by gallery id.

    Raises:
        InputError: no bare floating-point matrix, or lists that do not fit it.
    """
    path = Path(path)
    tensor = read_tensors(path, "a bare score tensor", mmap=True)
    if not isinstance(tensor, Tensor) or tensor.ndim != 2 or not tensor.is_floating_point():
        found = (
            f"{tensor.dtype} {list(tensor.shape)}"
            if isinstance(tensor, Tensor)
            else f"a {type(tensor).__name__}"
        )
        raise InputError(path, f"expected a bare floating-point matrix, found {found}")
    query_ids = read_id_list(query_list, "a list of query ids, one a line")
    gallery_ids = read_id_list(gallery_list, "a list of gallery ids, one a line")
    for listed, ids, size, kind in (
        (query_list, query_ids, tensor.shape[0], "rows"),
        (gallery_list, gallery_ids, tensor.shape[1], "columns"),
    ):
        if len(ids) != size:
            raise InputError(
                listed, f"expected {size} ids for the {size} {kind} of {path}, found {len(ids)}"
            )
    by_id = sorted(range(len(gallery_ids)), key=gallery_ids.__getitem__)
    return ScoreFile(
        scores=tensor[:, by_id].to(torch.float32),
        query_ids=query_ids,
        gallery_ids=[gallery_ids[column] for column in by_id],
        meta={
            "model": "imported",
            "imported_file": path.name,
            "imported_sha256": sha256_of_file(path),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "project_version": __version__,
        },
    )


def tell_other_data(metas: Mapping[str, Mapping[str, Any]]) -> None:
    """Print a warning for score files of the same ids but other captions, names or order of them.

    Args:
        metas: what each file says of itself, by path. One without ``data_sha256`` is not compared.
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


def bare_paths(prefix: str | Path) -> list[Path]:
    """The files of a bare export: the tensor, query ids, gallery ids."""
    prefix = Path(prefix)
    return [
        prefix.with_name(prefix.name + ending) for ending in (".pt", ".queries.txt", ".gallery.txt")
    ]


def export_bare(score_file: ScoreFile, prefix: str | Path) -> list[Path]:
    """Write ``PREFIX.pt`` (the bare tensor), ``PREFIX.queries.txt`` and ``PREFIX.gallery.txt``.

    :func:`import_scores` reads the three back.
    """
    paths = bare_paths(prefix)
    write_text(paths[1], "".join(f"{one}\n" for one in score_file.query_ids))
    write_text(paths[2], "".join(f"{one}\n" for one in score_file.gallery_ids))
    write_tensors(paths[0], score_file.scores.clone())
    return paths


def describe(path: str | Path, score_file: ScoreFile) -> str:
    """What a score file holds, as lines of text."""
    scores = score_file.scores
    lines = [
        f"file      {path}",
        f"scores    {scores.shape[0]} queries x {scores.shape[1]} images, float32, "
        f"{scores.nbytes / 2**20:.1f} MiB",
        f"range     {score_file.bounds[0]:.6g} to {score_file.bounds[1]:.6g}, "
        f"mean {scores.mean(dtype=torch.float64).item():.6g}",
        f"queries   {_first_and_last(score_file.query_ids)}",
        f"gallery   {_first_and_last(score_file.gallery_ids)}",
        "meta",
        *(f"  {key}: {json.dumps(value, default=str)}" for key, value in score_file.meta.items()),
    ]
    return "\n".join(lines)


def _first_and_last(ids: list[str]) -> str:
    return ids[0] if len(ids) == 1 else f"{ids[0]} ... {ids[-1]}"


def main(argv: list[str] | None = None) -> None:
    """Convert, show and export score files."""
    parser = CommandParser(
        prog="python -m pab.scores", description=main.__doc__, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "import", help="make a score file of a bare tensor", allow_abbrev=False
    )
    command.add_argument(
        "file", type=Path, help="the bare tensor [queries, gallery], as torch.save"
    )
    command.add_argument("--queries", type=Path, required=True, help="query ids, one a line")
    command.add_argument("--gallery", type=Path, required=True, help="gallery ids, one a line")
    command.add_argument("--out", type=Path, required=True, help="the score file to write")
    command = commands.add_parser("show", help="print what a score file holds", allow_abbrev=False)
    command.add_argument("file", type=Path)
    command = commands.add_parser(
        "export", help="write the bare tensor and its id lists", allow_abbrev=False
    )
    command.add_argument("file", type=Path)
    command.add_argument(
        "--bare", action="store_true", required=True, help="a plain tensor without ids"
    )
    command.add_argument(
        "--out",
        type=Path,
        metavar="PREFIX",
        help="writes PREFIX.pt, PREFIX.queries.txt, PREFIX.gallery.txt (default: FILE_bare)",
    )
    args = parser.parse_args(argv)
    if args.command == "import":
        score_file = import_scores(args.file, query_list=args.queries, gallery_list=args.gallery)
        save_scores(args.out, score_file)
        print(describe(args.out, score_file))
    elif args.command == "show":
        print(describe(args.file, load_scores(args.file)))
    else:
        prefix = args.out or args.file.with_name(f"{args.file.stem}_bare")
        if args.file.resolve() in {path.resolve() for path in bare_paths(prefix)}:
            raise InputError("--out", f"{prefix} would overwrite {args.file} itself")
        for path in export_bare(load_scores(args.file), prefix):
            print(path)


if __name__ == "__main__":
    run_cli(main)
