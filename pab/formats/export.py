"""Write scores in other tools' formats; :mod:`pab.formats.forms` reads all of these formats.

============  ====================================================================================
pt            a score file of this project
bare          the plain tensor, and the id lists ``.queries.txt`` and ``.gallery.txt`` beside it
npy           a NumPy array, and the same id lists
npz           arrays ``scores``, ``query_ids`` and ``gallery_ids``
csv           ids in the header and the first column
parquet       a column ``query`` of ids and a column per image; needs pyarrow
trec          ``query Q0 image rank score tag``; ties are written as descending float32 values
ranx          ``{query: {image: score}}``
rankings      JSON lines of ``{"query_index", "topk_gallery", "topk_scores"}``, without scores if
              the source has only an order
============  ====================================================================================
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pab.core.errors import InputError
from pab.core.files import atomic_path, write_text
from pab.core.notices import notice
from pab.core.progress import progress
from pab.formats.tables import pyarrow
from pab.ranking import top_k as best_columns

if TYPE_CHECKING:
    from pab.formats.score_file import ScoreFile

FORMATS = ("pt", "bare", "npy", "npz", "csv", "parquet", "trec", "ranx", "rankings")
LISTS = ("trec", "ranx", "rankings")
DEFAULT_TOP_K = 1000  # images per query in lists, as is customary for TREC runs

# Image names of a query, best first, with their scores.
Ranking = tuple[Sequence[str], NDArray[np.floating]]


def paths(form: str, out: Path) -> list[Path]:
    """Return the files that an export writes: the scores first, then the id lists.

    Args:
        form: one of :data:`FORMATS`; ``"prefix"`` is ``"bare"`` with ``out`` as the name prefix.
        out: output file.
    """
    if form == "prefix":
        out = out.with_name(f"{out.name}.pt")
    if form not in ("prefix", "bare", "npy"):
        return [out]
    stem = out.stem if out.suffix in (".pt", ".npy") else out.name
    return [out, *(out.with_name(f"{stem}.{kind}.txt") for kind in ("queries", "gallery"))]


def export(score_file: ScoreFile, form: str, out: Path, *, top_k: int | None = None) -> list[Path]:
    """Write a score file in another form.

    Args:
        score_file: the scores.
        form: one of :data:`FORMATS`, or ``"prefix"`` (see :func:`paths`).
        out: output file.
        top_k: images per query in forms that list images; None writes the first 1,000. Images that
            the original source did not list are omitted.

    Returns:
        The files written.

    Raises:
        InputError: ``top_k`` is below 1 or set for a form with the whole matrix, the form cannot
            represent an id, pyarrow is missing, or the file cannot be written.
    """
    if top_k is not None and form not in LISTS:
        raise InputError("--top_k", f"requires --format {' or '.join(LISTS)}")
    if top_k is not None and top_k < 1:
        raise InputError("--top_k", f"must be at least 1, found {top_k}")
    written = paths(form, out)
    if form not in LISTS and form != "pt" and score_file.listed is not None:
        notice(out, "unlisted images are written with a score below those of the listed images")
    match form:
        case "pt":
            from pab.formats.score_file import save_scores  # imports torch, like the next case

            save_scores(out, score_file)
        case "bare" | "prefix":
            from pab.core.tensor_files import write_tensors

            write_tensors(written[0], score_file.scores.clone())
        case "npy":
            with atomic_path(out) as temporary, temporary.open("wb") as handle:
                np.save(handle, score_file.scores.numpy())
        case "npz":
            rows, columns = score_file.query_ids, score_file.gallery_ids
            with atomic_path(out) as temporary, temporary.open("wb") as handle:
                scores = score_file.scores.numpy()
                np.savez(handle, scores=scores, query_ids=rows, gallery_ids=columns)
        case "csv":
            _write_csv(score_file, out)
        case "parquet":
            _write_parquet(score_file, out)
        case _:
            _write_lists(score_file, form, out, top_k)
    for path, ids in zip(written[1:], (score_file.query_ids, score_file.gallery_ids), strict=False):
        write_text(path, "".join(f"{one}\n" for one in ids))
    return written


def _write_csv(score_file: ScoreFile, out: Path) -> None:
    with atomic_path(out) as temporary, temporary.open("w", encoding="utf-8", newline="") as handle:
        separator = "\t" if out.suffix.lower() == ".tsv" else ","
        writer = csv.writer(handle, delimiter=separator, lineterminator="\n")
        writer.writerow(["query", *score_file.gallery_ids])
        query_ids = progress(score_file.query_ids, f"writing {out.name}", "queries")
        for query_id, row in zip(query_ids, score_file.scores, strict=True):
            writer.writerow([query_id, *(f"{value:.9g}" for value in row.tolist())])


def _write_parquet(score_file: ScoreFile, out: Path) -> None:
    arrow = pyarrow(out)
    name = "query"
    while name in score_file.gallery_ids:
        name += "_id"
    columns = score_file.scores.T.contiguous().numpy()  # [G, Q]
    table = arrow.table(
        {name: score_file.query_ids, **dict(zip(score_file.gallery_ids, columns, strict=True))}
    )
    with atomic_path(out) as temporary:
        arrow.parquet.write_table(table, str(temporary))


def _write_lists(score_file: ScoreFile, form: str, out: Path, top_k: int | None) -> None:
    depth = top_k or DEFAULT_TOP_K
    if top_k is None and score_file.listed_counts().max() > depth:
        notice(out, f"holds the first {depth} images of each query; --top_k sets another number")
    ranking = progress(ranking_of(score_file, depth), f"writing {out.name}", "queries")
    if form == "trec":
        write_text(out, "".join(trec_lines(out, score_file.query_ids, ranking)))
    elif form == "ranx":
        run = {
            query_id: dict(zip(names, map(_shortest, scores), strict=True))
            for query_id, (names, scores) in zip(score_file.query_ids, ranking, strict=True)
        }
        write_text(out, json.dumps(run, ensure_ascii=False) + "\n")
    else:
        write_text(out, "".join(_ranking_lines(score_file, ranking)))


def _ranking_lines(score_file: ScoreFile, ranking: Iterable[Ranking]) -> Iterator[str]:
    """Yield JSON lines with the order, and with scores unless they only encode the order."""
    for query_id, (names, scores) in zip(score_file.query_ids, ranking, strict=True):
        record: dict[str, Any] = {"query_index": query_id, "topk_gallery": list(names)}
        if not score_file.is_order_alone:
            record["topk_scores"] = [_shortest(score) for score in scores]
        yield json.dumps(record, ensure_ascii=False) + "\n"


def _shortest(score: np.floating) -> float:
    """Round a float32 to nine significant digits, which convert back to the same float32."""
    return float(f"{score:.9g}")


def ranking_of(score_file: ScoreFile, top_k: int) -> list[Ranking]:
    """Return the first images per query with their scores.

    Images that the scores' source did not list are omitted.
    """
    best = best_columns(score_file.scores, top_k)
    values = score_file.scores.gather(1, best).numpy()
    counts = score_file.listed_counts().tolist()
    return [
        ([score_file.gallery_ids[column] for column in columns[:count]], row[:count])
        for columns, row, count in zip(best.tolist(), values, counts, strict=True)
    ]


def write_trec(
    prefix: str | Path,
    query_ids: Sequence[str],
    ranking: Sequence[Ranking],
    relevant: Mapping[str, frozenset[str]],
) -> None:
    """Write ``PREFIX.run`` and ``PREFIX.qrels`` in TREC format.

    The run preserves the order of images with equal scores (:func:`trec_lines`).

    Args:
        prefix: prefix of the two file names.
        query_ids: ``Q`` ids.
        ranking: gallery names (best first) and their scores, per query.
        relevant: query id -> relevant gallery ids; may contain queries that the ranking lacks.

    Raises:
        InputError: an id contains a blank, which the format cannot represent, or a file cannot be
            written.
    """
    shown = progress(ranking, f"writing {prefix}.run", "queries")
    run = "".join(trec_lines(f"{prefix}.run", query_ids, shown))
    qrels: list[str] = []
    for query_id, images in relevant.items():
        check_words(f"{prefix}.qrels", (query_id, *images))
        qrels.extend(f"{query_id} 0 {name} 1\n" for name in sorted(images))
    write_text(f"{prefix}.run", run)
    write_text(f"{prefix}.qrels", "".join(qrels))


def trec_lines(
    where: str | Path, query_ids: Iterable[str], ranking: Iterable[Ranking]
) -> Iterator[str]:
    """Yield the lines of a TREC run.

    Other tools sort by score and break ties by their own rules. A score that is not below the
    previous written one is replaced by the next float32 below that one, to preserve the order.

    Args:
        where: the file, for the error.
        query_ids: ``Q`` ids.
        ranking: per query, gallery names (best first) and their scores.

    Raises:
        InputError: an id contains a blank, which the format cannot represent.
    """
    for query_id, (names, scores) in zip(query_ids, ranking, strict=True):
        check_words(where, (query_id, *names))
        below = np.float32(np.inf)
        for rank, (name, score) in enumerate(zip(names, scores, strict=True), start=1):
            below = min(np.float32(score), np.nextafter(below, np.float32(-np.inf)))
            yield f"{query_id} Q0 {name} {rank} {below:.9g} pab\n"


def check_words(where: str | Path, ids: Iterable[str]) -> None:
    """Reject ids with a blank, which TREC formats cannot represent.

    Raises:
        InputError: an id contains a blank; the message names the id.
    """
    for one in ids:
        if one.split() != [one]:
            raise InputError(where, f"expected ids without blanks, found {one!r}")
