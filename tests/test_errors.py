"""InputError: one-line text, exit code and pickling."""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from pab.core.errors import InputError, run_cli

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = [
    "pab.evaluate",
    "pab.scores",
    "pab.scores import",
    "pab.scores show",
    "pab.scores export",
    "pab.compare",
    "pab.layout",
    "pab.layout check",
    "pab.mini",
    "pab.mini.contact_sheet",
    "ensemble.report",
    "ensemble.run",
    "ensemble.search",
    "lhp.train_tokenizer",
    "lhp.train",
    "lhp.infer",
    "uit.make_vocabulary",
    "uit.train",
    "uit.run",
    "uit.infer",
]


def test_its_text_is_one_line() -> None:
    error = InputError("a.json", "expected text,\nfound 3", item="line 17", todo="mend\r\nit")
    assert str(error) == "a.json, line 17: expected text, found 3; mend it"
    assert str(InputError(Path("a.json"), "expected text")) == "a.json: expected text"


@pytest.mark.parametrize(
    "error",
    [
        InputError("a.json", "expected text"),
        InputError(Path("b") / "c.json", "found 3", item="line 17", todo="mend it"),
    ],
)
def test_it_survives_pickling(error: InputError) -> None:
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert type(again) is InputError
    assert str(again) == str(error)
    for name in ("where", "problem", "item", "todo"):
        assert getattr(again, name) == getattr(error, name)


def _refuse(number: int) -> None:
    raise InputError("a.json", "expected text", item=f"line {number}")


def test_it_arrives_intact_from_another_process() -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with pytest.raises(InputError, match=r"^a\.json, line 4: expected text$") as caught:
            pool.submit(_refuse, 4).result(timeout=120)
        assert caught.value.item == "line 4"


def _raise(error: BaseException) -> Callable[[list[str] | None], None]:
    def main(argv: list[str] | None) -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (InputError("a.json", "found\n3"), 2, "error: a.json: found 3\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_cli(_raise(error))
    assert stop.value.code == code
    assert capsys.readouterr() == ("", expected)


def test_bugs_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_cli(_raise(ZeroDivisionError()))


def test_a_closed_output_pipe_prints_no_traceback() -> None:
    code = (
        "from pab.core.errors import run_cli\n"
        "def main(argv):\n"
        "    for number in range(100_000): print('line', number)\n"
        "run_cli(main)"
    )
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, check=False
    )
    os.close(writing)
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr


def test_arguments_reach_the_command() -> None:
    seen: list[list[str] | None] = []
    run_cli(seen.append, ["--a", "1"])
    run_cli(seen.append)
    assert seen == [["--a", "1"], None]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_reports_a_wrong_flag_in_one_line(
    command: str, refused: Callable[..., str]
) -> None:
    module, *words = command.split()
    spec = importlib.util.find_spec(module)
    assert spec is not None
    name = f"{module}.__main__" if spec.submodule_search_locations else module
    main = importlib.import_module(name).main
    line = refused(main, [*words, "--no_such\nflag"])
    assert line.startswith("error: "), line
    assert "--no_such flag" in line or "required" in line, line
    assert f"; see python -m {module} " in line, line
    assert line.endswith(" --help"), line
