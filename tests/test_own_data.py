"""Run every command of docs/own_data.md in order, on a small synthetic folder with two tables."""

from __future__ import annotations

import csv
import json
import shlex
from pathlib import Path

import pytest

from tests.conftest import draw
from tests.test_readme import FENCE, STARTS, commands_in, main_of

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/own_data.md").read_text(encoding="utf-8")
TABLES = {"train": range(48), "test": range(100, 112)}
COMMANDS = [
    line for kind, text in FENCE.findall(PAGE) if kind == "bash" for line in commands_in(text)
]


def make_own_data(folder: Path) -> None:
    """Draw pictures and write the two tables of the page."""
    for name, numbers in TABLES.items():
        rows = [["filepath", "caption"]]
        for number in numbers:
            image = f"photos/{number:04d}.jpg"
            rows.append([image, draw(folder / image, number, number % 2 == 0)])
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)


def run(command: str) -> None:
    """Run a command of the page in this process."""
    match = STARTS.search(command)
    assert match is not None, command
    module, *argv = shlex.split(match[1] or match[2])
    main_of(module.removesuffix(".py").replace("/", "."))(argv)


@pytest.mark.slow
def test_the_page_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_own_data(tmp_path / "data/own")
    for name in ("checkpoints", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    out, said = tmp_path / "output/own", {}
    for command in COMMANDS:
        run(command)
        said[command] = capsys.readouterr().out

    def advice(path: str) -> str:
        return said[f"python -m pab.layout check {path}"]

    assert "python -m pab.layout check data/own/train.csv" in advice("data/own")
    tune = "finetune_clip.py --config configs/clip/finetune.yaml --data_path data/own/train.csv"
    assert f"{tune} --csv_caption_key caption" in advice("data/own/train.csv")
    best = "output/own/clip/checkpoint-best.pth"
    assert f"python -m pab.layout check {best}" in advice("output/own/clip")
    assert "python -m ensemble.run --member" in advice("output/own/test/clip.pt")
    run(f"python -m pab.layout check {best}")
    score = f"clip_infer.py --model local-dir:checkpoints/mini/clip --pretrained {best}"
    assert score in capsys.readouterr().out

    held_out = (out / "clip/val_pairs.json").read_text().splitlines()
    assert 0 < len(held_out) < len(TABLES["train"])
    lines = (out / "test/fused.txt").read_text().splitlines()
    assert [len(line.split()) for line in lines] == [10] * len(TABLES["test"])
    assert "chosen_on: output/own/clip/val_pairs.json" in (out / "weights.yaml").read_text()
    for page in ("found.html", "report.html"):
        assert "data:image/" in (out / page).read_text(encoding="utf-8")
    assert json.loads(held_out[0])["image"].startswith("photos/")


def test_the_page_has_every_step() -> None:
    steps = "search finetune_clip clip_infer lhp.infer ensemble.search ensemble.run evaluate report"
    assert [step for step in steps.split() if not any(step in line for line in COMMANDS)] == []
