"""Packages import only what their layer allows, and score files need no model library."""

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
# Package -> packages that it may import, besides itself. "pab" stands for the public modules
# directly in that package; `formats` and `layout` belong to them.
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
# In pab and ensemble, only preprocessing and the encoders may import model libraries.
LIBRARY_USERS = ("pab/data/images.py", "pab/encoders/")
# Modules that fusion, evaluation and external tools import.
LIGHT = ("pab.data.annotations", "pab.scores", "pab.ranking", "pab.metrics", "pab.evaluate")

# Modules of public functions. `pab/__init__.py` imports them for type checkers, and otherwise at
# first use; test_library.py checks that `import pab` loads none of them.
LAZY = {
    ("pab/__init__.py", "ensemble.api"),
    ("pab/__init__.py", "pab.scoring.members"),
}

MODULES = sorted(path for folder in PACKAGES for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Yield the modules that a file imports, even inside functions, with their line numbers."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole if is_module(whole) else str(node.module)), node.lineno


def is_module(name: str) -> bool:
    """Return whether a dotted name is a module or package of this repository."""
    place = ROOT / name.replace(".", "/")
    return place.is_dir() or place.with_suffix(".py").is_file()


def package_of(module: str) -> str:
    """Return the package of a module: ``pab.core``, ``lhp``, or ``pab`` for a public module."""
    package = ".".join(module.split(".")[:2])
    return package if package in BELOW else module.split(".")[0]


def test_modules_and_imports_are_found() -> None:
    assert len(MODULES) > 100
    found = {name for name, _ in imports(ROOT / "lhp/train.py")}
    assert {"torch", "pab.core.checkpoints", "lhp.beit3"} <= found
    assert {
        package_of(".".join(path.relative_to(ROOT).with_suffix("").parts)) for path in MODULES
    } == {*BELOW}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downward(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    package = package_of(name.removesuffix(".py").replace("/", "."))
    for module, line in imports(path):
        if (name, module) in LAZY:
            continue
        library = module.split(".")[0]
        if library in OURS:
            other = package_of(module)
            allowed = other == package or other in BELOW[package]
            assert allowed, f"{name}:{line}: {package} imports {module}"
        if library in MODEL_LIBRARIES and package.split(".")[0] in ("pab", "ensemble"):
            assert name.startswith(LIBRARY_USERS), f"{name}:{line}: imports {module}"


def test_no_file_changes_the_import_path() -> None:
    """Packages are importable if they are installed or Python starts in the repository."""
    call = ".".join(("sys", "path", "insert"))
    folders = (*OURS, "docs")
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(found) > 200
    assert [str(path) for path in found if call in path.read_text(encoding="utf-8")] == []


def test_one_module_finds_the_checkout() -> None:
    """A wheel has another layout, so all other modules use the paths of `pab.core.resources`."""
    packages = [path for path in MODULES if not path.is_relative_to(ROOT / "scripts")]
    found = [path for path in packages if "(__file__).resolve().parents" in path.read_text()]
    assert [path.relative_to(ROOT).as_posix() for path in found] == ["pab/core/resources.py"]


def test_few_files_are_directly_in_the_package() -> None:
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
    """A longer file usually has several purposes. The frozen code of the mini data is exempt."""
    mini = ROOT / "pab/mini"
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for folder in (*PACKAGES, "scripts", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if not path.is_relative_to(mini)
    }
    assert len(lengths) > 150
    assert {name: lines for name, lines in lengths.items() if lines > 450} == {}
