"""Notices: one line on stderr per assumption made about an input.

A reader that accepts a file in an unusual form reports it with :func:`notice`. Each notice is
printed once, and only by rank 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pab.core.progress import write_line

_said: set[str] = set()
_records: list[list[tuple[str, str]]] = []


def notice(where: str | Path, text: str) -> None:
    """Print ``note: WHERE: TEXT`` on stderr, once.

    Args:
        where: file, flag or setting that the assumption concerns.
        text: the assumption or omission, in one clause.
    """
    for record in _records:
        record.append((str(where), text))
    line = " ".join(f"note: {where}: {text}".split())
    if line not in _said:
        _said.add(line)
        write_line(line)


@contextmanager
def recorded() -> Iterator[list[tuple[str, str]]]:
    """Collect (where, text) of all notices in the block, whether printed or not."""
    record: list[tuple[str, str]] = []
    _records.append(record)
    try:
        yield record
    finally:
        _records.remove(record)


def forget_notices() -> None:
    """Allow every notice to be printed again (for tests, which share a process)."""
    _said.clear()
