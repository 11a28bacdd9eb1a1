"""Search photographs once: index them in a temporary folder, then query the index.

Only photographs that are not in the feature cache are decoded and encoded. A file that cannot be
decoded is skipped, and the problem is recorded.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pab.data.photos import photo_reader
from pab.data.records import GalleryImage
from pab.scoring.encoder import Encoder
from pab.search.index import SHARD_ROWS, Dtype, Entry, Index, Manifest, Member
from pab.search.query import Hit, Query, Searcher
from pab.search.vectors import text_vectors
from pab.search.writing import with_shards, write_shard

MEMBER = "once"  # name of the only member in the temporary index


@dataclass(frozen=True)
class Answers:
    """Result of a search."""

    indexed: int  # number of ranked photographs
    unreadable: dict[str, str]  # name of each unreadable photograph -> problem
    hits: list[list[Hit]]  # best photographs per query, in the order of the queries


def search(
    encoder: Encoder, photos: Sequence[GalleryImage], queries: Sequence[str], top_k: int
) -> Answers:
    """Rank photographs for each query; ties go to the smaller name.

    Args:
        encoder: encoder of the member.
        photos: photographs, sorted by name.
        queries: descriptions.
        top_k: photographs per query.

    Raises:
        InputError: an argument is invalid, the encoder rejects an input, a vector or a score is not
            finite, or the temporary index cannot be written.
    """
    if not photos:
        return Answers(0, {}, [[] for _ in queries])
    reader = photo_reader()
    assert reader.unreadable is not None
    text_vectors(encoder, queries)  # first, so that bad queries fail early
    vectors = encoder.encode_images(photos, reader=reader)
    kept = [i for i, photo in enumerate(photos) if photo.gallery_id not in reader.unreadable]
    unreadable = {name: error.problem for name, error in sorted(reader.unreadable.items())}
    if not kept:
        return Answers(0, unreadable, [[] for _ in queries])
    with tempfile.TemporaryDirectory(prefix="pab-search-") as folder:
        index = _index(Path(folder), encoder, photos, kept, vectors)
        hits = Searcher(index, {MEMBER: encoder}).search([Query(one) for one in queries], top_k)
    return Answers(len(kept), unreadable, hits)


def _index(
    folder: Path,
    encoder: Encoder,
    photos: Sequence[GalleryImage],
    kept: Sequence[int],
    vectors: Tensor,
) -> Index:
    """Write an index that keeps its entries in memory.

    Args:
        folder: folder of the index.
        encoder: encoder of the vectors.
        photos: G photographs.
        kept: positions of the photographs to index.
        vectors: [G, D], perhaps memory-mapped; they are copied shard by shard.
    """
    origin = {"checkpoint": encoder.origin.checkpoint}
    dtype: Dtype = "float16" if vectors.dtype == torch.float16 else "float32"
    member = Member(MEMBER, MEMBER, (), {}, origin, vectors.shape[1], dtype)
    manifest = Manifest({}, str(folder), [member])
    entries = [Entry(photos[i].gallery_id, photos[i].path, 0, 0) for i in kept]
    for start in range(0, len(kept), SHARD_ROWS):
        part = slice(start, start + SHARD_ROWS)
        rows = {MEMBER: vectors[torch.tensor(kept[part])].float().numpy()}
        shard = write_shard(folder, manifest, entries[part], rows, metadata=False)
        manifest = with_shards(manifest, [*manifest.shards, shard])
    return Index(folder, manifest, entries)
