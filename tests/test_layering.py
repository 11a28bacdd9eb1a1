"""Imports run downward only, from room to room; score files need no model library."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("pab", "lhp", "uit", "ensemble", "scripts")
OURS = {*PACKAGES, "tests", "benchmarks"}
# Room -> rooms below it that it may import, besides itself. "pab" are the public modules directly
# in the package; `formats` and `layout` are theirs.
BELOW: dict[str, set[str]] = {"pab.core": set(), "pab.data": {"pab.core"}}
BELOW["pab"] = BELOW["pab.formats"] = BELOW["pab.layout"] = {
    "pab", "pab.formats", "pab.layout", "pab.data", "pab.core",
}  # fmt: skip
BELOW["pab.training"] = BELOW["pab.scoring"] = {"pab.training", "pab.scoring", *BELOW["pab"]}
BELOW["pab.encoders"] = BELOW["pab.training"]
BELOW["lhp"] = BELOW["uit"] = BELOW["ensemble"] = BELOW["pab.search"] = {
    "pab.encoders", *BELOW["pab.encoders"],
}  # fmt: skip
BELOW["pab.mini"] = BELOW["pab"]
BELOW["scripts"] = {*BELOW} - {"pab.mini"}

MODEL_LIBRARIES = {
    "torchvision", "timm", "transformers", "open_clip", "sentencepiece", "lavis", "peft",
}  # fmt: skip
# Where pab and the ensemble may use them: preprocessing, and the wrappers of CLIP and BLIP-2.
LIBRARY_USERS = ("pab/data/images.py", "pab/encoders/")
# Modules that the ensemble, the evaluation and other people's tools build on.
LIGHT = ("pab.data.annotations", "pab.scores", "pab.ranking", "pab.metrics", "pab.evaluate")

# Public functions that `pab/__init__.py` names for type checkers, and imports at their first use;
# test_library.py checks that `import pab` loads none of them.
LAZY = {
    ("pab/__init__.py", "ensemble.api"),
    ("pab/__init__.py", "pab.scoring.members"),
}

MODULES = sorted(path for room in PACKAGES for path in (ROOT / room).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Modules a file imports, at any depth of it, with the line of each."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole if is_module(whole) else str(node.module)), node.lineno


def is_module(name: str) -> bool:
    """Return true if a dotted name is a module or package of this repository."""
    place = ROOT / name.replace(".", "/")
    return place.is_dir() or place.with_suffix(".py").is_file()


def room_of(module: str) -> str:
    """The room of a module: ``pab.core``, ``lhp``, or ``pab`` for a public module."""
    room = ".".join(module.split(".")[:2])
    return room if room in BELOW else module.split(".")[0]


def test_there_is_something_to_look_at() -> None:
    assert len(MODULES) > 100
    found = {name for name, _ in imports(ROOT / "lhp/train.py")}
    assert {"torch", "pab.core.checkpoints", "lhp.beit3"} <= found
    assert {
        room_of(".".join(path.relative_to(ROOT).with_suffix("").parts)) for path in MODULES
    } == {*BELOW}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downward(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    room = room_of(name.removesuffix(".py").replace("/", "."))
    for module, line in imports(path):
        if (name, module) in LAZY:
            continue
        library = module.split(".")[0]
        if library in OURS:
            other = room_of(module)
            allowed = other == room or other in BELOW[room]
            assert allowed, f"{name}:{line}: {room} imports {module}"
        if library in MODEL_LIBRARIES and room.split(".")[0] in ("pab", "ensemble"):
            assert name.startswith(LIBRARY_USERS), f"{name}:{line}: imports {module}"


def test_no_file_changes_the_import_path() -> None:
    """Packages are found because they are installed, or because Python starts in their folder."""
    call = ".".join(("sys", "path", "insert"))
    rooms = (*OURS, "docs")
    found = [path for room in rooms for path in (ROOT / room).rglob("*.py")]
    assert len(found) > 200
    assert [str(path) for path in found if call in path.read_text(encoding="utf-8")] == []


def test_one_module_finds_the_checkout() -> None:
    """A wheel has another layout: the others ask `pab.core.resources` for the project's files."""
    packages = [path for path in MODULES if not path.is_relative_to(ROOT / "scripts")]
    found = [path for path in packages if "(__file__).resolve().parents" in path.read_text()]
    assert [path.relative_to(ROOT).as_posix() for path in found] == ["pab/core/resources.py"]


def test_few_files_stand_directly_in_the_package() -> None:
    assert len(list((ROOT / "pab").glob("*.py"))) <= 20


def test_score_files_need_no_model_library() -> None:
    names = [
        *LIGHT,
        *(f"ensemble.{path.stem}" for path in (ROOT / "ensemble").glob("[a-z]*.py")),
        *(f"ensemble.report.{path.stem}" for path in (ROOT / "ensemble/report").glob("[a-z]*.py")),
    ]
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        f"print(*sorted({MODEL_LIBRARIES!r} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_files_are_short() -> None:
    """A longer file has more than one purpose; the mini data set's code is finished."""
    drawn = ROOT / "pab/mini"
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for folder in (*PACKAGES, "scripts", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if not path.is_relative_to(drawn)
    }
    assert len(lengths) > 150
    assert {name: lines for name, lines in lengths.items() if lines > 450} == {}
