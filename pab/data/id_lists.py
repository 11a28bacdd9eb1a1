"""Read lists of ids, one per line."""

from __future__ import annotations

from pathlib import Path

from pab.core.errors import InputError
from pab.core.files import existing_file
from pab.data.json_lines import decoded, lines


def read_id_list(path: str | Path, what: str = "a list of ids, one per line") -> list[str]:
    """Read unique ids, one per line, in file order.

    Blank lines, a byte-order mark and Windows line ends are skipped.

    Raises:
        InputError: the file is missing, unreadable, not UTF-8, empty, or repeats an id.
    """
    path = existing_file(path, what)
    first_seen: dict[str, int] = {}
    for number, _, raw in lines(path):
        name = decoded(raw, path, f"line {number}").strip()
        if name in first_seen:
            raise InputError(
                path,
                f"expected every id once, found {name!r} already on line {first_seen[name]}",
                item=f"line {number}",
            )
        first_seen[name] = number
    if not first_seen:
        raise InputError(path, f"expected {what}, found an empty file")
    return list(first_seen)


def read_query_order(path: str | Path) -> list[str]:
    """Read a query order file (Track 4's ``query_index.txt``): one query id per line.

    Raises:
        InputError: see :func:`read_id_list`.
    """
    return read_id_list(path, "a query order file, one query id per line")
