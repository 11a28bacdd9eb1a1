"""One-to-one matching of queries and images at least cost, with a price for taking no part."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

STAYS_OUT = -1


def priced_matching(
    columns: NDArray[np.int64],
    costs: NDArray[np.float64],
    n_gallery: int,
    price: float | None,
    *,
    limit: float | None,
) -> NDArray[np.int64]:
    """Match each query with one of its images so that the total cost is least.

    Args:
        columns: the images that each query may have [Q, K].
        costs: of each of them [Q, K].
        n_gallery: images in all.
        price: cost of taking no part; None if every query takes part.
        limit: images that cost more are not looked at; None for all.

    Returns:
        The column of each query [Q]; ``STAYS_OUT`` for a query that pays the price.
    """
    # Imported here: who only fuses need not pay its time and memory.
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    n_queries = len(columns)
    rows, places = np.nonzero(np.ones_like(costs, dtype=bool) if limit is None else costs <= limit)
    values, ends = costs[rows, places], columns[rows, places]
    if price is not None:  # a column of its own for each query
        own = np.arange(n_queries)
        rows = np.concatenate([rows, own])
        ends = np.concatenate([ends, n_gallery + own])
        values = np.concatenate([values, np.full(n_queries, price)])
    # The matching takes an entry of 0 for none: all costs are moved to 1 and above.
    graph = csr_array(
        (values - values.min() + 1.0, (rows, ends)), shape=(n_queries, n_gallery + n_queries)
    )
    matched_rows, matched = min_weight_full_bipartite_matching(graph)
    found = np.empty(n_queries, dtype=np.int64)
    found[matched_rows] = matched
    found[found >= n_gallery] = STAYS_OUT
    return found
