"""Language rules: short sentences and cells in the docs; no docstring begins like a question."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "data/README.md", "checkpoints/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
MOST_WORDS = 34  # in a sentence
MOST_CELL_WORDS = 8  # in a table cell of README.md
HISTORY = "log.md"  # rows of its table may have longer sentences
FENCED = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"\n\n(?: {4}.*\n)+")
CODE = re.compile(r"`[^`]*`")
LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
URL = re.compile(r"<?https?://\S+")
ITEM = re.compile(r"^\s*(?:[-*]|\d+\.)\s+", re.MULTILINE)
HEADING = re.compile(r"^#+ .*$", re.MULTILINE)
BREAK = re.compile(r"(?<=[.!?])[)*\"]*\s+(?=[^a-z])")
BY_QUESTION = re.compile(r"\s*(?:What|How|Whether)\b")


def plain(text: str) -> str:
    """Remove code blocks and link targets; a code span counts as one word."""
    text = INDENTED.sub("\n\n", FENCED.sub("", text))
    return URL.sub("URL", LINK.sub(r"\1", CODE.sub("Code", text)))


def cells(text: str) -> Iterator[str]:
    for line in text.splitlines():
        if line.startswith("|"):
            yield from (cell.strip() for cell in line.strip("|").split("|"))


def passages(text: str) -> Iterator[str]:
    """Yield paragraphs, list items and table cells of a page without code."""
    yield from cells(text)
    prose = "\n".join("" if line.startswith("|") else line for line in text.splitlines())
    prose = ITEM.sub("\n\n", HEADING.sub("\n\n", prose))
    yield from (" ".join(part.split()) for part in re.split(r"\n\s*\n", prose))


def sentences(text: str) -> Iterator[str]:
    for passage in passages(text):
        yield from BREAK.split(passage)


def long_sentences(text: str) -> list[str]:
    return [line for line in sentences(plain(text)) if len(line.split()) > MOST_WORDS]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_sentences_are_short(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    if page.name == HISTORY:
        text = "\n".join(line for line in text.splitlines() if not line.startswith("|"))
    assert long_sentences(text) == []


def test_cells_of_the_readme_are_short() -> None:
    found = cells(plain((ROOT / "README.md").read_text(encoding="utf-8")))
    assert [cell for cell in found if len(cell.split()) > MOST_CELL_WORDS] == []


def test_long_sentences_would_be_noticed() -> None:
    words = " ".join(["word"] * (MOST_WORDS + 1))
    for text in (words, f"Short one. {words}.", f"- {words}", f"| a | {words} |", f"# A\n{words}"):
        assert len(long_sentences(text)) == 1, text
    half = " ".join(["word"] * (MOST_WORDS // 2))
    for text in (
        f"{half}. B {half}",
        f"- {half}\n- {half} {half}",
        f"```\n{words}\n```",
        f"`{words}`",
    ):
        assert long_sentences(text) == [], text


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text is not None:
                yield getattr(node, "lineno", 1), text


def test_docstrings_begin_with_no_question() -> None:
    found = []
    for folder in ("pab", "lhp", "uit", "ensemble", "scripts", "tests", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            found += [
                f"{path.relative_to(ROOT)}:{line}: {text.splitlines()[0]}"
                for line, text in docstrings(path)
                if BY_QUESTION.match(text)
            ]
    assert found == []
