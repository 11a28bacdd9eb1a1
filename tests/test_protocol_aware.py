"""Reranking with a prior, margin arbitration, component-wise assignment: by hand, at random."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ensemble.arbitration import arbitrate
from ensemble.chain import stages
from ensemble.component_assignment import component_assignment, in_collisions
from ensemble.decode import DecodeSettings
from ensemble.ladder import ladder_table
from ensemble.rerank_prior import Evidence, Reranking, reordered
from ensemble.run import RunConfig
from ensemble.run import main as run
from pab.core.config import load_config
from pab.core.errors import InputError
from pab.metrics import evaluate_scores
from pab.ranking import ranked_names, read_ranked_list, top_k
from pab.scores import ScoreFile, load_scores, save_scores
from tests.conftest import write_lines

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
    # Blended: 1.0, 1.5, 1.5 for the first three. The fourth keeps its place whatever its score.
    found, evidence = reranking(scores, 3).reorder(fused)
    assert order_of(found) == [[B, C, A, D, E]]
    torch.testing.assert_close(found, torch.tensor([[0.7, 0.9, 0.8, 0.6, 0.5]]))
    assert evidence.margins() == [pytest.approx(0.5)]  # 2.5 - 2.0, of the three alone
    found, _ = reranking(scores, 3, prior=0.0).reorder(fused)
    assert order_of(found) == [[C, B, A, D, E]]


def test_equal_decimals_are_equal_after_the_prior() -> None:
    # In float64, 1.1 - 0.5 is above 0.6.
    fused, scores = torch.tensor([[0.9, 0.8]]), torch.tensor([[0.6, 1.1]])
    assert order_of(reranking(scores, 2, listed=2).reorder(fused)[0]) == [[A, B]]


def test_a_depth_beyond_the_gallery() -> None:
    fused, scores = torch.tensor([[0.9, 0.8]]), torch.tensor([[0.0, 1.0]])
    assert order_of(reranking(scores, 50, listed=2).reorder(fused)[0]) == [[B, A]]


def test_reordering_equal_scores_raises_them_as_little_as_it_can() -> None:
    scores = torch.tensor([[0.5, 0.5, 0.5, 0.1]])
    found = reordered(scores, torch.tensor([[C, A, B]]))
    assert order_of(found) == [[C, A, B, D]]
    torch.testing.assert_close(found, scores, atol=1e-6, rtol=0)
    unchanged = reordered(scores, torch.tensor([[A, B, C]]))
    assert torch.equal(unchanged, scores)
    # The last reordered image stays ahead of the first one beyond, which has the smaller name.
    found = reordered(torch.tensor([[0.5, 0.9, 0.5, 0.5]]), torch.tensor([[A, B]]))
    assert order_of(found) == [[A, B, C, D]]


@given(st.integers(1, 7), st.integers(1, 9), st.sampled_from([1, 3, 1000]), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_reordered_scores_rank_as_asked(depth: int, images: int, levels: int, seed: int) -> None:
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
    scores = torch.tensor([[0.3, -1.0, 0.7], [0.3, 0.7, -1.0]])  # -1.0 is the fill
    Reranking("vlm", "vlm.pt", scores, torch.tensor([2, 2]), 2, 0.0).reorder(fused)
    assert "vlm.pt: 1 of the first 2 images of 1 queries" in capsys.readouterr().err


# ------------------------------------------------------------------------------------ arbitration


def test_margins_decide_who_keeps_an_image() -> None:
    columns = torch.tensor([[A, B, C, D], [A, B, C, D], [B, C, A, D], [A, D, B, C]])
    ids = ["q1", "q2", "q3", "q4"]
    # A stays with q1; q4 is too close to give it up; q2 meets q3 at B and goes on to C.
    assert arbitrate(columns, [3.0, 1.0, 2.0, 2.8], ids, 0.5).tolist() == [A, C, B, A]
    assert arbitrate(columns, [3.0, 1.0, 2.0, 2.8], ids, 0.5, passes=1).tolist() == [A, B, B, A]
    assert arbitrate(columns, [3.0, 1.0, 2.0, 2.8], ids, 0.1).tolist() == [A, C, B, D]
    assert arbitrate(columns[:, :1], [3.0, 1.0, 2.0, 0.0], ids, 0.5).tolist() == [A, A, B, A]


def test_a_gap_of_exactly_tau_moves_nobody() -> None:
    columns = torch.tensor([[A, B], [A, B]])
    assert arbitrate(columns, [1.1, 0.6], ["q1", "q2"], 0.5).tolist() == [A, A]  # 0.50...01
    assert arbitrate(columns, [1.1, 0.59], ["q1", "q2"], 0.5).tolist() == [A, B]


def test_of_equal_margins_the_larger_id_keeps_the_image() -> None:
    columns = torch.tensor([[A, B], [A, B], [A, B]])
    # The owner is q2 or q3; neither moves the other, both are far above q1.
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
    # q1 to B gives up 0.4, q2 to C and q3 to F give up 0.5 together.
    assert component_assignment(columns, worth, ids, 1.0).tolist() == [B, A, C, G]
    # Cheaper than either: q1 or q2 keeps A without owning it.
    assert component_assignment(columns, worth, ids, 0.35).tolist() == [A, A, C, G]
    worth[0, 1] = 0.0
    assert component_assignment(columns, worth, ids, 1.0).tolist() == [A, C, F, G]


def test_a_better_second_image_is_taken_in_a_component() -> None:
    columns, worth = torch.tensor([[A, B], [A, C]]), torch.tensor([[1.0, 3.0], [1.0, 2.0]]).double()
    assert component_assignment(columns, worth, ["q1", "q2"], 1.0).tolist() == [B, C]


def test_utilities_count_in_steps_and_ties_do_not_depend_on_rows() -> None:
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
    """Utility of a choice of places, -1 for the slack; -infinity if an image is owned twice."""
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


def test_the_stages_one_after_the_other() -> None:
    # q0 and q1 share A; q1 has the smaller margin and moves on to B, which is q2's.
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
    # Last, B is worth 0.2 less than A to q1; q2 gives up 0.1 for D.
    assert firsts == [[A, A, B], [A, A, B], [A, B, B], [A, B, D]]
    assert order_of(made[-1].scores)[2] == [D, B, E, A, C]
    for before, after in itertools.pairwise(made[1:]):  # but for the first, all keep their order
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


def test_scores_that_change_are_the_evidence_of_what_follows() -> None:
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


# ------------------------------------------------------------------------------------ the command


@pytest.fixture
def given_files(tmp_path: Path) -> list[str]:
    """Twelve queries, two members, a reranker and labels: flags of the command."""
    generator = torch.Generator().manual_seed(3)
    queries, images = [f"i{n:02d}#0" for n in range(12)], [f"i{n:02d}" for n in range(12)]
    words = []
    for flag, name, strength in (("--beit3_score", "a", 0.4), ("--clip_score", "b", 0.3),
                                 ("--rerank", "r", 2.0)):  # fmt: skip
        scores = torch.eye(12) * strength + torch.rand(12, 12, generator=generator)
        path = tmp_path / f"{name}.pt"
        save_scores(path, ScoreFile(scores, queries, images))
        words += [flag, f"vlm={path}" if flag == "--rerank" else str(path)]
    annotation = tmp_path / "annotation/val.json"
    write_lines(
        annotation,
        [{"image": f"train/{n}.jpg", "image_id": i, "caption": [i]} for n, i in enumerate(images)],
    )
    return [*words, "--annotation", str(annotation)]


CHAIN = ["--decode", "margin", "--decode_tau", "0.1", "--decode", "assignment", "--decode_top", "2",
         "--decode_scope", "collisions", "--decode_slack", "0.5"]  # fmt: skip


def test_the_whole_chain_and_its_ladder(
    given_files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, saved = tmp_path / "out.txt", tmp_path / "out.pt"
    files = ["--output_file", str(out), "--save_score", str(saved)]
    run([*given_files, *CHAIN, "--rerank_depth", "6", "--rerank_prior", "0.05", "--ladder", *files])
    said = capsys.readouterr()
    lines = said.out.splitlines()
    head = next(n for n, line in enumerate(lines) if line.startswith("stage"))
    assert "R@1 over the previous stage" in lines[head]
    rungs = lines[head + 1 :]
    assert [line.split("  ")[0] for line in rungs] == [
        "fused", "reranked by vlm", "margin", "assignment",
    ]  # fmt: skip
    assert "first 6 reranked by vlm, decoded by margin, then assignment (joint" in said.err
    found = load_scores(saved)
    assert ranked_names(found.scores, found.gallery_ids) == read_ranked_list(out)
    relevant = {query: frozenset({query[:3]}) for query in found.query_ids}
    assert f"{evaluate_scores(found, relevant).mean()['R@1']:.2f}" in rungs[-1]
    assert found.meta["per_query"] is False
    assert [facts["method"] for facts in found.meta["decode"]] == ["margin", "assignment"]
    assert found.meta["decode"][1] == {
        "method": "assignment", "slack": 0.5, "top": 2, "scope": "collisions",
    }  # fmt: skip
    assert found.meta["rerank"]["depth"] == 6
    assert len(found.meta["rerank"]["sha256"]) == 64


def test_a_config_takes_a_word_or_a_list_of_decodings(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    for text, expected in (
        ("sinkhorn", ("sinkhorn",)),
        ("[margin, sinkhorn]", ("margin", "sinkhorn")),
        ("none", ("none",)),
        ("[]", ()),
    ):
        recipe.write_text(f"decode: {text}\n")
        assert load_config(RunConfig, recipe, {}).decode == expected
    recipe.write_text("decode: sinkhron\n")
    with pytest.raises(InputError, match="sinkhron"):
        load_config(RunConfig, recipe, {})


def test_what_a_config_says_is_switched_off(
    given_files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.yaml"
    rerank = given_files[given_files.index("--rerank") + 1]
    recipe.write_text(f"decode: assignment\ndecode_slack: 0.5\ndecode_top: 2\nrerank: {rerank}\n")
    words = [word for word in given_files if word not in ("--rerank", rerank)]
    run(["--config", str(recipe), *words, "--decode", "none", "--rerank"]
        + ["--output_file", str(tmp_path / "o.txt")])  # fmt: skip
    assert "lhp -> clip (weight 0.9) (per query)" in capsys.readouterr().err


def test_the_rows_of_a_reranker_may_come_in_any_order(
    given_files: list[str], tmp_path: Path
) -> None:
    path = Path(given_files[given_files.index("--rerank") + 1].partition("=")[2])
    words = [*given_files, "--rerank_depth", "6", "--output_file"]
    run([*words, str(tmp_path / "one.txt")])
    file = load_scores(path, mmap=False)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist()
    mixed = ScoreFile(file.scores[order], [file.query_ids[n] for n in order], file.gallery_ids)
    save_scores(path, mixed)
    run([*words, str(tmp_path / "two.txt")])
    assert (tmp_path / "one.txt").read_text() == (tmp_path / "two.txt").read_text()
    run([*[w for w in given_files if "vlm=" not in w and w != "--rerank"], "--output_file",
         str(tmp_path / "three.txt")])  # fmt: skip
    assert (tmp_path / "one.txt").read_text() != (tmp_path / "three.txt").read_text()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--rerank", "x={r}"], "--rerank: expected one reranker, found 2"),
        (["--rerank_depth", "0"], "--rerank_depth: expected a number greater than or equal to 1"),
        (["--rerank_prior", "-0.1"], "--rerank_prior: expected a number greater"),
        (["--rerank_prior", "1e30"], "--rerank_prior: expected a number less"),
        (["--decode", "assignment"], "--decode_top: an assignment after --rerank"),
        (["--decode", "assignment", "--decode_slack", "1", "--decode_top", "21"], "at most 20"),
        (["--decode", "assignment", "--decode_top", "2"], "--decode_top: goes with --decode_slack"),
        (["--decode", "margin", "--decode_top", "2"], "--decode_top: does not go with"),
        (["--decode", "margin", "--decode_scope", "collisions"], "--decode_scope: does not go"),
        (["--decode", "assignment", "--decode_slack", "1", "--decode_scope", "collisions"],
         "--decode_scope: collisions needs --decode_top"),
        (["--decode", "margin", "none"], "--decode: expected none without others"),
        (["--decode", "margin", "--decode_tau", "-1"], "--decode_tau: expected a number"),
        (["--decode", "sinkhorn", "--decode_factor", "1e30"], "--decode_factor: expected a number"),
        (["--decode", "assignment", "--decode_slack", "1e30"], "--decode_slack: expected a number"),
        (["--decode", "sinkhorn", "dual_softmax"], "dual_softmax cannot follow sinkhorn"),
        (["--fusion", "reciprocal_rank", "--rank_k", "9" * 30], "--rank_k: expected a number"),
        (["--clip_weight", "nan"], "--clip_weight"),
        (["--member", "x={r}:nan"], "weight of x: must lie in [0, 1], found nan"),
        (["--member", "x={r}:inf"], "weight of x: must lie in [0, 1], found inf"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense(
    given_files: list[str],
    tmp_path: Path,
    words: list[str],
    expected: str,
    refused: Callable[..., str],
) -> None:
    reranker = given_files[given_files.index("--rerank") + 1].partition("=")[2]
    out = tmp_path / "out.txt"
    flags = [word.format(r=reranker) for word in words]
    assert expected in refused(run, [*given_files, *flags, "--output_file", str(out)])
    assert not out.exists()


def test_rerankers_that_are_none(
    given_files: list[str], tmp_path: Path, refused: Callable[..., str]
) -> None:
    place = given_files.index("--rerank") + 1
    out = ["--output_file", str(tmp_path / "out.txt")]
    run([*given_files, "--output_file", str(tmp_path / "list.txt")])
    given_files[place] = f"vlm={tmp_path / 'list.txt'}"
    with pytest.raises(InputError, match="expected a reranker's scores, found a ranked list"):
        run(given_files + out)
    given_files[place] = "vlm.pt"
    assert "--rerank: expected NAME=FILE, found 'vlm.pt'" in refused(run, given_files + out)
    other = ScoreFile(torch.rand(12, 11), [f"i{n:02d}#0" for n in range(12)],
                      [f"i{n:02d}" for n in range(11)])  # fmt: skip
    save_scores(tmp_path / "other.pt", other)
    given_files[place] = f"vlm={tmp_path / 'other.pt'}"
    assert "'i11'" in refused(run, given_files + out)
    assert not (tmp_path / "out.txt").exists()


def test_a_ladder_needs_labels(
    given_files: list[str], tmp_path: Path, refused: Callable[..., str]
) -> None:
    out = ["--ladder", "--output_file", str(tmp_path / "out.txt")]
    assert "--ladder: expected labels" in refused(run, given_files[:4] + out)
    queries = [{"query_index": f"i{n:02d}#0", "caption": "x"} for n in range(12)]
    write_lines(tmp_path / "query.json", queries)
    words = [*given_files[:4], "--annotation", str(tmp_path / "query.json"), *out]
    assert "--ladder: expected labels, found none" in refused(run, words)
    key = {f"i{n:02d}#0": {"gallery": f"i{n:02d}", "normal": "walking"} for n in range(12)}
    (tmp_path / "answers.json").write_text(json.dumps(key))
    run([*words, "--answers", str(tmp_path / "answers.json")])


def test_the_ladder_shows_what_every_stage_adds() -> None:
    relevant = {f"q{n}": frozenset({f"g{n}"}) for n in range(4)}
    ids = [f"q{n}" for n in range(4)], [f"g{n}" for n in range(4)]
    wrong = torch.eye(4)
    wrong[0, 1] = 2.0
    rungs = [
        (name, evaluate_scores(ScoreFile(scores, *ids), relevant))
        for name, scores in (("fused", wrong), ("margin", torch.eye(4)))
    ]
    head, first, second = ladder_table(rungs).splitlines()
    assert head.split() == ["stage", "R@1", "mAP@10", "R@1", "over", "the", "previous", "stage"]
    assert first.split() == ["fused", "75.00", "87.50", "-"]
    assert second.split()[:4] == ["margin", "100.00", "100.00", "+25.00"]
    assert second.split()[4:] == ["[+0.00,", "+75.00]"]
