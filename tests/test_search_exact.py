"""Exact search equals a full sort: ties, differences below float16, filters, extreme values."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pab.search import exact
from pab.search.exact import half_is_bounded, longest_row, search_exact, selected


def brute_force(rows: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Sort all scores; NaN first, then the larger score, then the smaller row."""
    scores = np.empty((len(queries), len(rows)), dtype=np.float32)
    with np.errstate(all="ignore"):
        for number, query in enumerate(queries):
            scores[number] = (rows.astype(np.float64) * query.astype(np.float64)).sum(axis=1)
    order = np.stack([np.lexsort((-one, ~np.isnan(one))) for one in scores])[:, :k]
    return np.take_along_axis(scores, order, 1), order


def blocks_of(rows: np.ndarray, size: int) -> Iterator[tuple[int, np.ndarray]]:
    for first in range(0, len(rows), size):
        yield first, rows[first : first + size]


def unit_rows(count: int, width: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def check(rows: np.ndarray, queries: np.ndarray, k: int, **settings: Any) -> None:
    """Compare with brute force, for one query at a time and for all, in blocks of 37 rows."""
    stored = rows if rows.dtype == np.float16 else rows.astype(np.float32)
    scores, order = brute_force(stored, queries, k)
    found = search_exact(blocks_of(rows, 37), queries, k, **settings)
    np.testing.assert_array_equal(found[1], order)
    np.testing.assert_array_equal(found[0], scores)
    assert (found[0].dtype, found[1].dtype) == (np.float32, np.int64)
    for number in range(len(queries)):
        one = search_exact(blocks_of(rows, 37), queries[number : number + 1], k, **settings)
        np.testing.assert_array_equal(one[1][0], order[number])
        np.testing.assert_array_equal(one[0][0], scores[number])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("k", [1, 7, 300, 1000])
@pytest.mark.parametrize("width", [1, 5, 64])
def test_results_equal_a_full_sort(dtype: str, k: int, width: int) -> None:
    rows = unit_rows(300, width).astype(dtype)
    rows[200:220] = rows[3]
    check(rows, unit_rows(4, width, seed=1), k)
    check(rows, unit_rows(4, width, seed=1), k, longest=longest_row(blocks_of(rows, 100)))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_ties_go_to_the_smaller_row(dtype: str) -> None:
    rows = np.random.default_rng(0).integers(-2, 3, size=(500, 4)).astype(dtype)
    check(rows, np.array([[1, 2, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=np.float32), 25)


def test_differences_below_float16_are_ordered() -> None:
    width = 64
    made = np.random.default_rng(0)
    query = unit_rows(1, width)
    rows = (query + 1e-4 * made.standard_normal((5000, width))).astype(np.float16)
    plain = torch.mv(torch.from_numpy(rows), torch.from_numpy(query[0]).half())
    assert len(plain.topk(20).values.unique()) < 5  # float16 alone cannot order them
    check(rows, query, 20)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_ascending_scores_are_found(dtype: str) -> None:
    rows = (np.arange(1, 2001)[:, None] / 2001 * unit_rows(1, 8)).astype(dtype)
    check(rows, unit_rows(1, 8), 10)
    check(rows, -unit_rows(1, 8), 10)


def test_few_rows_are_compared_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, counts = unit_rows(20_000, 64).astype(np.float16), []
    own = exact._Best._exact

    def counted(self: Any, part: Any, queries: np.ndarray, places: np.ndarray) -> np.ndarray:
        counts.append(len(places))
        return own(self, part, queries, places)

    monkeypatch.setattr(exact._Best, "_exact", counted)
    for count in (1, 3):
        counts.clear()
        search_exact(blocks_of(rows, 5000), unit_rows(count, 64, seed=1), 20)
        assert sum(counts) < 150 * count


def test_only_chosen_rows_are_searched() -> None:
    rows, query = unit_rows(300, 16).astype(np.float16), unit_rows(1, 16, seed=1)
    chosen = np.flatnonzero(np.random.default_rng(2).random(300) < 0.3)
    scores, places = search_exact(selected(blocks_of(rows, 37), chosen), query, 10)
    expected = brute_force(rows[chosen], query, 10)
    np.testing.assert_array_equal(chosen[places], chosen[expected[1]])
    np.testing.assert_array_equal(scores, expected[0])
    for nothing in (np.empty(0, dtype=np.int64), np.array([], dtype=np.int64)):
        found = search_exact(selected(blocks_of(rows, 37), nothing), query, 10)
        assert found[0].shape == found[1].shape == (1, 0)


def test_empty_blocks_and_no_queries() -> None:
    rows = unit_rows(5, 4).astype(np.float16)
    blocks = [(0, rows[:0]), (0, rows), (5, rows[:0])]
    assert search_exact(blocks, unit_rows(2, 4), 3)[1].shape == (2, 3)
    assert search_exact([], unit_rows(2, 4), 3)[1].shape == (2, 0)
    assert search_exact(blocks, unit_rows(2, 4)[:0], 3)[1].shape == (0, 3)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_values_that_are_not_finite_rank_by_their_scores(dtype: str) -> None:
    rows = unit_rows(300, 8).astype(dtype)
    rows[7, 2], rows[250, 0], rows[100, 1] = np.nan, np.inf, -np.inf
    for k in (1, 2, 5, 300):
        check(rows, np.abs(unit_rows(3, 8, seed=1)), k)
    check(rows, np.array([[np.nan] * 8, [np.inf] + [0.0] * 7], dtype=np.float32), 5)


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-6, 1e6, 1e30])
def test_queries_of_any_length(scale: float) -> None:
    rows = unit_rows(300, 16)
    for dtype in ("float16", "float32"):
        check(rows.astype(dtype), unit_rows(3, 16, seed=1) * np.float32(scale), 10)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 6e4, 1e15, 1e25])
