"""Convert the JSON objects of a file to records; collect the bad lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from pab.core.errors import InputError
from pab.core.notices import notice
from pab.core.progress import progress
from pab.data.bad_lines import BadLines
from pab.data.fields import FieldNotes
from pab.data.json_lines import entries, json_object

Record = TypeVar("Record")


def read_records(
    path: Path,
    record_of: Callable[[dict[str, Any], Path, str, FieldNotes], Record],
    collected: BadLines | None = None,
) -> Iterator[Record]:
    """Yield the records of valid lines, print notices, then raise one error for the bad lines.

    Args:
        path: the file.
        record_of: fields, file, ``"line 17"`` and notes -> record; raises for a bad line.
        collected: takes the bad lines; without it they are raised.
    """
    bad, notes = BadLines() if collected is None else collected, FieldNotes()
    size = path.stat().st_size
    for number, _, raw in progress(
        entries(path), f"reading {path.name}", "B", size, lambda entry: len(entry[2])
    ):
        item = f"line {number}"
        try:
            record = record_of(json_object(raw, path, item), path, item, notes)
        except InputError as error:
            bad.add(error)
            continue
        yield record
    for text in notes.texts():
        notice(path, text)
    if collected is None:
        bad.check(path)


class Once:
    """Reject an id that an earlier line has."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.first_seen: dict[str, str] = {}

    def __call__(self, value: str, path: Path, item: str) -> None:
        before = self.first_seen.setdefault(value, item)
        if before is not item:
            raise InputError(
                path, f"expected every {self.what} once, found {value!r} already on {before}",
                item=item,
            )  # fmt: skip
