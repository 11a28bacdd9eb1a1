"""Decodings: the assignment against brute force, other methods, and the order of queries."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ensemble.decode import assignment, dual_softmax, querybank, sinkhorn, with_first_places
from pab.core.errors import InputError
from pab.ranking import top_k


def ids(count: int) -> list[str]:
    return [f"q{i:04d}" for i in range(count)]


def best_total(scores: Tensor, slack: float | None) -> float:
    """Return the largest total of all one-to-one choices.

    Choice -1 gives a query its best score minus ``slack``.
    """
    n_queries, n_gallery = scores.shape
    choices = range(n_gallery) if slack is None else range(-1, n_gallery)
    best = -float("inf")
    for chosen in itertools.product(choices, repeat=n_queries):
        taken = [c for c in chosen if c >= 0]
        if len(set(taken)) < len(taken):
            continue
        total = sum(
            float(scores[q, c]) if c >= 0 else float(scores[q].max()) - (slack or 0.0)
            for q, c in enumerate(chosen)
        )
        best = max(best, total)
    return best


def total_of(scores: Tensor, columns: Tensor, slack: float | None) -> float:
    """Return the total of a choice; ``slack`` is subtracted for all but one query per image."""
    total = 0.0
    first = top_k(scores, 1)[:, 0]
    for column in set(columns.tolist()):
        having = (columns == column).nonzero()[:, 0].tolist()
        owners = [q for q in having if first[q] != column]
        assert len(owners) <= 1, "only a first choice may be shared"
        owner = owners[0] if owners else having[0]
        for q in having:
            total += float(scores[q, column]) - (0.0 if q == owner else (slack or float("inf")))
    return total


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_the_assignment_has_the_largest_total(data: st.DataObject) -> None:
    n_queries = data.draw(st.integers(1, 4))
    slack = data.draw(st.sampled_from([None, 0.05, 0.2, 1.0]))
    n_gallery = data.draw(st.integers(n_queries if slack is None else 1, 5))
    seed = data.draw(st.integers(0, 10_000))
    scores = torch.rand(n_queries, n_gallery, generator=torch.Generator().manual_seed(seed))
    columns = assignment(scores, ids(n_queries), slack)
    assert total_of(scores, columns, slack) == pytest.approx(best_total(scores, slack), abs=1e-6)


def test_the_slack_decides_whether_queries_share_an_image() -> None:
    # Image 0 is first for both queries. Image 1 costs the first query 0.5 and the second 0.1.
    scores = torch.tensor([[0.9, 0.4, 0.0], [0.8, 0.7, 0.1]])
    assert assignment(scores, ids(2), None).tolist() == [0, 1]
    assert assignment(scores, ids(2), 0.2).tolist() == [0, 1]
    assert assignment(scores, ids(2), 0.05).tolist() == [0, 0]


@pytest.mark.parametrize("slack", [None, 0.1])
def test_the_order_of_queries_does_not_matter(slack: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 5, (40, 60), generator=generator) / 5  # many ties
    found = assignment(scores, ids(40), slack)
    order = torch.randperm(40, generator=generator)
    shuffled = assignment(scores[order], [ids(40)[i] for i in order], slack)
    assert torch.equal(shuffled, found[order])
    if slack is None:
        assert len(set(found.tolist())) == 40


def test_more_queries_than_images() -> None:
    scores = torch.rand(5, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match="--decode_slack"):
        assignment(scores, ids(5), None)
    found = assignment(scores, ids(5), 0.1)
    first = top_k(scores, 1)[:, 0]
    given_up = scores.amax(dim=1) - scores.gather(1, found[:, None])[:, 0]
    assert bool(((found == first) | (given_up <= 0.1)).all())


def test_the_assignment_of_a_large_gallery_has_the_largest_total() -> None:
    generator = torch.Generator().manual_seed(0)
    hubs = torch.rand(1, 500, generator=generator) * 2  # all queries prefer the same images
    scores = torch.rand(20, 500, generator=generator) + hubs
    found = assignment(scores, ids(20), None)
    assert len(set(found.tolist())) == 20
    total = float(scores.gather(1, found[:, None]).sum())
    assert total <= float(scores.amax(dim=1).sum())
    # SciPy solves the same problem on the whole matrix.
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(scores.numpy(), maximize=True)
    assert total == pytest.approx(float(scores[rows, columns].sum()), rel=1e-6)


def test_only_first_places_change() -> None:
    scores = torch.tensor([[0.9, 0.4, 0.0], [0.8, 0.7, 0.1]])
    found = with_first_places(scores, torch.tensor([0, 1]))
    assert top_k(found, 3).tolist() == [[0, 1, 2], [1, 0, 2]]
    assert torch.equal(found[0], scores[0])


def test_sinkhorn_balances_rows_and_columns() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((6, 6), (6, 20), (8, 4)):
        scores = torch.rand(*shape, generator=generator)
        plan = sinkhorn(scores, 10.0, 200).exp()
        torch.testing.assert_close(plan.sum(dim=1), torch.ones(shape[0]), atol=1e-2, rtol=0)
        most = max(1.0, shape[0] / shape[1])
        assert float(plan.sum(dim=0).max()) <= most + 1e-4
    sharp = sinkhorn(torch.tensor([[0.9, 0.4, 0.0], [0.8, 0.7, 0.1]]), 100.0, 100)
    assert top_k(sharp, 1)[:, 0].tolist() == [0, 1]


def test_dual_softmax_prefers_the_query_that_wants_an_image_most() -> None:
    scores = torch.tensor([[0.9, 0.4, 0.0], [0.8, 0.75, 0.1]])
    assert top_k(scores, 1)[:, 0].tolist() == [0, 0]
    assert top_k(dual_softmax(scores, 10.0), 1)[:, 0].tolist() == [0, 1]


def test_querybank_lowers_hubs_and_treats_queries_separately() -> None:
    # Image 0 is a hub: top-1 for both captions of the bank.
    bank = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.3, 0.1]])
    scores = torch.tensor([[0.6, 0.5, 0.0], [0.2, 0.7, 0.1]])
    found = querybank(scores, bank, 10.0)
    assert top_k(found, 1)[:, 0].tolist() == [1, 1]
    assert torch.equal(found[1], scores[1]), "its first image is not a hub"
    assert torch.equal(querybank(scores[:1], bank, 10.0), found[:1])
    with pytest.raises(ValueError, match="same images in bank and scores, found 3 and 2"):
        querybank(scores[:, :2], bank, 10.0)


@pytest.mark.parametrize("name", ["dual_softmax", "sinkhorn"])
def test_joint_decodings_do_not_depend_on_the_order_of_queries(name: str) -> None:
    scores = torch.rand(30, 50, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))

    def decoded(matrix: Tensor) -> Tensor:
        return dual_softmax(matrix, 20.0) if name == "dual_softmax" else sinkhorn(matrix, 20.0, 30)

    torch.testing.assert_close(decoded(scores[order]), decoded(scores)[order], atol=1e-5, rtol=1e-5)
