"""Search photographs on the command line: `python -m pab.search`.

Prints the best photographs for each query with their scores, and optionally writes an HTML page and
a JSON file. See docs/search.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from pab.core.commands import CommandParser
from pab.core.errors import InputError, run_cli
from pab.core.files import write_json
from pab.core.notices import notice
from pab.core.outputs import cannot_be_written, check_outputs
from pab.data.captions import has_visible
from pab.data.photos import PHOTO_ENDINGS, PhotoFolder, list_photos
from pab.encoders.captions import BECOME_BLANKS
from pab.scoring.members import members
from pab.search.engine import search
from pab.search.members import read_member
from pab.search.page import write_page
from pab.search.results import as_plain, one_line, unreadable_file, write_unreadable

PROG = "python -m pab.search"
TOP_K = 20


class _Once(argparse.Action):
    """Store a value; reject a flag that is passed twice."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Store the value unless an earlier flag has set it."""
        before = getattr(namespace, self.dest)
        if before is not None:
            todo = "--arch names the architecture" if self.dest == "model" else "pass it once"
            raise InputError(f"--{self.dest}", f"passed twice: {before} and {values}", todo=todo)
        setattr(namespace, self.dest, values)


def build_parser() -> CommandParser:
    """Build the parser of the search flags, without the flags of the members."""
    parser = CommandParser(
        prog=PROG,
        epilog="All other flags go to the encoder (--config, --checkpoint, --pretrained, --device, "
        "--dtype, --batch_size, ...): python -m pab.scoring NAME --help lists them.",
    )
    data, model, output = parser.groups["data"], parser.groups["model"], parser.groups["output"]
    once: dict[str, Any] = {"action": _Once}
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
    output.add_argument("--html", type=Path, metavar="FILE", help="write results as a page", **once)
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
    answers = search(encoder, folder.photos, args.query, top_k)
    unreadable = dict(sorted({**folder.unreadable, **answers.unreadable}.items()))
    write_unreadable(listing, unreadable)
    if not answers.indexed:
        raise InputError(
            args.image_folder,
            f"expected images, found {len(unreadable)} that cannot be read (listed in {listing})",
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
    for query, hits in zip(args.query, answers.hits, strict=True):
        print(one_line(query))
        for hit in hits:
            print(f"{hit.rank:4}  {hit.score:8.4f}  {one_line(hit.name)}")
    sys.stdout.flush()  # print the lines on stderr last
    for name, path in (("page", args.html), ("results", args.json)):
        if path is not None:
            print(f"{name}: {path}", file=sys.stderr)
    where = f" (listed in {listing})" if unreadable else ""
    summary = f"{answers.indexed} images indexed, {len(unreadable)} not readable{where}"
    print(summary, file=sys.stderr)


def check_query(query: str) -> None:
    """Reject a query without visible text.

    The rule is that of captions (:func:`pab.data.captions.has_visible`), after removing the
    punctuation that BLIP-2 removes. A query is therefore valid for all models or for none.

    Raises:
        InputError: the query is empty, has no visible text, or is not UTF-8.
    """
    if not query:
        raise InputError("--query", "expected words, found an empty text")
    try:
        query.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError("--query", f"expected UTF-8 text, found {query!a}") from error
    if not has_visible(BECOME_BLANKS.sub(" ", query)):
        raise InputError("--query", f"expected words, found none in {query!a}")


def check_files(args: argparse.Namespace, listing: Path, folder: PhotoFolder) -> None:
    """Reject outputs that cannot be written or would overwrite a photograph."""
    outputs = {"html": args.html, "json": args.json}
    check_outputs(outputs, omit="leave out --{}")
    taken = {photo.path.absolute(): "a photograph" for photo in folder.photos}
    taken[listing.absolute()] = "the list of unreadable images"
    for name, path in outputs.items():
        if path is not None and path.absolute() in taken:
            raise InputError(
                f"--{name}", f"{path} is {taken[path.absolute()]}", todo="use another file"
            )
    problem = cannot_be_written(listing)
    if problem is not None:
        raise InputError(
            listing, f"the list of unreadable images {problem}", todo="set --json to another folder"
        )


def warn_left_out(where: Path, folder: PhotoFolder) -> None:
    """Print a notice about images in nested folders, and one about other skipped files.

    Raises:
        InputError: no file is left to search.
    """
    nested = ""
    if folder.nested:
        images, folders = folder.nested.total(), len(folder.nested)
        nested = f"{images} images in {folders} nested folders are not searched"
    if not folder.photos and not folder.unreadable:
        endings = ", ".join(sorted(PHOTO_ENDINGS))
        raise InputError(
            where,
            f"expected images ({endings}), found none" + (f"; {nested}" if nested else ""),
            todo="add --recursive" if nested else None,
        )
    if nested:
        notice(where, f"{nested}; --recursive searches them too")
    if folder.left_out():
        notice(where, f"left out: {folder.left_out()}")


if __name__ == "__main__":
    run_cli(main)
