"""Worked and random examples of reranking, margin arbitration and component-wise assignment."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ensemble.arbitration import arbitrate
from ensemble.chain import stages
from ensemble.component_assignment import component_assignment, in_collisions
from ensemble.decode import DecodeSettings
from ensemble.rerank_prior import Evidence, Reranking, reordered
from pab.ranking import top_k

A, B, C, D, E = range(5)


def reranking(scores: Tensor, depth: int, prior: float = 0.5, listed: int = 5) -> Reranking:
    counts = torch.full((len(scores),), listed)
    return Reranking("vlm", "vlm.pt", scores, counts, depth, prior)


def order_of(scores: Tensor) -> list[list[int]]:
    return top_k(scores, scores.shape[1]).tolist()


# ------------------------------------------------------------------------------------- reranking


def test_the_prior_and_the_depth() -> None:
    fused = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5]])
    scores = torch.tensor([[1.0, 2.0, 2.5, 9.0, 0.0]])
    # Scores minus the prior: 1.0, 1.5, 1.5 for the first three. The fourth keeps its rank.
    found, evidence = reranking(scores, 3).reorder(fused)
    assert order_of(found) == [[B, C, A, D, E]]
    torch.testing.assert_close(found, torch.tensor([[0.7, 0.9, 0.8, 0.6, 0.5]]))
    assert evidence.margins() == [pytest.approx(0.5)]  # 2.5 - 2.0, among the first three
    found, _ = reranking(scores, 3, prior=0.0).reorder(fused)
    assert order_of(found) == [[C, B, A, D, E]]


def test_equal_decimals_are_equal_after_the_prior() -> None:
    # In float64, 1.1 - 0.5 is above 0.6.
    fused, scores = torch.tensor([[0.9, 0.8]]), torch.tensor([[0.6, 1.1]])
    assert order_of(reranking(scores, 2, listed=2).reorder(fused)[0]) == [[A, B]]


def test_a_depth_beyond_the_gallery() -> None:
    fused, scores = torch.tensor([[0.9, 0.8]]), torch.tensor([[0.0, 1.0]])
    assert order_of(reranking(scores, 50, listed=2).reorder(fused)[0]) == [[B, A]]


def test_reordering_equal_scores_raises_them_as_little_as_possible() -> None:
    scores = torch.tensor([[0.5, 0.5, 0.5, 0.1]])
    found = reordered(scores, torch.tensor([[C, A, B]]))
    assert order_of(found) == [[C, A, B, D]]
    torch.testing.assert_close(found, scores, atol=1e-6, rtol=0)
    unchanged = reordered(scores, torch.tensor([[A, B, C]]))
    assert torch.equal(unchanged, scores)
    # B, the last reordered image, stays ahead of C, the first image that keeps its rank.
    found = reordered(torch.tensor([[0.5, 0.9, 0.5, 0.5]]), torch.tensor([[A, B]]))
    assert order_of(found) == [[A, B, C, D]]


@given(st.integers(1, 7), st.integers(1, 9), st.sampled_from([1, 3, 1000]), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_reordered_scores_give_the_requested_ranking(
    depth: int, images: int, levels: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, levels, (3, images), generator=generator) / levels
    before = top_k(scores, images)
    first = before[:, :depth]
    turned = first[:, torch.randperm(first.shape[1], generator=generator)]
    found = top_k(reordered(scores, turned), images)
    assert torch.equal(found[:, :depth], turned)
    assert torch.equal(found[:, depth:], before[:, depth:])


def test_images_without_a_reranker_score_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    fused = torch.tensor([[0.9, 0.8, 0.7], [0.9, 0.8, 0.7]])
    scores = torch.tensor([[0.3, -1.0, 0.7], [0.3, 0.7, -1.0]])  # -1.0 is the fill value
    Reranking("vlm", "vlm.pt", scores, torch.tensor([2, 2]), 2, 0.0).reorder(fused)
    assert "worst of their query: 1 in 1 query, each among the query's first 2" in (
        capsys.readouterr().err
    )


# ------------------------------------------------------------------------------------ arbitration


def test_margins_decide_which_query_keeps_an_image() -> None:
    columns = torch.tensor([[A, B, C, D], [A, B, C, D], [B, C, A, D], [A, D, B, C]])
    ids = ["q1", "q2", "q3", "q4"]
    # q1 keeps A, and so does q4, whose margin is within tau. q2 loses B to q3 and gets C.
    assert arbitrate(columns, [3.0, 1.0, 2.0, 2.8], ids, 0.5).tolist() == [A, C, B, A]
    assert arbitrate(columns, [3.0, 1.0, 2.0, 2.8], ids, 0.5, passes=1).tolist() == [A, B, B, A]
    assert arbitrate(columns, [3.0, 1.0, 2.0, 2.8], ids, 0.1).tolist() == [A, C, B, D]
    assert arbitrate(columns[:, :1], [3.0, 1.0, 2.0, 0.0], ids, 0.5).tolist() == [A, A, B, A]


def test_a_gap_of_exactly_tau_moves_no_query() -> None:
    columns = torch.tensor([[A, B], [A, B]])
    # In float64, 1.1 - 0.6 is above 0.5.
    assert arbitrate(columns, [1.1, 0.6], ["q1", "q2"], 0.5).tolist() == [A, A]
    assert arbitrate(columns, [1.1, 0.59], ["q1", "q2"], 0.5).tolist() == [A, B]


def test_equal_margins_move_neither_query() -> None:
    columns = torch.tensor([[A, B], [A, B], [A, B]])
    # q2 and q3 do not move each other; q1 is more than tau below both.
    assert arbitrate(columns, [0.0, 2.0, 2.0], ["q1", "q2", "q3"], 1.0).tolist() == [B, A, A]


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.2, 1.0]))
@settings(max_examples=60, deadline=None)
def test_arbitration_never_leaves_more_duplicates(seed: int, tau: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 6, (8, 6), generator=generator).float()
    margins = torch.randint(0, 5, (8,), generator=generator).tolist()
    columns, ids = top_k(scores, 6), [f"q{n}" for n in range(8)]
    found = arbitrate(columns, margins, ids, tau)
    assert len(set(found.tolist())) >= len(set(columns[:, 0].tolist()))
    rows = torch.randperm(8, generator=generator)
    mixed = arbitrate(columns[rows], [margins[r] for r in rows], [ids[r] for r in rows], tau)
    assert torch.equal(mixed, found[rows])


# ---------------------------------------------------------------------- component-wise assignment


def test_only_components_with_a_duplicate_change() -> None:
    F, G, H = 5, 6, 7
    columns = torch.tensor([[A, B], [A, C], [C, F], [G, H]])
    worth = torch.tensor([[5.0, 4.6], [5.0, 4.7], [5.0, 4.8], [1.0, 9.0]]).double()
    ids = ["q1", "q2", "q3", "q4"]
    assert in_collisions(columns.numpy()).tolist() == [True, True, True, False]
    # Moving q1 to B costs 0.4; moving q2 to C and q3 to F costs 0.5 in total.
    assert component_assignment(columns, worth, ids, 1.0).tolist() == [B, A, C, G]
    # With a slack of 0.35, it is cheapest that q1 and q2 share A.
    assert component_assignment(columns, worth, ids, 0.35).tolist() == [A, A, C, G]
    worth[0, 1] = 0.0
    assert component_assignment(columns, worth, ids, 1.0).tolist() == [A, C, F, G]


def test_a_better_second_image_is_taken_in_a_component() -> None:
    columns, worth = torch.tensor([[A, B], [A, C]]), torch.tensor([[1.0, 3.0], [1.0, 2.0]]).double()
    assert component_assignment(columns, worth, ["q1", "q2"], 1.0).tolist() == [B, C]


def test_utilities_are_rounded_and_ties_do_not_depend_on_row_order() -> None:
    columns = torch.tensor([[A, B], [A, C]])
    worth = torch.tensor([[1.0, 0.7], [1.0, 0.700003]]).double()  # equal in steps of 1e-5
    found = component_assignment(columns, worth, ["q1", "q2"], 1.0)
    turned = component_assignment(columns.flip(0), worth.flip(0), ["q2", "q1"], 1.0)
    assert torch.equal(found, turned.flip(0))
    level = torch.tensor([[1.0, 0.7], [1.0, 0.7]]).double()
    assert torch.equal(component_assignment(columns, level, ["q1", "q2"], 1.0), found)
    worth[1, 1] = 0.70001
    assert component_assignment(columns, worth, ["q1", "q2"], 1.0).tolist() == [A, C]


def test_a_slack_equal_to_the_loss_frees_the_image() -> None:
    columns, worth = torch.tensor([[A, B], [A, B]]), torch.tensor([[1.0, 0.5], [1.0, 0.2]]).double()
    assert component_assignment(columns, worth, ["q1", "q2"], 0.5).tolist() == [B, A]
    assert component_assignment(columns, worth, ["q1", "q2"], 0.49).tolist() == [A, A]


def test_no_collision_changes_nothing() -> None:
    columns, worth = torch.tensor([[A, B], [C, A]]), torch.tensor([[0.0, 9.0], [0.0, 9.0]]).double()
    assert component_assignment(columns, worth, ["q1", "q2"], 1.0).tolist() == [A, C]


def total(chosen: tuple[int, ...], columns: Tensor, worth: Tensor, slack: float) -> float:
    """Return the total utility of one place per query.

    Place -1 opts out, with the utility -slack. The total is -inf if two other queries share an
    image.
    """
    owned = [int(columns[row, place]) for row, place in enumerate(chosen) if place >= 0]
    if len(set(owned)) < len(owned):
        return -float("inf")
    return sum(
        float(worth[row, place] - worth[row, 0]) if place >= 0 else -slack
        for row, place in enumerate(chosen)
    )


@given(st.integers(0, 10_000), st.integers(2, 3), st.sampled_from([0.0, 0.3, 2.0]))
@settings(max_examples=60, deadline=None)
def test_no_other_assignment_is_worth_more(seed: int, top: int, slack: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    columns = top_k(torch.rand(5, 6, generator=generator), top)
    worth = torch.randint(0, 10, (5, top), generator=generator).double() / 10
    found = component_assignment(columns, worth, [f"q{n}" for n in range(5)], slack)
    rows = in_collisions(columns.numpy())
    assert torch.equal(found[~torch.from_numpy(rows)], columns[~torch.from_numpy(rows), 0])
    columns, worth, found = columns[rows], worth[rows], found[rows]
    choices = list(itertools.product(range(-1, top), repeat=len(columns)))
    best = max((total(c, columns, worth, slack) for c in choices), default=0.0)
    images = found.tolist()
    as_found = [
        c for c in choices if all(int(columns[r, max(p, 0)]) == images[r] for r, p in enumerate(c))
    ]
    reached = max((total(c, columns, worth, slack) for c in as_found), default=0.0)
    assert reached == pytest.approx(best, abs=1e-4)


# -------------------------------------------------------------------------------------- the chain


def test_stages_run_in_order() -> None:
    # q0 and q1 share A; q1 has the smaller margin and moves to B, q2's first image.
    fused = torch.tensor(
        [[0.9, 0.8, 0.1, 0.2, 0.0], [0.9, 0.8, 0.7, 0.2, 0.0], [0.5, 0.9, 0.1, 0.7, 0.6]]
    )
    judged = torch.tensor(
        [[9.0, 3.0, 0.0, 0.0, 0.0], [5.0, 4.8, 1.0, 0.0, 0.0], [0.0, 6.0, 0.0, 5.9, 0.0]]
    )
    decodings = [
        DecodeSettings("margin", tau=0.5),
        DecodeSettings("assignment", slack=1.0, top=2, scope="collisions"),
    ]
    ids, names = ["q0", "q1", "q2"], ["a", "b", "c", "d", "e"]
    made = list(stages(fused, ids, names, reranking(judged, 4), decodings))
    assert [stage.name for stage in made] == ["fused", "reranked by vlm", "margin", "assignment"]
    firsts = [top_k(stage.scores, 1)[:, 0].tolist() for stage in made]
    # The assignment resolves B: moving q2 to D costs only 0.1.
    assert firsts == [[A, A, B], [A, A, B], [A, B, B], [A, B, D]]
    assert order_of(made[-1].scores)[2] == [D, B, E, A, C]
    for before, after in itertools.pairwise(made[1:]):  # only the first image may change
        for old, new in zip(order_of(before.scores), order_of(after.scores), strict=True):
            assert [image for image in old if image != new[0]] == new[1:]


def test_without_a_reranker_margins_are_those_of_the_fused_scores() -> None:
    fused = torch.tensor([[0.9, 0.2, 0.1], [0.8, 0.7, 0.0]])
    assert Evidence(fused).margins() == pytest.approx([0.7, 0.1])
    assert Evidence(fused[:, :1]).margins() == [0.0, 0.0]
    decodings = [DecodeSettings("margin", tau=0.5), DecodeSettings("assignment", slack=0.5)]
    made = list(stages(fused, ["q0", "q1"], ["a", "b", "c"], None, decodings))
    assert top_k(made[1].scores, 1)[:, 0].tolist() == [A, B]
    assert top_k(made[2].scores, 1)[:, 0].tolist() == [A, B]


def test_changed_scores_are_the_evidence_of_later_stages() -> None:
    fused = torch.rand(6, 9, generator=torch.Generator().manual_seed(0))
    ids, names = [f"q{n}" for n in range(6)], [f"g{n}" for n in range(9)]
    sinkhorn, margin = DecodeSettings("sinkhorn", steps=20), DecodeSettings("margin", tau=0.0)
    plan = list(stages(fused, ids, names, None, [sinkhorn]))[-1].scores
    twice = list(stages(fused, ids, names, None, [margin, sinkhorn, margin]))[-1].scores
    once = list(stages(list(stages(fused, ids, names, None, [margin]))[-1].scores, ids, names,
                       None, [sinkhorn, margin]))[-1].scores  # fmt: skip
    assert torch.equal(twice, once)
    assert not torch.equal(plan, twice)


@given(st.integers(0, 500), st.permutations(["sinkhorn", "margin", "assignment"]))
@settings(max_examples=20, deadline=None)
def test_decodings_in_any_order_keep_every_image(seed: int, order: list[str]) -> None:
    fused = torch.rand(5, 7, generator=torch.Generator().manual_seed(seed))
    decodings = [
        DecodeSettings(method, slack=0.2, tau=0.1, steps=10)  # type: ignore[arg-type]
        for method in order
    ]
    ids, names = [f"q{n}" for n in range(5)], [f"g{n}" for n in range(7)]
    for stage in stages(fused, ids, names, None, decodings):
        assert [sorted(row) for row in order_of(stage.scores)] == [list(range(7))] * 5
