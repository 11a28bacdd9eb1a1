"""Vectors of images and captions kept on disk between runs, by what they hold.

A cache belongs to one encoder: weights, preprocessing, number format. In it an image is known by
the SHA-256 of its file, so that renamed images are found again and changed ones are not, and a
caption by that of its token ids. A run that is cut off loses the batch it was at; a run with a
larger gallery or new queries encodes only what is new.

A cache is a folder of parts, one a process, width and run that encoded anything: ``N.sha256`` holds
32 bytes an item, ``N.float32`` its vector (UIT: with the image's tokens behind it). A vector is
written before its hash, so what a killed run left behind is read up to the last whole pair.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from pab.core.errors import InputError
from pab.core.files import sha256_of_file, write_text
from pab.data.annotations import GalleryImage
from pab.data.images import ImageReader

FORMAT = 1  # of the files; part of the key, so that another format is another cache
DIGEST_BYTES = 32
CODE = ("pab", "lhp", "uit", "scripts")
LIBRARIES = ("torch", "torchvision", "pillow", "open_clip_torch", "transformers", "timm")
HASHES, VECTORS, FACTS = ".sha256", ".float32", "encoder.json"


class FeatureCache(AbstractContextManager["FeatureCache"]):
    """The vectors of one encoder; use it as a context manager.

    Args:
        folder: of all caches.
        facts: what the vectors depend on beside the image: weights' hash, preprocessing, format.

    Raises:
        InputError: the folder cannot be made or read.
    """

    def __init__(self, folder: str | Path, facts: Mapping[str, str]) -> None:
        text = json.dumps({"format": FORMAT, **facts}, sort_keys=True, indent=1)
        self.folder = Path(folder) / hashlib.sha256(text.encode()).hexdigest()[:16]
        self._rows: dict[bytes, tuple[Path, int]] = {}  # a part's vectors, and the row there
        self._matrices: dict[Path, np.memmap] = {}
        self._parts: dict[int, tuple[BinaryIO, BinaryIO]] = {}  # this run's own, by width
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                self.folder, f"the feature cache cannot be made: {error.strerror or error}",
                todo="name another folder with --feature_cache_dir, or say --no_feature_cache",
            ) from error  # fmt: skip
        if not (self.folder / FACTS).is_file():
            write_text(self.folder / FACTS, text + "\n")
        for hashes in sorted(self.folder.glob(f"*{HASHES}")):
            try:
                self._read_part(hashes)
            except OSError as error:
                raise InputError(
                    hashes, f"kept vectors cannot be read: {error.strerror or error}",
                    todo=f"remove {self.folder}, or say --no_feature_cache",
                ) from error  # fmt: skip

    def __exit__(self, *_: object) -> None:
        for part in self._parts.values():
            for handle in part:
                with suppress(OSError):  # what could not be written has been told already
                    handle.close()
        self._parts.clear()

    def __len__(self) -> int:
        return len(self._rows)

    def _read_part(self, hashes: Path) -> None:
        """Take up a part's whole pairs; its vectors stay on disk."""
        digests = hashes.read_bytes()
        vectors = hashes.with_suffix(VECTORS)
        width = self._width_of(hashes)
        if width is None or not vectors.is_file():
            return
        count = min(len(digests) // DIGEST_BYTES, vectors.stat().st_size // (4 * width))
        if count == 0:
            return
        for row in range(count):
            digest = digests[row * DIGEST_BYTES : (row + 1) * DIGEST_BYTES]
            self._rows.setdefault(digest, (vectors, row))

    @staticmethod
    def _width_of(part: Path) -> int | None:
        """Numbers of a part's vectors, which its name tells."""
        words = part.stem.rpartition("x")
        return int(words[2]) if words[2].isdigit() else None

    def _matrix(self, vectors: Path, row: int) -> np.memmap:
        """A part's vectors, which stay on disk, mapped anew when it has grown beyond ``row``."""
        if vectors not in self._matrices or row >= len(self._matrices[vectors]):
            width = self._width_of(vectors)
            assert width is not None, "it was read or written under its width"
            count = vectors.stat().st_size // (4 * width)
            self._matrices[vectors] = np.memmap(vectors, np.float32, "r", shape=(count, width))
        return self._matrices[vectors]

    def split(self, digests: Mapping[int, bytes]) -> tuple[list[int], list[int]]:
        """Positions whose vectors are here, and those that are to be encoded."""
        known = [i for i, digest in digests.items() if digest in self._rows]
        new = [i for i, digest in digests.items() if digest not in self._rows]
        return known, new

    def vectors(self, digests: Sequence[bytes]) -> Tensor:
        """Kept vectors, float32 [n, D], n at least 1."""
        rows = [self._rows[digest] for digest in digests]
        return torch.from_numpy(np.stack([self._matrix(part, row)[row] for part, row in rows]))

    def of_images(
        self,
        images: Sequence[GalleryImage],
        positions: Sequence[int],
        num_workers: int,
        reader: ImageReader | None = None,
    ) -> tuple[dict[int, bytes], list[int], list[int]]:
        """Look up images of a gallery in the cache.

        Args:
            images: the gallery.
            positions: of those that are asked for.
            num_workers: threads that read the files.
            reader: decodes the files; None reads a benchmark's images.

        Returns:
            The hash at each position, positions whose vectors are here, and those to be encoded.
            Images that the reader collects as unreadable are in none of them.

        Raises:
            InputError: a file cannot be read.
        """
        reader = reader or ImageReader()
        digests = {}
        found = digests_of([images[i].path for i in positions], num_workers)
        for position, digest in zip(positions, found, strict=True):
            if not isinstance(digest, InputError):
                digests[position] = _under_key(digest, reader.cache_key)
            elif reader.unreadable is None:
                raise digest
            else:
                reader.unreadable[images[position].gallery_id] = digest
        return digests, *self.split(digests)

    def keep(self, digests: Sequence[bytes], vectors: Tensor) -> None:
        """Write vectors behind those that are there.

        Args:
            digests: of the images or captions.
            vectors: float32 [n, D] on the CPU.

        Raises:
            InputError: the disk is full, or the folder cannot be written.
        """
        matrix = vectors.contiguous().numpy()
        try:
            width = matrix.shape[1]
            if width not in self._parts:
                self._parts[width] = self._open_part(width)
            part = self._parts[width]
            first = part[0].tell() // matrix[0].nbytes
            for handle, data in zip(part, (matrix.tobytes(), b"".join(digests)), strict=True):
                handle.write(data)
                handle.flush()
        except OSError as error:
            raise InputError(
                self.folder, f"vectors cannot be kept: {error.strerror or error}",
                todo="make room, or say --no_feature_cache",
            ) from error  # fmt: skip
        for row, digest in enumerate(digests, start=first):
            self._rows.setdefault(digest, (Path(part[0].name), row))

    def _open_part(self, width: int) -> tuple[BinaryIO, BinaryIO]:
        """A new pair of files, of a name that no other process has."""
        number = 0
        while True:
            stem = self.folder / f"{number}_{os.getpid()}x{width}"
            try:
                hashes = stem.with_suffix(HASHES).open("xb")
            except FileExistsError:
                number += 1
                continue
            return stem.with_suffix(VECTORS).open("wb"), hashes


def made_by() -> dict[str, str]:
    """Identify the code that computes the vectors: the hash of this project, library versions.

    A cache outlives a mended bug otherwise.
    """
    root = Path(__file__).resolve().parents[2]
    code = hashlib.sha256()
    drawn = root / "pab/mini"  # its pictures are files like any others
    for room in CODE:
        for path in sorted((root / room).rglob("*.py")):
            if not path.is_relative_to(drawn):
                code.update(path.read_bytes())
    found = {"code": code.hexdigest()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # an environment for another model
            found[name] = "none"
    return found


def caption_digest(ids: Sequence[int | str]) -> bytes:
    """Cache key of a caption: SHA-256 of its token ids, in a namespace apart from image files."""
    return hashlib.sha256(f"caption {' '.join(map(str, ids))}".encode()).digest()


def _under_key(digest: bytes, key: str) -> bytes:
    """The hash under which an image is cached; the file's own for a benchmark's images."""
    return hashlib.sha256(f"{key} ".encode() + digest).digest() if key else digest


def digests_of(paths: Sequence[Path], num_workers: int) -> list[bytes | InputError]:
    """SHA-256 of each file, or the error of one that cannot be read; read by several threads."""

    def digest(path: Path) -> bytes | InputError:
        try:
            return bytes.fromhex(sha256_of_file(path))
        except OSError as error:
            return InputError(path, f"cannot be read: {error.strerror or error}")

    with ThreadPoolExecutor(max(num_workers, 1)) as pool:
        return list(pool.map(digest, paths))
