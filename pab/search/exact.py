"""Exact search: the rows with the largest dot products, block by block.

The first comparison is fast and has a bounded error. It is a product in float16 for one query and
float16 rows, and in float32 otherwise. Rows that may be among the first k, given this bound, are
compared again in float64. Scores and order therefore do not depend on blocks, threads, or the
number of queries.

Bounds, with unit roundoff u, for a sum of D products in any order (N. Higham, Accuracy and
Stability of Numerical Algorithms, section 3.1)::

    |computed - exact| <= D u / (1 - D u) * sum |a_i q_i| <= D u / (1 - D u) * |a| |q|

The float16 product accumulates in float32, then rounds to float16. PyTorch does not document this,
so it is checked once per width; if the check fails, the product is in float32. Rounding the query
to float16 adds at most |a| |q - rounded q|.

Shape letters: `Q` queries, `n` rows of a block or a part of it, `D` width of the vectors, `k`
results per query, `p` pairs of a query and a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import numpy as np
import torch

Blocks = Iterable[tuple[int, np.ndarray]]  # (number of the first row, vectors [n, D])

HALF, SINGLE, BRAIN = 2.0**-11, 2.0**-24, 2.0**-8  # unit roundoffs: float16, float32, bfloat16
SLACK = 1.01  # covers the rounding of the bounds themselves
LEAST_NORMAL = 2.0**-126  # of float32; smaller products may be rounded to zero
# Values compared at a time. One query reads each value once; several queries read them from the
# processor's cache.
ONE_VALUES, SEVERAL_VALUES = 8 << 20, 1 << 19
PAIR_VALUES = 4 << 20  # values that are compared in float64 at a time


def search_exact(
    blocks: Blocks, queries: np.ndarray, k: int, longest: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Find the k rows with the largest dot products; ties go to the smaller row number.

    A score is the dot product in float64, rounded to float32. Memory does not grow with the number
    of rows.

    Args:
        blocks: rows in float16 or float32. Other types are converted to float32, and read-only
            arrays are copied, in parts.
        queries: float32 [Q, D].
        k: rows per query, at least 1.
        longest: upper bound of the rows' norms, from :func:`longest_row`; None computes the norms,
            which takes longer than the product.

    Returns:
        Scores, float32 [Q, m], and row numbers, int64 [Q, m], best first; m is the smaller of k
        and the number of rows. NaN scores come first.
    """
    if not len(queries):
        total = sum(len(block) for _, block in blocks)
        return np.empty((0, min(k, total)), np.float32), np.empty((0, min(k, total)), np.int64)
    best = _Best(np.ascontiguousarray(queries, dtype=np.float32), k)
    one = len(queries) == 1
    for first, rows in _parts(blocks, ONE_VALUES if one else SEVERAL_VALUES):
        if one and rows.dtype == torch.float16 and half_is_bounded(rows.shape[1]):
            best.add_half(first, rows, longest)
        else:
            best.add_single(first, rows, longest)
    return best.result()


def longest_row(blocks: Blocks) -> float:
    """Return an upper bound of row norms, about 1 % too large; infinite for overflow or NaN."""
    return max((_length(rows.float()) for _, rows in _parts(blocks, SEVERAL_VALUES)), default=0.0)


