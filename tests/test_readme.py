"""The commands of README.md and of the scripts parse, and every config loads.

Each command runs its own ``main`` until its command line has been parsed and checked.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest

import pab.core.config

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = (README, ROOT / "docs/vlm.md")  # every command of these pages parses
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
OURS = ("pab", "lhp", "uit", "ensemble")
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHELL = ("", "bash", "sh", "shell", "console")
STARTS = re.compile(
    r"(?:\S*python3?|torchrun\b.*?)\s+-m\s+(.*)"  # a module and its arguments
    r"|(?:bash|python3?)\s+(scripts/\S+.*)"
)


class Understood(Exception):
    """Raised in place of the command's work, once its command line has been accepted."""


def commands_in(text: str) -> list[str]:
    """Return the shell commands of a text, with continued lines joined."""
    joined = re.sub(r"\\\n\s*", " ", text)
    return [line.strip() for line in joined.splitlines() if STARTS.search(line)]


def page_commands(pages: Sequence[Path]) -> list[str]:
    """Return the project's commands in the shell blocks of pages that exist."""
    found = [page.read_text(encoding="utf-8") for page in pages if page.is_file()]
    blocks = [block for text in found for block in FENCE.findall(text)]
    return [line for kind, text in blocks if kind in SHELL for line in commands_in(text)]


def script_commands() -> Iterator[str]:
    """Yield the project's commands in the shell scripts, with variables filled in."""
    for script in sorted((ROOT / "scripts").glob("*.sh")):
        text = script.read_text(encoding="utf-8")
        first: dict[str, str] = {}
        for name, value in re.findall(r"(?<![\w$-])(\w+)=([\w./$-]+)(?=\s)", text):
            first.setdefault(name, value)
        for command in commands_in(text):
            if not re.search(rf"-m ({'|'.join(OURS)})\.|scripts/\w+\.py", command):
                continue
            command = re.sub(r'"\$(?:@|\{\w+\[@\]\})"', "", command)  # the caller's own flags
            for name, value in reversed(first.items()):  # a value may name an earlier one
                command = re.sub(rf"\${name}\b", value, command)
            yield command.strip()


def main_of(module: str) -> Callable[[list[str] | None], None]:
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"there is no module {module}"
    if spec.submodule_search_locations is not None:
        module = f"{module}.__main__"
    main: Callable[[list[str] | None], None] = importlib.import_module(module).main
    return main


@pytest.fixture
def understood(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that checks a command line, with its config and combination of flags."""
    true_parse, true_load = argparse.ArgumentParser.parse_args, pab.core.config.load_config

    def parse(parser: argparse.ArgumentParser, *args: Any, **options: Any) -> Any:
        namespace = true_parse(parser, *args, **options)
        if hasattr(namespace, "config"):  # `load` checks the values of the config
            return namespace
        raise Understood

    def load(*args: Any) -> NoReturn:
        config = true_load(*args)
        if hasattr(config, "check"):
            config.check()
        raise Understood

    def run(command: str) -> None:
        match = STARTS.search(command)
        assert match is not None, command
        if match[1] is None:
            script, *argv = shlex.split(match[2], comments=True)
            assert (ROOT / script).is_file(), f"there is no {script}"
            if script.endswith(".py"):
                with pytest.raises(Understood):
                    main_of(f"scripts.{Path(script).stem}")(argv)
            return
        module, *argv = shlex.split(match[1], comments=True)
        if module.split(".")[0] not in OURS:
            assert importlib.util.find_spec(module) is not None, f"there is no module {module}"
            return
        with pytest.raises(Understood):
            main_of(module)(argv)

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(pab.core.config, "load_config", load)
    return run


@pytest.mark.skipif(not README.is_file(), reason="there is no README.md")
def test_the_readme_has_commands() -> None:
    found = page_commands([README])
    assert any("scripts/demo.sh" in command for command in found)
    assert any("lhp.train" in command for command in found)
    assert any("lhp.infer" in command for command in found)


@pytest.mark.parametrize("command", page_commands(PAGES))
def test_page_command(command: str, understood: Callable[[str], None]) -> None:
    # The search writes this file; a shipped config has the same form.
    chosen, shipped = "output/ensemble/vlm_chosen.yaml", "configs/ensemble/protocol_aware.yaml"
    command = command.replace(chosen, shipped)
    understood(command)


@pytest.mark.parametrize("command", script_commands())
def test_script_command(command: str, understood: Callable[[str], None]) -> None:
    understood(command)


@pytest.mark.parametrize(
    "command",
    [
        "python -m lhp.train --no_such_flag 1",
        "python -m lhp.train --batch_size 0",
        "python -m lhp.train --config configs/lhp/none.yaml",
        "python -m pab.evaluate --annotation FILE",
        "python -m lhp.nothing",
        "bash scripts/none.sh",
        "python scripts/clip_infer.py --no_such_flag 1",
        "python -m pab.search --model clip --image_folder photos --query a --no_such_flag 1",
    ],
)
def test_wrong_commands_would_be_noticed(command: str, understood: Callable[[str], None]) -> None:
    from pab.core.errors import InputError

    with pytest.raises((SystemExit, InputError, AssertionError)):
        understood(command)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_config(path: Path, understood: Callable[[str], None]) -> None:
    """The first comment names a command that uses the file, and this command accepts it."""
    name = path.relative_to(ROOT).as_posix()
    first = path.read_text(encoding="utf-8").splitlines()[0]
    match = re.match(r"# (?:.*\()?(python (?:-m|scripts/) ?[^()]*)\)?", first)
    assert match is not None, f"{name}: the first line names no command: {first}"
    command = match[1].strip()
    names_it = ("--debug",) if path.stem == "debug" else (name, f"--protocol {path.stem} ")
    assert any(words in f"{command} " for words in names_it), first
    understood(command)
    if first.startswith("# bash "):
        understood(first.removeprefix("# ").split("(")[0])


def test_there_are_configs() -> None:
    assert {"debug", "finetune", "infer", "mini"} <= {path.stem for path in CONFIGS}
