"""Write files atomically, check existing paths and zip files, and hash files."""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pab.core.errors import InputError
from pab.core.progress import Progress

BLOCK = 2**20  # bytes read at a time

# Exceptions of zipfile and its three decompressors for a zip file that is damaged, encrypted or
# compressed in an unknown way, or whose names are damaged.
DAMAGED_ARCHIVE = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, EOFError, RuntimeError, LookupError,
    UnicodeDecodeError,
)  # fmt: skip

# Limits against small files that unpack to fill the memory (deflate shrinks zeros 1,000-fold).
LARGEST_RATIO = 100  # unpacked bytes per packed byte
ALWAYS_UNPACKED = 1 << 30  # bytes allowed at any ratio; scores with few distinct values pack well


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it to ``path`` if the block succeeds.

    If the block raises, the temporary file is removed and ``path`` is unchanged.

    Raises:
        InputError: the file cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(path, "expected a file to write, found a directory")
    if path.exists() and not path.is_file():  # renaming would replace a device or pipe
        raise InputError(path, "expected a file to write, found something else")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise InputError(path, f"cannot be written: {error.strerror or error}") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files private; outputs are ordinary files
        temporary.replace(path)
    except OSError as error:
        raise InputError(path, f"cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_folder(folder: Path, write: Callable[[str], object]) -> None:
    """Write a folder under a temporary name, then move it into place; replace an existing folder.

    If the move fails, the existing folder is put back.

    Args:
        folder: folder to write.
        write: function that creates the folder at the path it receives, and writes its files.

    Raises:
        InputError: the folder cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
            made = Path(temporary) / folder.name
            write(str(made))
            old = Path(temporary) / "old"
            if folder.exists():
                folder.rename(old)
            try:
                made.rename(folder)
            except OSError:
                if old.exists():
                    old.rename(folder)
                raise
    except OSError as error:
        raise InputError(folder, f"cannot be written: {error.strerror or error}") from error


def existing_file(path: str | Path, what: str) -> Path:
    """Return the path if it is a readable regular file.

    Raises:
        InputError: it is missing, a directory, or unreadable.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(path, f"expected {what}, found a directory")
    if not path.is_file():
        raise InputError(path, f"expected {what}, found no such file")
    if not os.access(path, os.R_OK):
        raise InputError(path, f"expected {what}, found a file without read permission")
    return path


def existing_folder(path: str | Path, what: str) -> Path:
    """Return the path if it is a directory.

    Raises:
        InputError: it is missing or not a directory.
    """
    path = Path(path)
    if path.is_file():
        raise InputError(path, f"expected {what}, found a file")
    if not path.is_dir():
        raise InputError(path, f"expected {what}, found no such folder")
    return path


def check_unpacked_size(path: str | Path, entries: Iterable[zipfile.ZipInfo]) -> None:
    """Reject zip entries that would fill the memory, by their declared sizes.

    The check is sufficient, because zipfile never reads more than the declared size of an entry.

    Raises:
        InputError: the entries unpack to more than :data:`ALWAYS_UNPACKED` bytes and more than
            :data:`LARGEST_RATIO` times their packed size.
    """
    entries = list(entries)
    packed = sum(entry.compress_size for entry in entries)
    size = sum(entry.file_size for entry in entries)
    if size > max(ALWAYS_UNPACKED, LARGEST_RATIO * packed):
        raise InputError(
            path,
            f"expected a zip file that unpacks to at most {LARGEST_RATIO} times its size, found "
            f"{size / 2**30:.1f} GiB packed in {packed} bytes",
            todo="if that size is correct, unpack the zip file and pass the file inside",
        )


def sha256_of_file(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, as 64 hex digits."""
    path, digest = Path(path), hashlib.sha256()
    with path.open("rb") as file, Progress(path.stat().st_size, f"hashing {path.name}", "B") as bar:
        while block := file.read(BLOCK):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def sha256_of_lines(lines: list[str]) -> str:
    """Return the SHA-256 of strings (ids or captions), each followed by a newline."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()
