"""Number of UIT's candidates: published value, default output files, check before fusion."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ensemble.run import RunConfig
from ensemble.run import main as fuse
from ensemble.search import main as search
from pab.core.config import load_config
from pab.core.errors import InputError
from pab.ranking import write_ranked_list
from pab.scores import ScoreFile, save_scores
from uit.infer import InferConfig

ROOT = Path(__file__).resolve().parents[1]
QUERIES, IMAGES = [f"q{n}" for n in range(4)], [f"i{n:02d}" for n in range(20)]


def score_file(path: Path, meta: dict[str, Any]) -> str:
    scores = torch.rand(len(QUERIES), len(IMAGES), generator=torch.Generator().manual_seed(0))
    save_scores(path, ScoreFile(scores, QUERIES, IMAGES, meta))
    return str(path)


def words(folder: Path, meta: dict[str, Any], *more: str) -> list[str]:
    lhp, uit = score_file(folder / "lhp.pt", {}), score_file(folder / "uit.pt", meta)
    named = ["--beit3_score", lhp, "--uit_score", uit, "--output_file", str(folder / "list.txt")]
    return [*named, *more]


@pytest.mark.parametrize("name", ["infer", "released"])
def test_published_scoring_uses_ten_candidates(name: str) -> None:
    config = load_config(InferConfig, ROOT / f"configs/uit/{name}.yaml", {})
    assert config.k_test == InferConfig().k_test == 10


@pytest.mark.parametrize("name", ["published", "released"])
def test_published_weights_name_their_candidates(name: str) -> None:
    assert load_config(RunConfig, ROOT / f"configs/ensemble/{name}.yaml", {}).uit_k == 10


def test_evaluation_re_ranks_ten_candidates_by_default() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "uit.run", "--help"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "--evaluate re-ranks (default 10)" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("settings", "scores", "ranked"),
    [
        ({}, "sims_score/score_uit_reproduce.pt", "predictions/score_uit_reproduce.txt"),
        (
            {"k_test": 128},
            "sims_score/score_uit_k128_reproduce.pt",
            "predictions/score_uit_k128_reproduce.txt",
        ),
        ({"k_test": 128, "save_score": "a.pt", "output_file": None}, "a.pt", None),
        # A file that the user names is written, even if it is a default.
        (
            {"k_test": 128, "save_score": "sims_score/score_uit_reproduce.pt"},
            "sims_score/score_uit_reproduce.pt",
            "predictions/score_uit_k128_reproduce.txt",
        ),
    ],
)
def test_another_number_has_other_default_files(
    settings: dict[str, Any], scores: str, ranked: str | None
) -> None:
    config = InferConfig(**settings).with_outputs()
    assert (config.save_score, config.output_file) == (scores, ranked)


def test_itc_scores_cannot_share_the_default_file() -> None:
    config = InferConfig(k_test=128, save_itc="sims_score/score_uit_k128_reproduce.pt")
    with pytest.raises(InputError, match="is also the path of another output"):
        config.check()


@pytest.mark.parametrize("command", [fuse, search])
def test_another_number_of_candidates_is_refused(
    tmp_path: Path, refused: Callable[..., str], command: Callable[[list[str] | None], None]
) -> None:
    argv = words(tmp_path, {"k_test": 12}, "--uit_k", "10")
    if command is search:
        lines = [f'{{"image": "i{n:02d}.jpg", "image_id": "i{n:02d}", "caption": ["a"]}}'
                 for n in range(20)]  # fmt: skip
        (tmp_path / "pair.json").write_text("\n".join(lines))
        at = argv.index("--output_file")
        argv[at : at + 2] = ["--annotation", str(tmp_path / "pair.json")]
        argv += ["--image_folder", str(tmp_path)]
        queries = [f"i{n:02d}#0" for n in range(20)]
        for name, meta in (("lhp", {}), ("uit", {"k_test": 12})):
            file = ScoreFile(torch.rand(20, 20), queries, IMAGES, meta)
            save_scores(tmp_path / f"{name}.pt", file)
    said = refused(command, argv)
    assert f"{tmp_path}/uit.pt: expected 10 candidates per query (--uit_k), found 12; " in said
    assert "--k_test 10" in said
    assert not (tmp_path / "list.txt").exists()


@pytest.mark.parametrize(
    ("found", "expected"),
    [(10, 10), (12, None), (20, 128), (128, 20)],  # the last two: all images of the gallery
)
def test_matching_numbers_are_fused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], found: int, expected: int | None
) -> None:
    fuse(words(tmp_path, {"k_test": found}, "--uit_k", str(expected).lower()))
    assert (tmp_path / "list.txt").is_file()
    assert "note:" not in capsys.readouterr().err


def test_a_file_without_its_number_is_fused_with_a_notice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fuse(words(tmp_path, {}, "--uit_k", "10"))
    said = "does not record its number of candidates; assumed to be --uit_k 10"
    assert f"note: {tmp_path}/uit.pt: {said}" in capsys.readouterr().err.splitlines()


def test_a_ranked_list_is_fused_with_a_notice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = words(tmp_path, {}, "--uit_k", "10")
    write_ranked_list(tmp_path / "uit.txt", [IMAGES[:10]] * 4)
    (tmp_path / "order.txt").write_text("".join(f"{query}\n" for query in QUERIES))
    argv[argv.index("--uit_score") + 1] = str(tmp_path / "uit.txt")
    fuse([*argv, "--query_order", str(tmp_path / "order.txt")])
    assert "does not record its number of candidates" in capsys.readouterr().err


def test_a_fusion_without_uit_is_not_checked(tmp_path: Path) -> None:
    fuse(words(tmp_path, {"k_test": 12}, "--uit_k", "10", "--uit_score", "none"))
    assert (tmp_path / "list.txt").is_file()


def test_zero_candidates_are_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "--uit_k: expected a number greater than or equal to 1" in refused(
        fuse, words(tmp_path, {}, "--uit_k", "0")
    )


def test_searched_weights_name_their_candidates(tmp_path: Path) -> None:
    key, query, weights = (tmp_path / name for name in ("key.json", "query.json", "w.yaml"))
    lines = [{"query_index": one, "caption": f"person {one}"} for one in QUERIES]
    query.write_text("".join(json.dumps(line) + "\n" for line in lines))
    key.write_text(json.dumps({one: {"gallery": IMAGES[n]} for n, one in enumerate(QUERIES)}))
    given = words(tmp_path, {"k_test": 12})[:4]
    search(
        [
            *given,
            "--annotation",
            str(query),
            "--answers",
            str(key),
            "--folds",
            "0",
            "--grid_step",
            "0.5",
            "--trials",
            str(tmp_path / "t.csv"),
            "--out",
            str(weights),
        ]
    )
    assert load_config(RunConfig, weights, {}).uit_k == 12
    score_file(tmp_path / "uit.pt", {"k_test": 10})
    with pytest.raises(InputError, match=r"expected 12 candidates per query \(--uit_k\), found 10"):
        fuse(["--config", str(weights), "--output_file", str(tmp_path / "list.txt")])
