"""Read images from WebDataset archives (uncompressed tar files), without unpacking them.

No file is created or opened by a name from an archive.
"""

from __future__ import annotations

import os
import posixpath
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pab.core.errors import InputError
from pab.data.image_paths import is_photo_name
from pab.data.photos import MAX_PIXELS

LONGEST_CAPTION = 1 << 16  # bytes; a longer text file is not a caption
LARGEST_IMAGE = 4 * MAX_PIXELS  # bytes of an encoded image, which is read into memory whole


class Packed(NamedTuple):
    """Image in an archive: name inside it, offset and size in bytes, and caption or None."""

    name: str
    offset: int
    size: int
    caption: str | None


def packed_images(path: Path, unreadable: dict[str, str]) -> Iterator[Packed]:
    """Yield the images of an archive, sorted by name, with the captions that have the same keys.

    A key is a name up to the first dot of its last path component, as in WebDataset.

    Args:
        path: the archive.
        unreadable: receives the problem of each image that cannot be used, by name.

    Raises:
        InputError: the file cannot be read, is not an uncompressed tar file, or is damaged; the
            images before the damage are yielded first.
    """
    images: dict[str, tuple[int, int]] = {}
    captions: dict[str, str] = {}
    problem = None
    try:
        with tarfile.open(path, "r:") as archive:
            for info in archive:
                if info.size < 0:  # tarfile would read the same headers forever
                    problem = f"a negative size at byte {info.offset}"
                    break
                name = os.fsencode(info.name).decode("utf-8", "backslashreplace")
                base = posixpath.basename(name)
                if base and is_photo_name(base):
                    bad = _problem(info, name in images)
                    if bad is None:
                        images[name] = info.offset_data, info.size
                    else:
                        unreadable[name] = bad
                elif base.endswith(".txt") and info.isreg() and info.size <= LONGEST_CAPTION:
                    try:
                        text = read_packed(path, info.offset_data, info.size)
                    except InputError as error:  # for example, the archive ends in this caption
                        problem = error.problem
                        break
                    captions[_key(name)] = text.decode("utf-8", "backslashreplace").strip()
            if problem is None and read_packed(path, archive.offset, None).strip(b"\0"):
                problem = f"a damaged header at byte {archive.offset}"
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:
        problem = str(error)
    for name in sorted(images):
        yield Packed(name, *images[name], captions.get(_key(name)) or None)
    if problem is not None:
        raise InputError(
            path, f"expected an uncompressed tar file, found: {problem}",
            todo="unpack a compressed archive, or download a damaged archive again",
        )  # fmt: skip


def read_packed(path: Path, offset: int, size: int | None) -> bytes:
    """Read ``size`` bytes of an archive at an offset; without a size, at most one header block.

    Raises:
        InputError: the file cannot be read, or ends early.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            # Sizes in headers may be wrong, and `read` reserves memory for the requested size.
            rest = max(0, os.fstat(file.fileno()).st_size - offset)
            found = file.read(min(rest, tarfile.BLOCKSIZE if size is None else size))
    except OSError as error:
        raise InputError(path, f"cannot be read: {error.strerror or error}") from error
    if size is not None and len(found) < size:
        problem = f"expected {size} bytes at {offset}, found {len(found)}"
        raise InputError(path, problem, todo="index the images again if the archive has changed")
    return found


def _key(name: str) -> str:
    folder, base = posixpath.split(name)
    return posixpath.join(folder, base.partition(".")[0])


def _problem(info: tarfile.TarInfo, known: bool) -> str | None:
    """Return the reason why an entry of the archive cannot be used as an image, or None."""
    name = info.name
    if name.startswith("/") or ".." in name.split("/") or "\0" in name or "\\" in name:
        return "a path that may leave the archive"
    if not info.isreg() or info.issparse():
        return "not a regular file"
    if info.size == 0:
        return "an empty file"
    if info.size > LARGEST_IMAGE:
        return f"a file of more than {LARGEST_IMAGE >> 20} MiB"
    return "a name that the archive contains twice" if known else None
