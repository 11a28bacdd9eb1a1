"""Iterate over the JSON objects of a file, with the line and byte offset of each.

A file contains JSON lines, one JSON array, or consecutive objects that span lines. A byte-order
mark is skipped, and Windows line ends are white space. UTF-16 and UTF-32 need a byte-order mark;
offsets then refer to the same text in UTF-8. In all functions, ``path`` is the file, and ``item``
is the place to name in an error, such as ``"line 17"``. The readers and parsers raise
:class:`InputError`.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from pab.core import text_files
from pab.core.errors import InputError
from pab.core.files import existing_file

_SPACE = re.compile(r"[ \t\r\n]*")  # JSON's own white space
EXPECTED = "expected a JSON object"


class Twice(ValueError):
    """Duplicate field in an object; the message is the name of the field."""


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object; reject repeated fields, of which json would silently keep the last."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in fields if names.count(name) > 1)
        raise Twice(twice)
    return fields


OBJECT = json.JSONDecoder(object_pairs_hook=_each_once)  # json.loads would build a decoder per call
_ANY = json.JSONDecoder()  # finds the end of a value; repeated fields are checked later


# ---------------------------------------------------------------------------------------- bytes


def wide_encoding(path: Path) -> str | None:
    """Apply :func:`pab.core.text_files.wide_encoding` to a file."""
    return text_files.wide_encoding(head_of(path, 4))


def head_of(path: Path, size: int) -> bytes:
    """Read the first bytes of a file, ``size`` at most."""
    try:
        with path.open("rb") as handle:
            return handle.read(size)
    except OSError as error:
        raise _unreadable(path, error) from error


@contextmanager
def utf8_bytes(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Yield a stream of UTF-8 bytes after any byte-order mark, and the offset of its first byte."""
    is_wide = wide_encoding(path) is not None
    try:
        if is_wide:
            yield io.BytesIO(text_files.text_of(path.read_bytes(), path).encode()), 0
            return
        with path.open("rb") as handle:
            start = 3 if handle.read(3) == codecs.BOM_UTF8 else 0
            handle.seek(start)
            yield handle, start
    except OSError as error:
        raise _unreadable(path, error) from error


def lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield number (from 1), byte offset and bytes of every non-blank line."""
    with utf8_bytes(path) as (handle, offset):
        for number, raw in enumerate(handle, start=1):
            if not raw.isspace():
                yield number, offset, raw
            offset += len(raw)


def text_of(path: Path) -> str:
    """Read the whole text of a file."""
    with utf8_bytes(path) as (handle, _):
        return text_files.utf8_text(handle.read(), path)


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(path, f"cannot be read: {error.strerror or error}")


# -------------------------------------------------------------------------------------- objects


def entries(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield line number, byte offset and bytes of every entry, unparsed.

    JSON lines in UTF-8 are streamed; other files are read as a whole. A broken entry in an array,
    or among objects that span lines, ends the iteration with an error: later entries cannot be
    separated.
    """
    head = [raw.lstrip() for _, _, raw in islice(lines(path), 2)]
    if head and (head[0].startswith(b"[") or _spans_lines(head)):
        return _values(path)
    return lines(path)


def _spans_lines(head: list[bytes]) -> bool:
    """Return true if an object starts on the first line and ends on a later one.

    If the second line starts an object, the file has JSON lines, even if the first line is broken.
    """
    if not head[0].startswith(b"{") or len(head) == 1 or head[1].startswith(b"{"):
        return False
    try:
        _ANY.decode(head[0].decode("utf-8", "replace").rstrip())
    except (ValueError, RecursionError):
        return True
    return False


