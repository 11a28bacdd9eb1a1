"""Ids of images, which clients send instead of paths.

An id is ``ROW-HASH``: a row in the index, and the beginning of the SHA-256 of the image's name. An
update of the index may move an image to another row; the hash then finds the new row. The id of a
removed image finds no other image.
"""

from __future__ import annotations

import hashlib
from functools import cached_property

import numpy as np

from pab.search.index import Index

HASH_LETTERS = 16  # 64 bits
IMAGE_ID = rf"^[0-9]{{1,10}}-[0-9a-f]{{{HASH_LETTERS}}}$"


def image_id(row: int, name: str) -> str:
    """Return the id of an image."""
    return f"{row}-{_hash(name):0{HASH_LETTERS}x}"


def _hash(name: str) -> int:
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
    return int(digest[:HASH_LETTERS], 16)


class Ids:
    """Find the rows of an index by image ids, even by ids of an earlier state of the index."""

    def __init__(self, index: Index) -> None:
        self.index = index

    def row(self, identity: str) -> int | None:
        """Return the row of an image, or None if the index has no such image.

        Args:
            identity: an id that matches :data:`IMAGE_ID`.
        """
        number, _, digits = identity.partition("-")
        row, wanted = int(number), int(digits, 16)
        if row < self.index.rows and _hash(self.index.entry(row).name) == wanted:
            return row
        hashes, rows = self._moved
        place = int(np.searchsorted(hashes, np.uint64(wanted)))
        return int(rows[place]) if place < len(hashes) and int(hashes[place]) == wanted else None

    @cached_property
    def _moved(self) -> tuple[np.ndarray, np.ndarray]:
        """Hashes of all names, ascending, and their rows; computed when an id does not fit its row.

        Both arrays together take 16 bytes per image.
        """
        found = np.fromiter(map(_hash, self.index.names), np.uint64, self.index.rows)
        order = np.argsort(found, kind="stable")
        return found[order], order
