"""Exact search: the rows with the largest dot products, block by block.

Shape letters: `Q` queries, `n` rows of a block, `D` width of the vectors, `k` results per query.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

Blocks = Iterable[tuple[int, np.ndarray]]  # (number of the first row, vectors [n, D])


def search_exact(blocks: Blocks, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the k rows with the largest dot products; of equal scores, the smaller row comes first.

    Args:
        blocks: vectors of any float type, with ascending row numbers; only one block is in memory.
        queries: float32 [Q, D].
        k: rows per query, at least 1.

    Returns:
        Scores, float32 [Q, m], and row numbers, int64 [Q, m], best first; m is the smaller of k
        and the number of rows. NaN scores come first.
    """
    texts = torch.from_numpy(np.ascontiguousarray(queries, dtype=np.float32))
    scores = torch.empty(len(texts), 0)
    rows = torch.empty(len(texts), 0, dtype=torch.int64)
    for first, block in blocks:
        vectors = torch.from_numpy(np.asarray(block).astype(np.float32))
        found = texts @ vectors.T  # [Q, n]
        numbers = torch.arange(first, first + len(vectors)).expand(len(texts), -1)
        # Earlier rows stand first, so a stable sort gives ties to the smaller row.
        scores, order = torch.cat([scores, found], dim=1).sort(dim=1, descending=True, stable=True)
        rows = torch.cat([rows, numbers], dim=1).gather(1, order[:, :k])
        scores = scores[:, :k]
    return scores.numpy(), rows.numpy()