def selected(blocks: Blocks, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield only the chosen rows of blocks, numbered by their position in ``rows``.

    Args:
        blocks: all rows.
        rows: numbers of the chosen rows, int64, ascending.
    """
    for first, block in blocks:
        low, high = np.searchsorted(rows, (first, first + len(block)))
        if low < high:
            yield int(low), block[rows[low:high] - first]


class _Best:
    """Best rows of each query so far."""

    def __init__(self, queries: np.ndarray, k: int) -> None:
        self.queries, self.k, self.total = queries, k, 0
        self._single = torch.from_numpy(queries)
        self._double = queries.astype(np.float64)
        self._scores = [np.empty(0, dtype=np.float32) for _ in queries]
        self._rows = [np.empty(0, dtype=np.int64) for _ in queries]
        self._least = torch.full((len(queries), 1), -torch.inf)  # score of the k-th row so far
        with np.errstate(all="ignore"):
            self._lengths = torch.from_numpy(np.linalg.norm(self._double, axis=1)).float()
            self._half = self._rounded() if len(queries) == 1 else None

    def _rounded(self) -> tuple[torch.Tensor, float, float, float]:
        """Round the only query to float16; return it with its scale, norm and rounding error."""
        scale = float(np.abs(self._double[0]).max(initial=0))
        scale = scale if 0 < scale < np.inf else 1.0  # so that float16 does not overflow
        scaled = self._double[0] / scale
        rounded = scaled.astype(np.float16)
        length = float(np.linalg.norm(rounded.astype(np.float64)))
        return torch.from_numpy(rounded), scale, length, float(np.linalg.norm(scaled - rounded))

    def add_half(self, first: int, rows: torch.Tensor, longest: float | None) -> None:
        """Compare float16 rows [n, D] with the only query by a product in float16."""
        assert self._half is not None
        query, scale, length, error = self._half
        longest = longest_row([(first, rows.numpy())]) if longest is None else longest
        product = torch.mv(rows, query).float()  # [n]
        fixed = longest * (_sum_error(len(query), SINGLE) * length + error) + HALF**2
        errors = (product.abs() * HALF + fixed) * (SLACK * scale) + len(query) * LEAST_NORMAL
        self._add(first, rows, (product * scale)[None], errors[None])

    def add_single(self, first: int, rows: torch.Tensor, longest: float | None) -> None:
        """Compare rows [n, D] with all queries by a product in float32."""
        single = rows.float()
        longest = _length(single) if longest is None else longest
        if len(self.queries) == 1:
            products = torch.mv(single, self._single[0])[None]  # faster than a matrix product
        else:
            products = (single @ self._single.T).T
        # The additional 8 cover the rounding of the scores.
        unit = _sum_error(single.shape[1] + 8, SINGLE) + (3 * BRAIN if _is_rough() else 0.0)
        errors = self._lengths * (unit * longest * SLACK) + single.shape[1] * LEAST_NORMAL
        self._add(first, rows, products, errors[:, None])

    def _add(
        self, first: int, rows: torch.Tensor, products: torch.Tensor, errors: torch.Tensor
    ) -> None:
        """Compare again the rows that may be among the first k.

        Args:
            first: number of the first row.
            rows: [n, D].
            products: approximate dot products [Q, n].
            errors: bounds of their errors, [Q, n] or [Q, 1].
        """
        self.total += len(rows)
        highest = products + errors
        possible = ~(highest < self._least)  # also true for NaN, which an overflow may cause
        if len(rows) > self.k and bool((possible.sum(dim=1) > self.k).any()):
            lowest = torch.nan_to_num(products - errors, nan=-torch.inf, posinf=-torch.inf)
            enough = lowest.topk(self.k, dim=1).values[:, -1:]
            possible &= ~(highest < enough)
        of_queries, places = (one.numpy() for one in possible.nonzero(as_tuple=True))
        if not len(places):
            return
        scores = self._exact(rows, of_queries, places)
        ends = np.searchsorted(of_queries, np.arange(len(self.queries) + 1))
        for query in np.unique(of_queries):
            own = slice(ends[query], ends[query + 1])
            self._merge(query, scores[own], first + places[own])

    def _exact(self, rows: torch.Tensor, queries: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Return the scores of p pairs, float32 [p]; equal rows have equal scores."""
        step = max(1, PAIR_VALUES // max(1, rows.shape[1]))
        found = np.empty(len(places), dtype=np.float32)
        with np.errstate(all="ignore"):
            for start in range(0, len(places), step):
                part = slice(start, start + step)
                pairs = rows[torch.from_numpy(places[part])].double().numpy()  # [p, D]
                pairs *= self._double[queries[part]]
                found[part] = pairs.sum(axis=1)
        return found

    def _merge(self, query: int, scores: np.ndarray, rows: np.ndarray) -> None:
        scores = np.concatenate([self._scores[query], scores])
        rows = np.concatenate([self._rows[query], rows])
        order = np.lexsort((rows, -scores, ~np.isnan(scores)))[: self.k]
        self._scores[query], self._rows[query] = scores[order], rows[order]
        if len(order) == self.k:
            last = float(scores[order[-1]])
            self._least[query] = torch.inf if np.isnan(last) else last

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the scores and row numbers, [Q, m]."""
        shape = (len(self.queries), min(self.k, self.total))
        scores, rows = np.empty(shape, dtype=np.float32), np.empty(shape, dtype=np.int64)
        for query in range(len(self.queries)):
            scores[query], rows[query] = self._scores[query], self._rows[query]
        return scores, rows


@cache
def half_is_bounded(width: int) -> bool:
    """Return true if sampled float16 products on this CPU stay within the bound of this module."""
    made = np.random.default_rng(0)
    rows = torch.from_numpy(made.standard_normal((256, width)).astype(np.float16))
    query = torch.from_numpy(made.standard_normal(width).astype(np.float16))
    product, exact = torch.mv(rows, query).double(), rows.double() @ query.double()
    lengths = rows.double().norm(dim=1) * query.double().norm()
    bound = lengths * _sum_error(width, SINGLE) + product.abs() * HALF + HALF**2
    return bool(((product - exact).abs() <= bound * SLACK).all())


def _is_rough() -> bool:
    """Return true if the user allows rounded float32 products on the CPU (bfloat16, TF32)."""
    mkldnn: Any = torch.backends.mkldnn
    settings = (mkldnn.matmul, mkldnn, torch.backends)
    return any(one.fp32_precision not in ("none", "ieee") for one in settings)


def _sum_error(terms: int, unit: float) -> float:
    """Return the error bound of a dot product, relative to the product of the norms."""
    return terms * unit / (1 - terms * unit)


def _length(rows: torch.Tensor) -> float:
    """Return an upper bound of the norms of float32 rows [n, D], n at least 1."""
    squares = float((rows * rows).sum(dim=1).max())
    if np.isnan(squares):  # a NaN hides the largest norm of the other rows
        return float("inf")
    return SLACK * (squares + rows.shape[1] * LEAST_NORMAL) ** 0.5


def _parts(blocks: Blocks, values: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield blocks as tensors, in parts of at most ``values`` numbers but at least one row."""
    for first, block in blocks:
        step = max(1, values // max(1, block.shape[1]))
        for start in range(0, len(block), step):
            rows = block[start : start + step]
            kind = np.float16 if rows.dtype == np.float16 else np.float32
            rows = np.ascontiguousarray(rows, dtype=kind)
            # PyTorch warns about read-only memory, because it could write there.
            rows = rows if rows.flags.writeable else rows.copy()
            yield first + start, torch.from_numpy(rows)
