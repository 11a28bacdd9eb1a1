"""Fusion of runs and ranked lists that contain only some images per query."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from ensemble.listed import ranked_file
from ensemble.run import main as run
from ensemble.search import main as search
from pab.data.annotations import read_retrieval
from pab.evaluate import evaluate
from pab.scores import load_scores
from tests.fusion import IMAGES, annotation_file, fused, write

QUERIES = [f"{image}#0" for image in IMAGES]


def run_file(path: Path, seed: int, listed: int = 4) -> str:
    """Write a ranx run with a few images per query; the right image is one of them for a third."""
    drawn, lines = random.Random(seed), {}
    for number, query in enumerate(QUERIES):
        names = drawn.sample([name for name in IMAGES if name != IMAGES[number]], listed)
        if number % 3 == 0:
            names[drawn.randrange(listed)] = IMAGES[number]
        # Scores of very different sizes, so that scaling rounds the smallest step away.
        lines[query] = {
            name: 10.0**number + n * 10.0 ** (number - 3) for n, name in enumerate(names)
        }
    path.write_text(json.dumps(lines))
    return str(path)


@pytest.fixture
def annotation(tmp_path: Path) -> Path:
    return annotation_file(tmp_path)


def test_a_fusion_of_one_run_has_the_metrics_of_the_run(
    annotation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_file(tmp_path / "run.json", 0)
    retrieval = read_retrieval(annotation)
    alone = evaluate(load_scores(path), retrieval)
    flags = ["--beit3_score", path, "--annotation", str(annotation), "--ladder"]
    found = fused(tmp_path, *flags)
    said = capsys.readouterr()
    assert alone.table() in said.out
    assert "12 queries list fewer than 10 images: their lines are filled" in said.err
    assert f"fused  {alone.summary()['R@1']:.2f}" in said.out
    assert found.listed == dict.fromkeys(QUERIES, 4)
    assert evaluate(found, retrieval).summary() == alone.summary()
    ranked = [line.split() for line in (tmp_path / "fused.txt").read_text().splitlines()]
    best = json.loads(Path(path).read_text())
    assert [set(line[:4]) for line in ranked] == [set(best[query]) for query in QUERIES]
    run(["--beit3_score", path, "--output_file", str(tmp_path / "bare.txt")]
        + ["--gallery", str(gallery_file(tmp_path))])  # fmt: skip
    assert (tmp_path / "bare.txt").read_text() == (tmp_path / "fused.txt").read_text()


def gallery_file(tmp_path: Path) -> Path:
    path = tmp_path / "gallery.txt"
    path.write_text("".join(f"{image}\n" for image in IMAGES))
    return path


@pytest.mark.parametrize("rule", ["iterative", "reciprocal_rank"])
def test_an_image_is_listed_if_a_member_lists_it(
    annotation: Path, tmp_path: Path, rule: str
) -> None:
    paths = [run_file(tmp_path / f"{seed}.json", seed) for seed in (1, 2)]
    words = ["--beit3_score", paths[0], "--uit_score", paths[1], "--fusion", rule]
    words += ["--annotation", str(annotation)]
    found = fused(tmp_path, *words)
    first, second = (json.loads(Path(path).read_text()) for path in paths)
    unions = {query: first[query].keys() | second[query].keys() for query in QUERIES}
    assert found.listed == {query: len(names) for query, names in unions.items()}
    for row, query in enumerate(QUERIES):
        best = found.scores[row].argsort(descending=True, stable=True)[: len(unions[query])]
        assert {IMAGES[column] for column in best.tolist()} == unions[query]
    whole = write(tmp_path / "whole.pt", torch.rand(12, 12), QUERIES, IMAGES)
    assert fused(tmp_path, *words, "--clip_score", whole).listed is None


def test_a_search_counts_unlisted_images_as_not_found(
    annotation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [run_file(tmp_path / f"{seed}.json", seed) for seed in (1, 2)]
    words = ["--beit3_score", paths[0], "--uit_score", paths[1], "--annotation", str(annotation)]
    search([*words, "--grid_step", "0.25", "--out", str(tmp_path / "w.yaml")]
           + ["--decode", "dual_softmax", "--folds", "3"]
           + ["--trials", str(tmp_path / "t.csv")])  # fmt: skip
    said = capsys.readouterr().out
    retrieval = read_retrieval(annotation)
    alone = evaluate(load_scores(paths[0]), retrieval).summary()
    assert f"lhp: R@1 {alone['R@1']:.2f}, mAP {alone['mAP']:.2f}" in said
    chosen = fused(tmp_path, "--config", str(tmp_path / "w.yaml"), *words[4:])
    mean = evaluate(chosen, retrieval).summary()
    assert mean["R@10"] < 100.0
    decoded = next(line for line in said.splitlines() if line.startswith("decoded by"))
    assert f"R@1 {mean['R@1']:.2f}, mAP {mean['mAP']:.2f};" in decoded


def test_images_that_a_reranker_scored_are_listed(annotation: Path, tmp_path: Path) -> None:
    path = run_file(tmp_path / "run.json", 3)
    reranker = write(tmp_path / "r.pt", torch.eye(12), QUERIES, IMAGES)
    words = ["--beit3_score", path, "--rerank", f"vlm={reranker}", "--rerank_prior", "0"]
    words += ["--annotation", str(annotation), "--rerank_depth", "12"]
    found = fused(tmp_path, *words)
    assert found.listed == dict.fromkeys(QUERIES, 12)
    assert evaluate(found, read_retrieval(annotation)).summary()["R@1"] == 100.0


def test_unlisted_images_rank_last() -> None:
    scores = torch.tensor([[0.5, 0.5, 0.9, 0.1]])
    listed = torch.tensor([[False, True, True, False]])
    found = ranked_file(scores, ["q"], list("abcd"), listed)
    assert found.scores.argsort(descending=True, stable=True).tolist() == [[2, 1, 0, 3]]
    assert found.listed == {"q": 2}
    assert found.scores[0, 3] == scores[0, 3]
