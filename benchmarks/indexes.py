"""Write search indexes of synthetic entries and vectors, for the benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from pab.search.index import SHARD_ROWS, Entry, Manifest
from pab.search.writing import with_shards, write_shard


def write_index(
    folder: Path,
    manifest: Manifest,
    rows: int,
    entry: Callable[[int], Entry],
    vectors: Callable[[range], np.ndarray],
) -> None:
    """Write an index with one member, shard by shard.

    Args:
        folder: folder to write.
        manifest: manifest of an index without shards.
        rows: number of images in the index.
        entry: function from a row to its entry. It is called for all rows of a shard before
            ``vectors`` is called for that shard.
        vectors: function from the rows of a shard to their vectors, float32 [rows, width].
    """
    (member,) = manifest.members
    for first in range(0, rows, SHARD_ROWS):
        part = range(first, min(rows, first + SHARD_ROWS))
        entries = [entry(row) for row in part]
        shard = write_shard(folder, manifest, entries, {member.name: vectors(part)})
        manifest = with_shards(manifest, [*manifest.shards, shard])
    manifest.save(folder)
