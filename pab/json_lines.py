"""JSON lines and the checks of their fields, each ending in an error that names the line.

Errors say which file and line, which field, what was expected and what was found, so that whoever
owns the file can mend it without looking at this code. Everywhere here ``path`` is the file and
``item`` what an error calls the place in it (``"line 17"``); all raise :class:`InputError`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeGuard

from pab.errors import InputError
from pab.files import existing_file


class _Twice(ValueError):
    """A field that stands twice in one object; the message is its name."""


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's fields; json's own would keep the last of a field that stands there twice."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in fields if names.count(name) > 1)
        raise _Twice(twice)
    return fields


_LINE = json.JSONDecoder(object_pairs_hook=_each_once)  # made once: json.loads would make it anew


def lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Number from 1, byte offset and bytes of every line of a file that is not blank."""
    offset = 0
    try:
        with path.open("rb") as handle:
            for number, raw in enumerate(handle, start=1):
                if not raw.isspace():
                    yield number, offset, raw
                offset += len(raw)
    except OSError as error:
        raise InputError(path, f"cannot be read: {error.strerror or error}") from error


def objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and the JSON objects of a file, streamed."""
    for number, _, raw in lines(path):
        yield number, json_object(raw, path, f"line {number}")


def decoded(raw: bytes, path: Path, item: str) -> str:
    """The text of UTF-8 bytes."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            path,
            f"expected UTF-8 text, found byte 0x{raw[error.start]:02x} at column {error.start + 1}",
            item=item,
            todo="save the file as UTF-8",
        ) from error


def json_object(raw: bytes, path: Path, item: str) -> dict[str, Any]:
    """One line as a JSON object; not UTF-8, not JSON and not an object are errors."""
    text = decoded(raw, path, item).rstrip()  # else what ends too early is found on a next line
    try:
        value = _LINE.decode(text)
    except _Twice as error:
        raise _found_twice(error, path, item) from error
    except (ValueError, RecursionError) as error:  # a JSONDecodeError, or a number beyond limits
        problem = f"expected one JSON object a line, found broken JSON{_reason(error)}"
        raise InputError(path, problem, item=item) from error
    if type(value) is not dict:
        raise InputError(path, f"expected one JSON object a line, found {kind(value)}", item=item)
    return value


def json_document(path: Path, what: str) -> dict[str, Any]:
    """A whole file as one JSON object in which no key stands twice."""

    existing_file(path, what)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(path, f"cannot be read: {error.strerror or error}") from error
    text = decoded(raw, path, "the whole file").removeprefix("\ufeff")
    try:
        value = _LINE.decode(text)
    except _Twice as error:
        raise _found_twice(error, path, None) from error
    except (ValueError, RecursionError) as error:
        line = f"line {error.lineno}" if isinstance(error, json.JSONDecodeError) else None
        problem = f"expected {what}, found broken JSON{_reason(error)}"
        raise InputError(path, problem, item=line) from error
    if type(value) is not dict:
        raise InputError(path, f"expected {what}, found {kind(value)}")
    return value


def _found_twice(error: _Twice, path: Path, item: str | None) -> InputError:
    name = shortened(str(error))
    return InputError(path, f"expected every key once, found {name} twice", item=item)


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f" at column {error.colno}: {error.msg}"
    return f": {error}"


def kind(value: object) -> str:
    """What a JSON value is, for an error message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, int | float):
        return f"the number {value!r:.40}"
    if isinstance(value, str):
        return f"the text {shortened(value)}" if value.strip() else "an empty text"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return "an object"


def shortened(text: str, limit: int = 60) -> str:
    """A text quoted for an error message, cut at ``limit`` characters."""
    shown = ascii(text) if not text.isprintable() else repr(text)
    return shown if len(shown) <= limit else shown[:limit] + "..."


def check_known(
    fields: dict[str, Any], known: frozenset[str], order: Iterable[str], path: Path, item: str
) -> None:
    """Refuse fields that are not ``known``; ``order`` lists the known ones for the message."""
    if not fields.keys() <= known:
        unknown = next(name for name in fields if name not in known)
        raise InputError(
            path,
            f"unknown field {shortened(unknown)}; known fields are {', '.join(order)}",
            item=item,
        )


def bad_text(value: object, name: str, expected: str, path: Path, item: str) -> InputError:
    """The error for a value that :func:`is_text` refused."""
    found = kind(value)
    if isinstance(value, str) and value.strip():
        found = "half a surrogate pair, which is no character"
    return InputError(path, f"field {name!r}: expected {expected}, found {found}", item=item)


def is_text(value: object) -> TypeGuard[str]:
    """Whether a value is a text with something in it that can be written as UTF-8."""
    if type(value) is not str or not value or value.isspace():
        return False
    if value.isascii():
        return True
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def required_text(fields: dict[str, Any], name: str, path: Path, item: str) -> str:
    """A field that must be there and hold a text."""
    value = fields.get(name)
    if is_text(value):
        return value
    if name not in fields:
        raise InputError(path, f"field {name!r}: expected a text, found no such field", item=item)
    raise bad_text(value, name, "a text that is not empty", path, item)


def optional_text(fields: dict[str, Any], name: str, path: Path, item: str) -> str | None:
    """A field that may be absent (or ``null``: None), and else holds a text."""
    value = fields.get(name)
    if value is None or is_text(value):
        return value
    raise bad_text(value, name, "a text that is not empty, or no such field", path, item)


def identifier(value: str, name: str, path: Path, item: str) -> str:
    """An id must survive a list of ids, one a line."""
    if value[0].isspace() or value[-1].isspace() or len(value.splitlines()) > 1:
        raise InputError(
            path,
            f"field {name!r}: expected an id on one line without blanks around it, "
            f"found {shortened(value)}",
            item=item,
        )
    return value
