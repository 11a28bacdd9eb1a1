"""Reassign images within connected components that contain a duplicate top-1 image.

Queries and the first images of their rankings form a bipartite graph. A component without a
duplicate top-1 image is unchanged. In every other component, each query is assigned one of its
first images, or keeps its current top-1 image at the price of the slack.

This is the last stage of Protocol-Aware Assignment. Utilities are rounded to multiples of 1e-5, so
that equal utilities stay equal despite rounding errors.

Shape letters: `Q` queries, `K` considered images per query.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ensemble.matching import STAYS_OUT, priced_matching

UTILITY_STEP = 1e-5


def component_assignment(
    columns: Tensor, worth: Tensor, query_ids: Sequence[str], slack: float
) -> Tensor:
    """Assign images to the queries of every component with a duplicate top-1 image.

    The assignment maximizes the total utility. An image's utility is its score minus the score of
    the current top-1 image. A query that opts out keeps its current top-1 image with utility
    ``-slack``. Among equal totals, images at earlier places win. Remaining ties do not depend on
    the order of the rows.

    Args:
        columns: the first images of each query, best first, int64 [Q, K].
        worth: scores of these images, float64 [Q, K].
        query_ids: ids of the rows.
        slack: price of opting out.

    Returns:
        Column of each query's new top-1 image, int64 [Q].
    """
    result = columns[:, 0].clone()
    rows = np.flatnonzero(in_collisions(columns.numpy()))
    if len(rows) == 0:
        return result
    rows = np.array(sorted(rows.tolist(), key=query_ids.__getitem__))
    chosen = columns[rows].numpy()
    given_up = (worth[rows, :1] - worth[rows]).numpy()
    steps = np.round(given_up / UTILITY_STEP)
    price = float(np.round(slack / UTILITY_STEP))
    # Place costs sum to less than one step, so they never outweigh a utility.
    width = chosen.shape[1]
    place = np.arange(width + 1) / (len(rows) * (width + 1))
    names, numbered = np.unique(chosen, return_inverse=True)  # use only the columns that occur
    numbered, costs = numbered.reshape(chosen.shape), steps + place[:width]
    price += float(place[width])
    found = priced_matching(numbered, costs, len(names), price, limit=price)
    stays_out = found == STAYS_OUT
    result[rows[~stays_out]] = torch.from_numpy(names[found[~stays_out]])
    return result


def in_collisions(columns: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Mark the queries in components with a duplicate top-1 image, bool [Q].

    Args:
        columns: the first images of each query, best first [Q, K].
    """
    from scipy.sparse import csr_array  # plain fusion does not need scipy
    from scipy.sparse.csgraph import connected_components

    n_queries, width = columns.shape
    size = n_queries + int(columns.max()) + 1
    rows = np.repeat(np.arange(n_queries), width)
    edges = (np.ones(columns.size), (rows, n_queries + columns.ravel()))
    _, labels = connected_components(csr_array(edges, shape=(size, size)), directed=False)
    label = labels[:n_queries]
    first = columns[:, 0]
    shared = np.bincount(first)[first] > 1
    return np.isin(label, label[shared])
