"""The fusion and the search for its weights."""

from __future__ import annotations

import csv
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from ensemble.config import FusionConfig
from ensemble.fuse import aligned, best_candidates, kept_weights, shares_from_weights
from ensemble.members import Member, load_members, parse_member
from ensemble.run import RunConfig
from ensemble.run import main as run
from ensemble.scaling import mean_places, scaled_block
from ensemble.search import main as search
from ensemble.trials import grid
from pab.core.config import load_config
from pab.core.errors import InputError
from pab.metrics import evaluate_scores
from pab.ranking import top_k
from pab.scores import ScoreFile, load_scores, save_scores
from pab.scoring.rerank import choose_candidates, fill
from tests.conftest import GOLDEN, needs_golden, write_lines

ROOT = Path(__file__).parents[1]
QUERIES, IMAGES = [f"i{n}#0" for n in range(12)], [f"i{n:02d}" for n in range(12)]


def write(path: Path, scores: Tensor, queries: list[str], gallery: list[str]) -> str:
    """A score file; columns are put in the order of sorted ids."""
    columns = sorted(range(len(gallery)), key=gallery.__getitem__)
    ordered = scores[:, columns].float().contiguous()
    save_scores(path, ScoreFile(ordered, queries, [gallery[c] for c in columns], {}))
    return str(path)


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


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    generator = torch.Generator().manual_seed(0)
    right = torch.eye(12)
    return {
        name: write(
            tmp_path / f"{name}.pt", right * strength + torch.rand(12, 12, generator=generator),
            QUERIES, IMAGES,
        )
        for name, strength in (("a", 0.3), ("b", 0.5), ("c", 0.2))
    }  # fmt: skip


def test_order_and_meaning_of_the_weights(files: dict[str, str]) -> None:
    a, b, c = (load_scores(files[name]).scores.double() for name in "abc")

    def unit(x: Tensor) -> Tensor:
        return (x - x.min()) / (x.max() - x.min())

    config = FusionConfig(
        uit_score=files["a"], clip_score=files["b"], member=(f"x={files['c']}:0.5",),
        beit3_weight=0.1, clip_weight=0.75,
    )  # fmt: skip
    members = config.members()  # starts with UIT: its own weight has no part in it
    assert [member.name for member in members] == ["uit", "clip", "x"]
    expected = 0.5 * (0.75 * unit(a) + 0.25 * unit(b)) + 0.5 * unit(c)
    found = aligned(members, load_members(members)).matrix()
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)


def test_one_member_alone_keeps_its_ranking(files: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out.txt"
    run(["--clip_score", files["a"], "--output_file", str(out), "--top_k", "3"])
    best = top_k(load_scores(files["a"]).scores, 3)
    assert out.read_text() == "".join(" ".join(IMAGES[i] for i in row) + "\n" for row in best)


def test_lines_in_the_wanted_order(files: dict[str, str], tmp_path: Path) -> None:
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
        (["--beit3_score", "{flat}"], "rank nothing"),
    ],
)
def test_bad_input(files: dict[str, str], tmp_path: Path, words: list[str], expected: str) -> None:
    files["flat"] = write(tmp_path / "flat.pt", torch.zeros(12, 12), QUERIES, IMAGES)
    out = tmp_path / "out.txt"
    with pytest.raises(InputError, match=expected):
        run([word.format(**files) for word in words] + ["--output_file", str(out)])
    assert not out.exists()


def test_members_of_other_names() -> None:
    assert parse_member("a=b.pt:0.5") == Member("a", "b.pt", 0.5)
    assert parse_member("a=b.pt", {"x": 1.0, "a": 0.25}) == Member("a", "b.pt", 0.25)
    assert parse_member("a=C:/d.pt:0.5") == Member("a", "C:/d.pt", 0.5)


# ---------------------------------------------------------------------------------------- search


@pytest.fixture
def annotation(tmp_path: Path) -> Path:
    rows = [
        {"image": f"train/{n}.jpg", "image_id": IMAGES[n], "caption": [f"number {n}"]}
        for n in range(12)
    ]
    path = tmp_path / "annotation/val.json"
    write_lines(path, rows)
    return path


