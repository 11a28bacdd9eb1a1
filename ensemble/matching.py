"""Match queries and images one-to-one at minimum cost, with a price for opting out."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pab.core.progress import write_line

STAYS_OUT = -1
# Announce matchings of this size, which can take seconds (docs/log.md: 3.84 s for 1,978 x 1,978).
ANNOUNCED_PAIRS = 1_000_000


def priced_matching(
    columns: NDArray[np.int64],
    costs: NDArray[np.float64],
    n_gallery: int,
    price: float | None,
    *,
    limit: float | None,
) -> NDArray[np.int64]:
    """Match each query with one of its images at minimum total cost.

    Args:
        columns: candidate images of each query, [Q queries, K candidates].
        costs: costs of the candidates [Q, K].
        n_gallery: number of images.
        price: cost of opting out; None matches every query.
        limit: candidates above this cost are ignored; None uses all.

    Returns:
        Column of each query [Q]; ``STAYS_OUT`` for a query that opts out.
    """
    from scipy.sparse import csr_array  # plain fusion does not need scipy
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    n_queries = len(columns)
    rows, places = np.nonzero(np.ones_like(costs, dtype=bool) if limit is None else costs <= limit)
    values, ends = costs[rows, places], columns[rows, places]
    if len(rows) >= ANNOUNCED_PAIRS:  # scipy's solver does not report its progress
        write_line(f"matching {n_queries} queries with images, {len(rows)} possible pairs")
    if price is not None:  # one extra column per query
        own = np.arange(n_queries)
        rows = np.concatenate([rows, own])
        ends = np.concatenate([ends, n_gallery + own])
        values = np.concatenate([values, np.full(n_queries, price)])
    # The solver treats 0 as a missing entry, so all costs are shifted to 1 and above.
    graph = csr_array(
        (values - values.min() + 1.0, (rows, ends)), shape=(n_queries, n_gallery + n_queries)
    )
    matched_rows, matched = min_weight_full_bipartite_matching(graph)
    found = np.empty(n_queries, dtype=np.int64)
    found[matched_rows] = matched
    found[found >= n_gallery] = STAYS_OUT
    return found
