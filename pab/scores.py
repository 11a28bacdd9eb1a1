"""Score files, the interface between the models and all later steps.

A score file is written by ``torch.save`` and contains ``{"scores", "query_ids", "gallery_ids",
"meta"}``. The scores are a float32 matrix ``[Q, G]`` (query by gallery image, higher is better),
always stored with the ids of its rows and columns. Gallery ids are sorted, so among equal scores,
the image in the smaller column ranks first. By default, files are memory-mapped. Loading never
executes code from a file (:mod:`pab.core.tensor_files`).

:class:`ScoreFile` and :func:`save_scores` are defined in :mod:`pab.formats.score_file`. For files
of other tools, see :mod:`pab.formats.forms`.

Command line::

    python -m pab.scores import FILE [--queries FILE] [--gallery FILE|FOLDER] --out FILE.pt
    python -m pab.scores show FILE
    python -m pab.scores export FILE --format FORMAT [--top_k N] --out FILE
    python -m pab.scores export FILE --bare [--out PREFIX]
    python -m pab.scores merge PART PART ... --out FILE.pt
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pab import __version__
from pab.core.config import CommandParser
from pab.core.errors import InputError, run_cli
from pab.core.files import sha256_of_file
from pab.core.notices import notice
from pab.data.id_lists import read_gallery_ids, read_query_ids
from pab.data.label_config import add_path_flags
from pab.data.names import respelt
from pab.formats import export as score_export
from pab.formats.contents import Listing, Matrix
from pab.formats.conversion import to_score_file
from pab.formats.description import describe, listed_in_part, only_named, show
from pab.formats.forms import read_form
from pab.formats.parts import merge_parts
from pab.formats.score_file import ScoreFile, float32_columns, one_less, save_scores
from pab.ranking import rows_in_order


def load_scores(
    path: str | Path,
    *,
    query_ids: Sequence[str] | None = None,
    gallery_ids: Sequence[str] | None = None,
    mmap: bool = True,
) -> ScoreFile:
    """Read and check scores in any form known to :mod:`pab.formats.forms`.

    Ids in the file take precedence over the arguments. Columns are sorted by gallery id.

    Args:
        path: the file.
        query_ids: ids of the rows, in order, for files without ids; for a ranked list, the query id
            of each line.
        gallery_ids: ids of the columns, in order, for files without ids. For a form that lists only
            some images per query, the whole gallery; None uses the listed images.
        mmap: leave the matrix on disk until it is used, if the form, the dtype and the order of the
            columns allow it.

    Raises:
        InputError: the file cannot be read, ids are missing or do not match, or a rule of
            :class:`ScoreFile` is violated. If ids are missing, the message contains the command
            that converts the file.
    """
    found = read_form(path, mmap=mmap)
    return to_score_file(found, path, query_ids=query_ids, gallery_ids=gallery_ids, id_flags=False)


def reorder(
    score_file: ScoreFile, query_ids: Sequence[str], *, where: str | Path = "score file"
) -> ScoreFile:
    """Reorder the rows of a score file to ``query_ids``.

    Raises:
        InputError: ``query_ids`` and the file's ids differ; the message names missing, extra and
            duplicate ids.
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
    """Reorder the rows of a score file to those of ``reference``; the matrices can then be added.

    First, gallery ids that differ only in image extension or Unicode form are matched, and query
    ids that differ only in Unicode form. Columns then have the same order, because gallery ids are
    sorted.

    Raises:
        InputError: the query ids or the gallery ids differ, or two ids would become equal.
    """
    known = (reference.query_ids, reference.gallery_ids)
    score_file = respell(score_file, *known, where=where, known_name=reference_name)
    check_same_ids(score_file, reference, where, reference_name)
    return reorder(score_file, reference.query_ids, where=where)


def check_same_ids(
    score_file: ScoreFile, reference: ScoreFile, where: str | Path, reference_name: str
) -> None:
    """Check that a score file has the same ids as the reference; query ids may be in any order.

    Raises:
        InputError: the ids differ; the message names the file and the ids.
    """
    for kind in ("gallery_ids", "query_ids"):
        ids, wanted = getattr(score_file, kind), getattr(reference, kind)
        if ids != wanted:
            rows_in_order(ids, wanted, where=f"{where}, {kind}", order_name=reference_name)


