"""The command line of what makes a small vocabulary from training captions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pab.core.config import CommandParser
from pab.data.training_set import TrainingSet


def vocabulary_command(
    make: Callable[[list[str], Path, int], int],
    argv: list[str] | None,
    *,
    prog: str,
    description: str | None,
    out: str,
    pieces: int,
) -> None:
    """Read the command line, make the vocabulary of a data root's captions, say how large it is.

    Args:
        make: captions, where to write, pieces at most -> pieces written.
        argv: arguments without the program's name; None = ``sys.argv[1:]``.
        prog: name of the command, as the user types it.
        description: for ``--help``.
        out: what ``--out`` is.
        pieces: default of ``--vocab_size``.
    """
    parser = CommandParser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("--data_path", type=Path, required=True, help="root of PAB-shaped data")
    parser.add_argument("--out", type=Path, required=True, help=out)
    parser.add_argument(
        "--vocab_size", type=int, default=pieces, help=f"pieces at most (default {pieces})"
    )
    args = parser.parse_args(argv)
    captions = [pair.caption for pair in TrainingSet.open(args.data_path)]
    found = make(captions, args.out, args.vocab_size)
    print(f"{found} pieces from {len(captions)} captions -> {args.out}")
