"""Imports run downward only: scripts -> lhp, uit, ensemble -> pab; no model library in between."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("pab", "lhp", "uit", "ensemble", "scripts")
MAY_IMPORT = {
    "pab": {"pab"},
    "lhp": {"lhp", "pab"},
    "uit": {"uit", "pab"},
    "ensemble": {"ensemble", "pab"},
    "scripts": {"pab", "lhp", "uit", "ensemble"},
}
OURS = {*ROOMS, "tests", "benchmarks"}
MODEL_LIBRARIES = {
    "torchvision", "timm", "transformers", "open_clip", "sentencepiece", "lavis", "peft",
}  # fmt: skip
# Where pab may use them: preprocessing, and the wrappers of CLIP and BLIP-2.
LIBRARY_USERS = ("pab/images.py", "pab/encoders/")
# What the ensemble, the evaluation and other people's tools build on.
LIGHT = ("pab.annotations", "pab.scores", "pab.ranking", "pab.metrics", "pab.evaluate", "ensemble")

MODULES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def imported(path: Path) -> dict[str, int]:
    """Top-level names a file imports, at any depth of it, and the line of each."""
    found: dict[str, int] = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            inside = path.relative_to(ROOT).parts[0]  # a relative import stays in its room
            names = [inside if node.level else str(node.module)]
        else:
            continue
        for name in names:
            found.setdefault(name.split(".")[0], node.lineno)
    return found


def test_there_is_something_to_look_at() -> None:
    rooms = {path.relative_to(ROOT).parts[0] for path in MODULES}
    assert {"pab", "lhp"} <= rooms
    assert len(MODULES) > 20
    assert {"torch", "pab", "lhp"} <= imported(ROOT / "lhp/train.py").keys()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downward(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    room = name.split("/")[0]
    for module, line in imported(path).items():
        if module in OURS:
            assert module in MAY_IMPORT[room], f"{name}:{line}: {room} imports {module}"
        if module in MODEL_LIBRARIES and room in ("pab", "ensemble"):
            assert name.startswith(LIBRARY_USERS), f"{name}:{line}: imports {module}"


def test_score_files_need_no_model_library() -> None:
    names = [*LIGHT, *(f"ensemble.{path.stem}" for path in (ROOT / "ensemble").glob("[a-z]*.py"))]
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        f"print(*sorted({MODEL_LIBRARIES!r} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []
