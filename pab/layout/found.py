"""Result of the layout check of a path."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Found:
    """An explained path.

    Attributes:
        what: the kind of file or folder, as a noun phrase.
        facts: counts and other findings, one per line.
        commands: what to run next.
    """

    what: str
    facts: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()


def quoted(path: Path) -> str:
    """A path as a word of a shell command."""
    return shlex.quote(str(path))


def count(number: int, noun: str, plural: str = "") -> str:
    """A number with its noun: "1 image", "1,978 images"; ``plural`` is NOUN + s if not given."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