def respell(
    score_file: ScoreFile,
    query_ids: Sequence[str],
    gallery_ids: Sequence[str],
    *,
    where: str | Path,
    known_name: str = "the gallery",
) -> ScoreFile:
    """Replace ids with matching known ids of another spelling (:func:`pab.data.names.respelt`).

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
        float32_columns(score_file.scores, order),
        [queries[one] for one in score_file.query_ids],
        [names[column] for column in order],
        meta,
    )


def with_all_images(file: ScoreFile, gallery_ids: Sequence[str]) -> ScoreFile:
    """Extend scores of a form that lists only some images to the whole gallery.

    Added images are unlisted for every query. A file with an image outside the gallery is returned
    unchanged; a later comparison of ids reports this image.
    """
    wanted = sorted(gallery_ids)
    if file.gallery_ids == wanted:
        return file
    column_of = {name: column for column, name in enumerate(wanted)}
    if not column_of.keys() >= set(file.gallery_ids):
        return file
    columns = torch.tensor([column_of[name] for name in file.gallery_ids])
    counts = file.listed_counts()
    least = file.scores.amin(dim=1)  # score of unlisted images, or the smallest listed score
    below = torch.where(counts < len(file.gallery_ids), least, one_less(least))
    scores = below[:, None].repeat(1, len(wanted))
    scores[:, columns] = file.scores
    return ScoreFile(scores, file.query_ids, wanted, file.meta)


def import_scores(
    path: str | Path,
    *,
    query_list: str | Path | None = None,
    gallery_list: str | Path | None = None,
) -> ScoreFile:
    """Convert scores in any form to a score file; image names lose their extensions.

    Args:
        path: the scores; ids in the file take precedence over the lists.
        query_list: query ids in row order (:func:`read_query_ids`), for files without ids.
        gallery_list: gallery ids in column order (:func:`read_gallery_ids`), for files without ids;
            for a form that lists only some images per query, the whole gallery.

    Raises:
        InputError: a file cannot be read, ids are missing or do not match, or scores are NaN or
            infinite.
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
            text = f"; it lacks {len(missing)} of those, such as {missing[0]!r}" if missing else ""
            notice(path, f"its own ids are used, although they differ from those of {flag}{text}")
    if isinstance(found, Listing) and gallery_ids is None:
        notice(path, only_named(len(score_file.gallery_ids)))
    if score_file.listed and min(score_file.listed.values()) < len(score_file.gallery_ids):
        notice(path, listed_in_part(score_file))
    dtype = str(found.scores.dtype) if isinstance(found, Matrix) else "text"
    source = {"imported_file": path.name, "imported_sha256": sha256_of_file(path)}
    facts = {"dtype": dtype.removeprefix("torch."), "project_version": __version__}
    return replace(score_file, meta={**score_file.meta, **source, **facts})


def warn_on_data_mismatch(metas: Mapping[str, Mapping[str, Any]]) -> None:
    """Warn if captions, query ids, gallery ids, or their order differ between score files.

    Args:
        metas: path -> ``meta`` of the file. Files without ``data_sha256`` are not compared.
    """
    known = {path: meta["data_sha256"] for path, meta in metas.items() if meta.get("data_sha256")}
    first = next(iter(known), None)
    for path, sha256 in known.items():
        if first is not None and sha256 != known[first]:
            what = "captions, names or their order differ (data_sha256)"
            warning = f"warning: {path} was computed from other data than {first}: {what}"
            print(warning, file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    """Run the subcommands import, show, export and merge."""
    parser = CommandParser(prog="python -m pab.scores")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("import", help="convert scores in any form to a score file")
    about = "tensor, array, table, run or ranked list; detected from the content"
    command.add_argument("file", type=Path, help=about)
    flags = {
        "--queries": "for files without ids: query ids of the rows, one per line, or query.json",
        "--gallery": "for files without ids: image names of the columns, one per line, or the "
        "gallery folder (sorted names); for runs and lists: the whole gallery",
    }
    add_path_flags(command.groups["data"], flags)
    output = command.groups["output"]
    output.add_argument("--out", type=Path, required=True, help="score file to write")
    command = commands.add_parser("show", help="describe a file of scores")
    command.add_argument("file", type=Path, help="scores in any form, with or without ids")
    command = commands.add_parser("export", help="write a score file in the format of another tool")
    command.add_argument("file", type=Path, help="scores with ids, in any form")
    output = command.groups["output"]
    form = output.add_mutually_exclusive_group(required=True)
    form.add_argument("--format", choices=score_export.FORMATS, help="format to write")
    about = "plain tensor without ids, plus two id lists"
    form.add_argument("--bare", action="store_true", help=about)
    most = f"(default: {score_export.DEFAULT_TOP_K} at most)"
    output.add_argument("--top_k", type=int, help=f"trec, ranx, rankings: images per query {most}")
    about = (
        "file to write; --bare: PREFIX of PREFIX.pt, PREFIX.queries.txt, PREFIX.gallery.txt "
        "(default: FILE_bare)"
    )
    output.add_argument("--out", type=Path, help=about)
    command = commands.add_parser("merge", help="join the parts that a command wrote with --part")
    command.add_argument("files", type=Path, nargs="+", help="all parts, in any order")
    output = command.groups["output"]
    output.add_argument("--out", type=Path, required=True, help="score file to write")
    args = parser.parse_args(argv)
    if args.command == "merge":
        twice = [path for path, count in Counter(args.files).items() if count > 1]
        if twice:
            raise InputError(twice[0], "expected every part once, found this file twice")
        merged = merge_parts({path: load_scores(path) for path in args.files})
        save_scores(args.out, merged)
        print(describe(args.out, Matrix("a score file", merged.scores), merged))
    elif args.command == "import":
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
