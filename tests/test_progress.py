"""Progress of long loops: a bar in a terminal, a line every 30 seconds in a log."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import textwrap
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from pab.core import processes, progress
from pab.core.errors import InputError, run_cli
from pab.core.files import sha256_of_file
from pab.core.notices import notice
from pab.core.progress import Progress, write_line
from tests.conftest import MODEL

ROOT = Path(__file__).resolve().parents[1]
# A bar as tqdm draws it: percentage, count, time so far, remaining time, rate.
BAR = r"{what}: +\d+%\|[^|]*\| \d+/\d+ \[\d+:\d\d<\d+:\d\d, +[\d.]+ images/s\]"


@pytest.fixture
def passing(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Stop the clock; return a function that lets seconds pass."""
    now = [100.0]
    monkeypatch.setattr(progress, "clock", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def errors_in_terminal(code: str, *arguments: object, size: tuple[int, int] = (30, 100)) -> str:
    """Run Python code with stderr in a pseudo-terminal of ``size``; return the output shown."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # Linux raises it once the other end is closed
        while block := os.read(ours, 1 << 16):
            shown += block
    os.close(ours)
    process.wait(timeout=60)
    return shown.decode()


def screen(shown: str) -> list[str]:
    """Return the lines left on a terminal after carriage returns and cursor movements."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[\d;]*[A-Za-z]|\r|\n|[^\r\n\x1b]+", shown):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part == "\r":
            column = 0
        elif part == "\x1b[A":
            row -= 1
        else:
            assert not part.startswith("\x1b"), f"an unknown control sequence: {part!r}"
            line = lines[row].ljust(column)
            lines[row] = line[:column] + part + line[column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines]


# ----------------------------------------------------------------------------------------- a log


