"""Choice of reranking and decodings on validation scores: brute force, folds, written config."""

from __future__ import annotations

import csv
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ensemble.chain import stages
from ensemble.decode import DecodeSettings
from ensemble.rerank_prior import Reranking
from ensemble.run import RunConfig
from ensemble.search import main as search
from pab.core.config import load_config
from pab.core.errors import InputError
from pab.metrics import Metrics, evaluate_scores, paired_bootstrap
from pab.scores import ScoreFile, load_scores, save_scores
from tests.conftest import write_lines
from tests.fusion import fused, write

COUNT = 40
IMAGES = [f"i{n:02d}" for n in range(COUNT)]
QUERIES = [f"{image}#0" for image in IMAGES]
RELEVANT = {query: frozenset({query[:3]}) for query in QUERIES}
PRIORS, DEPTHS = (0.0, 0.3, 1.0), (3, 8)
TAUS, SLACKS = (0.0, 0.4, 2.0), (0.0, 0.5, 1.5)
GRIDS = [
    *("--prior_grid", *map(str, PRIORS), "--depth_grid", *map(str, DEPTHS)),
    *("--tau_grid", *map(str, TAUS), "--slack_grid", *map(str, SLACKS)),
]
CHAIN = ["--decode", "margin", "assignment", "--decode_top", "2", "--decode_scope", "collisions"]


