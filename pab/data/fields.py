"""Check the fields of a JSON object.

Errors name the field, and the expected and found values. The argument ``fault`` builds an
:class:`InputError` that names file and line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, TypeGuard

from pab.core.counts import counted
from pab.core.errors import Fault, InputError
from pab.data.captions import has_visible
from pab.data.json_lines import kind, shortened

EXACT = 2**53  # larger floats may have lost digits
_NAMED = 20  # maximum number of fields named in a notice


class FieldNotes:
    """Count ignored fields, and assumptions about other fields, for notices.

    Attributes:
        unknown: unknown field -> number of lines.
        absent: optional field and the reason why its value is treated as absent -> number of lines.
        whole_sources: number of lines whose ``source_id`` is not ``VIDEO_NUMBER``.
    """

    def __init__(self) -> None:
        self.unknown: Counter[str] = Counter()
        self.absent: Counter[str] = Counter()
        self.whole_sources = 0

    def ignore_unknown(self, fields: Iterable[str], known: frozenset[str]) -> None:
        """Count the fields that are not in ``known``."""
        self.unknown.update(name for name in fields if name not in known)

    def texts(self) -> list[str]:
        """Describe the counts in one clause per kind."""
        found = []
        if self.unknown:
            found.append(f"unknown fields are ignored: {_listed(self.unknown)}")
        if self.absent:
            found.append(f"optional fields are treated as absent: {_listed(self.absent)}")
        if self.whole_sources:
            lines = counted(self.whole_sources, "line")
            found.append(f"source_id is not VIDEO_NUMBER ({lines}): all of it names the video")
        return found


def _listed(counts: Counter[str]) -> str:
    named = sorted(counts.items(), key=lambda one: (-one[1], one[0]))[:_NAMED]
    text = ", ".join(f"{shortened(name)[1:-1]} ({counted(count, 'line')})" for name, count in named)
    rest = len(counts) - len(named)
    return f"{text} and {rest} more" if rest else text


def is_text(value: object) -> TypeGuard[str]:
    """Return true if a value is a non-blank string that can be encoded as UTF-8."""
    if type(value) is not str or not value or value.isspace():
        return False
    if value.isascii():
        return True
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def bad_text(value: object, name: str, expected: str, fault: Fault) -> InputError:
    """Build the error for a value that :func:`is_text` rejects."""
    found = kind(value)
    if isinstance(value, str) and value.strip():
        found = "half a surrogate pair, which is not a character"
    return fault(f"field {name!r}: expected {expected}, found {found}")


def required_text(fields: dict[str, Any], name: str, fault: Fault) -> str:
    """Read a required text field."""
    value = fields.get(name)
    if is_text(value):
        return value
    if name not in fields:
        raise fault(f"field {name!r}: expected a string, found no such field")
    raise bad_text(value, name, "a non-empty string", fault)


def required_id(fields: dict[str, Any], name: str, fault: Fault) -> str:
    """Read a required id: a string, or an integer as its decimal digits."""
    value = fields.get(name)
    if type(value) is str and is_text(value):
        return identifier(value, name, fault)
    number = number_text(value)
    if number is not None:
        return number
    if name not in fields:
        raise fault(f"field {name!r}: expected an id, found no such field")
    raise bad_text(value, name, "an id (a string or a whole number)", fault)


def number_text(value: object) -> str | None:
    """Convert an integer to its decimal digits; return None for any other value.

    A float is accepted if it is integral and small enough to be exact.
    """
    if type(value) is int:
        return str(value)
    if type(value) is float and value.is_integer() and abs(value) < EXACT:
        return str(int(value))
    return None


def optional_text(fields: dict[str, Any], name: str, notes: FieldNotes | None) -> str | None:
    """Read an optional string; None if it is absent or unusable. ``notes`` counts unusable ones."""
    value = fields.get(name)
    if value is None and name not in fields:
        return None
    if is_text(value):
        return value
    if notes is not None:
        notes.absent[f"{name} {_unusable(value)}"] += 1
    return None


def optional_id(fields: dict[str, Any], name: str, notes: FieldNotes | None) -> str | None:
    """Read an optional id; see :func:`optional_text`."""
    number = number_text(fields.get(name))
    return optional_text(fields, name, notes) if number is None else number


def _unusable(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return "not UTF-8" if value.strip() else "empty"
    return "of another type"


def caption_text(value: object, name: str, fault: Fault) -> str:
    """Return a caption that has visible text for every text encoder; ``name`` is its field.

    Raises:
        InputError: the value is not a string, is not valid Unicode, or has no visible text for one
            of the encoders.
    """
    if not is_text(value):
        raise bad_text(value, name, "a non-empty string", fault)
    if not has_visible(value):
        found = shortened(value)
        raise fault(f"field {name!r}: expected a string with a visible character, found {found}")
    return value


def one_caption(fields: dict[str, Any], fault: Fault) -> str:
    """Read the field ``caption`` of a line with one caption: a string, or a list of one string."""
    value = fields.get("caption")
    if type(value) is list:
        if len(value) != 1:
            found = f"a list of {len(value)}" if value else "an empty list"
            raise fault(f"field 'caption': expected one caption, found {found}")
        value = value[0]
    elif "caption" not in fields:
        return required_text(fields, "caption", fault)
    return caption_text(value, "caption", fault)


def identifier(value: str, name: str, fault: Fault) -> str:
    """Return an id that can be stored in a list of ids, one per line; raise for any other."""
    if value[0].isspace() or value[-1].isspace() or len(value.splitlines()) > 1:
        expected = "an id on one line, without blanks at its ends"
        raise fault(f"field {name!r}: expected {expected}, found {shortened(value)}")
    return value
