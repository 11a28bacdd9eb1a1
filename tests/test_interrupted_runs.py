"""Last messages and exit code of a training run that finishes or is stopped by Ctrl-C."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import lhp.infer
import lhp.train
import pab.training.pairs
import uit.infer
import uit.run
from pab.core.errors import run_cli
from pab.training.loop import BEST, FINAL
from pab.training.resume import LAST
from pab.training.run_log import read_log
from tests import test_lhp_train, test_uit_train
from tests.test_uit_train import vocabulary  # noqa: F401 - a fixture

ROOT = Path(__file__).resolve().parents[1]
CORES = os.cpu_count() or 1


@pytest.fixture
def runs(tiny_data: Path, tokenizer_file: Path, tmp_path: Path) -> test_lhp_train.Runs:
    return test_lhp_train.Runs(tiny_data, tokenizer_file, tmp_path)


@pytest.fixture
def uit_runs(
    tiny_data: Path, vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> test_uit_train.Runs:  # fmt: skip
    monkeypatch.chdir(ROOT)
    return test_uit_train.Runs(tiny_data, vocabulary, tmp_path)


# --------------------------------------------------------------------------------- finished runs


def run_scoring(command: str, main: Callable[[list[str]], None], program: str, out: Path) -> None:
    """Run the scoring command that a run has printed, with a device and output files added."""
    assert command.startswith(f"score with: {program} ")
    words = shlex.split(command)[2 + len(program.split()) :]
    outputs = ["--save_score", str(out / "s.pt"), "--output_file", str(out / "l.txt")]
    main([*words, "--device", "cpu", "--num_workers", "0", *outputs])
    assert (out / "l.txt").is_file()


def test_a_run_names_its_best_weights_and_the_next_command(
    runs: test_lhp_train.Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs("run", val_pairs=4, epochs=3)
    *_, finished, command = capsys.readouterr().err.splitlines()
    rows = read_log(run / "log.jsonl", "val")
    best = max(rows, key=lambda row: row["R@1"] + 1e-3 * row["mAP"])
    figures = ", ".join(f"{name} {best[name]:.2f}" for name in ("R@1", "R@5", "R@10", "mAP"))
    assert finished == (
        f"finished: {run / FINAL} holds the last epoch, {run / BEST} the best, "
        f"epoch {best['epoch']} ({figures})"
    )
    assert str(run / BEST) in command
    run_scoring(command, lhp.infer.main, "python -m lhp.infer", runs.folder)


def test_the_best_weights_are_named_without_the_log(
    runs: test_lhp_train.Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs("run", val_pairs=4, epochs=2)
    expected = capsys.readouterr().err.splitlines()[-2:]
    (run / "log.jsonl").unlink()
    runs("run", val_pairs=4, epochs=2)
    assert capsys.readouterr().err.splitlines()[-2:] == expected
    (run / BEST).unlink()
    runs("run", val_pairs=4, epochs=2)
    *_, finished, command = capsys.readouterr().err.splitlines()
    assert finished == f"finished: {run / FINAL} holds the last epoch"
    assert str(run / FINAL) in command


def test_a_uit_run_names_the_next_command(
    uit_runs: test_uit_train.Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    run = uit_runs("run", val_pairs=4, epo=1, k_val=3)
    command = capsys.readouterr().err.splitlines()[-1]
    assert str(run / BEST) in command
    run_scoring(command, uit.infer.main, "python -m uit.infer", uit_runs.folder)


def test_a_run_without_validation_names_the_last_epoch(
    runs: test_lhp_train.Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs("run", epochs=1)
    *_, finished, command = capsys.readouterr().err.splitlines()
    assert finished == f"finished: {run / FINAL} holds the last epoch"
    assert str(run / FINAL) in command
    runs("none", "--no_save_ckpt", epochs=1)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "finished; no checkpoint was written (--no_save_ckpt)"


@pytest.mark.filterwarnings("error::UserWarning")
def test_more_workers_than_cores_give_no_warning(runs: test_lhp_train.Runs) -> None:
    runs("run", num_workers=CORES + 1, val_pairs=4, epochs=1)


# ----------------------------------------------------------------------- runs stopped by Ctrl-C


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "nothing is saved yet, so the same command starts over; --save_every_steps N saves "
         "within an epoch"),
        (["--save_every_steps", "2"], "{last} holds step 2; resume with the same command"),
        (["--save_every_steps", "2", "--no_auto_resume"],
         "{last} holds step 2; resume with the same command, with --auto_resume"),
        (["--no_save_ckpt"], "nothing is saved (--no_save_ckpt)"),
    ],
)  # fmt: skip
def test_an_interrupted_run_says_how_to_resume(
    runs: test_lhp_train.Runs, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], flags: list[str], said: str,
) -> None:  # fmt: skip
    true_backward, calls = pab.training.pairs.pair_backward, []

    def backward(*args: Any, **options: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return true_backward(*args, **options)

    monkeypatch.setattr(pab.training.pairs, "pair_backward", backward)
    with pytest.raises(SystemExit) as stop:
        run_cli(lhp.train.main, runs.argv("run", *flags))
    assert stop.value.code == 130
    last = capsys.readouterr().err.splitlines()[-1]
    place = runs.folder / "run" / LAST
    assert last == "interrupted after step 3: " + said.format(last=place)


def interrupted(words: list[str], log: Path) -> tuple[int, list[str]]:
    """Send Ctrl-C to a command after three logged steps; return its exit code and messages."""
    process = subprocess.Popen([sys.executable, *words], stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while not log.is_file() or len(log.read_text().splitlines()) < 3:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    return process.returncode, said.splitlines()


def test_ctrl_c_ends_a_run_and_its_loaders_with_one_message(runs: test_lhp_train.Runs) -> None:
    argv = runs.argv("run", epochs=500, num_workers=2)
    code, said = interrupted(["-m", "lhp.train", *argv], runs.folder / "run/log.jsonl")
    assert code == 130
    assert said[-1].startswith("interrupted after step ")
    assert not [line for line in said if "Traceback" in line or "Warning" in line]


@pytest.mark.distributed
@pytest.mark.slow
def test_ctrl_c_ends_several_processes_with_one_message(uit_runs: test_uit_train.Runs) -> None:
    argv = uit_runs.argv("two", dist="f2", bs=3, epo=500)
    code, said = interrupted(["-m", "uit.run", *argv], uit_runs.folder / "two/log.jsonl")
    assert code == 130
    assert [line[:11] for line in said if "interrupted" in line] == ["interrupted"]
    assert not [line for line in said if "Traceback" in line or "Warning" in line]
