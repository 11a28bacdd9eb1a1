"""Print search results, convert them to JSON, and write the list of unreadable images."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pab.core.counts import counted
from pab.core.errors import InputError
from pab.core.files import write_text

if TYPE_CHECKING:  # both modules import torch, which an update of an index does not need
    from pab.search.engine import Answers
    from pab.search.query import Hit

UNREADABLE = Path("output/search/unreadable.txt")  # default without --json and --html


def as_plain(
    queries: Sequence[str], answers: Answers, unreadable: Mapping[str, str], **facts: str
) -> dict[str, Any]:
    """Convert the results to plain values for JSON.

    Args:
        queries: the queries, in order.
        answers: results of the search.
        unreadable: name -> problem of every unreadable image.
        facts: further top-level entries, such as the model and the checkpoint.
    """
    return {
        **facts,
        "indexed": answers.indexed,
        "queries": [
            {
                "query": query,
                "images": [
                    {"rank": rank, "path": hit.name, "score": hit.score}
                    for rank, hit in enumerate(hits, start=1)
                ],
            }
            for query, hits in zip(queries, answers.hits, strict=True)
        ],
        "unreadable": [{"path": name, "problem": problem} for name, problem in unreadable.items()],
    }


def hit_as_plain(rank: int, hit: Hit) -> dict[str, Any]:
    """Convert a result to plain values for JSON; unknown times and reranker scores are left out."""
    found: dict[str, Any] = {
        "rank": rank, "path": hit.name, "score": hit.score, "scores": dict(hit.scores),
    }  # fmt: skip
    if hit.time_s is not None:
        found["time_s"] = hit.time_s
    if hit.rerank_score is not None:
        found["rerank_score"] = hit.rerank_score
    return found


def print_hits(titles: Sequence[str], results: Sequence[Sequence[Hit]]) -> None:
    """Print each query, then one line per image: rank, score and name."""
    for title, hits in zip(titles, results, strict=True):
        print(one_line(title))
        for rank, hit in enumerate(hits, start=1):
            print(f"{rank:4}  {hit.rank_score:8.4f}  {one_line(hit.name)}")
    sys.stdout.flush()  # so that later lines on stderr appear below


def unreadable_file(json: Path | None, html: Path | None) -> Path:
    """Return the path of the list of unreadable images.

    The list is beside the JSON file, else beside the page, else at :data:`UNREADABLE`.
    """
    beside = json or html
    return UNREADABLE if beside is None else beside.with_name(f"{beside.stem}.unreadable.txt")


def write_unreadable(path: Path, unreadable: Mapping[str, str]) -> None:
    """Write one line per image: name and problem, separated by a tab.

    If all images are readable, remove the list of an earlier run.

    Raises:
        InputError: the file cannot be written or removed.
    """
    if unreadable:
        lines = [f"{one_line(name)}\t{one_line(why)}\n" for name, why in unreadable.items()]
        write_text(path, "".join(lines))
        return
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(path, f"cannot be removed: {error.strerror or error}") from error


def print_summary(indexed: int, unreadable: int, listing: Path) -> None:
    """Print the last line of a run on stderr: the numbers of indexed and of unreadable images."""
    where = f" (listed in {listing})" if unreadable else ""
    images = counted(indexed, "image")
    print(f"{images} indexed, {unreadable} not readable{where}", file=sys.stderr)


def one_line(text: str) -> str:
    """Replace control characters and line separators with escape sequences such as ``\\n``."""
    return "".join(
        letter.encode("unicode_escape").decode()
        if unicodedata.category(letter) in ("Cc", "Zl", "Zp")
        else letter
        for letter in text
    )