def labelled(tmp_path: Path) -> dict[str, str]:
    """Members whose query ids are those of the annotation."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: write(
            tmp_path / f"{name}.pt", torch.eye(12) * 0.6 + torch.rand(12, 12, generator=generator),
            [f"{image}#0" for image in IMAGES], IMAGES,
        )
        for name in ("a", "b", "c")
    }  # fmt: skip


def test_search_finds_the_best_of_the_grid(annotation: Path, tmp_path: Path) -> None:
    paths = labelled(tmp_path)
    trials, out = tmp_path / "trials.csv", tmp_path / "weights.yaml"
    words = [
        "--beit3_score",
        paths["a"],
        "--uit_score",
        paths["b"],
        "--member",
        f"x={paths['c']}:1",
    ]
    search([*words, "--annotation", str(annotation), "--grid_step", "0.05"]
           + ["--trials", str(trials), "--out", str(out)])  # fmt: skip
    rows = list(csv.DictReader(trials.open()))
    assert [row["member"] for row in rows] == ["lhp"] + ["uit"] * 21 + ["x"] * 21
    chosen = load_config(RunConfig, out, {})
    assert chosen.chosen_on == str(annotation)
    assert not chosen.chosen_on_test
    best = {}
    for name in ("uit", "x"):
        of_member = [row for row in rows if row["member"] == name]
        best[name] = max(of_member, key=lambda r: (float(r["R@1"]), float(r["mAP"])))
    assert chosen.beit3_weight == float(best["uit"]["weight"])
    assert chosen.member_weights == (f"x:{best['x']['weight']}",)
    # What the run makes of those weights is what the search saw.
    fused = tmp_path / "fused.pt"
    run(["--config", str(out), *words[:4], "--member", f"x={paths['c']}"]
        + ["--output_file", str(tmp_path / "o.txt"), "--save_score", str(fused)])  # fmt: skip
    relevant = {f"{image}#0": frozenset({image}) for image in IMAGES}
    mean = evaluate_scores(load_scores(fused), relevant).mean()
    assert mean["R@1"] == pytest.approx(float(best["x"]["R@1"]), abs=1e-3)
    assert float(best["x"]["R@1"]) >= float(best["uit"]["R@1"]) >= float(rows[0]["R@1"])


def test_a_test_set_is_refused(annotation: Path, tmp_path: Path) -> None:
    paths = labelled(tmp_path)
    path = tmp_path / "annotation/test/pair.json"
    path.parent.mkdir()
    annotation.rename(path)
    words = ["--beit3_score", paths["a"], "--uit_score", paths["b"], "--annotation", str(path)]
    words += ["--trials", str(tmp_path / "t.csv"), "--out", str(tmp_path / "w.yaml")]
    with pytest.raises(InputError, match="--allow_test"):
        search(words)
    assert not (tmp_path / "w.yaml").exists()
    search([*words, "--allow_test"])
    assert load_config(RunConfig, tmp_path / "w.yaml", {}).chosen_on_test


def test_a_test_set_is_one_however_its_path_is_spelt(
    annotation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = labelled(tmp_path)
    folder = tmp_path / "annotation/test"
    folder.mkdir()
    annotation.rename(folder / "pair.json")
    words = ["--beit3_score", str(Path(paths["a"]).absolute())]
    words += ["--uit_score", str(Path(paths["b"]).absolute()), "--image_folder", str(tmp_path)]
    monkeypatch.chdir(folder)
    with pytest.raises(InputError, match="--allow_test"):
        search([*words, "--annotation", "pair.json"])
    (folder / "pair.json").rename(tmp_path / "a1b2.json")
    (folder / "pair.json").symlink_to(tmp_path / "a1b2.json")
    with pytest.raises(InputError, match="--allow_test"):
        search([*words, "--annotation", str(folder / "pair.json")])


def test_a_validation_split_in_a_folder_called_test(annotation: Path, tmp_path: Path) -> None:
    paths = labelled(tmp_path)
    path = tmp_path / "output/test/lhp/val_pairs.json"
    path.parent.mkdir(parents=True)
    annotation.rename(path)
    words = ["--beit3_score", paths["a"], "--uit_score", paths["b"], "--annotation", str(path)]
    words += ["--image_folder", str(tmp_path), "--out", str(tmp_path / "w.yaml")]
    search([*words, "--trials", str(tmp_path / "t.csv")])
    assert not load_config(RunConfig, tmp_path / "w.yaml", {}).chosen_on_test


def test_members_of_other_captions_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, told in (("bare", None), ("a", "1"), ("b", "2"), ("c", "1")):
        scores = torch.rand(2, 3, generator=torch.Generator().manual_seed(len(name)))
        save_scores(
            tmp_path / f"{name}.pt",
            ScoreFile(scores, ["q1", "q2"], ["x", "y", "z"], {"data_sha256": told}),
        )
    names = {"beit3": "bare", "uit": "a", "clip": "b"}  # one that says nothing comes first
    words = [f"--{member}_score={tmp_path / name}.pt" for member, name in names.items()]
    run([*words, "--output_file", str(tmp_path / "o.txt"), "--top_k", "2"])
    warned = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warned) == 1
    assert "b.pt was made from other data than" in warned[0]
    words[2] = f"--clip_score={tmp_path / 'c'}.pt"
    run([*words, "--output_file", str(tmp_path / "o.txt"), "--top_k", "2"])
    assert "warning" not in capsys.readouterr().err


def test_test_images_are_a_test_set_under_any_name(annotation: Path, tmp_path: Path) -> None:
    paths = labelled(tmp_path)
    annotation.write_text(annotation.read_text().replace("train/", "test/"))
    words = ["--beit3_score", paths["a"], "--uit_score", paths["b"]]
    with pytest.raises(InputError, match="--allow_test"):
        search([*words, "--annotation", str(annotation)])


@pytest.mark.parametrize(("step", "count"), [(0.5, 3), (0.0125, 81), (0.3, 5), (1.0, 2)])
def test_grids_reach_both_ends(step: float, count: int) -> None:
    weights = grid(step)
    assert len(weights) == count
    assert weights == sorted(weights, reverse=True)
    assert (weights[0], weights[-1]) == (1.0, 0.0)


# ------------------------------------------------------------------- other scales, rules, lists


def fused(tmp_path: Path, *words: str, name: str = "fused") -> ScoreFile:
    """Run `ensemble.run` with these flags; return its score file."""
    out = tmp_path / f"{name}.pt"
    run([*words, "--save_score", str(out), "--output_file", str(tmp_path / f"{name}.txt")])
    return load_scores(out)


def unit(x: Tensor) -> Tensor:
    return (x - x.min()) / (x.max() - x.min())


@pytest.mark.parametrize("scaling", ["minmax_query", "zscore", "rank"])
def test_scales_by_row(files: dict[str, str], tmp_path: Path, scaling: str) -> None:
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


def test_one_sum_is_the_iterative_fusion_with_its_shares(
    files: dict[str, str], tmp_path: Path
) -> None:
    words = ["--beit3_score", files["a"], "--uit_score", files["b"], "--clip_score", files["c"]]
    keeps = ["--beit3_weight", "0.8", "--clip_weight", "0.5"]
    shares = shares_from_weights([0.8, 0.5])
    assert shares == pytest.approx([0.4, 0.1, 0.5])
    assert kept_weights(shares) == pytest.approx([0.8, 0.5])
    given = [f"{name}:{s}" for name, s in zip(("lhp", "uit", "clip"), shares, strict=True)]
    one = fused(tmp_path, *words, *keeps, name="one").scores
    two = fused(tmp_path, *words, "--fusion", "sum", "--shares", *given, name="two").scores
    torch.testing.assert_close(one, two, atol=1e-6, rtol=0)


def test_shares_of_nothing_first() -> None:
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

    # Lines and rows in another order: the same answer.
    mixed = list(range(12))
    random.Random(0).shuffle(mixed)
    lines = (tmp_path / "b.txt").read_text().splitlines()
    (tmp_path / "b.txt").write_text("".join(lines[i] + "\n" for i in mixed))
    order.write_text("".join(QUERIES[i] + "\n" for i in mixed))
    again = fused(tmp_path, *words, "--query_order", str(order), name="again")
    assert torch.equal(again.scores, found)
    text = (tmp_path / "fused.txt").read_text().splitlines()
    assert (tmp_path / "again.txt").read_text().splitlines() == [text[i] for i in mixed]


def test_lists_alone_go_by_their_lines(tmp_path: Path) -> None:
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
    # What neither list names is behind what one of them has first, whatever its name.
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


def test_what_members_were_is_not_forgotten(files: dict[str, str], tmp_path: Path) -> None:
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
        (["i00 i01"] * 11, "a line for each of 12 queries, found 11"),
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
def test_decodings_say_what_they_are(
    files: dict[str, str],
    tmp_path: Path,
    words: list[str],
    joint: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["--beit3_score", files["a"], "--uit_score", files["b"], "--beit3_weight", "0.5"]
    found = fused(tmp_path, *given, "--decode", *(word.format(**files) for word in words))
    said = capsys.readouterr().err
    assert ("joint over all queries" in said) is joint
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
        (["--decode_bank", "{b}"], "--decode_bank"),
        (["--decode_slack", "-1"], "--decode_slack"),
        (["--decode_factor", "0"], "--decode_factor"),
        (["--sinkhorn_steps", "0"], "--sinkhorn_steps"),
        (["--rank_k", "-1"], "--rank_k"),
        (["--shares", "lhp:1"], "--shares"),
        (["--fusion", "sum"], "every member, found none for lhp"),
        (["--fusion", "sum", "--shares", "lhp:0.5", "uit:0.6"], "add up to 1, found 1.1"),
        (["--fusion", "sum", "--shares", "lhp:0.5", "uit:0.5", "x:0"], "x, which is no member"),
        (["--fusion", "sum", "--shares", "lhp:much", "uit:0.5"], "'much'"),
        (["--scaling", "zscore", "--decode", "dual_softmax"], "--scaling: zscore"),
        (["--decode_slack", "0.1"], "--decode_slack: does not go with --decode none"),
        (["--fusion", "sum", "--shares", "lhp:1", "lhp:0.5", "uit:0.5"], "found 'lhp' twice"),
        (["--fusion", "sum", "--shares", "lhp", "uit:0.5"], "expected NAME:NUMBER, found 'lhp'"),
        (["--member", "x={c}:0.5", "--member_weights", "x:0.7"], "given here and by"),
        (["--member", "x={c}", "--member_weights", "x:0.7", "x:0.6"], "found 'x' twice"),
    ],
)
def test_more_bad_input(
    files: dict[str, str], tmp_path: Path, words: list[str], expected: str
) -> None:
    given = ["--beit3_score", files["a"], "--uit_score", files["b"]]
    with pytest.raises(InputError, match=expected):
        fused(tmp_path, *given, *(word.format(**files) for word in words))
    assert not (tmp_path / "fused.txt").exists()


# ------------------------------------------------------------------------ rows that rank nothing


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
    said = capsys.readouterr().err
    assert said.count("note:") == 1
    assert f"{flat}: 1 query has the same score for all images: nothing is added" in said
    row = known.query_ids.index("q3")
    assert torch.equal(top_k(found.scores, 12)[row], top_k(scores, 12)[row])
    low, high = float(found.scores[row].min()), float(found.scores[row].max())
    assert low < high
    # The same list without a matrix to save, and the other queries do look at both members.
    alone = fused(tmp_path, "--beit3_score", other, name="alone")
    run([*words, *how, "--clip_weight", "0.5", "--output_file", str(tmp_path / "list.txt")])
    assert (tmp_path / "list.txt").read_text() == (tmp_path / "fused.txt").read_text()
    assert not torch.equal(top_k(found.scores, 12), top_k(alone.scores, 12))


@pytest.mark.parametrize("how", FUSIONS)
def test_a_member_that_ranks_nothing_at_all_is_refused(
    files: dict[str, str], tmp_path: Path, how: list[str]
) -> None:
    rows = torch.arange(12.0)[:, None].expand(12, 12)  # not one value, but one value per query
    flat = write(tmp_path / "flat.pt", rows, QUERIES, IMAGES)
    with pytest.raises(InputError, match=r"flat\.pt: all images have the same score"):
        fused(tmp_path, "--beit3_score", files["a"], "--clip_score", flat, *how)
    assert not (tmp_path / "fused.txt").exists()


def test_deviations_that_are_rounding_are_no_scale(tmp_path: Path) -> None:
    scores = torch.rand(3, 1000, generator=torch.Generator().manual_seed(0))
    other = scores.clone()
    scores[1] = 0.1  # whose mean is not 0.1 in float32
    ids = [f"q{n}" for n in range(3)], [f"g{n:04d}" for n in range(1000)]
    one, two = write(tmp_path / "1.pt", scores, *ids), write(tmp_path / "2.pt", other, *ids)
    found = fused(tmp_path, "--beit3_score", one, "--clip_score", two, "--scaling", "zscore")
    assert torch.equal(top_k(found.scores, 1000)[1], top_k(other, 1000)[1])


def test_one_image_is_no_row_of_equal_scores(tmp_path: Path) -> None:
    one = write(tmp_path / "one.pt", torch.tensor([[0.1], [0.7]]), ["q0", "q1"], ["a"])
    for how in ("minmax", "minmax_query", "zscore", "rank"):
        fused(tmp_path, "--beit3_score", one, "--clip_score", one, "--scaling", how)
        assert (tmp_path / "fused.txt").read_text() == "a\na\n"


# ---------------------------------------------------------------------------------------- weights


def test_weights_that_have_no_part_need_not_be_given(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = ["--member", f"x={files['a']}", "--member", f"y={files['b']}:0.5"]
    found = fused(tmp_path, *first).scores
    given = fused(tmp_path, "--beit3_score", files["a"], "--member", f"y={files['b']}:0.5").scores
    assert torch.equal(found, given)
    assert "note:" not in capsys.readouterr().err
    fused(tmp_path, *first, "--fusion", "reciprocal_rank", "--scaling", "rank")
    said = capsys.readouterr().err
    assert "note: --member: weights have no effect with --fusion reciprocal_rank" in said
    assert "note: --scaling: has no effect with --fusion reciprocal_rank" in said
    fused(tmp_path, *first, "--member_weights", "z:0.5")
    assert "no --member has the name 'z': not used" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_leaves_no_other(
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
        InputError, match=rf"huge.pt: its scores, .* overflow at --scaling {scaling}"
    ):
        run([*words, "--output_file", str(out)])
    assert not out.exists()


@pytest.mark.parametrize("flag", ["--output_file", "--save_score"])
def test_no_output_replaces_an_input(files: dict[str, str], tmp_path: Path, flag: str) -> None:
    before = Path(files["a"]).read_bytes()
    (tmp_path / "link.pt").symlink_to(files["a"])
    for path in (files["a"], str(tmp_path / "link.pt")):
        with pytest.raises(InputError, match="is the file of lhp: it would be overwritten"):
            run(["--beit3_score", files["a"], "--clip_score", files["b"], flag, path])
    assert Path(files["a"]).read_bytes() == before


@pytest.mark.parametrize("flag", ["--out", "--trials"])
@pytest.mark.parametrize("what", ["lhp", "annotation", "decode_bank"])
def test_a_search_replaces_no_input(annotation: Path, tmp_path: Path, flag: str, what: str) -> None:
    paths = labelled(tmp_path)
    files = {"lhp": paths["a"], "annotation": str(annotation), "decode_bank": paths["c"]}
    words = [
        "--beit3_score",
        paths["a"],
        "--uit_score",
        paths["b"],
        "--annotation",
        files["annotation"],
    ]
    words += ["--decode", "querybank", "--decode_bank", paths["c"], "--folds", "0"]
    words += ["--out", str(tmp_path / "w.yaml"), "--trials", str(tmp_path / "t.csv")]
    before = Path(files[what]).read_bytes()
    with pytest.raises(
        InputError, match=f"{flag}: .* is the file of {what}: it would be overwritten"
    ):
        search([*words, flag, files[what]])
    assert Path(files[what]).read_bytes() == before


def test_a_search_names_the_file_that_lacks_images(annotation: Path, tmp_path: Path) -> None:
    few = {
        name: write(
            tmp_path / f"few_{name}.pt", torch.rand(12, 11),
            [f"{image}#0" for image in IMAGES], IMAGES[:11],
        )
        for name in ("a", "b")
    }  # fmt: skip
    words = ["--beit3_score", few["a"], "--uit_score", few["b"], "--annotation", str(annotation)]
    words += ["--out", str(tmp_path / "w.yaml"), "--trials", str(tmp_path / "t.csv")]
    with pytest.raises(InputError, match="i11") as caught:
        search(words)
    assert str(caught.value).startswith(few["a"])


def test_sinkhorn_says_if_it_has_not_converged(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--beit3_score", files["a"], "--decode", "sinkhorn"]
    facts = fused(tmp_path, *words, "--sinkhorn_steps", "1", "--decode_factor", "100").meta[
        "decode"
    ]
    said = capsys.readouterr().err
    assert "note: --decode sinkhorn: has not converged after 1 steps at factor 100" in said
    assert facts["row_error"] > 1e-3
    assert f"{facts['row_error']:.2g} in rows and {facts['column_error']:.2g} in columns" in said
    facts = fused(tmp_path, *words, "--sinkhorn_steps", "500", "--decode_factor", "5").meta[
        "decode"
    ]
    assert "note:" not in capsys.readouterr().err
    assert max(facts["row_error"], facts["column_error"]) <= 1e-3


def test_a_bank_whose_scores_overflow_is_refused(files: dict[str, str], tmp_path: Path) -> None:
    bank = write(tmp_path / "bank.pt", torch.rand(12, 12) * 1e38, QUERIES, IMAGES)
    words = ["--beit3_score", files["a"], "--decode", "querybank", "--decode_bank", bank]
    with pytest.raises(InputError, match="overflow at --decode_factor 20; take a smaller factor"):
        fused(tmp_path, *words)
    assert not (tmp_path / "fused.txt").exists()


# ------------------------------------------------------------------------- other ways to search


@pytest.mark.parametrize(
    "flags",
    [
        ["--method", "steps"],
        ["--order", "greedy", "--scaling", "rank"],
        ["--method", "simplex", "--scaling", "zscore"],
        ["--decode", "margin"],
        ["--decode", "assignment", "--decode_top", "2", "--decode_scope", "collisions"],
        ["--decode", "sinkhorn", "--scaling", "minmax_query", "--decode_grid", "5", "20"],
    ],
)
def test_what_the_search_writes_runs_as_it_stands(
    annotation: Path, tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    paths = labelled(tmp_path)
    # No weights, and a --member with the name of a published one.
    words = ["--uit_score", paths["a"], "--member", f"clip={paths['b']}", f"other={paths['c']}"]
    out, made = tmp_path / "w.yaml", ["--annotation", str(annotation), "--grid_step", "0.1"]
    search([*words, *made, *flags, "--folds", "0", "--out", str(out)]
           + ["--trials", str(tmp_path / "t.csv")])  # fmt: skip
    said = capsys.readouterr().out
    shares = re.search(r"shares of the sum: uit (\S+), clip (\S+), other (\S+)\n", said)
    assert shares is not None
    assert sum(map(float, shares.groups())) == pytest.approx(1.0, abs=1e-3)
    found = fused(tmp_path, "--config", str(out))
    assert [member["name"] for member in found.meta["members"]] == ["uit", "clip", "other"]
    relevant = {f"{image}#0": frozenset({image}) for image in IMAGES}
    mean = evaluate_scores(found, relevant).mean()
    told = re.findall(r"R@1 (\d+\.\d\d), mAP (\d+\.\d\d)", said)[-1]
    assert told == (f"{mean['R@1']:.2f}", f"{mean['mAP']:.2f}")


def test_a_grid_that_does_not_divide_one_is_told(
    annotation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    searched(annotation, tmp_path, "--method", "simplex", "--grid_step", "0.3", "--folds", "0")
    assert "--grid_step: 0.3 does not divide 1: shares in steps of 1/3" in capsys.readouterr().err


def test_a_list_in_a_search_on_ranks(annotation: Path, tmp_path: Path) -> None:
    paths = labelled(tmp_path)
    lines = [" ".join(IMAGES[(n + shift) % 12] for shift in range(3)) for n in range(12)]
    (tmp_path / "list.txt").write_text("\n".join(lines) + "\n")
    out = tmp_path / "w.yaml"
    words = ["--beit3_score", paths["a"], "--clip_score", str(tmp_path / "list.txt")]
    search([*words, "--scaling", "rank", "--annotation", str(annotation), "--folds", "0"]
           + ["--out", str(out), "--trials", str(tmp_path / "t.csv")])  # fmt: skip
    found = fused(tmp_path, "--config", str(out))  # as it stands: it names the lines' order
    assert evaluate_scores(found, {f"{image}#0": frozenset({image}) for image in IMAGES}).mean()[
        "R@1"
    ] == pytest.approx(100.0)


def searched(
    annotation: Path, tmp_path: Path, *flags: str
) -> tuple[RunConfig, list[dict[str, str]]]:
    """The written weights and the trials of a search over three members."""
    paths = labelled(tmp_path)
    trials, out = tmp_path / "trials.csv", tmp_path / "weights.yaml"
    words = ["--beit3_score", paths["a"], "--uit_score", paths["b"], "--clip_score", paths["c"]]
    search([*words, "--annotation", str(annotation), "--trials", str(trials), "--out", str(out)]
           + list(flags))  # fmt: skip
    return load_config(RunConfig, out, {}), list(csv.DictReader(trials.open()))


def figures(tmp_path: Path, config: RunConfig) -> dict[str, float]:
    """Metrics of what `ensemble.run` makes of written weights."""
    words = [f"--{name}" for name in ("beit3_score", "uit_score", "clip_score")]
    given = [w for n, f in zip(words, "abc", strict=True) for w in (n, str(tmp_path / f"{f}.pt"))]
    found = fused(tmp_path, *given, "--config", str(tmp_path / "weights.yaml"))
    assert config.chosen_on is not None
    relevant = {f"{image}#0": frozenset({image}) for image in IMAGES}
    return evaluate_scores(found, relevant).mean()


def test_greedy_order_starts_with_the_best(annotation: Path, tmp_path: Path) -> None:
    config, rows = searched(annotation, tmp_path, "--order", "greedy", "--grid_step", "0.1")
    assert [row["member"] for row in rows[:3]] == ["lhp", "uit", "clip"]
    assert len(rows) == 3 + 2 * 11 + 11
    best = max(rows, key=lambda row: (float(row["R@1"]), float(row["mAP"])))
    mean = figures(tmp_path, config)
    assert mean["R@1"] == pytest.approx(float(best["R@1"]), abs=1e-3)
    assert mean["mAP"] == pytest.approx(float(best["mAP"]), abs=1e-3)


def test_the_simplex_holds_every_share(annotation: Path, tmp_path: Path) -> None:
    config, rows = searched(annotation, tmp_path, "--method", "simplex", "--grid_step", "0.1")
    assert len(rows) == 66  # of three members in tenths
    assert rows[0]["member"] == "lhp:1 uit:0 clip:0"
    best = max(rows, key=lambda row: (float(row["R@1"]), float(row["mAP"])))
    mean = figures(tmp_path, config)
    assert mean["R@1"] == pytest.approx(float(best["R@1"]), abs=1e-3)
    with pytest.raises(InputError, match="are 501501 trials"):
        searched(annotation, tmp_path, "--method", "simplex", "--grid_step", "0.001")


def test_folds_tell_what_the_search_overfits(
    annotation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    searched(annotation, tmp_path, "--folds", "4", "--grid_step", "0.1")
    said = capsys.readouterr().out
    assert "weights chosen on the other folds (4): R@1 " in said
    inside = float(said.split("+ clip")[1].split("R@1 ")[1].split(",")[0])
    outside = float(said.split("folds (4): R@1 ")[1].split(",")[0])
    assert f"overfits by {inside - outside:+.2f}" in said
    assert outside <= inside + 1e-6


def test_a_later_keep_of_nothing_forgets_no_weight(annotation: Path, tmp_path: Path) -> None:
    paths = labelled(tmp_path)
    perfect = torch.eye(12)
    write(tmp_path / "c.pt", perfect, [f"{image}#0" for image in IMAGES], IMAGES)
    words = ["--beit3_score", paths["a"], "--uit_score", paths["b"], "--clip_score", paths["c"]]
    flags = ["--grid_step", "0.5", "--trials", str(tmp_path / "t.csv"), "--folds", "0"]
    search([*words, "--annotation", str(annotation), *flags, "--out", str(tmp_path / "w.yaml")])
    rows = list(csv.DictReader((tmp_path / "t.csv").open()))
    uit = [row for row in rows if row["member"] == "uit"]
    best = max(uit, key=lambda row: (float(row["R@1"]), float(row["mAP"])))
    assert load_config(RunConfig, tmp_path / "w.yaml", {}).beit3_weight == float(best["weight"])


def test_a_search_over_lists_alone(annotation: Path, tmp_path: Path) -> None:
    for name, shift in (("a", 0), ("b", 1)):
        lines = [f"{IMAGES[(n + shift * (n % 2)) % 12]} {IMAGES[(n + 5) % 12]}" for n in range(12)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines[:11] + ["i00 i01"]) + "\n")
    words = ["--beit3_score", str(tmp_path / "a.txt"), "--uit_score", str(tmp_path / "b.txt")]
    (tmp_path / "train").mkdir()
    out = ["--trials", str(tmp_path / "t.csv"), "--out", str(tmp_path / "w.yaml"), "--folds", "0"]
    search([*words, "--annotation", str(annotation), *out])  # no list names i11
    assert (tmp_path / "w.yaml").exists()


def test_a_copied_test_set_is_one_by_its_key(annotation: Path, tmp_path: Path) -> None:
    paths = labelled(tmp_path)
    query, key = tmp_path / "val.json", tmp_path / "name-masked_test-set/answers.json"
    ids = [f"{image}#0" for image in IMAGES]
    write_lines(query, [{"query_index": one, "caption": "x"} for one in ids])
    key.parent.mkdir()
    found = {one: {"gallery": one[:3], "normal": "walking"} for one in ids}
    key.write_text(json.dumps(found))
    words = ["--beit3_score", paths["a"], "--uit_score", paths["b"], "--annotation", str(query)]
    with pytest.raises(InputError, match="--allow_test"):
        search([*words, "--answers", str(key)])


@pytest.mark.parametrize(
    ("decode", "name"), [("assignment", "decode_slack"), ("sinkhorn", "decode_factor")]
)
def test_the_number_of_a_decoding_is_chosen_too(
    annotation: Path, tmp_path: Path, decode: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--decode", decode, "--decode_grid", "0.01", "0.3", "--grid_step", "0.1"]
    config, _ = searched(annotation, tmp_path, *flags, "--folds", "0", "--sinkhorn_steps", "7")
    assert config.decode == (decode,)
    assert getattr(config, name) in (0.01, 0.3)
    said = capsys.readouterr().out.split(f"decoded by {decode}, {name} {getattr(config, name):g}: ")
    assert config.sinkhorn_steps == (7 if decode == "sinkhorn" else 50)
    mean = figures(tmp_path, config)
    assert said[1].startswith(f"R@1 {mean['R@1']:.2f}, mAP {mean['mAP']:.2f}")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--folds", "1"], "--folds"),
        (["--decode_grid", "0.1"], "--decode_grid"),
        (["--decode", "assignment", "--decode_grid", "-0.5"], "cannot be -0.5 for assignment"),
        (["--decode", "sinkhorn", "--decode_grid", "0"], "cannot be 0 for sinkhorn"),
        (["--decode", "assignment", "--decode_slack", "0.1"], "set --decode_grid"),
        (["--decode", "margin", "sinkhorn"], "expected one decoding to search, found 2"),
        (["--decode", "sinkhorn", "--decode_grid", "1e30"], "cannot be 1e\\+30 for sinkhorn"),
        (["--method", "simplex", "--order", "greedy"], "--order"),
        (["--fusion", "reciprocal_rank"], "--fusion"),
        (["--chosen_on", "x"], "--chosen_on"),
    ],
)
def test_searches_that_make_no_sense(
    annotation: Path, tmp_path: Path, flags: list[str], expected: str
) -> None:
    with pytest.raises(InputError, match=expected):
        searched(annotation, tmp_path, *flags)
    assert not (tmp_path / "weights.yaml").exists()


# ------------------------------------------------------------------------------- the best columns


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_the_best_columns_are_those_of_the_whole_matrix(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 4), "members")
    queries, images = data.draw(st.integers(1, 5), "Q"), data.draw(st.integers(2, 70), "G")
    k = data.draw(st.integers(1, 12), "k")
    levels = data.draw(st.sampled_from([2, 5, 1000]), "levels")  # few levels: full of ties
    offset = data.draw(st.sampled_from([0.0, -3.0, 1e4]), "offset")  # large: sums lose digits
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10_000), "seed"))
    files, members = [], []
    for number in range(count):
        scores = torch.randint(0, levels, (queries, images), generator=generator) / levels + offset
        scores[0, 0], scores[-1, -1] = offset - 1.0, offset + 2.0  # no constant matrix
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
