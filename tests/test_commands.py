"""The list of commands is complete, needs no torch, and matches the texts of ``--help``."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pab import __version__
from pab.core.commands import COMMANDS, GROUPS

ROOT = Path(__file__).resolve().parents[1]
ALL = {command: sentence for part in COMMANDS.values() for command, sentence in part.items()}
PYTHON = [command for command in ALL if command.startswith("python ")]
SETUP = {
    "setup.sh",
    "setup_browser.sh",
    "setup_lavis.sh",
    "test.sh",
    "check_requirements.sh",
}  # set-up and maintenance
UNGROUPED = ("options", "positional arguments")


def main_of(command: str) -> Callable[[list[str] | None], None]:
    name = command.split()[-1].removesuffix(".py").replace("/", ".")
    if (ROOT / name.replace(".", "/")).is_dir():
        name += ".__main__"
    main: Callable[[list[str] | None], None] = importlib.import_module(name).main
    return main


def test_every_command_is_listed_and_exists() -> None:
    found = set()
    for room in ("pab", "lhp", "uit", "ensemble"):
        for path in (ROOT / room).rglob("*.py"):
            if '__name__ == "__main__"' in path.read_text(encoding="utf-8"):
                module = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
                found.add(f"python -m {module.removesuffix('.__main__')}")
    shell = {path.name for path in (ROOT / "scripts").glob("*.sh")} - SETUP
    found |= {f"bash scripts/{name}" for name in shell}
    for path in (ROOT / "scripts").glob("*.py"):
        name = path.relative_to(ROOT).as_posix()
        # A script that a shell script calls is not listed itself.
        called = any(f"scripts.{path.stem} " in (ROOT / "scripts" / s).read_text() for s in shell)
        found |= set() if called else {f"python {name}"}
    assert found == {*ALL}


def test_every_python_command_is_run_with_the_requirements() -> None:
    script = (ROOT / "scripts" / "check_requirements.sh").read_text(encoding="utf-8")
    named = set(re.findall(r"[\w./]+", script))
    assert {command.split()[-1] for command in PYTHON} - named == set()


def test_the_list_names_each_command_in_a_line_and_imports_no_torch() -> None:
    code = (
        "import sys; from pab.__main__ import main; main([])\n"
        "assert not {'torch', 'numpy', 'pydantic'} & sys.modules.keys(), sys.modules.keys()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = [re.sub(r"\s+", " ", line).strip() for line in done.stdout.splitlines()]
    for command, sentence in ALL.items():
        assert f"{command} {sentence}" in lines
        assert sentence.endswith(".")
        assert sentence[0].isupper()


@pytest.mark.parametrize("command", PYTHON)
def test_help_of_each_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main_of(command)(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: {command} [")
    assert " ".join(ALL[command].split()) in " ".join(text.split())
    assert "(default: None)" not in text
    assert "(default: )" not in text
    titles = re.findall(r"^(\S[\w ]*):$", text, re.MULTILINE)
    assert [title for title in titles if title not in UNGROUPED] == [
        title for title in GROUPS if title in titles
    ]
    if "pab.mini" not in command:  # its flags are not grouped
        own = text.partition("\noptions:\n")[2].partition("\n\n")[0]
        assert set(re.findall(r"--\w+", own)) <= {"--help", "--version", "--config"}


@pytest.mark.parametrize("command", PYTHON)
def test_version_of_each_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main_of(command)(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"person-anomaly-retrieval {__version__}\n"
