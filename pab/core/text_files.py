"""Text files of other programs: UTF-8, with or without a byte-order mark, or UTF-16."""

from __future__ import annotations

import codecs
from pathlib import Path

from pab.core.errors import InputError
from pab.core.files import existing_file
from pab.core.notices import notice

MARK = "\ufeff"  # byte-order mark; programs that join files may leave several
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(path: str | Path, what: str, *, todo: str | None = None) -> str:
    """Read a text file without its byte-order mark.

    UTF-16 is accepted, with a notice, if the file starts with its byte-order mark: Windows shells
    write it when output is redirected.

    Args:
        path: the file.
        what: expected content (``"a ranked list"``), for the error.
        todo: remedy if the file is not text.

    Raises:
        InputError: the file is missing, or neither UTF-8 nor UTF-16.
    """
    path = existing_file(path, what)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(path, f"cannot be read: {error.strerror or error}") from error
    return text_of(raw, path, todo=todo)


def text_of(raw: bytes, path: str | Path, *, todo: str | None = None) -> str:
    """Decode the bytes of a text file; see :func:`read_text`.

    Raises:
        InputError: neither UTF-8 nor UTF-16.
    """
    if raw.startswith(_UTF16):
        try:
            text = raw.decode("utf-16")
        except UnicodeDecodeError:
            pass  # bytes that only look like a mark; the error below names the first bad byte
        else:
            notice(path, "read as UTF-16, which its byte-order mark names")
            return text.lstrip(MARK)
    try:
        return raw.decode("utf-8").lstrip(MARK)
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise InputError(
            path,
            f"expected UTF-8 text, found byte 0x{raw[error.start]:02x}",
            item=f"line {line}",
            todo=todo,
        ) from error
