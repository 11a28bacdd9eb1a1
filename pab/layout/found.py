"""Result of the layout check of a path."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Found:
    """Description of a path.

    Attributes:
        what: the kind of file or folder, as a noun phrase.
        facts: counts and other findings, one per line.
        commands: next commands to run.
    """

    what: str
    facts: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()


def quoted(path: Path) -> str:
    """Quote a path for a shell command."""
    return shlex.quote(str(path))


def count(number: int, noun: str, plural: str = "") -> str:
    """Format a number with its noun: "1 image", "1,978 images"; ``plural`` defaults to NOUN + s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