def test_a_log_gets_a_line_every_30_seconds(
    passing: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in progress.progress(range(1978), "encoding images", "images"):
        passing(1 / 40)
    assert capsys.readouterr().err.splitlines() == [
        "encoding images: 1200/1978, 40 images/s, 19 s left",
        "encoding images: 1978/1978, 40 images/s, 49 s in all",
    ]


def test_a_short_loop_prints_nothing(
    passing: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(progress.progress("abc", "reading", "letters")) == ["a", "b", "c"]
    for _ in progress.progress(range(29), "reading", "letters"):
        passing(1)
    assert capsys.readouterr().err == ""


def test_batches_bytes_figures_and_earlier_steps(
    passing: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    batches = [[1, 2], [3, 4], [5]]
    for _ in progress.progress(batches, "encoding captions", "captions", 5, len):
        passing(31)
    with Progress(2_700_000_000, "fetching lhp", "B", done=1_000_000_000) as shown:
        passing(100)
        shown.update(100_000_000)
    with Progress(40_000, "training", "steps") as shown:
        passing(30)
        shown.update(3, loss=0.51234)
    with Progress(None, "listing photographs", "files") as shown:
        passing(30)
        shown.update(60_000)
    assert [line for line in capsys.readouterr().err.splitlines() if "in all" not in line] == [
        "encoding captions: 2/5, 0.065 captions/s, 46 s left",
        "encoding captions: 4/5, 0.065 captions/s, 16 s left",
        "fetching lhp: 1100/2700 MB, 1 MB/s, 26:40 left",
        "training: 3/40000, 0.1 steps/s, 111:06:10 left, loss 0.5123",
        "listing photographs: 60000 files, 2000 files/s",
    ]


def test_a_log_marks_an_estimated_total(
    passing: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress(None, "indexing", "images") as shown:
        for total in (100, 80):
            passing(40)
            shown.estimate(total)
            shown.update(20)
    assert capsys.readouterr().err.splitlines()[:2] == [
        "indexing: 20/about 100, 0.5 images/s, 2:40 left",
        "indexing: 40/about 80, 0.5 images/s, 1:20 left",
    ]


def test_only_rank_0_writes(
    passing: Callable[[float], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(processes, "is_main", lambda: False)
    for _ in progress.progress(range(3), "encoding images", "images"):
        passing(100)
        write_line("one line")
        notice("a file", "one notice")
    assert capsys.readouterr().err == ""


def test_hashing_a_file_reports_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "weights.pth").write_bytes(bytes(3 << 20))
    moments = iter(range(0, 10_000, 20))
    monkeypatch.setattr(progress, "clock", lambda: next(moments))
    assert sha256_of_file(tmp_path / "weights.pth").startswith("bbd05cf6097ac9b1")
    assert "hashing weights.pth: 2/3 MB" in capsys.readouterr().err


# ------------------------------------------------------------------------------------ a terminal

LOOP = """
    import sys, time
    from pab.core import progress
    from pab.core.errors import InputError, run_cli
    from pab.core.notices import notice
    progress.BAR_AFTER_S = 0.1

    def main(argv):
        for number in progress.progress(range(20), "encoding images", "images"):
            time.sleep(0.03)
            {inside}

    run_cli(main, [])
"""


@pytest.mark.parametrize("size", [(30, 100), (0, 0)], ids=["a usual size", "an unknown size"])
def test_a_terminal_shows_a_bar_with_rate_and_remaining_time(size: tuple[int, int]) -> None:
    shown = errors_in_terminal(LOOP.format(inside="pass"), size=size)
    bars = re.findall(BAR.format(what="encoding images"), shown)
    assert len(bars) > 2
    assert "100%" in bars[-1]
    assert len(screen(shown)) == 2, "one bar, and the empty line below it"


def test_a_slow_loop_shows_seconds_per_unit() -> None:
    shown = errors_in_terminal(LOOP.format(inside="pass").replace("20", "2").replace("0.03", "1.2"))
    assert re.search(r"\[00:0\d<00:00, +\d\.\d+s/images\]", screen(shown)[0]), shown


def test_a_short_loop_prints_nothing_in_a_terminal() -> None:
    code = LOOP.format(inside="pass").replace("0.1", "30")
    assert errors_in_terminal(code) == ""


@pytest.mark.parametrize("at", [0, 12], ids=["before the bar", "below the bar"])
def test_a_notice_is_printed_above_the_bar(at: int) -> None:
    shown = errors_in_terminal(LOOP.format(inside=f"if number == {at}: notice('a.json', 'is odd')"))
    note, bar, end = screen(shown)
    assert note == "note: a.json: is odd"
    assert bar.startswith("encoding images: 100%|")
    assert end == ""


def test_an_error_is_printed_below_the_bar() -> None:
    inside = "if number == 12: raise InputError('b.jpg', 'is damaged')"
    bar, error, end = screen(errors_in_terminal(LOOP.format(inside=inside)))
    assert bar.startswith("encoding images:  60%|")
    assert error == "error: b.jpg: is damaged"
    assert end == ""


def test_a_loop_inside_another_leaves_one_bar() -> None:
    inside = "[time.sleep(.05) for _ in progress.progress(range(6), 'checking', 'images')]"
    shown = errors_in_terminal(LOOP.format(inside=inside))
    assert re.search(BAR.format(what="checking"), shown)
    bar, *rest = screen(shown)
    assert bar.startswith("encoding images: 100%|")
    assert set(rest) == {""}


def test_the_bar_of_a_failed_loop_is_closed(
    passing: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)

    def main(argv: list[str] | None) -> None:
        for _ in progress.progress(range(3), "encoding images", "images"):
            passing(2)
            if progress._shown:
                raise InputError("b.jpg", "is damaged")

    with pytest.raises(SystemExit):
        run_cli(main, [])
    assert not progress._shown


def test_a_scoring_command_shows_a_bar(
    tiny_data: Path, debug_checkpoint: Path, tokenizer_file: Path, tmp_path: Path
) -> None:
    code = """
        import sys, time
        from lhp.beit3 import Beit3Retrieval
        from lhp.infer import main
        from pab.core import progress
        from pab.core.errors import run_cli

        def slowly(self, pixels, encode=Beit3Retrieval.encode_image):
            time.sleep(0.1)
            return encode(self, pixels)

        Beit3Retrieval.encode_image = slowly
        progress.BAR_AFTER_S = 0.2
        run_cli(main, sys.argv[1:])
    """
    masked = tiny_data / "name-masked_test-set"
    shown = errors_in_terminal(
        code, "--model", MODEL, "--checkpoint", debug_checkpoint, "--tokenizer", tokenizer_file,
        "--image_folder", masked / "gallery", "--annotation", masked / "query.json",
        "--save_score", "none", "--output_file", tmp_path / "list.txt", "--batch_size", 1,
        "--device", "cpu", "--num_workers", 0, "--no_feature_cache",
    )  # fmt: skip
    assert re.search(BAR.format(what="encoding images"), shown), shown
    *_, bar, summary, end = screen(shown)
    assert bar.startswith("encoding images: 100%|")
    assert summary == f"10 queries x 10 images -> {tmp_path}/list.txt"
    assert end == ""
