"""Names of images: spellings of members, labels and gallery; members that lack images."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ensemble.run import main as run
from ensemble.search import main as search
from pab.core.errors import InputError
from pab.data.annotations import read_retrieval
from pab.evaluate import evaluate
from pab.scores import load_scores
from tests.conftest import write_lines
from tests.fusion import fused, write

COUNT = 6
NAMES = [f"é{n}" for n in range(COUNT)]
QUERIES = [f"{name}.jpg#0" for name in NAMES]  # ids of the annotation's captions
SPELLINGS = {
    "extension": lambda name: f"{name}.jpg",
    "decomposed": lambda name: unicodedata.normalize("NFD", name),
    "both": lambda name: unicodedata.normalize("NFD", name) + ".PNG",
}


def matrix(seed: int) -> Tensor:
    noise = torch.rand(COUNT, COUNT, generator=torch.Generator().manual_seed(seed))
    return noise + 0.5 * torch.eye(COUNT)


def table(path: Path, scores: Tensor, names: list[str]) -> str:
    """Write scores as CSV, with image names in the header."""
    rows = [["query", *names]]
    rows += [[query, *map(str, row)] for query, row in zip(QUERIES, scores.tolist(), strict=True)]
    path.write_text("".join(",".join(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def annotation(tmp_path: Path) -> str:
    """Write labels whose image ids have extensions."""
    lines = [
        {"image": f"train/{name}.jpg", "image_id": f"{name}.jpg", "caption": [name]}
        for name in NAMES
    ]
    path = tmp_path / "annotation/val.json"
    write_lines(path, lines)
    return str(path)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_members_may_spell_the_names_of_the_labels_in_another_way(
    annotation: str, tmp_path: Path, spelling: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [SPELLINGS[spelling](name) for name in NAMES]
    paths = [table(tmp_path / f"{seed}.csv", matrix(seed), names) for seed in (1, 2)]
    own = write(tmp_path / "own.pt", matrix(3), QUERIES, names)
    words = ["--beit3_score", paths[0], "--clip_score", paths[1], "--annotation", annotation]
    for flags in (words, ["--beit3_score", own, *words[2:]]):
        found = fused(tmp_path, *flags, "--ladder")
        mean = evaluate(found, read_retrieval(annotation)).summary()
        assert f"fused  {mean['R@1']:.2f}" in capsys.readouterr().out
        search([*flags, "--folds", "0", "--out", str(tmp_path / "w.yaml")]
               + ["--trials", str(tmp_path / "t.csv")])  # fmt: skip
        alone = evaluate(load_scores(flags[1]), read_retrieval(annotation)).summary()
        assert f"lhp: R@1 {alone['R@1']:.2f}" in capsys.readouterr().out


def folder_of(tmp_path: Path, count: int = COUNT) -> str:
    (tmp_path / "gallery").mkdir()
    for name in NAMES[:count]:
        (tmp_path / "gallery" / f"{name}.jpg").touch()
    return str(tmp_path / "gallery")


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_bank_may_spell_the_names_of_the_gallery_in_another_way(
    tmp_path: Path, spelling: str
) -> None:
    plain = write(tmp_path / "a.pt", matrix(1), QUERIES, NAMES)
    names = [SPELLINGS[spelling](name) for name in NAMES]
    banks = [
        write(tmp_path / "bank.pt", matrix(2), QUERIES, NAMES),
        table(tmp_path / "bank.csv", matrix(2), names),
        write(tmp_path / "own.pt", matrix(2), QUERIES, names),
    ]
    words = ["--beit3_score", plain, "--decode", "querybank", "--decode_bank"]
    expected, *others = (fused(tmp_path, *words, bank).scores for bank in banks)
    for found in others:
        torch.testing.assert_close(found, expected)


def test_names_take_the_spelling_of_the_folder(tmp_path: Path) -> None:
    names = [SPELLINGS["both"](name) for name in NAMES]
    own = write(tmp_path / "own.pt", matrix(1), QUERIES, names)
    found = fused(tmp_path, "--beit3_score", own, "--image_folder", folder_of(tmp_path))
    assert found.gallery_ids == NAMES
    assert torch.equal(found.scores.argmax(dim=1), matrix(1).argmax(dim=1))


def test_members_without_some_images_of_the_gallery_are_refused(
    annotation: str, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path)
    part = write(tmp_path / "part.pt", matrix(1)[:, 1:], QUERIES, NAMES[1:])
    out = ["--output_file", str(tmp_path / "o.txt")]
    with pytest.raises(InputError, match=r"part\.pt: .*ids of the gallery that are missing: 'é0'"):
        run(["--beit3_score", part, "--image_folder", folder, *out])
    assert not (tmp_path / "o.txt").exists()
    out = ["--out", str(tmp_path / "w.yaml"), "--trials", str(tmp_path / "t.csv")]
    words = ["--clip_score", part, "--beit3_score", part, "--annotation", annotation]
    with pytest.raises(InputError, match=r"ids of the gallery that are missing: 'é0"):
        search([*words, *out])
    assert not (tmp_path / "w.yaml").exists()


def test_a_search_accepts_scores_with_distractors(annotation: str, tmp_path: Path) -> None:
    wider = write(tmp_path / "wide.pt", torch.rand(COUNT, COUNT + 1), QUERIES, [*NAMES, "z"])
    words = ["--clip_score", wider, "--beit3_score", wider, "--annotation", annotation]
    search([*words, "--out", str(tmp_path / "w.yaml"), "--trials", str(tmp_path / "t.csv")])
    assert (tmp_path / "w.yaml").exists()


def test_runs_may_lack_images_of_the_gallery(tmp_path: Path) -> None:
    lines = [f"{query} Q0 {name} 1 0.5 tag\n" for query, name in zip(QUERIES, NAMES, strict=True)]
    (tmp_path / "run.txt").write_text("".join(lines[:3]), encoding="utf-8")
    found = fused(
        tmp_path, "--beit3_score", str(tmp_path / "run.txt"),
        "--image_folder", folder_of(tmp_path),
    )  # fmt: skip
    assert found.gallery_ids == NAMES
    assert found.listed == dict.fromkeys(QUERIES[:3], 1)
