"""Record a run: command, environment and all logged values.

Files in the output folder: ``config.yaml`` (all settings), ``run.json`` (number of skipped steps;
command, seed, number format, versions, git commit and changed settings per start) and ``log.jsonl``
(one line per log entry). Curves are also written for TensorBoard if a log folder is set. Only rank
0 writes.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from pab.core import processes
from pab.core.config import save_resolved
from pab.core.errors import InputError
from pab.core.files import write_json, write_text
from pab.core.resources import CODE_ROOT

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from torch.utils.tensorboard import SummaryWriter

PACKAGES = ("torch", "torchvision", "numpy", "pillow", "safetensors", "sentencepiece")


class RunLog:
    """Write the record of one run; use as a context manager.

    Args:
        output_dir: output folder of the run.
        log_dir: folder for TensorBoard; None disables TensorBoard.
        config: resolved config; its ``seed``, if any, is recorded.
        command: command line.
        resumed_at: optimizer steps done in the resumed state; lines of later steps are removed,
            because the run repeats these steps. None starts a new run and removes all old lines.
        validates_again: true if the resumed state precedes a validation; lines of this validation
            are removed too. TensorBoard keeps both validations.
        resumed_from: facts of the resumed checkpoint, for ``run.json``.
        skipped_steps: number of steps skipped so far.
        computed_in: device and number format of the run, for ``run.json``.

    Raises:
        InputError: the folder is not writable, or an old ``run.json`` or log line is invalid.
    """

    def __init__(
        self,
        output_dir: str | Path,
        log_dir: str | Path | None,
        config: DataclassInstance,
        command: str,
        *,
        resumed_at: int | None = None,
        validates_again: bool = False,
        resumed_from: Mapping[str, Any] | None = None,
        skipped_steps: int = 0,
        computed_in: Mapping[str, Any] | None = None,
    ) -> None:
        self._active = processes.is_main()
        self._lines: TextIO | None = None
        self._board: SummaryWriter | None = None
        if not self._active:
            return
        output_dir = Path(output_dir)
        save_resolved(output_dir / "config.yaml", config)
        start = {
            "command": command,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "seed": getattr(config, "seed", None),
            "resumed_at": resumed_at,
            "resumed_from": dict(resumed_from) if resumed_from is not None else None,
            "processes": processes.world_size(),
            "computed_in": dict(computed_in or {}),
            "versions": versions(),
            "git": git_state(CODE_ROOT),
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
        """Write a line ``{"step": step, "kind": kind, **figures}``; send numbers to TensorBoard.

        Args:
            step: optimizer steps done.
            figures: name -> number, or text, which is not sent to TensorBoard.
            kind: ``train`` or ``val``; TensorBoard groups curves by it.
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
        """Record the number of skipped steps in ``run.json``."""
        if self._active:
            write_json(self._record, {"skipped_steps": total, "starts": self._starts})

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lines is not None:
            self._lines.close()
            self._lines = None
        if self._board is not None:
            self._board.close()
            self._board = None


def read_log(path: str | Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Read the lines of a ``log.jsonl``: those of one ``kind``, or all if ``kind`` is None.

    Raises:
        InputError: a line is not a JSON object with an integer ``step``.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    rows = [_parsed(Path(path), number, line) for number, line in enumerate(lines, 1)]
    return [row for row in rows if kind is None or row.get("kind") == kind]


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of packages that affect results; None if missing."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("person-anomaly-retrieval", *PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return ``{"commit": hash, "changed": bool}`` for the root of a git checkout, else None."""
    top = _git(folder, "rev-parse", "--show-toplevel")
    commit = _git(folder, "rev-parse", "HEAD")
    if top is None or commit is None or Path(top).resolve() != folder.resolve():
        return None  # also if the package is installed inside an unrelated checkout
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
            path,
            "expected earlier starts of the run, found something else",
            todo="move or delete the file; the run then starts a new record",
        ) from error


def _kept_lines(path: Path, resumed_at: int | None, validates_again: bool) -> list[str]:
    """Return the log lines of steps up to ``resumed_at``, without a truncated last line."""
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
        raise InputError(path, "expected an object with an integer 'step'", item=f"line {number}")
    return row


def _json_safe(value: float | int | str) -> float | int | str:
    """Convert NaN and infinity, which JSON lacks, to text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