def _values(path: Path) -> Iterator[tuple[int, int, bytes]]:
    with utf8_bytes(path) as (handle, offset):
        text = text_files.utf8_text(handle.read(), path)
    number, done = 1, 0
    try:
        for start, stop in _spans(text):
            number += text.count("\n", done, start)
            offset += len(text[done:start].encode())
            raw = text[start:stop].encode()
            yield number, offset, raw
            number += text.count("\n", start, stop)
            offset, done = offset + len(raw), stop
    except json.JSONDecodeError as error:
        raise _broken(path, EXPECTED, error, f"line {error.lineno}") from error
    except RecursionError as error:
        raise _broken(path, EXPECTED, error, f"line {number}") from error


def _spans(text: str) -> Iterator[tuple[int, int]]:
    """Yield start and end of each value in an array, or of consecutive values."""
    position = _after_space(text, 0)
    in_array = text.startswith("[", position)
    if in_array:
        position = _after_space(text, position + 1)
        if text.startswith("]", position):
            in_array, position = False, _after_space(text, position + 1)
    more = position < len(text)
    while more:
        try:
            _, stop = _ANY.raw_decode(text, position)
        except json.JSONDecodeError:
            raise
        except ValueError as error:  # a number beyond Python's limits
            raise json.JSONDecodeError(str(error), text, position) from error
        yield position, stop
        position = _after_space(text, stop)
        if in_array and text.startswith(",", position):
            position = _after_space(text, position + 1)
            continue
        if in_array and text.startswith("]", position):
            in_array, position = False, _after_space(text, position + 1)
            if position < len(text):
                raise json.JSONDecodeError("text after the array", text, position)
        more = position < len(text)
        if in_array:
            raise json.JSONDecodeError("expected ',' or ']'", text, position)


def _after_space(text: str, position: int) -> int:
    return _SPACE.match(text, position).end()  # type: ignore[union-attr]


def json_object(raw: bytes, path: Path, item: str) -> dict[str, Any]:
    """Parse an entry as a JSON object; reject bad UTF-8 or JSON, repeated keys and other values."""
    text = text_files.utf8_text(raw, path, item)
    # Without rstrip, the column of an error at the end of a truncated line would be 1.
    return _decoded(text.rstrip(), path, EXPECTED, item)


def json_document(path: Path, what: str) -> dict[str, Any]:
    """Read a whole file as one JSON object without duplicate keys."""
    existing_file(path, what)
    return _decoded(text_of(path), path, f"expected {what}", None)


def _decoded(text: str, path: Path, expected: str, item: str | None) -> dict[str, Any]:
    """Parse a JSON object; if ``item`` is None, the error for broken JSON names the line."""
    try:
        value = OBJECT.decode(text)
    except Twice as error:
        raise found_twice(error, path, item) from error
    except (ValueError, RecursionError) as error:  # a JSONDecodeError, or a number beyond limits
        line = f"line {error.lineno}" if isinstance(error, json.JSONDecodeError) else None
        raise _broken(path, expected, error, item or line) from error
    if type(value) is not dict:
        raise InputError(path, f"{expected}, found {kind(value)}", item=item)
    return value


def found_twice(error: Twice, path: Path, item: str | None) -> InputError:
    """Build the error for a repeated field."""
    name = shortened(str(error))
    return InputError(path, f"expected every key once, found {name} twice", item=item)


def _broken(path: Path, expected: str, error: Exception, item: str | None) -> InputError:
    reason = f": {error}"
    if isinstance(error, json.JSONDecodeError):
        reason = f" at column {error.colno}: {error.msg}"
    return InputError(path, f"{expected}, found broken JSON{reason}", item=item)


# ------------------------------------------------------------------------------------- messages


def kind(value: object) -> str:
    """Describe the kind of a JSON value for an error message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, int | float):
        return f"the number {value!r:.40}"
    if isinstance(value, str):
        return f"the string {shortened(value)}" if value.strip() else "an empty string"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return "an object"


def shortened(text: str, limit: int = 60) -> str:
    """Quote a text for an error message; ``...`` replaces all after ``limit`` characters."""
    shown = ascii(text) if not text.isprintable() else repr(text)
    return shown if len(shown) <= limit else shown[:limit] + "..."
