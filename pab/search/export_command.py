"""Export an index on the command line: `python -m pab.search export`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from pab.core.commands import CommandParser
from pab.core.counts import counted
from pab.core.outputs import check_output_folder
from pab.search.export import export_index
from pab.search.flags import add_index_flags
from pab.search.index import Index
from pab.search.libraries import library

PROG = "python -m pab.search export"


def build_parser() -> CommandParser:
    """Build the parser."""
    parser = CommandParser(
        prog=PROG, description="Export the vectors and metadata of an index for a vector database."
    )
    add_index_flags(parser)
    output = parser.groups["output"]
    output.add_argument(
        "--format", choices=("lancedb", "qdrant"), required=True,
        help="lancedb: Parquet files; qdrant: requests as JSON Lines",
    )  # fmt: skip
    output.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to write; new or empty"
    )
    return parser


def main(argv: Sequence[str]) -> None:
    """Parse the command line and export."""
    args = build_parser().parse_args(list(argv))
    library("pyarrow.parquet", "search indexes")
    index = Index.open(args.index)
    check_output_folder("--out", args.out)
    rows = export_index(index, args.out, args.format, args.members)
    print(f"export: {args.out}: {counted(rows, 'image')} for {args.format}", file=sys.stderr)
