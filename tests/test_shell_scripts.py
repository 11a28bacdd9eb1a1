"""The shell commands of inference refuse a wrong line before their first long step."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.mark.parametrize("script", ["iterative_ensemble.sh", "infer_all.sh"])
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--typo", "1"], "--typo: unknown flag"),
        (["--top_k"], "--top_k: expected a value after it"),
        (["--task=itr"], "--task: expected cmp, found itr"),
    ],
)
def test_a_wrong_line_is_refused_at_once(script: str, words: list[str], expected: str) -> None:
    done = subprocess.run(
        ["bash", SCRIPTS / script, *words], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {expected}")
    assert done.stderr.count("\n") == 1


def test_a_missing_member_is_told_before_uit_scores(tmp_path: Path) -> None:
    there = tmp_path / "lhp.pt"
    there.touch()
    words = ["--beit3_score", there, "--blip2_score", "none", "--clip_score", tmp_path / "no.pt"]
    done = subprocess.run(
        ["bash", SCRIPTS / "iterative_ensemble.sh", *words],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert (
        done.stderr == f"error: {tmp_path / 'no.pt'}: expected a score file, found no such file\n"
    )


def test_a_member_whose_scores_are_given_is_not_scored(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    for name in ("infer_all.sh", "ensemble_flags.sh"):
        (tmp_path / "scripts" / name).write_bytes((SCRIPTS / name).read_bytes())
    (tmp_path / "scripts/iterative_ensemble.sh").write_text('echo "then $*"\n')
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    words = ["--clip_score", "mine.pt", "--blip2_score", "none", "--answers", "key.json"]
    done = subprocess.run(
        ["bash", tmp_path / "scripts/infer_all.sh", *words],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    data = "--answers key.json --annotation data/PAB/name-masked_test-set/query.json"
    assert done.stdout.splitlines() == [f"-m lhp.infer {data}", f"then {' '.join(words)}"]
