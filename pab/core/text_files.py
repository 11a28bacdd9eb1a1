"""Read text files: UTF-8, or UTF-16 and UTF-32 with a byte-order mark."""

from __future__ import annotations

import codecs
from pathlib import Path

from pab.core.errors import InputError
from pab.core.files import existing_file
from pab.core.notices import notice

MARK = "\ufeff"  # byte-order mark; programs that join files may leave several
# UTF-32-LE's mark starts with UTF-16-LE's, so UTF-32 comes first.
_WIDE_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
SAVE_AS_UTF8 = "save the file as UTF-8"


def wide_encoding(raw: bytes) -> str | None:
    """Return ``"UTF-16"`` or ``"UTF-32"`` if bytes start with its mark, else None."""
    return next((name for mark, name in _WIDE_MARKS.items() if raw.startswith(mark)), None)


def read_text(path: str | Path, what: str, *, todo: str | None = None) -> str:
    """Read a text file without its byte-order mark; all line ends become ``\\n``.

    UTF-16 and UTF-32 are accepted, with a notice, if the file starts with their byte-order mark:
    Windows shells write UTF-16 when output is redirected.

    Args:
        path: the file.
        what: expected content (``"a ranked list"``), for the error.
        todo: remedy if the file is not text.

    Raises:
        InputError: the file is missing, unreadable, or in none of these encodings.
    """
    path = existing_file(path, what)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(path, f"cannot be read: {error.strerror or error}") from error
    return text_of(raw, path, todo=todo)


def text_of(raw: bytes, path: str | Path, *, todo: str | None = None) -> str:
    """Decode the bytes of a text file, and convert its line ends; see :func:`read_text`.

    Raises:
        InputError: the bytes are in none of the encodings.
    """
    encoding = wide_encoding(raw)
    if encoding is None:
        return _plain(utf8_text(raw, path, todo=todo))
    try:
        text = raw.decode(encoding)
    except UnicodeError as error:
        problem = f"found the byte-order mark of {encoding}, but bytes that are not {encoding}"
        todo = todo or SAVE_AS_UTF8
        raise InputError(path, f"expected UTF-8 text, {problem}", todo=todo) from error
    notice(path, f"is read as {encoding}, because of its byte-order mark")
    return _plain(text)


def _plain(text: str) -> str:
    """Remove byte-order marks, and convert the line ends of Windows and of the classic Mac."""
    return text.lstrip(MARK).replace("\r\n", "\n").replace("\r", "\n")


def utf8_text(
    raw: bytes, path: str | Path, item: str | None = None, *, todo: str | None = None
) -> str:
    """Decode bytes of a UTF-8 file; the error names the line, or ``item``, and the column.

    Raises:
        InputError: the bytes are not UTF-8.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        at = error.start
        line, column = raw.count(b"\n", 0, at) + 1, at - raw.rfind(b"\n", 0, at)
        raise InputError(
            path,
            f"expected UTF-8 text, found byte 0x{raw[at]:02x} at column {column}",
            item=item or f"line {line}",
            todo=todo or SAVE_AS_UTF8,
        ) from error
