"""The shell commands of inference refuse a wrong line before their first long step."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
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


@pytest.fixture
def reproduce(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs reproduce.sh with a Python that notes its arguments and makes the score files."""
    (tmp_path / "scripts").mkdir()
    script = tmp_path / "scripts/reproduce.sh"
    script.write_bytes((SCRIPTS / "reproduce.sh").read_bytes())
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(
        '#!/bin/sh\necho "ran $*"\nwhile [ $# -gt 1 ]; do\n'
        'if [ "$1" = --save_score ]; then mkdir -p "$(dirname "$2")"; touch "$2"; fi; shift\ndone\n'
    )
    python.chmod(0o755)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", script, *words], capture_output=True, text=True, check=False,
            env={**os.environ, "DATA": "data", "OUT": "out"},
        )  # fmt: skip

    return run


def make_sets(root: Path, *files: str) -> None:
    for file in files:
        (root / "data" / file).parent.mkdir(parents=True, exist_ok=True)
        (root / "data" / file).touch()


LABELLED = "annotation/test/attr.json"
MASKED = ("name-masked_test-set/query.json", "name-masked_test-set/gallery/A.jpg")


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("masked", ["", "no key", "key in its folder", "key given"])
def test_each_test_set_that_is_there_is_scored(
    reproduce: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path,
    labelled: bool, masked: str,
) -> None:  # fmt: skip
    make_sets(tmp_path, "other", *([LABELLED] if labelled else []), *(MASKED if masked else []))
    words: tuple[str, ...] = ()
    key = "data/name-masked_test-set/answers.json"
    if masked == "key in its folder":
        make_sets(tmp_path, "name-masked_test-set/answers.json")
    elif masked == "key given":
        make_sets(tmp_path, "mine.json")
        words, key = ("--answers", "data/mine.json"), "data/mine.json"
    done = reproduce(*words)
    lines = done.stdout.splitlines()
    assert lines[0] == "ran -m pab.layout check data"
    if not labelled and not masked:
        assert done.returncode == 2
        assert "expected annotation/test/pair.json, or name-masked_test-set/" in done.stderr
        return
    assert (done.returncode, done.stderr) == (0, "")
    published = [line for line in lines if "ensemble.published" in line]
    steps = ["lhp", "lhp+uit", "lhp+uit+blip2", "lhp+uit+blip2+clip"]
    assert [line.split()[3] for line in published] == steps * (labelled + (masked[:3] == "key"))
    assert sum("lhp.infer" in line for line in lines) == labelled + bool(masked)
    if labelled:
        assert any(
            f"--annotation data/{LABELLED} --image_folder data" in line for line in published
        )
        assert (tmp_path / "out/score_uit.pt").is_file()
    if masked:
        answers = key if masked != "no key" else "none"
        scored = [line for line in lines if "gallery" in line]
        assert len(scored) == 4
        assert all(f"--answers {answers} --save_score" in line for line in scored)
        assert any("score_clip_masked.pt" in line for line in lines if "ensemble.run" in line)
        assert ("no figures: the name-masked set has no labels" in done.stdout) == (
            masked == "no key"
        )
    again = reproduce(*words)
    assert "infer" not in again.stdout, "a step whose score file is there is not run again"


def test_the_order_of_the_challenge_is_kept(
    reproduce: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    make_sets(tmp_path, LABELLED, *MASKED, "name-masked_test-set/query_index.txt")
    order = "--query_order data/name-masked_test-set/query_index.txt"
    lines = [line for line in reproduce().stdout.splitlines() if "--output_file" in line]
    assert [order in line for line in lines] == ["_masked" in line for line in lines]


def test_a_masked_set_without_its_gallery_is_told(
    reproduce: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    make_sets(tmp_path, LABELLED, MASKED[0])
    done = reproduce()
    told = "note: data/name-masked_test-set: not scored, because it has no gallery/\n"
    assert (done.returncode, done.stderr) == (0, told)


def test_gpus_is_a_number(
    reproduce: Callable[..., subprocess.CompletedProcess[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for word in ("0", "x", "-1"):
        monkeypatch.setenv("GPUS", word)
        done = reproduce("--train")
        expected = f"error: GPUS: expected a number of GPUs, found {word}\n"
        assert (done.returncode, done.stderr) == (2, expected)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--typo"], "--typo: expected --train, --mini or --answers FILE"),
        (["--answers"], "--answers: expected a file after it"),
        (["--answers", "no.json"], "--answers: no.json: expected the answer key"),
        (["--train", "--mini"], "--train: the mini models are shipped"),
    ],
)
def test_reproduce_refuses_a_wrong_line(
    reproduce: Callable[..., subprocess.CompletedProcess[str]], words: list[str], expected: str
) -> None:
    done = reproduce(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {expected}")
