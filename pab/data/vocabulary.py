"""Command line shared by the tokenizer commands: build a small vocabulary from captions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pab.core.config import CommandParser
from pab.core.counts import counted
from pab.core.progress import progress
from pab.data.training_set import TrainingSet


def vocabulary_command(
    make: Callable[[list[str], Path, int], int],
    argv: list[str] | None,
    *,
    prog: str,
    out: str,
    pieces: int,
) -> None:
    """Parse the command line, build a vocabulary from the captions, and print its size.

    Args:
        make: function (captions, output path, maximum size) -> number of pieces written.
        argv: arguments without the program's name; None reads ``sys.argv[1:]``.
        prog: name of the command, as typed.
        out: help text of ``--out``.
        pieces: default of ``--vocab_size``.
    """
    parser = CommandParser(prog=prog)
    data, model, output = parser.groups["data"], parser.groups["model"], parser.groups["output"]
    data.add_argument(
        "--data_path", type=Path, required=True,
        help="root of the PAB data, or a table or folder of captioned images",
    )  # fmt: skip
    output.add_argument("--out", type=Path, required=True, help=out)
    model.add_argument(
        "--vocab_size", type=int, default=pieces, help=f"maximum vocabulary size (default {pieces})"
    )
    args = parser.parse_args(argv)
    pairs = progress(TrainingSet.open(args.data_path), "reading captions", "captions")
    captions = [pair.caption for pair in pairs]
    found = make(captions, args.out, args.vocab_size)
    print(f"{found} pieces from {counted(len(captions), 'caption')} -> {args.out}")
