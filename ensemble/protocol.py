"""Evaluation protocols: files, line order, metrics, and rules for an answer file.

A protocol is a YAML file in `configs/protocols/`. `python -m ensemble.protocol NAME FILE` checks an
answer file before submission.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ensemble.members import known_gallery
from pab.core.config import CommandParser, flag, load_config
from pab.core.errors import InputError, run_cli
from pab.core.resources import CONFIGS
from pab.data.annotations import read_retrieval
from pab.data.id_lists import read_query_order
from pab.data.tree import labelled_test
from pab.ranking import order_queries, read_ranked_list

LABELLED_TEST = "annotation/test/pair.json"  # if it is missing, attr.json is used
PROTOCOL_FILES = ("annotation", "image_folder", "query_order")  # settings that a protocol fixes
ANSWER_NAMES = 10  # names per line in every protocol's answer


@dataclass(frozen=True)
class Protocol:
    """Settings fixed by an evaluation protocol; paths are relative to the data root."""

    data_root: str = flag("", "root of the protocol's data")
    annotation: str = flag("", "queries, with labels if there are any")
    image_folder: str | None = flag(None, "gallery of a name-masked set")
    query_order: str | None = flag(None, "file of query ids in the answer's line order")
    metrics: tuple[str, ...] = flag((), "metrics to report")

    def files(self, data_root: str | None) -> dict[str, Any]:
        """Return the protocol's files as settings of `ensemble.run`.

        Args:
            data_root: data root to use instead of the protocol's; None uses the protocol's.
        """
        root = Path(data_root or self.data_root)
        places = {name: getattr(self, name) for name in PROTOCOL_FILES}
        files = {name: str(root / place) for name, place in places.items() if place is not None}
        if self.annotation == LABELLED_TEST:
            files["annotation"] = str(labelled_test(root))
        return files


def names() -> list[str]:
    """List the available protocols."""
    return sorted(path.stem for path in (CONFIGS / "protocols").glob("*.yaml"))


def load_protocol(name: str) -> Protocol:
    """Load a protocol by name.

    Raises:
        InputError: unknown name; the message lists the available ones.
    """
    if name not in names():
        raise InputError("protocol", f"expected one of {', '.join(names())}, found {name!r}")
    return load_config(Protocol, CONFIGS / f"protocols/{name}.yaml", {})


def check_answer(
    lines: Sequence[Sequence[str]], query_count: int, gallery_ids: Sequence[str], where: str | Path
) -> None:
    """Check an answer: one line per query, ten gallery names per line (all if there are fewer).

    Args:
        lines: image names, best first; names are distinct within a line, and all lines have the
            same number of names (see :func:`pab.ranking.read_ranked_list`).
        query_count: number of queries in the protocol's annotation.
        gallery_ids: ids of the protocol's gallery.
        where: answer file, for error messages.

    Raises:
        InputError: the number of lines or of names per line is wrong, or a name is not in the
            gallery.
    """
    if len(lines) != query_count:
        raise InputError(where, f"expected one line per query ({query_count}), found {len(lines)}")
    wanted = min(ANSWER_NAMES, len(gallery_ids))
    if len(lines[0]) != wanted:
        raise InputError(where, f"expected {wanted} names per line, found {len(lines[0])}")
    known = set(gallery_ids)
    for number, line in enumerate(lines, start=1):
        unknown = next((name for name in line if name not in known), None)
        if unknown is not None:
            raise InputError(
                where, f"the name {unknown!r} is not in the gallery", item=f"line {number}"
            )


def main(argv: list[str] | None = None) -> None:
    """Check an answer file against a protocol."""
    parser = CommandParser(prog="python -m ensemble.protocol")
    parser.add_argument("protocol", help=f"name of the protocol: {', '.join(names())}")
    parser.add_argument("file", type=Path, help="answer file")
    parser.groups["data"].add_argument(
        "--data_root", help="root of the data (default: the protocol's)"
    )
    args = parser.parse_args(argv)
    files = load_protocol(args.protocol).files(args.data_root)
    retrieval = read_retrieval(files["annotation"], image_folder=files.get("image_folder"))
    ids = [query.query_id for query in retrieval.queries]
    if "query_order" in files:
        ids = order_queries(ids, read_query_order(files["query_order"]), where=files["query_order"])
    gallery = known_gallery(retrieval, files.get("image_folder")) or []
    check_answer(read_ranked_list(args.file), len(ids), gallery, args.file)
    print(f"{args.file}: {len(ids)} lines of distinct known names, as {args.protocol} requires")


if __name__ == "__main__":
    run_cli(main)
