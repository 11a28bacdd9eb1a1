"""Parser of all commands: grouped flags, `--version`, errors in one line."""

from __future__ import annotations

import argparse
import typing
from typing import Any, Literal, NoReturn

from pab.core import __version__
from pab.core.errors import EXIT_BAD_INPUT

Group = Literal["data", "model", "optimization", "output", "speed", "advanced"]

GROUPS: tuple[Group, ...] = typing.get_args(Group)  # in the order of --help


class CommandParser(argparse.ArgumentParser):
    """Argument parser with grouped flags, ``--version``, and errors in one line.

    Subparsers have this class too.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})
        version = f"person-anomaly-retrieval {__version__}"
        self.add_argument(
            "--version", action="version", version=version, help="show the version and exit"
        )
        self.groups = {name: self.add_argument_group(name) for name in GROUPS}

    def error(self, message: str) -> NoReturn:
        """Print one line on stderr and exit with code 2."""
        words = " ".join(message.split())  # a value may contain line breaks
        self.exit(EXIT_BAD_INPUT, f"error: {words}; see {self.prog} --help\n")
