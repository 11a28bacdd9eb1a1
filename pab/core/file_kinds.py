"""Detect the kind of a file from its content, not from its name.

Weight files may therefore have any extension. Errors name common mix-ups instead of reporting
damage: a saved web page, a Git LFS pointer, a partial download.
"""

from __future__ import annotations

import enum
import json
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

HEAD = 4096  # bytes read from the start to detect the kind
LARGEST_HEADER = 100_000_000  # bytes; the format's limit on a safetensors header
OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # pickled magic number of torch before 1.6
TEXT_SHOWN = 40  # characters of a text file that a message quotes


class Kind(enum.Enum):
    """Kind of a file."""

    TORCH = "a torch.save file"
    SAFETENSORS = "a safetensors file"
    TORCHSCRIPT = "a TorchScript archive"
    CUT = "a truncated file"
    EMPTY = "an empty file"
    PAGE = "a web page or a server's error"
    OTHER = "another file"
    UNKNOWN = "unknown bytes"


@dataclass(frozen=True, slots=True)
class FileKind:
    """Kind of a file, for code and for messages."""

    kind: Kind
    text: str  # for messages, as in "found TEXT"
    todo: str = ""  # the remedy, if the kind determines it


# First bytes, text for messages, remedy.
SIGNATURES = (
    (
        b"version https://git-lfs.github.com/spec/", "a pointer of Git LFS instead of the file",
        "run git lfs pull in the repository that it came from",
    ),
    (b"/annex/objects/", "a pointer of git-annex instead of the file", "run git annex get"),
    (b"\x93NUMPY", "a NumPy array (.npy)", ""),
    (b"\x89HDF", "an HDF5 file", "convert it with the library that wrote it"),
    (b"GGUF", "a GGUF file", "use the weights that it was converted from"),
    (b"\x1f\x8b", "a gzip archive", "unpack it"),
    (b"BZh", "a bzip2 archive", "unpack it"),
    (b"\xfd7zXZ", "an xz archive", "unpack it"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it"),
    (b"Rar!", "a RAR archive", "unpack it"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive", "unpack it"),
    (b"%PDF", "a PDF file", ""),
)  # fmt: skip
PAGE = re.compile(r"\s*(<!doctype html|<html|<head|<body|<script|<!--)", re.IGNORECASE)
TITLE = re.compile(r"<title[^>]*>([^<]*)", re.IGNORECASE)


def file_kind(path: Path) -> FileKind:
    """Detect the kind of a file from its content.

    Args:
        path: a readable file.
    """
    size = path.stat().st_size
    with path.open("rb") as handle:
        head = handle.read(HEAD)
    if not head:
        return FileKind(Kind.EMPTY, Kind.EMPTY.value)
    for signature, text, todo in SIGNATURES:
        if head.startswith(signature):
            return FileKind(Kind.OTHER, text, todo)
    if head.startswith(b"PK\x03\x04"):
        return _zip_kind(path)
    if head.startswith(OLD_TORCH):
        return FileKind(Kind.TORCH, Kind.TORCH.value)
    length = int.from_bytes(head[:8], "little")
    if len(head) > 8 and head[8:9] == b"{" and length <= LARGEST_HEADER:
        return _safetensors_kind(path, length, size)
    if not any(head):
        return FileKind(Kind.CUT, "only zero bytes, as an interrupted copy leaves them")
    return _text_kind(head) or FileKind(Kind.UNKNOWN, Kind.UNKNOWN.value)


def _zip_kind(path: Path) -> FileKind:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return FileKind(Kind.CUT, "a zip archive without its end, as an interrupted copy leaves it")
    parts = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in parts:
        return FileKind(Kind.TORCHSCRIPT, Kind.TORCHSCRIPT.value)
    if "data.pkl" in parts:
        return FileKind(Kind.TORCH, Kind.TORCH.value)
    if all(name.endswith(".npy") for name in parts) and parts:
        return FileKind(Kind.OTHER, "NumPy arrays (.npz)")
    shown = ", ".join(names[:3])
    return FileKind(Kind.OTHER, f"a zip archive of other files ({shown})", "unpack it")


def _safetensors_kind(path: Path, length: int, size: int) -> FileKind:
    """Detect a truncated file by the size of the tensors that its header lists."""
    with path.open("rb") as handle:
        handle.seek(8)
        header = handle.read(length)
    ends = [0]
    if len(header) == length:
        try:
            tensors = json.loads(header)
            ends += [t["data_offsets"][1] for n, t in tensors.items() if n != "__metadata__"]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            return FileKind(Kind.SAFETENSORS, "a damaged safetensors file")
    announced = 8 + length + max(end for end in ends if isinstance(end, int))
    if announced > size:
        return FileKind(
            Kind.CUT, f"{size} of the {announced} bytes of a safetensors file, as an interrupted "
            "copy leaves it",
        )  # fmt: skip
    return FileKind(Kind.SAFETENSORS, Kind.SAFETENSORS.value)


def _text_kind(head: bytes) -> FileKind | None:
    """Describe a text file; None for other content."""
    try:  # the last character may be cut
        text = head.decode("utf-8-sig", errors="strict" if len(head) < HEAD else "ignore")
    except UnicodeDecodeError:
        return None
    if any(ord(letter) < 9 for letter in text):
        return None
    shown = " ".join(text.split())
    if PAGE.match(text):
        title = TITLE.search(text)
        named = f" ({title[1].strip()[:TEXT_SHOWN]})" if title and title[1].strip() else ""
        return FileKind(
            Kind.PAGE, f"a web page{named}",
            "the download saved a web page instead of the file; download the file by hand",
        )  # fmt: skip
    if shown.startswith("<?xml"):
        return FileKind(
            Kind.PAGE, "an XML document, perhaps a server's error", "download the file again"
        )
    what = "a JSON document" if shown[:1] in ("{", "[") else "plain text"
    return FileKind(Kind.OTHER, f"{what} ({shown[:TEXT_SHOWN]!r})")