def test_rows_of_any_length(scale: float) -> None:
    """Products overflow float16; squares overflow or underflow in float32."""
    made = np.random.default_rng(3)
    rows = unit_rows(300, 16) * made.uniform(0.5, 1, (300, 1)) * scale
    check(rows.astype(np.float32), unit_rows(3, 16, seed=1), 10)
    if scale <= 6e4:
        check(rows.astype(np.float16), unit_rows(3, 16, seed=1), 10)


def test_lengths_are_bounded_from_above() -> None:
    made = np.random.default_rng(4)
    rows = (made.standard_normal((500, 32)) * made.uniform(0, 9, (500, 1))).astype(np.float16)
    longest = np.linalg.norm(rows.astype(np.float64), axis=1).max()
    assert longest <= longest_row(blocks_of(rows, 64)) <= 1.02 * longest
    assert longest_row([]) == 0.0
    rows[499, 3] = np.nan
    assert longest_row(blocks_of(rows, 64)) == longest_row([(0, rows)]) == np.inf


def test_read_only_maps_are_searched_without_a_warning(tmp_path: Path) -> None:
    rows, query = unit_rows(300, 16).astype(np.float16), unit_rows(1, 16, seed=1)
    np.save(tmp_path / "rows.npy", rows)
    expected = brute_force(rows, query, 5)[1]
    for mode in ("r", "c"):
        mapped = np.load(tmp_path / "rows.npy", mmap_mode=mode)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert (search_exact([(0, mapped)], query, 5)[1] == expected).all()


def test_parts_do_not_change_results(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, queries = unit_rows(1000, 48).astype(np.float16), unit_rows(5, 48, seed=1)
    before = search_exact([(0, rows)], queries, 50)
    monkeypatch.setattr(exact, "SEVERAL_VALUES", 48 * 10)
    monkeypatch.setattr(exact, "ONE_VALUES", 48 * 3)
    monkeypatch.setattr(exact, "PAIR_VALUES", 48)
    after = search_exact(blocks_of(rows, 90), queries, 50)
    np.testing.assert_array_equal(before[0], after[0])
    np.testing.assert_array_equal(before[1], after[1])
    check(rows, queries[:1], 50)


def test_a_product_that_accumulates_in_float16_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = torch.mv

    def rough(rows: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        if rows.dtype != torch.float16:
            return own(rows, query)
        total = torch.zeros(len(rows), dtype=torch.float16)
        for column in range(rows.shape[1]):
            total = (total + rows[:, column] * query[column]).half()
        return total

    assert half_is_bounded(768)
    monkeypatch.setattr(torch, "mv", rough)
    for width in (8, 64, 768):
        assert not half_is_bounded.__wrapped__(width)
    monkeypatch.setattr(exact, "half_is_bounded", half_is_bounded.__wrapped__)
    check(unit_rows(300, 64).astype(np.float16), unit_rows(1, 64, seed=1), 20)


def test_a_lower_precision_of_products_widens_the_bound() -> None:
    rows, queries = unit_rows(2000, 64).astype(np.float16), unit_rows(8, 64, seed=1)
    before = torch.backends.mkldnn.matmul.fp32_precision
    # The setting has an effect only if the processor supports it.
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        assert exact._is_rough()
        check(rows, queries, 20)
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    assert not exact._is_rough()


def test_the_bound_covers_values_rounded_to_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    def rough(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a.bfloat16().double() @ b.bfloat16().double()).to(a.dtype)

    half_way = 1 + 2.0**-8  # rounds to 1, the largest relative error
    rows = np.stack([np.full(64, 1.0031), np.full(64, half_way)]).astype(np.float32)
    queries = np.full((2, 64), half_way, dtype=np.float32)
    monkeypatch.setattr(exact, "_is_rough", lambda: True)
    product = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor, "__matmul__",
        lambda a, b: rough(a, b) if a.dtype == torch.float32 else product(a, b),
    )  # fmt: skip
    found = search_exact([(0, rows[:1]), (1, rows[1:])], queries, 1)[1]
    assert found.tolist() == [[1], [1]]
