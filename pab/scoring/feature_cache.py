"""Content-addressed cache on disk for vectors of images and captions.

A cache belongs to one encoder with its weights, preprocessing, dtype, device and code versions. The
key of an image depends on the content of its file and the reader, so a renamed image is recognized,
and a changed image is encoded again. The key of a caption depends only on its token ids or, for
some models, its text. An interrupted process loses at most two batches. A run with a larger gallery
or new queries encodes only the new items. A vision-language reranker caches the score of a pair as
a vector of width 1.

A cache is a folder of parts, one per process, vector width, dtype and run. ``PART.sha256`` holds
the keys, 32 bytes each. ``PART.float32`` or ``PART.float16`` holds the vectors (for re-ranking with
UIT, each is followed by the image's tokens). A vector is written before its key; a vector that an
interruption leaves without a key is ignored.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pab.core.errors import InputError
from pab.core.files import write_text
from pab.core.resources import CODE_ROOT

FORMAT = 1  # version of the file format; a new version starts a new cache
DIGEST_BYTES = 32
CODE = ("pab", "lhp", "uit", "scripts")
LIBRARIES = ("torch", "torchvision", "pillow", "open_clip_torch", "transformers", "timm")
HASHES, VECTORS, FACTS = ".sha256", ".float32", "encoder.json"
HALVES = ".float16"  # ending of vectors in half precision
DTYPES: dict[str, np.dtype[Any]] = {VECTORS: np.dtype("float32"), HALVES: np.dtype("float16")}


class FeatureCache:
    """Cache the vectors of one encoder on disk.

    Files are opened for each write, and memory-mapped once their vectors are read.

    Args:
        folder: folder of all caches.
        facts: everything that the vectors depend on besides the input: hash of the weights,
            preprocessing, dtype, device, code versions.

    Raises:
        InputError: the folder cannot be created, read or written.
    """

    def __init__(self, folder: str | Path, facts: Mapping[str, str]) -> None:
        text = json.dumps({"format": FORMAT, **facts}, sort_keys=True, indent=1)
        self.folder = Path(folder) / hashlib.sha256(text.encode()).hexdigest()[:16]
        self._rows: dict[bytes, tuple[Path, int]] = {}  # key -> file and row of the vector
        self._matrices: dict[Path, np.memmap] = {}
        # width and ending of the vectors -> key file of this run's part
        self._parts: dict[tuple[int, str], Path] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                self.folder, f"the feature cache cannot be created: {error.strerror or error}",
                todo="set another folder with --feature_cache_dir, or use --no_feature_cache",
            ) from error  # fmt: skip
        if not (self.folder / FACTS).is_file():
            write_text(self.folder / FACTS, text + "\n")
        for hashes in sorted(self.folder.glob(f"*{HASHES}")):
            try:
                self._read_part(hashes)
            except OSError as error:
                raise InputError(
                    hashes, f"cached vectors cannot be read: {error.strerror or error}",
                    todo=f"remove {self.folder}, or use --no_feature_cache",
                ) from error  # fmt: skip

    def __len__(self) -> int:
        return len(self._rows)

    def _read_part(self, hashes: Path) -> None:
        """Register the keys of a part that have a complete vector; vectors stay on disk."""
        digests = hashes.read_bytes()
        files = [hashes.with_suffix(ending) for ending in DTYPES]
        vectors = next((file for file in files if file.is_file()), None)
        width = self._width_of(hashes)
        if width is None or vectors is None:
            return
        size = DTYPES[vectors.suffix].itemsize * width
        count = min(len(digests) // DIGEST_BYTES, vectors.stat().st_size // size)
        if count == 0:
            return
        for row in range(count):
            digest = digests[row * DIGEST_BYTES : (row + 1) * DIGEST_BYTES]
            self._rows.setdefault(digest, (vectors, row))

    @staticmethod
    def _width_of(part: Path) -> int | None:
        """Parse the vector width from a part's name."""
        words = part.stem.rpartition("x")
        return int(words[2]) if words[2].isdigit() else None

    def _matrix(self, vectors: Path, row: int) -> np.memmap:
        """Memory-map a part's vectors; map again if the part has grown beyond ``row``."""
        if vectors not in self._matrices or row >= len(self._matrices[vectors]):
            width = self._width_of(vectors)
            assert width is not None, "parts are registered under their width"
            dtype = DTYPES[vectors.suffix]
            count = vectors.stat().st_size // (dtype.itemsize * width)
            self._matrices[vectors] = np.memmap(vectors, dtype, "r", shape=(count, width))
        return self._matrices[vectors]

    def split(self, digests: Mapping[int, bytes]) -> tuple[list[int], list[int]]:
        """Split positions into those with cached vectors and those to encode."""
        known = [i for i, digest in digests.items() if digest in self._rows]
        new = [i for i, digest in digests.items() if digest not in self._rows]
        return known, new

    def vectors(self, digests: Sequence[bytes]) -> Tensor:
        """Read cached vectors of equal width, [n, D] in their dtype; n is at least 1."""
        return torch.stack(self.rows(digests))

    def rows(self, digests: Sequence[bytes]) -> list[Tensor]:
        """Read cached vectors of any width, [D] each, in their dtype."""
        found = [self._rows[digest] for digest in digests]
        return [torch.from_numpy(np.array(self._matrix(part, row)[row])) for part, row in found]

    def keys(self) -> frozenset[bytes]:
        """Return the keys of all cached vectors, for the loader's processes."""
        return frozenset(self._rows)

    def keep_rows(self, digests: Sequence[bytes], rows: Sequence[Tensor]) -> None:
        """Append vectors of any width, [D] each; see :meth:`keep`."""
        of_width: dict[int, list[int]] = {}
        for position, row in enumerate(rows):
            of_width.setdefault(len(row), []).append(position)
        for places in of_width.values():
            self.keep([digests[i] for i in places], torch.stack([rows[i] for i in places]))

    def keep(self, digests: Sequence[bytes], vectors: Tensor) -> None:
        """Append vectors of equal width to the cache.

        Args:
            digests: keys of the images or captions.
            vectors: float32 or float16 [n, D] on the CPU.

        Raises:
            InputError: the vectors cannot be written.
        """
        matrix = vectors.contiguous().numpy()
        width = matrix.shape[1]
        ending = next(ending for ending, dtype in DTYPES.items() if dtype == matrix.dtype)
        try:
            # After a failed write, start a new part: a torn row would shift later rows.
            hashes = self._parts.pop((width, ending), None) or self._new_part(width, ending)
            part = hashes.with_suffix(ending)
            first = hashes.stat().st_size // DIGEST_BYTES
            for path, data in ((part, matrix.tobytes()), (hashes, b"".join(digests))):
                with path.open("ab") as file:
                    file.write(data)
            self._parts[width, ending] = hashes
        except OSError as error:
            raise InputError(
                self.folder, f"vectors cannot be cached: {error.strerror or error}",
                todo="free disk space, or use --no_feature_cache",
            ) from error  # fmt: skip
        for row, digest in enumerate(digests, start=first):
            self._rows.setdefault(digest, (part, row))

    def _new_part(self, width: int, ending: str) -> Path:
        """Create an empty pair of files under a name that no other process uses."""
        number = 0
        while True:
            hashes = self.folder / f"{number}_{os.getpid()}x{width}{HASHES}"
            try:
                hashes.touch(exist_ok=False)
            except FileExistsError:
                number += 1
                continue
            hashes.with_suffix(ending).write_bytes(b"")  # keys without vectors are ignored
            return hashes


def code_versions() -> dict[str, str]:
    """Return the hash of the project's code and the versions of the libraries behind the vectors.

    Both belong to the facts of a cache, because a bug fix must invalidate cached vectors.
    """
    code = hashlib.sha256()
    ignored = CODE_ROOT / "pab/mini"  # it writes image files, which have their own keys
    for folder in CODE:
        for path in sorted((CODE_ROOT / folder).rglob("*.py")):
            if not path.is_relative_to(ignored):
                code.update(path.read_bytes())
    found = {"code": code.hexdigest()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # not installed: an environment for another model
            found[name] = "none"
    return found


def caption_digest(ids: Sequence[int | str]) -> bytes:
    """Return the cache key of a caption: SHA-256 of a prefix and its ids or text."""
    return hashlib.sha256(f"caption {' '.join(map(str, ids))}".encode()).digest()
