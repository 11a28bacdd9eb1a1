"""Text files as other programs write them: UTF-8, with or without a byte-order mark, or UTF-16."""

from __future__ import annotations

import codecs
from pathlib import Path

from pab.core.errors import InputError
from pab.core.files import existing_file
from pab.core.notices import notice

MARK = "\ufeff"  # the byte-order mark; programs that join files leave more than one
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(path: str | Path, what: str, *, todo: str | None = None) -> str:
    """Read a text file without its byte-order mark.

    UTF-16 is read if the file begins with its mark, and a notice says so: shells of Windows write
    it when a program's output is redirected.

    Args:
        path: the file.
        what: what the file should be (``"a ranked list"``), for the error.
        todo: the remedy if the file is no text.

    Raises:
        InputError: no such file, or neither UTF-8 nor UTF-16.
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
            pass  # bytes that happen to begin so; the error below names the first of them
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
