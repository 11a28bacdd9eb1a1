"""Tie rule compared with brute force; reader and writer of ranked lists."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pab.core.errors import InputError
from pab.ranking import (
    order_queries,
    ranked_names,
    ranks_of,
    read_ranked_list,
    rows_in_order,
    top_k,
    write_ranked_list,
)


def by_hand(scores: torch.Tensor) -> list[list[int]]:
    """Return the full ranking of every row by the tie rule."""
    return [sorted(range(len(row)), key=lambda c: (-row[c], c)) for row in scores.tolist()]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_top_k_and_ranks_equal_brute_force_with_many_ties(data: st.DataObject) -> None:
    n_queries = data.draw(st.integers(1, 5))
    n_gallery = data.draw(st.integers(1, 30))
    k = data.draw(st.integers(1, 35))
    value = st.sampled_from([-1.5, -0.0, 0.0, 0.25, 1.0, 3e38])
    rows = st.lists(value, min_size=n_gallery, max_size=n_gallery)
    scores = torch.tensor(data.draw(st.lists(rows, min_size=n_queries, max_size=n_queries)))
    expected = by_hand(scores)
    assert top_k(scores, k).tolist() == [row[:k] for row in expected]

    pairs = [(row, column) for row in range(n_queries) for column in range(n_gallery)]
    ranks = ranks_of(scores, *torch.tensor(pairs).T)
    assert ranks.tolist() == [expected[row].index(column) + 1 for row, column in pairs]


@pytest.mark.parametrize("block", [1, 700, 1 << 22])
def test_block_size_changes_nothing(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pab.ranking._BLOCK_ELEMENTS", block)
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(40, 300, generator=generator).mul(4).round()  # many equal scores
    expected = by_hand(scores)
    assert top_k(scores, 10).tolist() == [row[:10] for row in expected]
    rows, columns = torch.arange(40), torch.arange(40) * 7
    assert ranks_of(scores, rows, columns).tolist() == [
        expected[row].index(row * 7) + 1 for row in range(40)
    ]


def test_all_equal_scores_rank_by_id() -> None:
    assert top_k(torch.zeros(2, 5000), 10).tolist() == [list(range(10))] * 2


def test_top_k_accepts_non_contiguous_scores_and_refuses_bad_arguments() -> None:
    scores = torch.tensor([[3.0, 1.0], [2.0, 2.0]])
    assert top_k(scores.T, 2).tolist() == by_hand(scores.T)
    with pytest.raises(ValueError, match="k of at least 1"):
        top_k(scores, 0)
    with pytest.raises(ValueError, match="scores"):
        top_k(scores[0], 1)


def test_list_round_trip(tmp_path: Path) -> None:
    names = ranked_names(torch.tensor([[0.1, 0.3, 0.3], [1.0, 0.0, 2.0]]), ["a", "b", "ç"], 2)
    assert names == [["b", "ç"], ["ç", "a"]]
    write_ranked_list(tmp_path / "r.txt", names)
    assert (tmp_path / "r.txt").read_bytes() == "b ç\nç a\n".encode()
    assert read_ranked_list(tmp_path / "r.txt") == names
    for end in ("\r\n", "\r"):
        (tmp_path / "r.txt").write_bytes(f"b ç{end}ç a{end}".encode())
        assert read_ranked_list(tmp_path / "r.txt") == names


@pytest.mark.parametrize("name", ["two words", "", " a", "tab\tname", "a\n"])
def test_names_with_blanks_are_not_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"line 2: .*cannot be written") as error:
        write_ranked_list(tmp_path / "r.txt", [["a"], [name]])
    assert " ".join(repr(name).split()) in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "found an empty file"),
        (b"a b\n\nc d\n", "line 2: expected gallery names, found an empty line"),
        (b"a b\nc\n", "line 2: expected 2 names as in line 1, found 1"),
        (b"a b\nc d\ne e\n", "line 3: expected distinct names, found 'e' twice"),
        (b"a b\n\xff\xfe\n", "expected UTF-8 text"),
    ],
)
def test_bad_lists_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "r.txt").write_bytes(content)
    with pytest.raises(InputError) as error:
        read_ranked_list(tmp_path / "r.txt")
    assert message in str(error.value)


def test_order_queries() -> None:
    assert order_queries(["b", "a"], None) == ["b", "a"]
    assert order_queries(["b", "a"], ["a", "b"]) == ["a", "b"]
    assert rows_in_order(["b", "a", "c"], ["a", "c", "b"]) == [1, 2, 0]
    with pytest.raises(InputError, match=r"order.txt: .*missing: 'b'.*not in the annotation: 'x'"):
        order_queries(["b", "a"], ["a", "x"], where="order.txt")


def test_long_mismatches_are_shortened() -> None:
    with pytest.raises(InputError, match="'0', '1', '2', '3', '4' and 95 more"):
        rows_in_order([], [str(i) for i in range(100)])
