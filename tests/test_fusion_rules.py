"""Fusion beyond the defaults: scalings, rules, decodings, ranked lists, rows of equal scores."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ensemble.chain import stages
from ensemble.decode import DecodeSettings
from ensemble.fuse import kept_weights, shares_from_weights
from ensemble.listed import ranked_file
from ensemble.run import main as run
from ensemble.scaling import mean_places
from pab.core.errors import InputError
from pab.ranking import ranked_names, top_k
from pab.scores import load_scores
from tests.conftest import write_lines
from tests.fusion import IMAGES, QUERIES, fused, score_files, write


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    return score_files(tmp_path)


# --------------------------------------------------------------------- scalings, rules, lists


def unit(x: Tensor) -> Tensor:
    return (x - x.min()) / (x.max() - x.min())


@pytest.mark.parametrize("scaling", ["minmax_query", "zscore", "rank"])
def test_scaling_per_row(files: dict[str, str], tmp_path: Path, scaling: str) -> None:
    a, b = (load_scores(files[name]).scores for name in "ab")
    words = ["--beit3_score", files["a"], "--uit_score", files["b"], "--beit3_weight", "0.5"]
    found = fused(tmp_path, *words, "--scaling", scaling).scores
    for row in range(12):
        if scaling == "minmax_query":
            expected = 0.5 * unit(a[row]) + 0.5 * unit(b[row])
        elif scaling == "zscore":
            expected = sum(0.5 * (x - x.mean()) / x.std(correction=0) for x in (a[row], b[row]))  # type: ignore[assignment]
        else:
            places = [sorted(x.tolist(), reverse=True) for x in (a[row], b[row])]
            expected = torch.tensor([
                0.5 * (1 - places[0].index(x) / 11) + 0.5 * (1 - places[1].index(y) / 11)
                for x, y in zip(a[row].tolist(), b[row].tolist(), strict=True)
            ])  # fmt: skip
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=0)


def test_a_sum_with_equivalent_shares_equals_iterative_fusion(
    files: dict[str, str], tmp_path: Path
) -> None:
    words = ["--beit3_score", files["a"], "--uit_score", files["b"], "--clip_score", files["c"]]
    weights = ["--beit3_weight", "0.8", "--clip_weight", "0.5"]
    shares = shares_from_weights([0.8, 0.5])
    assert shares == pytest.approx([0.4, 0.1, 0.5])
    assert kept_weights(shares) == pytest.approx([0.8, 0.5])
    given = [f"{name}:{s}" for name, s in zip(("lhp", "uit", "clip"), shares, strict=True)]
    one = fused(tmp_path, *words, *weights, name="one").scores
    two = fused(tmp_path, *words, "--fusion", "sum", "--shares", *given, name="two").scores
    torch.testing.assert_close(one, two, atol=1e-6, rtol=0)


def test_first_shares_may_be_zero() -> None:
    assert kept_weights([0.0, 0.0, 1.0]) == [1.0, 0.0]
    assert shares_from_weights(kept_weights([0.0, 0.25, 0.75])) == pytest.approx([0.0, 0.25, 0.75])


def test_reciprocal_ranks(files: dict[str, str], tmp_path: Path) -> None:
    words = ["--beit3_score", files["a"], "--uit_score", files["b"], "--fusion", "reciprocal_rank"]
    found = fused(tmp_path, *words, "--rank_k", "10").scores
    expected = sum(
        1 / (10 + 1 + load_scores(files[name]).scores.argsort(1, descending=True).argsort(1))
        for name in "ab"
    )
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)  # type: ignore[arg-type]


def test_ranked_lists_beside_score_files(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(["--beit3_score", files["b"], "--output_file", str(tmp_path / "b.txt"), "--top_k", "4"])
    order = tmp_path / "order.txt"
    order.write_text("\n".join(QUERIES) + "\n")
    words = ["--beit3_score", files["a"], "--uit_score", str(tmp_path / "b.txt")]
    capsys.readouterr()
    found = fused(tmp_path, *words, "--query_order", str(order)).scores
    assert "images that are not listed score 0" in capsys.readouterr().err
    best = top_k(load_scores(files["b"]).scores, 4)
    listed = torch.zeros(12, 12).scatter_(1, best, (1 / torch.arange(1.0, 5.0)).expand(12, -1))
    expected = 0.925 * unit(load_scores(files["a"]).scores) + 0.075 * listed
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)

    # Lines in another order, with their query ids, give the same scores.
    mixed = list(range(12))
    random.Random(0).shuffle(mixed)
    lines = (tmp_path / "b.txt").read_text().splitlines()
    (tmp_path / "b.txt").write_text("".join(lines[i] + "\n" for i in mixed))
    order.write_text("".join(QUERIES[i] + "\n" for i in mixed))
    again = fused(tmp_path, *words, "--query_order", str(order), name="again")
    assert torch.equal(again.scores, found)
    text = (tmp_path / "fused.txt").read_text().splitlines()
    assert (tmp_path / "again.txt").read_text().splitlines() == [text[i] for i in mixed]


def test_lists_without_score_files_are_matched_by_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x y\nz x\n")
    (tmp_path / "b.txt").write_text("y x\nz y\n")
    words = ["--beit3_score", str(tmp_path / "a.txt"), "--clip_score", str(tmp_path / "b.txt")]
    found = fused(tmp_path, *words, "--top_k", "3", "--clip_weight", "0.4")
    assert found.query_ids == ["line 1", "line 2"]
    assert found.gallery_ids == ["x", "y", "z"]
    assert (tmp_path / "fused.txt").read_text() == "y x z\nz y x\n"


def test_equal_scores_share_a_place(tmp_path: Path) -> None:
    scores = torch.tensor([[0.5, 0.9, 0.5, 0.1, 0.5], [0.3, 0.2, 0.1, 0.0, -1.0]])
    assert mean_places(scores).tolist() == [[2, 0, 2, 4, 2], [0, 1, 2, 3, 4]]
    # Images in no list rank below all listed images, even if their ids are smaller.
    (tmp_path / "a.txt").write_text("z y\n")
    (tmp_path / "b.txt").write_text("y x\n")
    (tmp_path / "g").mkdir()
    for name in ("a", "b", "c", "x", "y", "z"):
        (tmp_path / f"g/{name}.jpg").touch()
    words = ["--beit3_score", str(tmp_path / "a.txt"), "--clip_score", str(tmp_path / "b.txt")]
    words += ["--image_folder", str(tmp_path / "g"), "--fusion", "reciprocal_rank"]
    found = fused(tmp_path, *words, "--top_k", "4", "--rank_k", "1")
    assert (tmp_path / "fused.txt").read_text() == "y z x a\n"
    assert found.scores[0].tolist() == pytest.approx([0, 0, 0, 1 / 3, 1 / 3 + 1 / 2, 1 / 2])


def test_facts_about_the_members_are_passed_on(files: dict[str, str], tmp_path: Path) -> None:
    given = ["--beit3_score", files["a"], "--uit_score", files["b"]]
    joint = fused(tmp_path, *given, "--decode", "assignment", "--chosen_on_test", name="joint")
    assert (joint.meta["per_query"], joint.meta["chosen_on_test"]) == (False, True)
    again = fused(tmp_path, "--beit3_score", str(tmp_path / "joint.pt"), "--clip_score", files["c"])
    assert (again.meta["per_query"], again.meta["chosen_on_test"]) == (False, True)


def test_nothing_is_written_before_the_last_check(tmp_path: Path) -> None:
    one = write(tmp_path / "one.pt", torch.rand(2, 3), ["q1", "q2"], ["a", "b", "two words"])
    words = ["--output_file", str(tmp_path / "o.txt"), "--save_score", str(tmp_path / "o.pt")]
    with pytest.raises(InputError, match="two words"):
        run(["--beit3_score", one, *words])
    two = write(tmp_path / "two.pt", torch.rand(2, 3), ["q1", "q2"], ["a", "b", "c"])
    write_lines(tmp_path / "q.json", [{"query_index": q, "caption": "x"} for q in ("q1", "q2")])
    key = {q: {"gallery": "elsewhere", "normal": "walking"} for q in ("q1", "q2")}
    (tmp_path / "key.json").write_text(json.dumps(key))
    labels = ["--annotation", str(tmp_path / "q.json"), "--answers", str(tmp_path / "key.json")]
    with pytest.raises(InputError, match=r"two\.pt.*elsewhere"):
        run(["--beit3_score", two, *words, *labels])
    assert not (tmp_path / "o.txt").exists()
    assert not (tmp_path / "o.pt").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (["i00 i01"] * 11, r"one line per query \(12\), found 11"),
        (["i00 i01"] * 11 + ["i00 i77"], r"'i77' is not in the gallery .*line 12|line 12.*'i77'"),
        (["i00 i01"] * 11 + ["i00 i00"], "'i00' twice"),
    ],
)
def test_lists_that_do_not_fit(
    files: dict[str, str], tmp_path: Path, text: list[str], expected: str
) -> None:
    path, order = tmp_path / "list.txt", tmp_path / "order.txt"
    path.write_text("\n".join(text) + "\n")
    order.write_text("\n".join(QUERIES) + "\n")
    words = ["--beit3_score", files["a"], "--uit_score", str(path)]
    with pytest.raises(InputError, match=expected):
        fused(tmp_path, *words, "--query_order", str(order))


def test_a_list_without_an_order_is_refused(files: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("i00 i01\n" * 12)
    with pytest.raises(InputError, match="--query_order"):
        fused(tmp_path, "--beit3_score", files["a"], "--uit_score", str(path))


@pytest.mark.parametrize(
    ("words", "joint"),
    [
        (["dual_softmax"], True),
        (["sinkhorn", "--sinkhorn_steps", "20"], True),
        (["assignment"], True),
        (["assignment", "--decode_slack", "0.05"], True),
        (["querybank", "--decode_bank", "{c}"], False),
    ],
)
def test_decodings_are_reported_and_recorded(
    files: dict[str, str],
    tmp_path: Path,
    words: list[str],
    joint: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["--beit3_score", files["a"], "--uit_score", files["b"], "--beit3_weight", "0.5"]
    found = fused(tmp_path, *given, "--decode", *(word.format(**files) for word in words))
    printed = capsys.readouterr().err
    assert ("joint over all queries" in printed) is joint
    assert found.meta["per_query"] is not joint
    assert found.meta["decode"]["method"] == words[0]
    lines = [line.split() for line in (tmp_path / "fused.txt").read_text().splitlines()]
    assert [[IMAGES[i] for i in row] for row in top_k(found.scores, 10)] == lines
    if words == ["assignment"]:
        assert len({line[0] for line in lines}) == 12


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--decode", "querybank"], "--decode_bank"),
        (["--decode_bank", "{b}"], "if a config sets it, pass --decode_bank none"),
        (["--decode_slack", "-1"], "--decode_slack"),
        (["--decode_factor", "0"], "--decode_factor"),
        (["--sinkhorn_steps", "0"], "--sinkhorn_steps"),
        (["--rank_k", "-1"], "--rank_k"),
        (["--shares", "lhp:1"], "--shares"),
        (["--fusion", "sum"], "every member, found none for lhp"),
        (["--fusion", "sum", "--shares", "lhp:0.5", "uit:0.6"], "add up to 1, found 1.1"),
        (["--fusion", "sum", "--shares", "lhp:0.5", "uit:0.5", "x:0"], "x, which is not a member"),
        (["--fusion", "sum", "--shares", "lhp:much", "uit:0.5"], "'much'"),
        (["--scaling", "zscore", "--decode", "dual_softmax"], "--scaling: zscore"),
        (["--decode_slack", "0.1"], "--decode_slack: cannot be used with --decode none"),
        (["--fusion", "sum", "--shares", "lhp:1", "lhp:0.5", "uit:0.5"], "found 'lhp' twice"),
        (["--fusion", "sum", "--shares", "lhp", "uit:0.5"], "expected NAME:NUMBER, found 'lhp'"),
        (["--member", "x={c}:0.5", "--member_weights", "x:0.7"], "is also set by --member_weights"),
        (["--member", "x={c}", "--member_weights", "x:0.7", "x:0.6"], "found 'x' twice"),
    ],
)
def test_bad_flags_are_refused(
    files: dict[str, str], tmp_path: Path, words: list[str], expected: str
) -> None:
    given = ["--beit3_score", files["a"], "--uit_score", files["b"]]
    with pytest.raises(InputError, match=expected):
        fused(tmp_path, *given, *(word.format(**files) for word in words))
    assert not (tmp_path / "fused.txt").exists()


# -------------------------------------------------------------------------- rows of equal scores


CASES = Path(__file__).parent / "data/scores"
FUSIONS = [
    *(["--scaling", scaling] for scaling in ("minmax", "minmax_query", "zscore", "rank")),
    ["--fusion", "reciprocal_rank"],
    ["--fusion", "sum", "--shares", "lhp:0.5", "clip:0.5"],
]


@pytest.mark.parametrize("how", FUSIONS)
@pytest.mark.parametrize("first", [False, True])
def test_a_row_of_equal_scores_contributes_nothing(
    tmp_path: Path, how: list[str], first: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    flat = CASES / "one_flat_row.pt"
    known = load_scores(flat)
    scores = torch.rand(6, 12, generator=torch.Generator().manual_seed(0))
    other = write(tmp_path / "other.pt", scores, known.query_ids, known.gallery_ids)
    words = ["--beit3_score", str(flat), "--clip_score", other]
    if not first:
        words[1], words[3] = other, str(flat)
    found = fused(tmp_path, *words, *how, "--clip_weight", "0.5")
    printed = capsys.readouterr().err
    assert printed.count("note:") == 1
    assert f"{flat}: 1 query has the same score for all images: nothing is added" in printed
    row = known.query_ids.index("q3")
    assert torch.equal(top_k(found.scores, 12)[row], top_k(scores, 12)[row])
    low, high = float(found.scores[row].min()), float(found.scores[row].max())
    assert low < high
    # The list is the same without --save_score, and other queries depend on both members.
    alone = fused(tmp_path, "--beit3_score", other, name="alone")
    run([*words, *how, "--clip_weight", "0.5", "--output_file", str(tmp_path / "list.txt")])
    assert (tmp_path / "list.txt").read_text() == (tmp_path / "fused.txt").read_text()
    assert not torch.equal(top_k(found.scores, 12), top_k(alone.scores, 12))


@pytest.mark.parametrize("how", FUSIONS)
def test_a_member_with_only_rows_of_equal_scores_is_refused(
    files: dict[str, str], tmp_path: Path, how: list[str]
) -> None:
    rows = torch.arange(12.0)[:, None].expand(12, 12)  # a different constant for each query
    flat = write(tmp_path / "flat.pt", rows, QUERIES, IMAGES)
    with pytest.raises(InputError, match=r"flat\.pt: all images have the same score"):
        fused(tmp_path, "--beit3_score", files["a"], "--clip_score", flat, *how)
    assert not (tmp_path / "fused.txt").exists()


def test_deviations_due_to_rounding_do_not_set_the_scale(tmp_path: Path) -> None:
    scores = torch.rand(3, 1000, generator=torch.Generator().manual_seed(0))
    other = scores.clone()
    scores[1] = 0.1  # the float32 mean of this row is not exactly 0.1
    ids = [f"q{n}" for n in range(3)], [f"g{n:04d}" for n in range(1000)]
    one, two = write(tmp_path / "1.pt", scores, *ids), write(tmp_path / "2.pt", other, *ids)
    found = fused(tmp_path, "--beit3_score", one, "--clip_score", two, "--scaling", "zscore")
    assert torch.equal(top_k(found.scores, 1000)[1], top_k(other, 1000)[1])


def test_a_gallery_of_one_image_is_accepted(tmp_path: Path) -> None:
    one = write(tmp_path / "one.pt", torch.tensor([[0.1], [0.7]]), ["q0", "q1"], ["a"])
    for how in ("minmax", "minmax_query", "zscore", "rank"):
        fused(tmp_path, "--beit3_score", one, "--clip_score", one, "--scaling", how)
        assert (tmp_path / "fused.txt").read_text() == "a\na\n"
    equal = write(tmp_path / "equal.pt", torch.full((2, 1), 0.3), ["q0", "q1"], ["a"])
    words = ["--beit3_score", equal, "--clip_score", one, "--output_file"]
    for flags in ([], ["--save_score", str(tmp_path / "f.pt")]):
        run([*words, str(tmp_path / "one.txt"), *flags])
        assert (tmp_path / "one.txt").read_text() == "a\na\n"


def test_an_assignment_may_give_an_image_that_no_member_lists() -> None:
    """Three queries list the same two images, so one of them receives an unlisted image."""
    scores = torch.tensor([[0.9, 0.5, 0.0], [0.8, 0.6, 0.0], [0.7, 0.4, 0.0]])
    listed = torch.tensor([[True, True, False]] * 3)
    ids = (["q1", "q2", "q3"], ["a", "b", "c"])
    settings = DecodeSettings("assignment")
    *_, last = stages(scores, *ids, None, [settings], listed)
    file = ranked_file(last.scores, *ids, last.listed)
    assert {names[0] for names in ranked_names(file.scores, ids[1], 1)} == {"a", "b", "c"}
