"""Reciprocal rank fusion: exact ties, the order of members, lists and partial members."""

from __future__ import annotations

import itertools
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ensemble.fuse import aligned
from ensemble.members import RANKED_LIST, Member
from ensemble.reciprocal_rank import exact_scores
from ensemble.run import main as run
from pab.ranking import top_k
from pab.scores import ScoreFile

CASES = Path(__file__).parent / "data/scores"


def fusion_of(*matrices: Tensor, metas: list[dict[str, object]] | None = None) -> Tensor:
    """Return the fused matrix of members m0, m1, ... with the same queries and images."""
    queries, images = matrices[0].shape
    ids = [f"q{n}" for n in range(queries)], [f"g{n:03d}" for n in range(images)]
    metas = metas or [{}] * len(matrices)
    files = [ScoreFile(m, *ids, meta) for m, meta in zip(matrices, metas, strict=True)]
    members = [Member(f"m{n}", f"m{n}.pt", 1.0) for n in range(len(files))]
    return aligned(members, files, rule="reciprocal_rank").matrix()


@pytest.mark.parametrize("order", itertools.permutations((1, 2, 3)))
def test_a_tie_of_three_lists_goes_to_the_smaller_names(
    order: tuple[int, ...], tmp_path: Path
) -> None:
    paths = [str(CASES / f"rrf_tie_{number}.txt") for number in order]
    words = ["--beit3_score", paths[0], "--member", f"x={paths[1]}", "--member", f"y={paths[2]}"]
    out = tmp_path / "out.txt"
    run([*words, "--fusion", "reciprocal_rank", "--output_file", str(out)])
    assert out.read_text() == "a b c\n"


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_scores_rank_as_fractions_do(data: st.DataObject) -> None:
    members, images = data.draw(st.integers(1, 5), "M"), data.draw(st.integers(1, 40), "C")
    k = data.draw(st.sampled_from([0, 1, 60, 1000, 1_000_000]), "k")
    # Few numbers often give equal sums. With k = 0, so do unequal fractions: 2/3 + 2/6 = 2/4 + 2/4.
    kinds = data.draw(st.sampled_from([[0, 72, 80, 90], list(range(6)), list(range(300))]), "n")
    numbers = st.lists(st.sampled_from(kinds), min_size=images, max_size=images)
    rows = data.draw(st.lists(numbers, min_size=members, max_size=members))
    parts = torch.tensor(rows)[:, None]  # [M, 1, C]: M members, one query, C images
    parts = torch.where(parts > 0, parts + 2 * k + 2, 0)
    found = exact_scores(parts)
    turned = exact_scores(parts[data.draw(st.permutations(range(members)))])
    assert torch.equal(found, turned)
    exact = [
        sum((Fraction(2, n) for n in parts[:, 0, image].tolist() if n), Fraction(0))
        for image in range(images)
    ]
    expected = sorted(range(images), key=lambda image: (-exact[image], image))
    assert top_k(found, images)[0].tolist() == expected
    for score, value in zip(found[0].tolist(), exact, strict=True):
        assert score == pytest.approx(float(value), rel=1e-5)
    for one, other in itertools.pairwise(expected):
        assert (found[0, one] == found[0, other]) == (exact[one] == exact[other])


def test_unequal_fractions_with_equal_sums() -> None:
    parts = torch.tensor([[[144, 160]], [[180, 160]]])  # 1/72 + 1/90 and twice 1/80
    found = exact_scores(parts)
    assert found[0, 0] == found[0, 1]
    assert float(found[0, 0]) == pytest.approx(0.025)


def test_sums_that_float32_does_not_tell_apart() -> None:
    # 1/100000 + 1/100002 is above 2/100001 by 2e-15.
    parts = 2 * torch.tensor([[[100001, 100000]], [[100001, 100002]]])
    found = exact_scores(parts)
    assert found[0, 1] > found[0, 0]
    assert float(found[0, 1]) == pytest.approx(2e-5, rel=1e-4)


@given(st.permutations(range(4)), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_the_order_of_members_does_not_matter(order: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    whole, tied = torch.rand(3, 30, generator=generator), torch.randint(0, 4, (3, 30)).float()
    flat = torch.rand(3, 30, generator=generator)
    flat[1] = 0.5
    best = top_k(torch.rand(3, 30, generator=generator), 5)
    listed = torch.zeros(3, 30).scatter_(1, best, (1 / torch.arange(1.0, 6.0)).expand(3, -1))
    members = [whole, tied, flat, listed]
    metas: list[dict[str, object]] = [{}, {}, {}, {"model": RANKED_LIST}]
    expected = fusion_of(*members, metas=metas)
    found = fusion_of(*(members[n] for n in order), metas=[metas[n] for n in order])
    assert torch.equal(found, expected)


def test_images_that_a_partial_member_does_not_list_get_no_score() -> None:
    # Listed: two images of the first query, three of the second. All others have lower scores.
    partial = torch.tensor([[0.9, -0.1, -0.1, 0.4], [0.2, 0.8, 0.5, -7.0]])
    listed = {"q0": 2, "q1": 3}
    found = fusion_of(partial, metas=[{"listed": listed}])
    expected = torch.tensor([[1 / 61, 0, 0, 1 / 62], [1 / 63, 1 / 61, 1 / 62, 0]])
    torch.testing.assert_close(found, expected)


def test_a_large_gallery_is_ranked_by_fractions_too() -> None:
    generator = torch.Generator().manual_seed(0)
    members = [
        torch.stack([torch.randperm(5000, generator=generator).float() for _ in range(2)])
        for _ in range(3)
    ]
    found = fusion_of(*members)
    for row in range(2):
        places = [m[row].argsort(descending=True).argsort().tolist() for m in members]
        exact = [sum(Fraction(1, 61 + place[image]) for place in places) for image in range(5000)]
        expected = sorted(range(5000), key=lambda image, row=exact: (-row[image], image))  # type: ignore[misc]
        assert top_k(found, 5000)[row].tolist() == expected


def test_the_sum_of_tied_images_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counting(numerator: int, part: int) -> Fraction:
        calls.append(part)
        return Fraction(numerator, part)

    monkeypatch.setattr("ensemble.reciprocal_rank.Fraction", counting)
    members = [torch.zeros(1, 2000) for _ in range(3)]
    for n, member in enumerate(members):
        member[0, 100 * n : 100 * n + 100] = torch.rand(100) + 1.0
    found = fusion_of(*members)
    assert len(calls) < 3000
    assert len(found[0, 300:].unique()) == 1
