"""Shell scripts for inference, demo and reproduction: commands, steps, errors before long steps."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from scripts.published_inference import commands, main

UIT_CONFIG = "configs/uit/infer.yaml"
NO_MEMBERS = ["--beit3_score", "none", "--blip2_score", "none", "--clip_score", "none"]
SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.mark.parametrize("script", ["iterative_ensemble", "infer_all"])
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--typo", "1"], "unrecognized arguments: --typo 1"),
        (["--top_k"], "argument --top_k: expected one argument"),
        (["--task=itr"], "--task: expected cmp, found itr"),
        (["--k_test", "many"], "--k_test: expected a valid integer, found 'many'"),
        (["--decode", "none", "margin"], "--decode: none cannot be combined with margin"),
        (["--config", "configs/ensemble/mini.yaml"], "configs/ensemble/mini.yaml: unknown setting"),
    ],
)
def test_a_wrong_command_line_is_refused_at_once(
    script: str, words: list[str], expected: str, refused: Callable[..., str]
) -> None:
    line = refused(main, [script, *NO_MEMBERS, *words])
    assert line.startswith(f"error: {expected}")


@pytest.mark.parametrize("script", ["iterative_ensemble", "infer_all"])
def test_help_and_errors_of_the_shell_scripts(script: str) -> None:
    run = partial(subprocess.run, capture_output=True, text=True, check=False)
    done = run(["bash", SCRIPTS / f"{script}.sh", "--help"])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: bash scripts/{script}.sh [--config FILE]")
    assert "(default: None)" not in done.stdout
    done = run(["bash", SCRIPTS / f"{script}.sh", "--version", "--typo"])
    assert (done.returncode, done.stdout.split()[0]) == (0, "person-anomaly-retrieval")
    done = run(["bash", SCRIPTS / f"{script}.sh", "--typo"])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unrecognized arguments: --typo; see bash scripts/")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("script", ["demo", "reproduce"])
def test_help_starts_no_work(script: str, tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    for name in (f"scripts/{script}.sh", "pyproject.toml"):
        (tmp_path / name).write_text((SCRIPTS.parent / name).read_text())
    (tmp_path / "scripts/setup.sh").write_text("echo set up\nexit 9\n")
    run = partial(subprocess.run, capture_output=True, text=True, check=False)
    command = ["bash", tmp_path / f"scripts/{script}.sh"]
    done = run([*command, "--help"])
    assert (done.returncode, done.stderr) == (0, "")
    assert f"bash scripts/{script}.sh" in done.stdout
    assert "#" not in done.stdout
    assert "set -" not in done.stdout
    done = run([*command, "--version"])
    assert (done.returncode, done.stdout) == (0, f"{package_version()}\n")
    done = run([*command, "--typo"])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --typo: expected ")


def package_version() -> str:
    return f"person-anomaly-retrieval {importlib.metadata.version('person-anomaly-retrieval')}"


@pytest.mark.parametrize("script", ["iterative_ensemble", "infer_all"])
def test_a_missing_member_is_reported_before_scoring(
    script: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    there = tmp_path / "lhp.pt"
    there.touch()
    words = ["--beit3_score", str(there), "--blip2_score", "none"]
    missing = tmp_path / "no.pt"
    line = refused(main, [script, *words, "--clip_score", str(missing)])
    assert line == f"error: {missing}: expected a score file, found no such file"


def test_a_flag_goes_to_the_steps_that_have_it(tmp_path: Path) -> None:
    there = tmp_path / "lhp.pt"
    there.touch()
    argv = f"""--beit3_score {there} --blip2_score none --clip_score={there} --clip_weight 0.8
        --checkpoint uit.pth --config {UIT_CONFIG} --image_folder photos --k_test 12 --top_k 5
        --query_order order.txt --member a=a.pt:0.5 --member b=b.pt:0.25 --no_feature_cache
        --device cpu --output_dir out --same_caption_counts --uit_k 12 --output_file list.txt"""
    data = "--image_folder photos --query_order order.txt --same_caption_counts"
    uit, fusion = (" ".join(step) for step in commands("iterative_ensemble", argv.split()))
    assert uit == (
        f"-m uit.infer --config {UIT_CONFIG} --checkpoint uit.pth --image_folder photos"
        " --k_test 12 --query_order order.txt --no_feature_cache --device cpu"
        f" --same_caption_counts --candidates {there} --save_score out/score_uit.pt"
        " --output_file out/predictions_uit.txt"
    )
    assert fusion == (
        f"-m ensemble.run --beit3_score {there} --blip2_score none --clip_score {there}"
        " --clip_weight 0.8 --image_folder photos --top_k 5 --query_order order.txt"
        " --member a=a.pt:0.5 b=b.pt:0.25 --same_caption_counts --uit_k 12"
        " --output_file list.txt --uit_score out/score_uit.pt"
    )
    lhp, *rest = commands("infer_all", [word for word in argv.split() if word != "--beit3_score"
                                        and word != str(there)])  # fmt: skip
    assert " ".join(lhp) == f"-m lhp.infer {data}"
    assert [step[1] for step in rest] == ["uit.infer", "ensemble.run"]


def test_a_member_with_a_score_file_is_not_scored(tmp_path: Path) -> None:
    mine = tmp_path / "mine.pt"
    mine.touch()
    argv = ["--clip_score", str(mine), "--blip2_score", "none", "--answers", "key.json"]
    steps = [" ".join(step) for step in commands("infer_all", argv)]
    data = "--answers key.json --annotation data/PAB/name-masked_test-set/query.json"
    scores = "sims_score/score_beit3_reproduce.pt"
    assert steps == [
        f"-m lhp.infer {data}",
        f"-m uit.infer --config {UIT_CONFIG} {data} --candidates {scores}"
        " --save_score output/score_uit.pt --output_file output/predictions_uit.txt",
        f"-m ensemble.run --clip_score {mine} --blip2_score none {data} --beit3_score {scores}"
        " --uit_score output/score_uit.pt",
    ]
    every = [step[-1] for step in commands("infer_all", [])[:3]]
    assert every == ["lhp.infer", "scripts/blip2_infer.py", "scripts/clip_infer.py"]


def test_no_step_follows_one_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        ran.append(command[2])
        return subprocess.CompletedProcess(command, 3 if command[2] == "uit.infer" else 0)

    monkeypatch.setattr("scripts.published_inference.subprocess.run", run)
    with pytest.raises(SystemExit) as stop:
        main(["infer_all", "--blip2_score", "none", "--clip_score", "none"])
    assert (stop.value.code, ran) == (3, ["lhp.infer", "uit.infer"])


@pytest.fixture
def reproduce(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs reproduce.sh with a fake Python, which creates score files."""
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
def test_each_existing_test_set_is_scored(
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
        assert ("no metrics: the name-masked set has no labels" in done.stdout) == (
            masked == "no key"
        )
    again = reproduce(*words)
    assert "infer" not in again.stdout, "a step with a score file is skipped"


def test_the_order_of_the_challenge_is_kept(
    reproduce: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    make_sets(tmp_path, LABELLED, *MASKED, "name-masked_test-set/query_index.txt")
    order = "--query_order data/name-masked_test-set/query_index.txt"
    lines = [line for line in reproduce().stdout.splitlines() if "--output_file" in line]
    assert [order in line for line in lines] == ["_masked" in line for line in lines]


def test_a_masked_set_without_a_gallery_is_reported(
    reproduce: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    make_sets(tmp_path, LABELLED, MASKED[0])
    done = reproduce()
    told = "note: data/name-masked_test-set: not scored, because it has no gallery/\n"
    assert (done.returncode, done.stderr) == (0, told)


def test_gpus_must_be_a_positive_integer(
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
        (["--answers"], "--answers: expected a file"),
        (["--answers", "no.json"], "--answers: no.json: expected the answer key"),
        (["--train", "--mini"], "--train: cannot be used with --mini"),
    ],
)
def test_reproduce_refuses_a_wrong_command_line(
    reproduce: Callable[..., subprocess.CompletedProcess[str]], words: list[str], expected: str
) -> None:
    done = reproduce(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {expected}")
