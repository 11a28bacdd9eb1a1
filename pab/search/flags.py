"""Flags that the search commands share, and the action of flags that may be passed only once."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pab.core.commands import CommandParser
from pab.core.errors import InputError

RERANK_DEPTH = 20


def add_index_flags(parser: CommandParser) -> None:
    """Add ``--index`` and ``--members``, for commands that read an index."""
    parser.groups["data"].add_argument(
        "--index", type=Path, required=True, metavar="DIR", help="folder of an index"
    )
    parser.groups["model"].add_argument(
        "--members", nargs="+", default=[], metavar="NAME",
        help="members of the index to use (default: all)",
    )  # fmt: skip


def add_device_flag(parser: CommandParser) -> None:
    """Add ``--device``, for commands that open the models of an index."""
    parser.groups["speed"].add_argument(
        "--device", metavar="NAME", help="device of the models (default: the setting of the index)"
    )


def add_rerank_flags(parser: CommandParser) -> None:
    """Add ``--rerank`` and ``--rerank_depth``."""
    model = parser.groups["model"]
    model.add_argument(
        "--rerank", metavar="uit|FILE",
        help="re-rank the first images with a cross encoder: uit, or a YAML config of a reranker",
    )  # fmt: skip
    model.add_argument(
        "--rerank_depth", type=int, default=RERANK_DEPTH, metavar="N",
        help=f"images per query to re-rank (default: {RERANK_DEPTH})",
    )  # fmt: skip


def add_ann_flag(parser: CommandParser) -> None:
    """Add ``--ann``."""
    parser.groups["speed"].add_argument(
        "--ann", action="store_true",
        help="use the approximate index that index --ann built; searches with several "
        "members, a folder or a time range stay exact",
    )  # fmt: skip


class Once(argparse.Action):
    """Store a value; reject a flag that is passed twice."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Store the value.

        Raises:
            InputError: the flag was passed before.
        """
        before = getattr(namespace, self.dest)
        if before is not None:
            todo = "--arch names the architecture" if self.dest == "model" else "pass it once"
            raise InputError(f"--{self.dest}", f"passed twice: {before} and {values}", todo=todo)
        setattr(namespace, self.dest, values)
