"""Search an index on the command line: `python -m pab.search query`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

from pab.core.commands import CommandParser
from pab.core.errors import InputError
from pab.core.files import write_json
from pab.core.notices import notice
from pab.core.outputs import check_inputs_are_kept, check_outputs
from pab.data.photos import load_photo
from pab.search.ann import usable_ann
from pab.search.flags import add_ann_flag, add_device_flag, add_index_flags, add_rerank_flags
from pab.search.index import Index
from pab.search.libraries import library
from pab.search.members import open_encoders
from pab.search.query import PARTS, Filters, Query, Searcher
from pab.search.rerank import check_depth, open_reranker, reranked
from pab.search.results import hit_as_plain, print_hits
from pab.search.texts import TOP_K, check_query
from pab.search.vectors import report_ignored_ends

PROG = "python -m pab.search query"

Pair = tuple[str | None, Path | None]  # text and image of a query


def build_parser() -> CommandParser:
    """Build the parser."""
    parser = CommandParser(
        prog=PROG, description="Search an index made by python -m pab.search index."
    )
    add_index_flags(parser)
    data, model, output = parser.groups["data"], parser.groups["model"], parser.groups["output"]
    data.add_argument(
        "--text", action="append", default=[], metavar="TEXT",
        help="description of the images to find; may be repeated",
    )  # fmt: skip
    data.add_argument(
        "--image", action="append", type=Path, default=[], metavar="FILE",
        help="example image; a single one is combined with each text, several are paired with the "
        "texts in order; may be repeated",
    )  # fmt: skip
    data.add_argument(
        "--minus", action="append", default=[], metavar="TEXT",
        help="description of unwanted content, for all queries; may be repeated",
    )  # fmt: skip
    data.add_argument(
        "--folder", default="", metavar="NAME", help="search only names that begin with NAME/"
    )
    for flag, text in (("--start", "first"), ("--end", "last")):
        data.add_argument(
            flag, type=float, metavar="SECONDS", help=f"{text} time stamp of frames to search"
        )
    data.add_argument("--least", type=float, metavar="SCORE", help="smallest score of a result")
    model.add_argument(
        "--weights", nargs="+", default=[], metavar="NAME=X",
        help=f"weights of {', '.join(PARTS)} in a query, and of members in the fusion (default: 1)",
    )  # fmt: skip
    model.add_argument(
        "--one_to_one", action="store_true",
        help="assign the first images of all queries jointly, so that all differ",
    )  # fmt: skip
    add_rerank_flags(parser)
    output.add_argument(
        "--top_k", type=int, default=TOP_K, metavar="N",
        help=f"images per query (default: {TOP_K})",
    )  # fmt: skip
    output.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    add_ann_flag(parser)
    add_device_flag(parser)
    return parser


def main(argv: Sequence[str]) -> None:
    """Parse the command line, search, then write and print the results."""
    args = build_parser().parse_args(list(argv))
    if args.top_k < 1:
        raise InputError("--top_k", f"must be at least 1, found {args.top_k}")
    for flag, texts in (("--text", args.text), ("--minus", args.minus)):
        for text in texts:
            check_query(text, flag)
    check_depth(args.rerank_depth)
    library("pyarrow.parquet", "search indexes")
    index = Index.open(args.index)
    check_outputs({"json": args.json}, omit="leave out --{}")
    if args.json is not None and args.index.resolve() in args.json.resolve().parents:
        problem = f"{args.json} is in the folder of the index"
        raise InputError("--json", problem, todo="use another folder")
    check_not_indexed(index, args.json)
    names = args.members or [member.name for member in index.members]
    weights = parsed_weights(args.weights, names)
    pairs = paired(args.text, args.image)
    of_parts = {name: weight for name, weight in weights.items() if name in PARTS}
    queries = queries_of(pairs, args.minus, of_parts)
    settings = {} if args.device is None else {"device": args.device}
    more = [] if args.device is None else ["--device", args.device]
    reranker = open_reranker(args.rerank, **settings) if args.rerank else None
    encoders = open_encoders(index, prog=PROG, names=names, more=more)
    report_ignored_ends(encoders, [*args.text, *args.minus])
    of_members = {name: weight for name, weight in weights.items() if name not in PARTS}
    ann = usable_ann(index, names) if args.ann else None
    searcher = Searcher(index, encoders, of_members, ann)
    filters = Filters(args.folder, args.start, args.end, args.least)
    filters.check()
    chosen = filters.rows(index)
    if chosen is not None and not len(chosen):
        flags = ", ".join(f"--{one}" for one in ("folder", "start", "end") if is_given(args, one))
        notice(flags, "the index has no such images")
    wanted = args.top_k if reranker is None else max(args.top_k, args.rerank_depth)
    joint = args.one_to_one and reranker is None  # with a reranker, `reranked` assigns
    hits = searcher.search(queries, wanted, filters, one_to_one=joint)
    if reranker is not None:
        hits = reranked(
            index, queries, hits, reranker, args.rerank_depth, one_to_one=args.one_to_one
        )  # fmt: skip
    hits = [one[: args.top_k] for one in hits]
    if args.least is not None and not any(hits) and (chosen is None or len(chosen)):
        notice("--least", "no image has such a score")
    if args.json is not None:
        facts = {
            "index": str(args.index), "indexed": index.rows, "weights": searcher.weights,
            "rerank": args.rerank,
        }  # fmt: skip
        shown: list[dict[str, Any]] = [
            {
                "query": query.text,
                "image": None if image is None else str(image),
                "minus": list(query.minus),
                "images": [hit_as_plain(rank, hit) for rank, hit in enumerate(one, start=1)],
            }
            for (_, image), query, one in zip(pairs, queries, hits, strict=True)
        ]
        write_json(args.json, {**facts, "queries": shown})
    print_hits([title_of(*pair, args.minus) for pair in pairs], hits)
    if args.json is not None:
        print(f"results: {args.json}", file=sys.stderr)


def check_not_indexed(index: Index, out: Path | None) -> None:
    """Reject an output that would overwrite an image, an archive or a video of the index.

    Raises:
        InputError: see above.
    """
    if out is None or not out.is_file():
        return
    with out.open("rb") as file:
        # An earlier result begins with a brace, unlike an image: a large index need not be read.
        if file.read(1) == b"{":
            return
    check_inputs_are_kept({"json": out}, {"the index": [*{one.path for one in index.entries()}]})


def is_given(args: argparse.Namespace, flag: str) -> bool:
    """Return true if a filter is set; the start of a video, 0, is a filter too."""
    return getattr(args, flag) not in (None, "")


def parsed_weights(words: Sequence[str], members: Sequence[str]) -> dict[str, float]:
    """Parse the words of ``--weights``: ``NAME=X`` for a part of the query or a member.

    Raises:
        InputError: a word has another form, a name is unknown or repeated, or a number is negative
            or not finite.
    """
    found: dict[str, float] = {}
    known = (*PARTS, *members)
    for word in words:
        name, _, number = word.partition("=")
        try:
            weight = float(number)
        except ValueError as error:
            raise InputError("--weights", f"expected NAME=NUMBER, found {word!r}") from error
        if name not in known or name in found:
            problem = f"expected each of {', '.join(known)} at most once, found {name!r}"
            raise InputError("--weights", problem)
        if not 0 <= weight < float("inf"):
            raise InputError("--weights", f"expected a number of at least 0, found {word!r}")
        found[name] = weight
    return found


def paired(texts: Sequence[str], images: Sequence[Path]) -> list[Pair]:
    """Pair texts and images, one pair per query; a single image is paired with each text.

    Raises:
        InputError: there is neither, or there are several images but not one per text.
    """
    if not texts and not images:
        raise InputError(PROG, "expected --text or --image, found neither")
    if not images:
        return [(text, None) for text in texts]
    if not texts:
        return [(None, image) for image in images]
    if len(images) == 1:
        return list(zip(texts, repeat(images[0])))
    if len(texts) != len(images):
        problem = f"expected one image, or one per --text ({len(texts)}), found {len(images)}"
        raise InputError("--image", problem)
    return list(zip(texts, images, strict=True))


def queries_of(
    pairs: Sequence[Pair], minus: Sequence[str], weights: dict[str, float]
) -> list[Query]:
    """Build the queries; each image is read once, upright.

    Raises:
        InputError: an image cannot be read.
    """
    paths = dict.fromkeys(image for _, image in pairs if image is not None)
    pictures = {path: load_photo(path) for path in paths}
    return [
        Query(text, None if image is None else pictures[image], tuple(minus), weights)
        for text, image in pairs
    ]


def title_of(text: str | None, image: Path | None, minus: Sequence[str]) -> str:
    """Return the title line of a query."""
    parts = [part for part in (text, None if image is None else f"[{image}]") if part]
    return " + ".join(parts) + "".join(f" - {unwanted}" for unwanted in minus)
