"""Searching a folder of pictures with the shipped mini model, by the command a newcomer types."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import draw

from pab.errors import InputError
from pab.search import main

ROOT = Path(__file__).parents[1]
MINI = ["--config", str(ROOT / "configs/lhp/mini_infer.yaml"), "--answers", "none"]
MINI += ["--no_feature_cache"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(ROOT)  # the mini recipe names its files from there
    for number in range(4):
        draw(tmp_path / f"photos/p{number}.jpg", number, normal=number % 2 == 0)
    return tmp_path / "photos"


def test_names_and_scores_best_first(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    page = folder.parent / "page.html"
    main(
        ["--model", "lhp", "--image_folder", str(folder), "--query", "a man falls", "--query", "é"]
        + ["--top_k", "3", "--html", str(page), "--num_workers", "0", *MINI]
    )
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 8
    assert (lines[0], lines[4]) == ("a man falls", "é")
    ranks, scores, names = zip(*(line.split() for line in lines[1:4]), strict=True)
    assert ranks == ("1", "2", "3")
    assert sorted(map(float, scores), reverse=True) == list(map(float, scores))
    assert set(names) < {"p0", "p1", "p2", "p3"}
    assert page.read_text().count("<article") == 2


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--checkpoint", "none.pth"], "none.pth"),
        (["--no_such_flag"], "--no_such_flag"),
        (["--image_folder", "nowhere"], "nowhere"),
    ],
)
def test_the_scoring_commands_own_errors(
    folder: Path, flags: list[str], expected: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--model", "lhp", "--image_folder", str(folder), "--query", "a", *MINI, *flags])
    assert caught.value.code == 2
    said = capfd.readouterr()
    assert expected in said.err
    assert said.out == ""


def test_top_k_of_none(folder: Path) -> None:
    with pytest.raises(InputError, match="--top_k"):
        main(["--model", "lhp", "--image_folder", str(folder), "--query", "a", "--top_k", "0"])
