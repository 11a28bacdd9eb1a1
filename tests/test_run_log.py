"""Record of a run: its files, resuming without duplicate lines, curves and progress."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pab.core import processes, progress
from pab.core.config import load_config
from pab.core.errors import InputError
from pab.core.progress import Progress, write_line
from pab.training.run_log import RunLog, git_state, read_log, versions


@dataclass(frozen=True)
class Recipe:
    seed: int = 16
    lr: float = 1e-5


def open_log(folder: Path, resumed_at: int | None = None, log_dir: Path | None = None) -> RunLog:
    return RunLog(
        folder, log_dir, Recipe(), "python -m train --lr 1e-5", resumed_at=resumed_at
    )  # fmt: skip


def steps_in(folder: Path) -> list[int]:
    return [row["step"] for row in read_log(folder / "log.jsonl")]


def test_a_run_writes_its_config_its_facts_and_its_figures(tmp_path: Path) -> None:
    with open_log(tmp_path / "run") as log:
        log.log(1, {"loss": 2.5, "lr": 1e-6})
        log.log(1, {"r1": 50.0, "split": "validation"}, kind="val")
        # Every line is written at once, so a killed run keeps it.
        assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 2
    assert load_config(Recipe, tmp_path / "run" / "config.yaml", {}) == Recipe()
    (start,) = json.loads((tmp_path / "run" / "run.json").read_text())["starts"]
    assert start["command"] == "python -m train --lr 1e-5"
    assert start["seed"] == 16
    assert start["versions"]["python"] == sys.version.split()[0]
    assert start["versions"]["torch"]
    assert read_log(tmp_path / "run" / "log.jsonl", "val") == [
        {"step": 1, "kind": "val", "r1": 50.0, "split": "validation"}
    ]


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        for step in range(1, 8):
            log.log(step, {"loss": 1.0 / step})
    with (tmp_path / "log.jsonl").open("a") as handle:
        handle.write('{"step": 8, "lo')  # killed while writing
    with open_log(tmp_path, resumed_at=4) as log:
        assert steps_in(tmp_path) == [1, 2, 3, 4]
        for step in (5, 6):
            log.log(step, {"loss": 1.0})
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5, 6]
    starts = json.loads((tmp_path / "run.json").read_text())["starts"]
    assert [start["resumed_at"] for start in starts] == [None, 4]


def test_a_new_run_in_an_old_folder_starts_an_empty_log(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.log(0, {"loss": 1.0})
    with open_log(tmp_path):
        assert steps_in(tmp_path) == []
    assert len(json.loads((tmp_path / "run.json").read_text())["starts"]) == 1


@pytest.mark.parametrize("line", ["no json", "[1]", '{"loss": 1}', '{"step": "x"}'])
def test_a_broken_line_is_named_and_nothing_is_lost(tmp_path: Path, line: str) -> None:
    text = f'{{"step": 1}}\n{line}\n{{"step": 3}}\n'
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(InputError, match=r"log\.jsonl, line 2: expected"):
        open_log(tmp_path, resumed_at=3)
    assert (tmp_path / "log.jsonl").read_text() == text


def test_a_broken_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(InputError, match=r"run\.json: expected earlier starts"):
        open_log(tmp_path, resumed_at=3)


def test_lines_with_non_finite_numbers_are_valid_json(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.log(1, {"norm": float("inf"), "loss": float("nan")})

    def refuse(constant: str) -> float:
        raise AssertionError(constant)

    line = (tmp_path / "log.jsonl").read_text()
    assert json.loads(line, parse_constant=refuse)["norm"] == "inf"


def test_curves_are_written_and_rewound(tmp_path: Path) -> None:
    board = tmp_path / "board"
    with open_log(tmp_path, log_dir=board) as log:
        for step in (1, 2, 3):
            log.log(step, {"loss": float(step), "note": "text"})
    with open_log(tmp_path, resumed_at=1, log_dir=board) as log:
        log.log(2, {"loss": 20.0})
    events = EventAccumulator(str(board), purge_orphaned_data=True)
    events.Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (1, 1.0), (2, 20.0),
    ]  # fmt: skip


def test_only_the_main_process_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processes, "is_main", lambda: False)
    with open_log(tmp_path / "run", log_dir=tmp_path / "board") as log:
        log.log(1, {"loss": 1.0})
        write_line("hello")
        with Progress(3, "training", "steps") as shown:
            shown.update(3)
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().err == ""


def test_progress_without_a_terminal_is_a_line_every_30_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(progress, "clock", lambda: now[0])
    with open_log(tmp_path), Progress(40, "training", "steps", 10) as shown:
        for _ in range(20):
            now[0] += 10.0
            shown.update(1, loss=0.51234)
        now[0] += 4.0
        shown.update(10)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 7  # one per 30 s in 200 s, and the last
    assert lines[0] == "training: 13/40, 0.1 steps/s, 4:30 left, loss 0.5123"
    assert lines[-1] == "training: 40/40, 0.15 steps/s, 3:24 in all, loss 0.5123"


def test_progress_on_a_terminal_is_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "BAR_AFTER_S", 0.0)
    with open_log(tmp_path), Progress(4, "training", "steps") as shown:
        shown.update(4, loss=0.5)
    assert "4/4" in terminal.getvalue()
    assert "loss=0.5" in terminal.getvalue()


def test_messages_go_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_log(tmp_path):
        write_line("best so far")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "best so far\n")


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip


def test_git_commit_and_changes(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
    git(tmp_path, "init", "-q")
    assert git_state(tmp_path) is None  # no commit yet
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a.txt").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert git_state(tmp_path) == {"commit": commit, "changed": False}
    (tmp_path / "inner" / "a.txt").write_text("2")
    assert git_state(tmp_path) == {"commit": commit, "changed": True}
    assert git_state(tmp_path / "inner") is None  # not the root of the checkout


def test_without_git_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path) is None


def test_missing_packages_have_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pab.training.run_log.PACKAGES", ("torch", "no-such-package"))
    assert versions()["no-such-package"] is None
