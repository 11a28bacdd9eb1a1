"""Second look of the server: re-rank the first images of a text query with a cross encoder."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence

from PIL import Image

from pab.scoring.rerank import Reranker
from pab.search.index import Entry, Index
from pab.search.query import Hit
from pab.search.rerank import ordered, pair_scores
from pab.search.server.cache import BoundedCache

CACHED_SCORES = 4 << 20  # bytes, about 2,000 queries with 20 images each
IMAGE_BYTES = 100  # per image: its row in the key, its score in the value


class SecondLook:
    """Re-rank with one model for all threads, and keep the scores of recent queries.

    All pages of a query get one order, because they share the scores of its first images.

    Args:
        reranker: model that scores pairs; it need not be thread-safe.
        depth: images per query to re-rank, at least 1.
        models: lock of all models; held while the reranker runs.
        load: function that reads an image of the index.
    """

    def __init__(
        self, reranker: Reranker, depth: int, models: threading.Lock,
        load: Callable[[Entry], Image.Image],
    ) -> None:  # fmt: skip
        self.reranker, self.depth, self._models, self._load = reranker, depth, models, load
        self._scores: BoundedCache[list[float]] = BoundedCache(CACHED_SCORES)
        self._one_query = threading.Lock()

    def apply(self, index: Index, state: Hashable, text: str, hits: list[Hit]) -> list[Hit]:
        """Order the first images by the reranker's scores; the others keep their order.

        Args:
            index: the searched index.
            state: state of the index on disk. With the text and the images, it is the key of the
                kept scores.
            text: text of the query.
            hits: results, best first.

        Raises:
            InputError: see :func:`pab.search.rerank.pair_scores`.
        """
        first = hits[: self.depth]
        key = state, text, tuple(hit.row for hit in first)
        scores = self._scores.get(key)
        if scores is None:
            with self._one_query:
                scores = self._scores.get(key)  # another request may just have computed them
                if scores is None:
                    scores = self._scored(index, text, first)
                    size = len(text.encode()) + IMAGE_BYTES * len(first)
                    self._scores.put(key, scores, size)
        return ordered(first, scores) + hits[self.depth :]

    def _scored(self, index: Index, text: str, hits: Sequence[Hit]) -> list[float]:
        (scores,) = pair_scores(
            index, [text], [list(hits)], self.reranker, load=self._load, lock=self._models
        )
        return scores
