"""Check, train, evaluate and reproduce with a data root in the layout of PAB's release."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

import pab.layout.check
from lhp.train import main as lhp_train
from pab.data.splits import TRAIN_IDS, VAL_IDS
from pab.scores import load_scores
from pab.training.loop import FINAL
from pab.training.run_log import read_log
from tests.release import make_release
from uit.run import main as uit_run

ROOT = Path(__file__).resolve().parents[1]
SHARDS, TEST_IMAGES = 75, 12


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("release") / "PAB"
    make_release(
        root, shards=SHARDS, test_images=TEST_IMAGES, numeric_ids=True, extra_fields=True
    )  # fmt: skip
    return root


def settings(release: Path, out: Path) -> list[str]:
    words = ["--data_path", release, "--output_dir", out, "--train_shards", "none"]
    return [*map(str, words), "--val_pairs", "40", "--epochs", "1", "--device", "cpu"]


def test_the_layout_is_explained(release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pab.layout.check.main(["check", str(release)])
    output = capsys.readouterr().out
    assert f"annotation/train/attr_*.json ({SHARDS})" in output
    assert "300 of 300" in output
    assert "annotation/test/attr.json" in output
    assert f"{TEST_IMAGES} of {TEST_IMAGES}" in output
    assert "lhp.train" in output


def test_lhp_trains_and_validates(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    lhp_train(["--debug", *settings(release, tmp_path / "lhp")])
    (row,) = read_log(tmp_path / "lhp/log.jsonl", "val")
    assert 0 <= row["R@1"] <= 100
    assert (tmp_path / "lhp" / FINAL).is_file()
    ids = [
        line
        for name in (TRAIN_IDS, VAL_IDS)
        for line in (tmp_path / "lhp" / name).read_text().split()
    ]
    assert len(ids) == len(set(ids)) == 4 * SHARDS


def test_uit_trains_validates_and_evaluates(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    uit_run(["--debug", *settings(release, tmp_path / "uit")])
    (row,) = read_log(tmp_path / "uit/log.jsonl", "val")
    assert 0 <= row["itc R@1"] <= 100
    words = ["--debug", *settings(release, tmp_path / "test"), "--k_test", "10"]
    uit_run([*words, "--evaluate", "--checkpoint", str(tmp_path / "uit" / FINAL)])
    found = load_scores(tmp_path / "test/score_test.pt")
    assert sorted(found.gallery_ids) == sorted(str(n) for n in range(TEST_IMAGES))
    assert len(found.query_ids) == TEST_IMAGES


@pytest.mark.slow
def test_reproduce_scores_the_release(release: Path, tmp_path: Path) -> None:
    """Run reproduce.sh with the mini models in a temporary copy of the checkout."""
    for name in ("pab", "lhp", "uit", "ensemble", "scripts", "configs", "checkpoints", ".venv"):
        if name != "scripts":
            (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "scripts").mkdir()
    for script in (ROOT / "scripts").iterdir():
        if script.is_file():
            (tmp_path / "scripts" / script.name).write_bytes(script.read_bytes())
    done = subprocess.run(
        ["bash", tmp_path / "scripts/reproduce.sh", "--mini"],
        env={
            **os.environ, "DATA": str(release), "OUT": str(tmp_path / "out"),
            "OMP_NUM_THREADS": "1",  # other pytest workers use the other cores
        },
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for step in ("lhp", "lhp+uit", "lhp+uit+blip2", "lhp+uit+blip2+clip"):
        assert f"\n{step}\n" in done.stdout
    assert f"obtained on {TEST_IMAGES}" in done.stdout
    assert "name-masked" not in done.stdout.partition("labelled test: ")[2]
    lines = (tmp_path / "out/predictions.txt").read_text().splitlines()
    assert len(lines) == TEST_IMAGES
