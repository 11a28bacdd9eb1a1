"""Search photographs once: `python -m pab.search --model NAME --image_folder DIR --query TEXT`.

Indexes the photographs in a temporary folder, searches the index, and prints the best photographs
for each query with their scores. Optionally writes an HTML page and a JSON file. See
docs/search.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from pab.core.commands import CommandParser
from pab.core.errors import InputError
from pab.core.files import write_json
from pab.core.outputs import cannot_be_written, check_outputs
from pab.data.photos import PhotoFolder, list_photos
from pab.scoring.members import members
from pab.search.engine import search
from pab.search.flags import Once
from pab.search.members import read_member
from pab.search.page import write_page
from pab.search.results import (
    as_plain,
    print_hits,
    print_summary,
    unreadable_file,
    write_unreadable,
)
from pab.search.sources import warn_left_out
from pab.search.texts import TOP_K, check_query
from pab.search.vectors import report_ignored_ends

PROG = "python -m pab.search"


def build_parser() -> CommandParser:
    """Build the parser of the search flags, without the flags of the members."""
    parser = CommandParser(
        prog=PROG,
        epilog="python -m pab.search index makes a permanent index; query searches it, serve "
        "shows it on a page, and export writes it for vector databases. All other flags go to the "
        "encoder (--config, --checkpoint, --pretrained, --device, --dtype, --batch_size, ...): "
        "python -m pab.scoring NAME --help lists them.",
    )
    data, model, output = parser.groups["data"], parser.groups["model"], parser.groups["output"]
    once: dict[str, Any] = {"action": Once}
    model.add_argument(
        "--model", choices=members(), required=True, help="member to search with", **once
    )
    model.add_argument("--arch", metavar="NAME", help="architecture of the member", **once)
    data.add_argument(
        "--image_folder", type=Path, required=True, metavar="DIR", help="folder of photographs",
        **once,
    )  # fmt: skip
    data.add_argument("--recursive", action="store_true", help="also search nested folders")
    data.add_argument(
        "--query", action="append", required=True, metavar="TEXT",
        help="description of the photographs to find; may be repeated",
    )  # fmt: skip
    output.add_argument(
        "--top_k", type=int, metavar="N", help=f"photographs per query (default: {TOP_K})", **once
    )
    output.add_argument(
        "--html", type=Path, metavar="FILE", help="write the results as an HTML page", **once
    )
    output.add_argument(
        "--json", type=Path, metavar="FILE", help="write the results as JSON", **once
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, search, then write and print the results."""
    args, rest = build_parser().parse_known_args(argv)
    top_k = TOP_K if args.top_k is None else args.top_k
    if top_k < 1:
        raise InputError("--top_k", f"must be at least 1, found {top_k}")
    for query in args.query:
        check_query(query)
    member = read_member(args.model, args.arch, rest, prog=PROG)
    folder = list_photos(args.image_folder, recursive=args.recursive)
    listing = unreadable_file(args.json, args.html)
    check_files(args, listing, folder)
    warn_left_out(args.image_folder, folder)

    encoder = member.open()
    report_ignored_ends({args.model: encoder}, args.query)
    answers = search(encoder, folder.photos, args.query, top_k)
    unreadable = dict(sorted({**folder.unreadable, **answers.unreadable}.items()))
    write_unreadable(listing, unreadable)
    if not answers.indexed:
        raise InputError(
            args.image_folder,
            f"expected readable images, found {len(unreadable)} that cannot be read "
            f"(listed in {listing})",
        )
    if args.json is not None:
        facts = {
            "model": args.model,
            "architecture": encoder.origin.architecture,
            "checkpoint": encoder.origin.checkpoint,
            "image_folder": str(args.image_folder),
        }
        write_json(args.json, as_plain(args.query, answers, unreadable, **facts))
    if args.html is not None:
        write_page(args.html, args.query, answers, len(unreadable))
    print_hits(args.query, answers.hits)
    for name, path in (("page", args.html), ("results", args.json)):
        if path is not None:
            print(f"{name}: {path}", file=sys.stderr)
    print_summary(answers.indexed, len(unreadable), listing)


def check_files(args: argparse.Namespace, listing: Path, folder: PhotoFolder) -> None:
    """Reject outputs that cannot be written, or would overwrite a photograph or another output."""
    outputs = {"html": args.html, "json": args.json}
    check_outputs(outputs, omit="leave out --{}")
    taken = {listing.resolve(): "the list of unreadable images"}
    if any(path is not None and path.exists() for path in outputs.values()):
        taken |= {photo.path.resolve(): "a photograph" for photo in folder.photos}
    for name, path in outputs.items():
        if path is not None and path.resolve() in taken:
            raise InputError(
                f"--{name}", f"{path} is {taken[path.resolve()]}", todo="use another file"
            )
    problem = cannot_be_written(listing)
    if problem is not None:
        raise InputError(
            listing, f"the list of unreadable images {problem}",
            todo="set --json to a file in another folder",
        )  # fmt: skip
