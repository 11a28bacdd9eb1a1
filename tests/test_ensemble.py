"""Fusion: the published arithmetic, the command and its outputs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from ensemble.config import FusionConfig
from ensemble.fuse import aligned, best_candidates
from ensemble.members import Member, load_members, parse_member
from ensemble.run import RunConfig
from ensemble.run import main as run
from ensemble.scaling import scaled_block
from ensemble.search import main as search
from pab.core.config import load_config
from pab.core.errors import InputError
from pab.metrics import evaluate_scores
from pab.ranking import top_k
from pab.scores import ScoreFile, load_scores
from pab.scoring.rerank import choose_candidates, fill
from tests.conftest import GOLDEN, needs_golden
from tests.fusion import IMAGES, QUERIES, annotation_file, fused, score_files, write

ROOT = Path(__file__).parents[1]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    return score_files(tmp_path)


@pytest.fixture
def annotation(tmp_path: Path) -> Path:
    return annotation_file(tmp_path)


# ------------------------------------------------------------------------------ reference vectors


@pytest.fixture(scope="module")
def reference() -> tuple[dict[str, Tensor], dict[str, Any]]:
    vectors = load_file(GOLDEN / "fusion.safetensors")
    return vectors, json.loads((GOLDEN / "fusion.json").read_text())


@needs_golden
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize(
    ("name", "config", "weights"),
    [
        ("paper_0.925_0.9_0.9", "published", (0.925, 0.9, 0.9)),
        ("equal_0.9", "released", (0.9, 0.9, 0.9)),
    ],
)
def test_published_arithmetic(
    reference: tuple[dict[str, Tensor], dict[str, Any]],
    tmp_path: Path,
    name: str,
    config: str,
    weights: tuple[float, ...],
    shuffled: bool,
) -> None:
    v, facts = reference
    candidates = choose_candidates(v["lhp"], facts["k_test"])
    assert torch.equal(candidates.sort().values, v["candidates"].sort().values)
    match = v["itm_logit_all_pairs"].gather(1, candidates)
    uit = fill(match, candidates, v["lhp"].shape[1])
    scaled = scaled_block(uit, "minmax", ScoreFile(uit, [], []).bounds, "uit")
    torch.testing.assert_close(scaled, v["uit_minmax"], atol=1e-6, rtol=0)

    count, images = v["lhp"].shape
    queries, gallery = [f"q{i:03d}" for i in range(count)], [f"g{i:03d}" for i in range(images)]
    words = []
    for member, scores in (("beit3", v["lhp"]), ("uit", uit), ("blip2", v["blip2"]),
                           ("clip", v["clip"])):  # fmt: skip
        rows, columns = list(range(count)), list(range(images))
        if shuffled and member != "beit3":
            random.Random(member).shuffle(rows)
            random.Random(member).shuffle(columns)
        mixed = scores[rows][:, columns]
        path = write(tmp_path / f"{member}.pt", mixed, [queries[r] for r in rows],
                     [gallery[c] for c in columns])  # fmt: skip
        words += [f"--{member}_score", path]
    out, fused = tmp_path / "out.txt", tmp_path / "fused.pt"
    recipe = ROOT / f"configs/ensemble/{config}.yaml"
    assert load_config(RunConfig, recipe, {}).beit3_weight == weights[0]
    run(["--config", str(recipe), *words, "--output_file", str(out), "--save_score", str(fused)])
    found = load_scores(fused)
    torch.testing.assert_close(found.scores, v[f"fused_{name}"], atol=1e-6, rtol=0)
    expected = [" ".join(gallery[i] for i in line) for line in facts["top10"][name]]
    assert out.read_text().splitlines() == expected
    relevant = {q: frozenset({gallery[int(g)]})
                for q, g in zip(queries, v["ground_truth"], strict=True)}  # fmt: skip
    mean = evaluate_scores(found, relevant).mean()
    for metric, value in facts["metrics"][f"fused_{name}"].items():
        short = {"R1": "R@1", "R5": "R@5", "R10": "R@10", "mAP10": "mAP@10"}.get(metric, metric)
        assert mean[short] == pytest.approx(value, abs=1e-4), metric


@needs_golden
@pytest.mark.parametrize("member", ["lhp", "blip2", "clip", "uit"])
def test_metrics_of_members(
    reference: tuple[dict[str, Tensor], dict[str, Any]], member: str
) -> None:
    v, facts = reference
    if member == "uit":
        match = v["itm_logit_all_pairs"].gather(1, v["candidates"])
        scores = fill(match, v["candidates"], v["lhp"].shape[1])
    else:
        scores = v[member]
    queries, gallery = [str(i) for i in range(120)], [f"{i:03d}" for i in range(150)]
    relevant = {q: frozenset({gallery[int(g)]})
                for q, g in zip(queries, v["ground_truth"], strict=True)}  # fmt: skip
    mean = evaluate_scores(ScoreFile(scores, queries, gallery, {}), relevant).mean()
    assert mean["R@1"] == pytest.approx(facts["metrics"][member]["R1"], abs=1e-4)
    assert mean["mAP"] == pytest.approx(facts["metrics"][member]["mAP"], abs=1e-4)


# ---------------------------------------------------------------------------------------- fusing


def test_order_and_meaning_of_the_weights(files: dict[str, str]) -> None:
    a, b, c = (load_scores(files[name]).scores.double() for name in "abc")

    def unit(x: Tensor) -> Tensor:
        return (x - x.min()) / (x.max() - x.min())

    config = FusionConfig(
        uit_score=files["a"], clip_score=files["b"], member=(f"x={files['c']}:0.5",),
        beit3_weight=0.1, clip_weight=0.75,
    )  # fmt: skip
    members = config.members()  # UIT is first, and the first member needs no weight
    assert [member.name for member in members] == ["uit", "clip", "x"]
    expected = 0.5 * (0.75 * unit(a) + 0.25 * unit(b)) + 0.5 * unit(c)
    found = aligned(members, load_members(members)).matrix()
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)


def test_one_member_alone_keeps_its_ranking(files: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out.txt"
    run(["--clip_score", files["a"], "--output_file", str(out), "--top_k", "3"])
    best = top_k(load_scores(files["a"]).scores, 3)
    assert out.read_text() == "".join(" ".join(IMAGES[i] for i in row) + "\n" for row in best)


def test_lines_follow_the_query_order(files: dict[str, str], tmp_path: Path) -> None:
    plain, turned = tmp_path / "plain.txt", tmp_path / "turned.txt"
    words = ["--beit3_score", files["a"], "--uit_score", files["b"]]
    run([*words, "--output_file", str(plain)])
    (tmp_path / "order.txt").write_text("\n".join(QUERIES[::-1]) + "\n")
    order = ["--query_order", str(tmp_path / "order.txt")]
    run([*words, *order, "--output_file", str(turned)])
    assert turned.read_text().splitlines() == plain.read_text().splitlines()[::-1]


@pytest.mark.parametrize("kind", ["missing", "extra", "double", "image"])
def test_ids_that_do_not_match(files: dict[str, str], tmp_path: Path, kind: str) -> None:
    scores = load_scores(files["b"]).scores
    queries, gallery = list(QUERIES), list(IMAGES)
    if kind == "missing":
        scores, queries = scores[1:].contiguous(), queries[1:]
    elif kind == "extra":
        scores, queries = torch.cat([scores, scores[:1]]), [*queries, "i99#0"]
    elif kind == "double":
        queries[3] = queries[2]
    else:
        gallery[4] = "i04x"
    path = tmp_path / "odd.pt"
    torch.save({"scores": scores, "query_ids": queries, "gallery_ids": gallery, "meta": {}}, path)
    named = {"missing": "i0#0", "extra": "i99#0", "double": "i2#0", "image": "i04"}[kind]
    out = tmp_path / "out.txt"
    with pytest.raises(InputError, match=named):
        run(["--beit3_score", files["a"], "--uit_score", str(path), "--output_file", str(out)])
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "found none"),
        (["--uit_score", "{a}", "--clip_score", "{b}", "--clip_weight", "1.5"], "clip"),
        (["--beit3_score", "{a}", "--member", "x={b}"], "no weight for 'x'"),
        (["--beit3_score", "{a}", "--member", "{b}"], "NAME=FILE:WEIGHT"),
        (["--beit3_score", "{a}", "--member", "x={b}:much"], "'much'"),
        (["--beit3_score", "{a}", "--member", "lhp={b}:0.5"], "'lhp' twice"),
        (["--beit3_score", "{a}", "--answers", "{b}"], "--annotation"),
        (["--beit3_score", "{a}", "--top_k", "0"], "--top_k"),
        (["--beit3_score", "{flat}"], "no ranking"),
    ],
)
def test_bad_input(files: dict[str, str], tmp_path: Path, words: list[str], expected: str) -> None:
    files["flat"] = write(tmp_path / "flat.pt", torch.zeros(12, 12), QUERIES, IMAGES)
    out = tmp_path / "out.txt"
    with pytest.raises(InputError, match=expected):
        run([word.format(**files) for word in words] + ["--output_file", str(out)])
    assert not out.exists()


def test_flags_of_further_members_are_parsed() -> None:
    assert parse_member("a=b.pt:0.5") == Member("a", "b.pt", 0.5)
    assert parse_member("a=b.pt", {"x": 1.0, "a": 0.25}) == Member("a", "b.pt", 0.25)
    assert parse_member("a=C:/d.pt:0.5") == Member("a", "C:/d.pt", 0.5)


# ---------------------------------------------------------------------------------------- weights


def test_unused_weights_may_be_omitted(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = ["--member", f"x={files['a']}", "--member", f"y={files['b']}:0.5"]
    found = fused(tmp_path, *first).scores
    given = fused(tmp_path, "--beit3_score", files["a"], "--member", f"y={files['b']}:0.5").scores
    assert torch.equal(found, given)
    assert "note:" not in capsys.readouterr().err
    fused(tmp_path, *first, "--fusion", "reciprocal_rank", "--scaling", "rank")
    printed = capsys.readouterr().err
    assert "note: --member: weights have no effect with --fusion reciprocal_rank" in printed
    assert "note: --scaling: has no effect with --fusion reciprocal_rank" in printed
    published = ["--beit3_score", files["a"], "--uit_score", files["b"]]
    with pytest.raises(InputError, match=r"'uit' is not a --member; set --beit3_weight"):
        fused(tmp_path, *published, "--member_weights", "uit:0.2")
    fused(tmp_path, *first, "--member_weights", "z:0.5")
    assert "no --member has the name 'z': ignored" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_leaves_no_other_output(
    files: dict[str, str], annotation: Path, tmp_path: Path
) -> None:
    words = ["--beit3_score", files["a"], "--uit_score", files["b"]]
    saved = tmp_path / "saved.pt"
    with pytest.raises(InputError, match=f"--output_file: {annotation.parent} is a directory"):
        run([*words, "--save_score", str(saved), "--output_file", str(annotation.parent)])
    trials = ["--annotation", str(annotation), "--trials", str(tmp_path / "trials.csv")]
    with pytest.raises(InputError, match=f"--out: {annotation.parent} is a directory"):
        search([*words, *trials, "--out", str(annotation.parent)])
    assert not saved.exists()
    assert not (tmp_path / "trials.csv").exists()


@pytest.mark.parametrize("scaling", ["minmax", "minmax_query", "zscore"])
def test_scores_that_overflow_when_scaled_are_refused(
    files: dict[str, str], scaling: str, tmp_path: Path
) -> None:
    huge = torch.linspace(-1, 1, 12).expand(12, 12) * 3.2e38
    path = write(tmp_path / "huge.pt", huge, QUERIES, IMAGES)
    words = ["--beit3_score", files["a"], "--uit_score", path, "--scaling", scaling]
    out = tmp_path / "o.txt"
    with pytest.raises(
        InputError, match=rf"huge.pt: the range .* overflows float32 with --scaling {scaling}"
    ):
        run([*words, "--output_file", str(out)])
    assert not out.exists()


def test_a_tiny_range_of_scores(tmp_path: Path) -> None:
    scores = torch.rand(3, 40, generator=torch.Generator().manual_seed(0))
    ids = ["q0", "q1", "q2"], [f"i{n:02d}" for n in range(40)]
    words = ["--beit3_score", write(tmp_path / "a.pt", scores.flip(0), *ids), "--uit_score"]
    words += [write(tmp_path / "b.pt", scores * 1e-41, *ids), "--beit3_weight", "0.5"]
    run([*words, "--output_file", str(tmp_path / "bare.txt")])
    fused(tmp_path, *words)
    assert (tmp_path / "bare.txt").read_text() == (tmp_path / "fused.txt").read_text()


@pytest.mark.parametrize("flag", ["--output_file", "--save_score"])
def test_an_output_cannot_replace_an_input(
    files: dict[str, str], tmp_path: Path, flag: str
) -> None:
    before = Path(files["a"]).read_bytes()
    (tmp_path / "link.pt").symlink_to(files["a"])
    for path in (files["a"], str(tmp_path / "link.pt")):
        with pytest.raises(
            InputError, match="is the file of --beit3_score: it would be overwritten"
        ):
            run(["--beit3_score", files["a"], "--clip_score", files["b"], flag, path])
    assert Path(files["a"]).read_bytes() == before


def test_sinkhorn_reports_if_it_has_not_converged(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--beit3_score", files["a"], "--decode", "sinkhorn"]
    facts = fused(tmp_path, *words, "--sinkhorn_steps", "1", "--decode_factor", "100").meta[
        "decode"
    ]
    printed = capsys.readouterr().err
    assert "note: --decode sinkhorn: has not converged after 1 step at factor 100" in printed
    assert facts["row_error"] > 1e-3
    assert f"{facts['row_error']:.2g} in rows and {facts['column_error']:.2g} in columns" in printed
    facts = fused(tmp_path, *words, "--sinkhorn_steps", "500", "--decode_factor", "5").meta[
        "decode"
    ]
    assert "note:" not in capsys.readouterr().err
    assert max(facts["row_error"], facts["column_error"]) <= 1e-3


def test_a_bank_whose_scores_overflow_is_refused(files: dict[str, str], tmp_path: Path) -> None:
    bank = write(tmp_path / "bank.pt", torch.rand(12, 12) * 1e38, QUERIES, IMAGES)
    words = ["--beit3_score", files["a"], "--decode", "querybank", "--decode_bank", bank]
    with pytest.raises(InputError, match="overflow at --decode_factor 20; use a smaller factor"):
        fused(tmp_path, *words)
    assert not (tmp_path / "fused.txt").exists()


# ------------------------------------------------------------------------------- the best columns


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_the_best_columns_are_those_of_the_fused_matrix(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 4), "members")
    queries, images = data.draw(st.integers(1, 5), "Q"), data.draw(st.integers(2, 70), "G")
    k = data.draw(st.integers(1, 12), "k")
    levels = data.draw(st.sampled_from([2, 5, 1000]), "levels")  # few levels: many ties
    offset = data.draw(st.sampled_from([0.0, -3.0, 1e4]), "offset")  # large: sums lose digits
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10_000), "seed"))
    files, members = [], []
    for number in range(count):
        scores = torch.randint(0, levels, (queries, images), generator=generator) / levels + offset
        scores[0, 0], scores[-1, -1] = offset - 1.0, offset + 2.0  # so that no matrix is constant
        ids = [f"q{i}" for i in range(queries)], [f"g{i:02d}" for i in range(images)]
        files.append(ScoreFile(scores, *ids))
        members.append(Member(f"m{number}", "", data.draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))))
    fusion = aligned(members, files)
    assert torch.equal(fusion.best_columns(k), top_k(fusion.matrix(), k))


@pytest.mark.parametrize("scaling", ["minmax", "rank"])
def test_best_columns_of_rows_in_another_order(scaling: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = [f"q{i}" for i in range(9)], [f"g{i:03d}" for i in range(200)]
    one, two = torch.rand(9, 200, generator=generator), torch.rand(9, 200, generator=generator)
    order = torch.randperm(9, generator=generator).tolist()
    files = [ScoreFile(one, *ids), ScoreFile(two[order], [ids[0][i] for i in order], ids[1])]
    members = [Member("a", "", 1.0), Member("b", "", 0.6)]
    fusion = aligned(members, files, scaling=scaling)
    plain = aligned(members, [files[0], ScoreFile(two, *ids)], scaling=scaling)
    assert torch.equal(fusion.best_columns(10), top_k(plain.matrix(), 10))


@given(st.integers(1, 5), st.integers(5, 1500), st.sampled_from([2, 30, 100_000]), st.integers())
@settings(max_examples=60, deadline=None)
def test_candidates_are_the_best(count: int, images: int, levels: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed % 10_000)
    block = torch.randint(0, levels, (3, images), generator=generator).float()
    values, columns = best_candidates(block, count)
    assert torch.equal(values, block.topk(count).values)
    assert torch.equal(block.gather(1, columns), values)
    assert all(len(set(row)) == count for row in columns.tolist())
