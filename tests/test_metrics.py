"""Metrics compared with brute force (with ties and several right images) and stored values."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from pab.core.errors import InputError
from pab.metrics import (
    bootstrap_interval,
    evaluate_lists,
    evaluate_scores,
    paired_bootstrap,
    twin_preference,
)
from pab.ranking import ranked_names
from pab.scores import ScoreFile

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"


def one_query(order: list[str], right: frozenset[str]) -> dict[str, float]:
    """Compute the metrics of one full ranking directly from their definitions."""
    hits = [rank for rank, name in enumerate(order, start=1) if name in right]
    precisions = {rank: sum(h <= rank for h in hits) / rank for rank in hits}
    return {
        "R@1": 100.0 * any(r <= 1 for r in hits),
        "R@5": 100.0 * any(r <= 5 for r in hits),
        "R@10": 100.0 * any(r <= 10 for r in hits),
        "mAP": 100.0 * sum(precisions.values()) / len(right),
        "mAP@10": 100.0 * sum(p for r, p in precisions.items() if r <= 10) / min(len(right), 10),
        "mINP": 100.0 * len(right) / hits[-1],
    }


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_equal_to_brute_force(data: st.DataObject) -> None:
    n_queries, n_gallery = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 25))
    value = st.sampled_from([0.0, 0.25, 0.5, 1.0])
    rows = st.lists(value, min_size=n_gallery, max_size=n_gallery)
    scores = torch.tensor(data.draw(st.lists(rows, min_size=n_queries, max_size=n_queries)))
    gallery_ids = [f"g{i:02}" for i in range(n_gallery)]
    query_ids = [f"q{i}" for i in range(n_queries)]
    some = st.frozensets(st.sampled_from(gallery_ids), min_size=1)
    relevant = {query_id: data.draw(some) for query_id in query_ids}

    metrics = evaluate_scores(ScoreFile(scores, query_ids, gallery_ids), relevant)
    for row, query_id in enumerate(query_ids):
        line = scores[row].tolist()
        columns = sorted(range(n_gallery), key=lambda c: (-line[c], c))
        expected = one_query([gallery_ids[c] for c in columns], relevant[query_id])
        found = {name: values[row] for name, values in metrics.values.items()}
        assert found == pytest.approx(expected, abs=1e-9)
    assert metrics.values["mAP"].dtype == np.float64


def test_lists_and_scores_agree_up_to_the_length_of_the_lists() -> None:
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(30, 40, generator=generator).mul(3).round()
    gallery_ids = [f"g{i:02}" for i in range(40)]
    query_ids = [f"q{i}" for i in range(30)]
    relevant = {q: frozenset({f"g{i:02}", f"g{i + 3:02}"}) for i, q in enumerate(query_ids)}
    full = evaluate_scores(ScoreFile(scores, query_ids, gallery_ids), relevant)
    ten = evaluate_lists(ranked_names(scores, gallery_ids, 10), query_ids, relevant)
    assert list(ten.values) == ["R@1", "R@5", "R@10", "mAP@10"]
    for name, values in ten.values.items():
        np.testing.assert_allclose(values, full.values[name], rtol=1e-12)
    five = evaluate_lists(ranked_names(scores, gallery_ids, 5), query_ids, relevant)
    assert list(five.values) == ["R@1", "R@5", "R@10", "mAP@10"]
    np.testing.assert_array_equal(five.values["R@5"], full.values["R@5"])
    np.testing.assert_array_equal(five.values["R@10"], full.values["R@5"])  # none after rank 5
    seen = full.best_rank <= 10
    assert 0 < seen.sum() < 30
    np.testing.assert_array_equal(ten.best_rank, np.where(seen, full.best_rank, 0))


@settings(max_examples=60, deadline=None)
@given(n_gallery=st.integers(1, 12), seed=st.integers(0, 1000))
def test_lists_of_a_whole_small_gallery_equal_its_score_file(n_gallery: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 3, (5, n_gallery), generator=generator).float()
    gallery_ids = [f"g{i:02}" for i in range(n_gallery)]
    query_ids = [f"q{i}" for i in range(5)]
    relevant = {
        q: frozenset({gallery_ids[i % n_gallery], gallery_ids[2 * i % n_gallery]})
        for i, q in enumerate(query_ids)
    }
    full = evaluate_scores(ScoreFile(scores, query_ids, gallery_ids), relevant)
    names = ranked_names(scores, gallery_ids, n_gallery)
    listed = evaluate_lists(names, query_ids, relevant, n_gallery=n_gallery)
    assert list(listed.values) == list(full.values)
    for name, values in full.values.items():
        np.testing.assert_allclose(listed.values[name], values, rtol=1e-12)


def test_images_that_a_run_does_not_list_are_not_found() -> None:
    scores = torch.tensor([[0.9, 0.8, 0.1, 0.1], [0.9, 0.1, 0.1, 0.1]])
    meta = {"listed": {"q0": 2, "q1": 1}}
    run = ScoreFile(scores, ["q0", "q1"], ["a", "b", "c", "d"], meta)
    relevant = {"q0": frozenset({"b", "c"}), "q1": frozenset({"b"})}
    metrics = evaluate_scores(run, relevant)
    found = {name: values.tolist() for name, values in metrics.values.items()}
    assert found == {
        "R@1": [0, 0], "R@5": [100, 0], "R@10": [100, 0],
        "mAP": [25, 0], "mAP@10": [25, 0], "mINP": [0, 0],
    }  # fmt: skip
    assert metrics.best_rank.tolist() == [2, 0]
    # z is in no query's list, nor in the run's gallery.
    assert evaluate_scores(run, {**relevant, "q1": frozenset({"z"})}).best_rank.tolist() == [2, 0]
    preference = twin_preference(run, metrics, {"q0": "c", "q1": "c"})
    np.testing.assert_array_equal(preference, [100.0, 0.0])

    missed = metrics.with_misses(["q2", "q3"])
    assert missed.query_ids == ["q0", "q1", "q2", "q3"]
    assert missed.values["R@5"].tolist() == [100, 0, 0, 0]
    assert missed.best_rank.tolist() == [2, 0, 0, 0]


def test_labels_that_do_not_fit_are_refused() -> None:
    scores = ScoreFile(torch.zeros(1, 2), ["q"], ["a", "b"])
    with pytest.raises(InputError, match=r"query 'q': .*'z' in the scored gallery"):
        evaluate_scores(scores, {"q": frozenset("z")})
    with pytest.raises(InputError, match="query 'q': expected a right image"):
        evaluate_scores(scores, {})
    with pytest.raises(InputError, match="query 'q': expected a right image"):
        evaluate_lists([["a"]], ["q"], {"q": frozenset()})


def test_twin_preference_follows_the_tie_rule() -> None:
    scores = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 0.0, 0.0]])
    score_file = ScoreFile(scores, ["q0", "q1", "q2", "q3"], ["a", "b", "c"])
    relevant = {"q0": "a", "q1": "b", "q2": "c", "q3": "a"}
    metrics = evaluate_scores(score_file, {q: frozenset(g) for q, g in relevant.items()})
    preference = twin_preference(score_file, metrics, {"q0": "b", "q1": "a", "q2": "b"})
    np.testing.assert_array_equal(preference, [100.0, 0.0, 100.0, np.nan])
    assert np.isnan(twin_preference(score_file, metrics, {})).all()
    with pytest.raises(InputError, match=r"query 'q0': .*'z'"):
        twin_preference(score_file, metrics, {"q0": "z"})


def test_bootstrap_agrees_with_theory_and_repeats() -> None:
    values = np.where(np.arange(400) < 280, 100.0, 0.0)  # 70 %, standard error 2.29
    low, high = bootstrap_interval(values, seed=0)
    assert low == pytest.approx(70 - 1.96 * 2.291, abs=0.4)
    assert high == pytest.approx(70 + 1.96 * 2.291, abs=0.4)
    assert bootstrap_interval(values, seed=0) == (low, high)
    both_low, both_high = bootstrap_interval(np.stack([values, 100 - values], axis=1), seed=0)
    np.testing.assert_allclose(both_low, [low, 100 - high])
    np.testing.assert_allclose(both_high, [high, 100 - low])


def test_bootstrap_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(5).random(50)
    whole = bootstrap_interval(values, seed=2, n=999)
    monkeypatch.setattr("pab.metrics._BLOCK_ELEMENTS", 333)
    np.testing.assert_allclose(bootstrap_interval(values, seed=2, n=999), whole)


def test_paired_bootstrap_uses_the_pairing() -> None:
    a = np.random.default_rng(0).integers(2, size=300) * 100.0
    b = a.copy()
    b[np.flatnonzero(a == 0)[:15]] = 100.0  # better on fifteen queries, worse on none
    change = paired_bootstrap(a, b)
    assert change.mean == pytest.approx(5.0)
    assert 0 < change.low < 5 < change.high
    assert paired_bootstrap(a, a).high == 0
    with pytest.raises(ValueError, match="equal length"):
        paired_bootstrap(a, b[:-1])
    with pytest.raises(ValueError, match="at least one query"):
        bootstrap_interval(np.empty(0))


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="reference values (../shared) not found")
def test_reference_metrics_and_lists() -> None:
    tensors = load_file(GOLDEN / "fusion.safetensors")
    reference = json.loads((GOLDEN / "fusion.json").read_text())
    n_queries, n_gallery = tensors["lhp"].shape
    query_ids = [f"q{i:03}" for i in range(n_queries)]
    gallery_ids = [f"{i:03}" for i in range(n_gallery)]
    truth = tensors["ground_truth"].tolist()
    relevant = {q: frozenset({gallery_ids[t]}) for q, t in zip(query_ids, truth, strict=True)}

    # UIT scores only the candidates. All other images get the float32 just below the lowest score.
    logits, candidates = tensors["itm_logit_all_pairs"], tensors["candidates"]
    scored = logits.gather(1, candidates)
    lowest = scored.amin(dim=1, keepdim=True)
    below = torch.nextafter(lowest, torch.full_like(lowest, -torch.inf))
    uit = below.expand(-1, n_gallery).scatter(1, candidates, scored)

    matrices = {**tensors, "uit": uit}
    for name, expected in reference["metrics"].items():
        scores = ScoreFile(matrices[name].contiguous(), query_ids, gallery_ids)
        found = evaluate_scores(scores, relevant).mean()
        for key, value in expected.items():
            own = {"R1": "R@1", "R5": "R@5", "R10": "R@10", "mAP10": "mAP@10"}.get(key, key)
            assert found[own] == pytest.approx(value, abs=1e-4), (name, key)
    for name, expected_lists in reference["top10"].items():
        matrix = tensors[f"fused_{name}"]
        assert [[int(i) for i in line] for line in ranked_names(matrix, gallery_ids, 10)] == (
            expected_lists
        )
