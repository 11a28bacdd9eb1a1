"""Odd and hostile inputs are read correctly, ignored or refused; a table lists them.

`PAB_WRITE_TABLES=1 python -m pytest tests/test_hostile.py` rewrites `docs/reliability.md`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ensemble.run import main as fuse
from lhp.infer import main as infer
from pab.core.checkpoints import model_state, read_checkpoint
from pab.core.errors import InputError
from pab.data.annotations import read_retrieval
from pab.data.photos import list_photos, load_photo
from pab.data.training_set import TrainingSet
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
from tests.odd_files import (
    FileCase,
    checkpoint_cases,
    foreign_score_cases,
    photo_cases,
    put,
    shard_cases,
    table_cases,
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
    """Score a small folder of pictures with the debug model."""

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
        """Run the command, and return image name -> scores."""
        infer(self.argv(name))
        found = load_scores(self.folder / f"{name}.pt")
        return dict(zip(found.gallery_ids, found.scores.T.tolist(), strict=True))

    def wrote_nothing(self) -> bool:
        return not list(self.folder.glob("s.*")) and not list(self.folder.rglob("*.tmp"))


@pytest.fixture
def scorer(debug_checkpoint: Path, tokenizer_file: Path, tmp_path: Path) -> Scorer:
    return Scorer(tmp_path, debug_checkpoint, tokenizer_file)


def named(case: ImageCase | TextCase | ScoreCase | FileCase) -> str:
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


@pytest.mark.parametrize("case", shard_cases(), ids=named)
def test_training_shard(case: FileCase, tmp_path: Path) -> None:
    path = put(tmp_path / "annotation/train", case)
    if case.refused:
        with pytest.raises(InputError) as found:
            TrainingSet.open(tmp_path, [path])
        assert case.refused in str(found.value)
        return
    (read,) = TrainingSet.open(tmp_path, [path])
    assert read.image_id in ("0_0", "7")
    assert read.caption == "a man falls"
    assert read.image.startswith("train/")


@pytest.mark.parametrize("case", table_cases(), ids=named)
def test_table_of_captions(case: FileCase, tmp_path: Path) -> None:
    path = put(tmp_path, case)
    if case.refused:
        with pytest.raises(InputError) as found:
            read_retrieval(path)
        assert case.refused in str(found.value)
        return
    read = read_retrieval(path)
    assert read.gallery is not None
    assert [image.gallery_id for image in read.gallery] == ["a", "b"]
    assert [query.query_id for query in read.queries] == ["a#0", "b#0"]


@pytest.mark.parametrize("case", foreign_score_cases(), ids=named)
def test_scores_of_other_tools(
    case: FileCase, tmp_path: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.txt"
    argv = ["--beit3_score", str(put(tmp_path, case)), "--output_file", str(out)]
    if case.refused:
        assert case.refused in refused(fuse, argv)
        assert not out.exists()
        assert "code of a score file ran" not in capsys.readouterr().out
    else:
        fuse(argv)
        assert out.read_text() == "c b a\nc b a\n"


@pytest.mark.parametrize("case", checkpoint_cases(), ids=named)
def test_checkpoint(case: FileCase, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = put(tmp_path, case)
    if case.refused:
        with pytest.raises(InputError) as found:
            model_state(read_checkpoint(path), path)
        assert case.refused in str(found.value)
        assert "code of a score file ran" not in capsys.readouterr().out
        return
    state = model_state(read_checkpoint(path), path)
    assert {name: tensor.tolist() for name, tensor in state.items()} == {"w": [1.0, 2.0]}


@pytest.mark.parametrize("case", photo_cases(), ids=named)
def test_photograph(case: FileCase, tmp_path: Path) -> None:
    path = put(tmp_path, case)
    listed = list_photos(tmp_path)
    if case.refused:
        with pytest.raises(InputError) as found:
            load_photo(path)
        assert case.refused in str(found.value)
        return
    assert [photo.gallery_id for photo in listed.photos] == [case.name]
    shown, wanted = (
        np.asarray(image, dtype=int) for image in (load_photo(path), picture((48, 32)))
    )
    assert shown.shape == wanted.shape
    # Mean change of the pixels: below 6 for compression and palettes, above 80 for a rotation.
    assert np.abs(shown - wanted).mean() < 6


def table() -> str:
    """Format the page `docs/reliability.md` from the cases."""
    rows = []
    for kind, cases in (
        ("image", image_cases()), ("caption or annotation", caption_cases()),
        ("training shard", shard_cases()), ("table of captions", table_cases()),
        ("score file", score_cases(GOOD)), ("scores of other tools", foreign_score_cases()),
        ("ranked list", list_cases()), ("checkpoint", checkpoint_cases()),
        ("photograph (photo search)", photo_cases()),
    ):  # fmt: skip
        for case in cases:
            outcome = "refused" if case.refused else "read correctly"
            if isinstance(case, ImageCase) and case.ignored:
                outcome = "ignored: not a gallery image"
            rows.append(f"| {kind} | {case.what} | {outcome} |")
    lines = [
        "# Odd and hostile inputs",
        "",
        f"Each of the {len(rows)} cases in this table is a test. `tests/test_hostile.py` writes",
        "this page if `PAB_WRITE_TABLES=1` is set.",
        "",
        "- **Read correctly**: an image scores as the same picture in a plain RGB file does. All",
        "  other inputs are read with the expected content.",
        "- **Refused**: the command ends with exit code 2 and one line that names the file and the",
        "  line or item. It writes nothing and runs no code from the file. Photo search instead",
        "  lists the photograph as unreadable, and continues.",
        "",
        "| input | case | outcome |",
        "| --- | --- | --- |",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def test_the_table_lists_all_cases() -> None:
    if os.environ.get("PAB_WRITE_TABLES"):
        TABLE.write_text(table(), encoding="utf-8")
    assert TABLE.read_text(encoding="utf-8") == table()
