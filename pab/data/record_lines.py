"""Convert the JSON objects of a file to records; collect the bad lines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from pab.core.errors import InputError
from pab.core.notices import notice
from pab.core.progress import progress
from pab.data.bad_lines import BadLines
from pab.data.fields import FieldNotes
from pab.data.json_lines import entries, json_object

Record = TypeVar("Record")
Value = TypeVar("Value")


def read_records(
    path: Path,
    record_of: Callable[[dict[str, Any], Path, str, FieldNotes], Record],
    collected: BadLines | None = None,
) -> Iterator[Record]:
    """Yield the records of valid lines, print notices, then raise one error for the bad lines.

    Args:
        path: the file.
        record_of: function (fields, file, item such as ``"line 17"``, notes) -> record; raises
            :class:`InputError` for a bad line.
        collected: collects the bad lines; if None, they raise one error.
    """
    size, what = path.stat().st_size, f"reading {path.name}"
    found = progress(entries(path), what, "B", size, lambda entry: len(entry[2]))
    lines = ((f"line {number}", raw) for number, _, raw in found)

    def of_line(raw: bytes, item: str, notes: FieldNotes) -> Record:
        return record_of(json_object(raw, path, item), path, item, notes)

    return valid_records(path, lines, of_line, collected)


def valid_records(
    path: Path,
    found: Iterable[tuple[str, Value]],
    record_of: Callable[[Value, str, FieldNotes], Record],
    collected: BadLines | None = None,
) -> Iterator[Record]:
    """Yield the records of valid values; ``found`` pairs each value with its place, for errors.

    See :func:`read_records`.
    """
    bad, notes = BadLines() if collected is None else collected, FieldNotes()
    for item, value in found:
        try:
            record = record_of(value, item, notes)
        except InputError as error:
            bad.add(error)
            continue
        yield record
    for text in notes.texts():
        notice(path, text)
    if collected is None:
        bad.check(path)


class Once:
    """Reject an id that an earlier line contains."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.first_seen: dict[str, str] = {}

    def __call__(self, value: str, path: Path, item: str) -> None:
        before = self.first_seen.setdefault(value, item)
        if before is not item:
            problem = f"expected every {self.what} once, found {value!r} already on {before}"
            raise InputError(path, problem, item=item)
