"""The record of a run: what was run, on what, and every figure it gave.

In the output folder: ``config.yaml`` (every setting), ``run.json`` (number of skipped steps;
command, seed, versions, git commit and changed settings of every start), ``log.jsonl`` (one line
per thing logged). Curves go to TensorBoard when a log folder is given, progress to stderr. Only the
main process writes.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

from pab.core import processes
from pab.core.config import save_resolved
from pab.core.errors import InputError
from pab.core.files import write_json, write_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from torch.utils.tensorboard import SummaryWriter

PACKAGES = ("torch", "torchvision", "numpy", "pillow", "safetensors", "sentencepiece")
SECONDS_BETWEEN_LINES = 30.0  # of progress, where stderr is no terminal
PROJECT_ROOT = Path(__file__).resolve().parents[2]


class RunLog:
    """Writes the record of one run; use it as a context manager.

    Args:
        output_dir: folder of the run.
        log_dir: folder for TensorBoard; None = no TensorBoard.
        config: the resolved config; its ``seed``, if it has one, is recorded.
        argv: the command's arguments, as typed.
        command: the command itself, such as ``python -m lhp.train``.
        resumed_at: optimizer steps done in the state the run resumes from; lines of later steps
            are removed, since those are about to be done again. None = a new run: old lines go.
        validates_again: that state is one before validation; its figures at that step go too
            (TensorBoard keeps them beside the new ones).
        resumed_from: facts of the checkpoint that the run resumes from, for ``run.json``.
        skipped_steps: steps skipped so far.

    Raises:
        InputError: the folder cannot be written, or a log line cannot be read back.
    """

    def __init__(
        self,
        output_dir: str | Path,
        log_dir: str | Path | None,
        config: DataclassInstance,
        argv: Sequence[str],
        *,
        command: str = "",
        resumed_at: int | None = None,
        validates_again: bool = False,
        resumed_from: Mapping[str, Any] | None = None,
        skipped_steps: int = 0,
    ) -> None:
        self._active = processes.is_main()
        self._lines: TextIO | None = None
        self._board: SummaryWriter | None = None
        if not self._active:
            return
        output_dir = Path(output_dir)
        save_resolved(output_dir / "config.yaml", config)
        start = {
            "command": f"{command} {shlex.join(argv)}".strip(),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "seed": getattr(config, "seed", None),
            "resumed_at": resumed_at,
            "resumed_from": dict(resumed_from) if resumed_from is not None else None,
            "processes": processes.world_size(),
            "versions": versions(),
            "git": git_state(PROJECT_ROOT),
        }
        self._record = output_dir / "run.json"
        earlier = _earlier_starts(self._record) if resumed_at is not None else []
        self._starts = [*earlier, start]
        self.count_skipped(skipped_steps)
        path = output_dir / "log.jsonl"
        write_text(path, "".join(_kept_lines(path, resumed_at, validates_again)))
        self._lines = path.open("a", encoding="utf-8", newline="\n")
        if log_dir is not None:
            from torch.utils.tensorboard import SummaryWriter

            purge = None if resumed_at is None else resumed_at + 1
            self._board = SummaryWriter(str(log_dir), purge_step=purge)

    def log(self, step: int, figures: Mapping[str, float | int | str], kind: str = "train") -> None:
        """Write one line, ``{"step": step, "kind": kind, **figures}``, and numbers to TensorBoard.

        Args:
            step: optimizer steps done.
            figures: name -> number (or text, which goes to the line alone).
            kind: ``train``, ``val`` ...; groups the curves.
        """
        if self._lines is None:
            return
        line = {"step": step, "kind": kind, **{k: _json_safe(v) for k, v in figures.items()}}
        self._lines.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._lines.flush()
        if self._board is not None:
            for name, value in figures.items():
                if not isinstance(value, str):
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    def count_skipped(self, total: int) -> None:
        """Write how many steps were skipped so far to ``run.json``."""
        if self._active:
            write_json(self._record, {"skipped_steps": total, "starts": self._starts})

    def message(self, text: str) -> None:
        """Print a line to stderr, above any progress bar."""
        if self._active:
            tqdm.write(text, file=sys.stderr)

    def progress(self, total: int, what: str, done: int = 0) -> Progress:
        """A progress display of ``total`` steps, ``done`` of them before it starts."""
        return Progress(total, what, done, active=self._active)

    def close(self) -> None:
        """Close the files."""
        if self._lines is not None:
            self._lines.close()
            self._lines = None
        if self._board is not None:
            self._board.close()
            self._board = None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Progress:
    """Progress on stderr: a bar on a terminal, elsewhere a line every 30 seconds and at the end.

    Args:
        total: steps in all.
        what: word before the bar.
        done: steps done before.
        active: False = say nothing (processes other than the main one).
        seconds: time between lines where stderr is no terminal.
    """

    def __init__(
        self,
        total: int,
        what: str,
        done: int = 0,
        *,
        active: bool = True,
        seconds: float = SECONDS_BETWEEN_LINES,
    ) -> None:
        self.total, self.what, self.done = total, what, done
        self._active, self._seconds = active, seconds
        self._first = done
        self._began = self._last = time.monotonic()
        self._figures: dict[str, float] = {}
        terminal = active and sys.stderr.isatty()
        self._bar: Any = (
            tqdm(total=total, initial=done, desc=what, file=sys.stderr, dynamic_ncols=True)
            if terminal
            else None
        )

    def update(self, count: int = 1, **figures: float) -> None:
        """``count`` more steps are done; ``figures`` are shown beside them."""
        self.done += count
        self._figures.update(figures)
        if self._bar is not None:
            self._bar.set_postfix({k: f"{v:.4g}" for k, v in self._figures.items()}, refresh=False)
            self._bar.update(count)
        elif self._active and time.monotonic() - self._last >= self._seconds:
            self._print_line()

    def close(self) -> None:
        """End the display with a last line."""
        if self._bar is not None:
            self._bar.close()
        elif self._active:
            self._print_line()
        self._active, self._bar = False, None

    def _print_line(self) -> None:
        self._last = time.monotonic()
        elapsed = self._last - self._began
        rate = (self.done - self._first) / elapsed if elapsed > 0 else 0.0
        left = f", {(self.total - self.done) / rate:.0f} s left" if rate > 0 else ""
        figures = "".join(f" {name}={value:.4g}" for name, value in self._figures.items())
        print(
            f"{self.what} {self.done}/{self.total}{figures} ({elapsed:.0f} s, {rate:.3g}/s{left})",
            file=sys.stderr,
            flush=True,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_log(path: str | Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of a ``log.jsonl``, of one kind or all.

    Raises:
        InputError: a line is no JSON object with a step.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    rows = [_parsed(Path(path), number, line) for number, line in enumerate(lines, 1)]
    return [row for row in rows if kind is None or row.get("kind") == kind]


def versions() -> dict[str, str | None]:
    """Version of Python and of every package that can change a result; None = not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("person-anomaly-retrieval", *PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def git_state(folder: Path) -> dict[str, Any] | None:
    """``{"commit": hash, "changed": bool}`` if ``folder`` is a git checkout's root, else None."""
    top = _git(folder, "rev-parse", "--show-toplevel")
    commit = _git(folder, "rev-parse", "HEAD")
    if top is None or commit is None or Path(top).resolve() != folder.resolve():
        return None  # also for a package installed inside somebody else's checkout
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "changed": bool(changed)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:  # git is not installed
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def _earlier_starts(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["starts"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(
            path, "expected the record of earlier starts, found something else", todo="move it away"
        ) from error


def _kept_lines(path: Path, resumed_at: int | None, validates_again: bool) -> list[str]:
    """Log lines of steps up to ``resumed_at``; a last line cut short by a kill is dropped."""
    if resumed_at is None or not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    kept = []
    for number, line in enumerate(lines, 1):
        row = _parsed(path, number, line)
        repeated = validates_again and (row["step"], row.get("kind")) == (resumed_at, "val")
        if row["step"] <= resumed_at and not repeated:
            kept.append(line)
    return kept


def _parsed(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(
            path, f"expected JSON, found {line.strip()[:40]!r}", item=f"line {number}"
        ) from error
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise InputError(path, "expected an object with a 'step'", item=f"line {number}")
    return row


def _json_safe(value: float | int | str) -> float | int | str:
    """JSON has no NaN and no infinity: they become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
