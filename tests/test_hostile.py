"""Every odd or hostile input is answered right or refused in one line; the table says which.

`PAB_WRITE_TABLES=1 python -m pytest tests/test_hostile.py` writes `docs/reliability.md` anew.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ensemble.run import main as fuse
from lhp.infer import main as infer
from pab.evaluate import main as evaluate
from pab.scores import load_scores
from tests.conftest import MODEL, write_lines
from tests.hostile_cases import (
    ImageCase,
    ScoreCase,
    TextCase,
    caption_cases,
    image_cases,
    list_cases,
    picture,
    score_cases,
    write,
)

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs/reliability.md"
GOOD: dict[str, Any] = {
    "scores": torch.arange(6.0).reshape(2, 3),
    "query_ids": ["q1", "q2"],
    "gallery_ids": ["a", "b", "c"],
    "meta": {},
}


class Scorer:
    """Scores a small folder of pictures with the debug model."""

    def __init__(self, folder: Path, checkpoint: Path, tokenizer: Path) -> None:
        self.folder, self.gallery = folder, folder / "gallery"
        self.gallery.mkdir()
        for number in range(3):
            picture((30 + number, 40)).save(self.gallery / f"G0{number}.jpg")
        self.query = folder / "query.json"
        write_lines(self.query, [{"query_index": "q1", "caption": "a man falls"}])
        self.words = [
            "--model", MODEL, "--checkpoint", str(checkpoint), "--tokenizer", str(tokenizer),
            "--image_folder", str(self.gallery), "--annotation", str(self.query),
            "--num_workers", "0", "--device", "cpu", "--no_feature_cache",
        ]  # fmt: skip

    def argv(self, name: str = "s") -> list[str]:
        outputs = (("--save_score", f"{name}.pt"), ("--output_file", f"{name}.txt"))
        return [*self.words, *(w for flag, f in outputs for w in (flag, str(self.folder / f)))]

    def scores(self, name: str = "s") -> dict[str, list[float]]:
        """Image name -> its scores."""
        infer(self.argv(name))
        found = load_scores(self.folder / f"{name}.pt")
        return dict(zip(found.gallery_ids, found.scores.T.tolist(), strict=True))

    def wrote_nothing(self) -> bool:
        return not list(self.folder.glob("s.*")) and not list(self.folder.rglob("*.tmp"))


@pytest.fixture
def scorer(debug_checkpoint: Path, tokenizer_file: Path, tmp_path: Path) -> Scorer:
    return Scorer(tmp_path, debug_checkpoint, tokenizer_file)


def named(case: ImageCase | TextCase | ScoreCase) -> str:
    return case.what


@pytest.mark.parametrize("case", image_cases(), ids=named)
def test_image(case: ImageCase, scorer: Scorer, refused: Callable[..., str]) -> None:
    path = write(scorer.gallery, case.name, case.data)
    if case.refused:
        assert case.refused in refused(infer, scorer.argv())
        assert scorer.wrote_nothing()
        return
    found = scorer.scores()
    if case.ignored:
        assert set(found) == {"G00", "G01", "G02"}
        return
    assert case.right is not None
    path.unlink()
    case.right.save(scorer.gallery / "plain.png")
    plain = scorer.scores("plain")
    assert set(found) == {"G00", "G01", "G02", path.stem}
    assert found[path.stem] == pytest.approx(plain["plain"], abs=1e-6)


@pytest.mark.parametrize("case", caption_cases(), ids=named)
def test_caption(case: TextCase, scorer: Scorer, refused: Callable[..., str]) -> None:
    scorer.query.write_bytes(case.data)
    if case.refused:
        assert case.refused in refused(infer, scorer.argv())
        assert scorer.wrote_nothing()
    else:
        assert all(len(scores) == 1 for scores in scorer.scores().values())


@pytest.mark.parametrize("case", score_cases(GOOD), ids=named)
def test_score_file(
    case: ScoreCase, tmp_path: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "x.pt", tmp_path / "out.txt"
    if isinstance(case.content, bytes):
        path.write_bytes(case.content)
    else:
        torch.save(case.content, path)
    argv = ["--beit3_score", str(path), "--output_file", str(out)]
    if case.refused:
        assert case.refused in refused(fuse, argv)
        assert not out.exists()
        assert "code of a score file ran" not in capsys.readouterr().out
    else:
        fuse(argv)
        assert out.read_text() == "c b a\nc b a\n"


@pytest.mark.parametrize("case", list_cases(), ids=named)
def test_ranked_list(
    case: TextCase, tmp_path: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    labelled = tmp_path / "annotation/labels.json"
    rows = [{"image": f"test/{n}.jpg", "image_id": n, "caption": [f"person {n}"]} for n in "abc"]
    write_lines(labelled, rows)
    path = write(tmp_path, "list.txt", case.data)
    argv = ["--predictions", str(path), "--annotation", str(labelled)]
    if case.refused:
        assert case.refused in refused(evaluate, argv)
    else:
        evaluate(argv)
        assert "100.00" in capsys.readouterr().out


def table() -> str:
    """The cases as a page."""
    rows = []
    for kind, cases in (
        ("image", image_cases()), ("caption or annotation", caption_cases()),
        ("score file", score_cases(GOOD)), ("ranked list", list_cases()),
    ):  # fmt: skip
        for case in cases:
            outcome = "refused, naming it" if case.refused else "right"
            if isinstance(case, ImageCase) and case.ignored:
                outcome = "left alone: no image of the gallery"
            rows.append(f"| {kind} | {case.what} | {outcome} |")
    lines = [
        "# Odd and hostile inputs",
        "",
        f"{len(rows)} cases, each a test (`tests/test_hostile.py`, which writes this page with",
        "`PAB_WRITE_TABLES=1`). Right: an image scores as the plain RGB picture it shows does,",
        "other inputs give what they say. Refused: exit code 2, one line that names the file and",
        "the line or item, nothing written, no code of a file run.",
        "",
        "| input | case | outcome |",
        "| --- | --- | --- |",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def test_the_table_is_that_of_the_cases() -> None:
    if os.environ.get("PAB_WRITE_TABLES"):
        TABLE.write_text(table(), encoding="utf-8")
    assert TABLE.read_text(encoding="utf-8") == table()
