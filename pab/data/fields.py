"""Checks of the fields of a JSON object, each ending in an error that names the line.

Errors say which file and line, which field, what was expected and what was found. Everywhere here
``path`` is the file and ``item`` what an error calls the place in it (``"line 17"``); all functions
raise :class:`InputError`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeGuard

from pab.data.captions import has_visible
from pab.core.errors import InputError
from pab.data.json_lines import kind, shortened

EXACT = 2**53  # above it a float has lost digits
_NAMED = 20  # fields that one notice names


class FieldNotes:
    """Counts of what a reader ignored or assumed; :meth:`texts` puts them into words.

    Attributes:
        unknown: name of a field that no reader uses -> lines.
        absent: optional field and why its value cannot be used -> lines.
        whole_sources: lines whose ``source_id`` is not ``VIDEO_NUMBER``.
    """

    def __init__(self) -> None:
        self.unknown: Counter[str] = Counter()
        self.absent: Counter[str] = Counter()
        self.whole_sources = 0

    def ignore_unknown(self, fields: Iterable[str], known: frozenset[str]) -> None:
        """Count the fields that are not known."""
        self.unknown.update(name for name in fields if name not in known)

    def texts(self) -> list[str]:
        """One clause per kind of assumption."""
        found = []
        if self.unknown:
            found.append(f"unknown fields are ignored: {_listed(self.unknown)}")
        if self.absent:
            found.append(f"optional fields are treated as absent: {_listed(self.absent)}")
        if self.whole_sources:
            found.append(
                f"source_id is not VIDEO_NUMBER ({_lines(self.whole_sources)}): all of it names "
                "the video"
            )
        return found


def _listed(counts: Counter[str]) -> str:
    named = sorted(counts.items(), key=lambda one: (-one[1], one[0]))[:_NAMED]
    text = ", ".join(f"{shortened(name)[1:-1]} ({_lines(count)})" for name, count in named)
    rest = len(counts) - len(named)
    return f"{text} and {rest} more" if rest else text


def _lines(count: int) -> str:
    return "1 line" if count == 1 else f"{count} lines"


def is_text(value: object) -> TypeGuard[str]:
    """Return true if a value is non-blank text that can be encoded as UTF-8."""
    if type(value) is not str or not value or value.isspace():
        return False
    if value.isascii():
        return True
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def bad_text(value: object, name: str, expected: str, path: Path, item: str) -> InputError:
    """The error for a value that :func:`is_text` refused."""
    found = kind(value)
    if isinstance(value, str) and value.strip():
        found = "half a surrogate pair, which is no character"
    return InputError(path, f"field {name!r}: expected {expected}, found {found}", item=item)


def required_text(fields: dict[str, Any], name: str, path: Path, item: str) -> str:
    """A field that must be there and hold a text."""
    value = fields.get(name)
    if is_text(value):
        return value
    if name not in fields:
        raise InputError(path, f"field {name!r}: expected a text, found no such field", item=item)
    raise bad_text(value, name, "a text that is not empty", path, item)


def required_id(fields: dict[str, Any], name: str, path: Path, item: str) -> str:
    """A field that must be there and hold an id: a text, or a whole number as its decimal text."""
    value = fields.get(name)
    if type(value) is str and is_text(value):
        return identifier(value, name, path, item)
    number = number_text(value)
    if number is not None:
        return number
    if name not in fields:
        raise InputError(path, f"field {name!r}: expected an id, found no such field", item=item)
    raise bad_text(value, name, "an id, a text or a whole number", path, item)


def number_text(value: object) -> str | None:
    """The decimal text of a whole number; None for everything else.

    A float counts if it is whole and small enough to have kept all its digits.
    """
    if type(value) is int:
        return str(value)
    if type(value) is float and value.is_integer() and abs(value) < EXACT:
        return str(int(value))
    return None


def optional_text(fields: dict[str, Any], name: str, notes: FieldNotes | None) -> str | None:
    """A field that may be absent: None also if it is empty, null or of another type (counted)."""
    value = fields.get(name)
    if value is None and name not in fields:
        return None
    if is_text(value):
        return value
    if notes is not None:
        notes.absent[f"{name} {_unusable(value)}"] += 1
    return None


def optional_id(fields: dict[str, Any], name: str, notes: FieldNotes | None) -> str | None:
    """An id that may be absent; see :func:`optional_text`."""
    number = number_text(fields.get(name))
    return optional_text(fields, name, notes) if number is None else number


def _unusable(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return "not UTF-8" if value.strip() else "empty"
    return "of another type"


def caption_text(value: object, name: str, path: Path, item: str) -> str:
    """A caption: a text in which every text encoder finds something.

    Args:
        value: the caption.
        name: what the error calls the field.
        path, item: see above.
    """
    if not is_text(value):
        raise bad_text(value, name, "a text that is not empty", path, item)
    if not has_visible(value):
        raise InputError(
            path,
            f"field {name!r}: expected a text with a visible character, found {shortened(value)}",
            item=item,
        )
    return value


def one_caption(fields: dict[str, Any], path: Path, item: str) -> str:
    """The field ``caption`` of a line that has one: a text, or a list that holds one text."""
    value = fields.get("caption")
    if type(value) is list:
        if len(value) != 1:
            found = f"a list of {len(value)}" if value else "an empty list"
            raise InputError(
                path, f"field 'caption': expected one caption, found {found}", item=item
            )
        value = value[0]
    elif "caption" not in fields:
        return required_text(fields, "caption", path, item)
    return caption_text(value, "caption", path, item)


def identifier(value: str, name: str, path: Path, item: str) -> str:
    """An id must survive a list of ids, one per line."""
    if value[0].isspace() or value[-1].isspace() or len(value.splitlines()) > 1:
        raise InputError(
            path,
            f"field {name!r}: expected an id on one line without blanks around it, "
            f"found {shortened(value)}",
            item=item,
        )
    return value