def matrix(strength: float, seed: int) -> Tensor:
    """Return uniform noise, plus ``strength`` for each query's own image."""
    noise = torch.rand(COUNT, COUNT, generator=torch.Generator().manual_seed(seed))
    return torch.eye(COUNT) * strength + noise


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Return the flags of a search with one member, a reranker, and labels."""
    paths = {
        name: write(tmp_path / f"{name}.pt", scores, QUERIES, IMAGES)
        for name, scores in (("a", matrix(0.7, 1)), ("r", 4.0 * matrix(0.5, 2)))
    }
    annotation = tmp_path / "annotation/val.json"
    write_lines(
        annotation,
        [{"image": f"train/{n}.jpg", "image_id": i, "caption": [i]} for n, i in enumerate(IMAGES)],
    )
    return [
        *("--member", f"a={paths['a']}", "--rerank", f"vlm={paths['r']}"),
        *("--annotation", str(annotation)),
        *("--out", str(tmp_path / "w.yaml"), "--trials", str(tmp_path / "t.csv")),
    ]


def judged(scores: Tensor) -> Metrics:
    return evaluate_scores(ScoreFile(scores, QUERIES, IMAGES), RELEVANT)


def made(depth: int, prior: float, *decodings: DecodeSettings) -> Metrics:
    """Run a chain with these parameters, as `ensemble.run` does, and evaluate its result."""
    member = matrix(0.7, 1)
    member = (member - member.min()).div(member.max() - member.min())
    counts = torch.full((COUNT,), COUNT)
    vlm = Reranking("vlm", "", 4.0 * matrix(0.5, 2), counts, depth, prior)
    return judged(list(stages(member, QUERIES, IMAGES, vlm, decodings))[-1].scores)


def chosen_by_brute_force(counted: np.ndarray | None = None) -> tuple[dict[str, float], Metrics]:
    """Return the best parameters, chosen stage by stage, and the metrics of the chain."""

    def key(metrics: Metrics) -> tuple[float, float]:
        mean = metrics.mean(counted)
        return mean["R@1"], mean["mAP"]

    depth, prior = max(itertools.product(DEPTHS, PRIORS), key=lambda both: key(made(*both)))
    tau = max(TAUS, key=lambda tau: key(made(depth, prior, margin(tau))))
    slack = max(SLACKS, key=lambda one: key(made(depth, prior, margin(tau), assigned(one))))
    numbers = {
        "rerank_depth": depth, "rerank_prior": prior, "decode_tau": tau, "decode_slack": slack,
    }  # fmt: skip
    return numbers, made(depth, prior, margin(tau), assigned(slack))


def margin(tau: float) -> DecodeSettings:
    return DecodeSettings("margin", tau=tau)


def assigned(slack: float) -> DecodeSettings:
    return DecodeSettings("assignment", slack=slack, top=2, scope="collisions")


def test_the_choices_are_those_of_brute_force(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search([*words, *CHAIN, *GRIDS, "--folds", "0"])
    expected, metrics = chosen_by_brute_force()
    config = load_config(RunConfig, tmp_path / "w.yaml", {})
    config.check()
    assert {name: getattr(config, name) for name in expected} == expected
    assert (config.decode, config.decode_top) == (("margin", "assignment"), 2)
    # The written file applies the whole chain.
    found = fused(tmp_path, "--config", str(tmp_path / "w.yaml"))
    assert evaluate_scores(found, RELEVANT).mean() == pytest.approx(metrics.mean())
    assert found.meta["rerank"]["depth"] == expected["rerank_depth"]
    # Every stage is printed with its gain over the previous stage.
    said = capsys.readouterr().out.splitlines()
    reranked = made(int(expected["rerank_depth"]), expected["rerank_prior"])
    before = judged(matrix(0.7, 1))
    gain = paired_bootstrap(before.values["R@1"], reranked.values["R@1"])
    (line,) = (line for line in said if line.startswith("reranked by vlm"))
    numbers = f"rerank_depth {expected['rerank_depth']}, rerank_prior {expected['rerank_prior']:g}"
    assert line.startswith(f"reranked by vlm, {numbers}: R@1 {reranked.mean()['R@1']:.2f}, ")
    assert line.endswith(f"gain in R@1 {gain}")
    assert any(line.startswith("decoded by margin, decode_tau ") for line in said)
    assert any(line.startswith("decoded by assignment, decode_slack ") for line in said)
    trials = [row["member"] for row in csv.DictReader((tmp_path / "t.csv").open())]
    assert len(trials) == 1 + len(PRIORS) * len(DEPTHS) + len(TAUS) + len(SLACKS)
    assert trials[1] == "reranked by vlm: rerank_depth 3, rerank_prior 0"


def test_the_estimate_includes_the_choice_of_every_stage(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    search([*words, *CHAIN, *GRIDS, "--folds", "4", "--seed", "5"])
    fold_of = np.random.default_rng(5).permutation(COUNT) % 4
    values = np.zeros(COUNT)
    chosen = []
    for fold in range(4):
        numbers, metrics = chosen_by_brute_force(fold_of != fold)
        chosen.append(tuple(numbers.values()))
        values[fold_of == fold] = metrics.values["R@1"][fold_of == fold]
    assert len(set(chosen)) > 1  # otherwise this test would not notice a choice on all queries
    inside = chosen_by_brute_force()[1].mean()["R@1"]
    said = capsys.readouterr().out
    expected = f"weights and stages chosen on the other folds (4): R@1 {values.mean():.2f}, mAP "
    assert expected in said
    assert f"overfits by {inside - values.mean():+.2f} points of R@1" in said
    table = said.split("R@1 over the previous stage\n")[1].splitlines()
    names = [re.split(r"\s{2,}", line)[0] for line in table]
    assert names == ["fused", "reranked by vlm", "margin", "assignment"]
    assert f" {values.mean():.2f} " in table[-1]


def test_the_default_grids_use_the_unit_of_the_reranker(words: list[str], tmp_path: Path) -> None:
    search([*words, *CHAIN, "--folds", "0"])
    rows = [row["member"] for row in csv.DictReader((tmp_path / "t.csv").open())]
    assert "reranked by vlm: rerank_depth 20, rerank_prior 0.5" in rows
    assert "margin: decode_tau 0.5" in rows
    assert "assignment: decode_slack 1" in rows
    assert "margin: decode_tau 0.002" not in rows
    without = [word for word in words if word != "--rerank" and not word.startswith("vlm=")]
    search([*without, "--decode", "margin", "--folds", "0"])
    rows = [row["member"] for row in csv.DictReader((tmp_path / "t.csv").open())]
    assert "margin: decode_tau 0.002" in rows


def test_a_number_at_the_end_of_its_grid_is_reported(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "r.pt", 4.0 * matrix(0.0, 2), QUERIES, IMAGES)  # worse than the fused order
    flags = ["--depth_grid", "3", "--folds", "0", "--prior_grid"]
    search([*words, *flags, "0", "1", "5"])
    said = capsys.readouterr()
    assert "rerank_prior 5:" in said.out
    assert "--rerank_prior: 5 is the largest value tried: try larger ones" in said.err
    assert "--rerank_depth" not in said.err  # only one depth was tried
    search([*words, *flags, "5", "50"])  # both keep the fused order
    assert "largest value" not in capsys.readouterr().err


def test_images_outside_the_candidates_are_reported_once(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = load_scores(tmp_path / "r.pt", mmap=False)
    best = file.scores.topk(6).indices
    below = file.scores.amin(dim=1, keepdim=True).expand(-1, COUNT) - 1.0
    scores = below.scatter(1, best, file.scores.gather(1, best))
    meta = {"k_test": 6}
    save_scores(tmp_path / "r.pt", ScoreFile(scores, file.query_ids, file.gallery_ids, meta))
    search([*words, "--depth_grid", "10", "20", "--prior_grid", "0"])
    said = [
        line for line in capsys.readouterr().err.splitlines() if "images without a score" in line
    ]
    assert len(said) == 1
    assert "are treated as the worst of their query" in said[0]


def test_only_the_chosen_factor_reports_that_sinkhorn_has_not_converged(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--decode", "sinkhorn", "--sinkhorn_steps", "1", "--factor_grid", "20", "50", "100"]
    search([*words, *flags])
    said = capsys.readouterr()
    reports = [line for line in said.err.splitlines() if "has not converged" in line]
    chosen = re.search(r"decoded by sinkhorn, decode_factor (\d+):", said.out)
    assert chosen is not None
    assert len(reports) == 1
    assert f"after 1 step at factor {chosen[1]}:" in reports[0]


def test_more_queries_than_images_are_decoded_with_a_slack(tmp_path: Path) -> None:
    queries = [f"i{n % 3}#{n // 3}" for n in range(6)]
    scores = torch.rand(6, 3, generator=torch.Generator().manual_seed(0))
    path = write(tmp_path / "a.pt", scores, queries, ["i0", "i1", "i2"])
    annotation = tmp_path / "annotation/val.json"
    write_lines(
        annotation,
        [{"image": f"train/{n}.jpg", "image_id": f"i{n}", "caption": ["a", "b"]} for n in range(3)],
    )
    search(["--member", f"a={path}", "--annotation", str(annotation), "--decode", "assignment"]
           + ["--folds", "0", "--out", str(tmp_path / "w.yaml")]
           + ["--trials", str(tmp_path / "t.csv")])  # fmt: skip
    assert load_config(RunConfig, tmp_path / "w.yaml", {}).decode_slack is not None


def test_a_search_does_not_overwrite_the_reranker(words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "r.pt"
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"--out: .* is the file of --rerank"):
        search([*words, "--out", str(path)])
    assert path.read_bytes() == before


def test_a_member_alone_needs_a_stage(words: list[str]) -> None:
    with pytest.raises(InputError, match="expected at least two members, found 1; pass another"):
        search([word for word in words if word != "--rerank" and not word.startswith("vlm=")])
