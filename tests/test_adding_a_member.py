"""The code and commands of docs/adding_a_member.md run unchanged on the tiny data."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from pab.scores import ScoreFile, load_scores, save_scores

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/adding_a_member.md"
MOST_LINES = 15  # of the example, blank lines excluded


def block(language: str) -> str:
    match = re.search(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert match is not None
    return match[1]


def test_the_member_is_short() -> None:
    lines = [line for line in block("python").splitlines() if line.strip()]
    assert len(lines) <= MOST_LINES


def test_the_page_works(tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "colours.py").write_text(block("python"))
    (tmp_path / "pyproject.toml").write_text(block("toml"))
    install = "from setuptools import setup; setup()"
    options = {"cwd": tmp_path, "check": True, "env": {**os.environ, "PYTHONPATH": str(ROOT)}}
    subprocess.run([sys.executable, "-c", install, "-q", "egg_info"], **options)  # type: ignore[call-overload]
    masked = tmp_path / "data/mini/name-masked_test-set"
    masked.parent.mkdir(parents=True)
    masked.symlink_to(tiny_data / "name-masked_test-set")
    queries = [f"q{n:02d}" for n in range(10)]
    images = [f"G{n:02d}" for n in range(10)]
    scores = torch.rand(10, 10, generator=torch.Generator().manual_seed(0))
    save_scores(tmp_path / "output/demo/score_lhp.pt", ScoreFile(scores, queries, images, {}))
    commands = re.sub(r"\\\n\s*", " ", block("bash")).splitlines()
    assert len(commands) == 4
    for command in commands:
        words = shlex.split(command)
        assert words[0] == "python"
        subprocess.run([sys.executable, *words[1:]], **options)  # type: ignore[call-overload]
    found = load_scores(tmp_path / "output/fused.pt")
    assert [member["name"] for member in found.meta["members"]] == ["lhp", "colours"]
    alone = load_scores(tmp_path / "output/colours.pt")
    assert float(alone.scores.std()) > 0.01
    assert "<h2>Metrics</h2>" in (tmp_path / "output/report.html").read_text()
