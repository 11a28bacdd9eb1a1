"""Notices: one line on stderr for every assumption made about an input.

A reader that accepts a file in another form than the usual one says so with :func:`notice`. Each
text is printed once per process, and only by the main process.
"""

from __future__ import annotations

import sys
from pathlib import Path

_said: set[str] = set()


def notice(where: str | Path, text: str) -> None:
    """Print ``note: WHERE: TEXT`` on stderr, once.

    Args:
        where: the file, flag or setting that the assumption is about.
        text: what was assumed or left out, in one clause.
    """
    line = " ".join(f"note: {where}: {text}".split())
    if line in _said or not _is_main():
        return
    _said.add(line)
    print(line, file=sys.stderr)


def _is_main() -> bool:
    """Whether this is the main process, found without importing torch for work on lists alone."""
    if "torch" not in sys.modules:
        return True  # nothing has joined a group of processes
    from pab import processes

    return processes.is_main()


def forget_notices() -> None:
    """Allow every notice to be printed again (for tests, which share one process)."""
    _said.clear()
