"""Small score files of other tools (`tests/data/scores`): imported, and passed to a fusion.

The files read here have the ranking of ``MATRIX``. Those with scores have the scores of ``MATRIX``,
except `reranked.json`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ensemble.run import main as fuse
from pab.core.errors import InputError
from pab.evaluate import main as evaluate
from pab.ranking import ranked_names
from pab.scores import ScoreFile, load_scores, save_scores
from pab.scores import main as convert

DATA = Path(__file__).parent / "data/scores"
QUERIES = [f"q{i}" for i in range(6)]
GALLERY = [f"IM{i:02}" for i in range(12)]
MATRIX = torch.tensor(
    [
        [0.75, 0.30, 0.40, 0.75, 0.05, 0.80, 0.40, 0.75, 0.55, 0.45, 0.65, 0.50],
        [0.70, 0.30, 0.45, 0.45, 0.55, 0.50, 0.95, 0.65, 0.30, 0.20, 0.40, 0.30],
        [0.35, 0.50, 0.80, 0.75, 0.00, 0.80, 0.65, 0.95, 0.85, 0.05, 0.00, 0.25],
        [0.95, 0.40, 0.70, 0.25, 1.00, 0.30, 0.85, 0.50, 0.25, 0.75, 0.25, 0.65],
        [0.35, 0.45, 0.00, 0.25, 0.75, 0.40, 1.00, 0.90, 0.50, 0.15, 0.80, 0.65],
        [0.20, 0.80, 0.80, 0.95, 0.20, 0.40, 0.50, 0.55, 0.10, 0.15, 0.75, 0.40],
    ]
)
IDS = ["--queries", str(DATA / "query_ids.txt"), "--gallery", str(DATA / "gallery_ids.txt")]
WITHOUT_IDS = ["bare.pt", "bare.npy", "dict_half.pt", "numpy_inside.pt"]
WITH_IDS = ["with_ids.npz", "table.csv", "unsorted_columns.pt", "carries_gradient.pt"]
LISTED = {"run.trec": 8, "ranx_run.json": 8, "rankings.jsonl": 8, "reranked.json": 5}
LISTS = ranked_names(MATRIX, GALLERY, 12)


def imported(name: str, folder: Path, *flags: str) -> ScoreFile:
    convert(["import", str(DATA / name), *flags, "--out", str(folder / "imported.pt")])
    return load_scores(folder / "imported.pt")


def fused(folder: Path, path: Path | str, *flags: str) -> ScoreFile:
    """Fuse a file with a second member, so that scores matter, not only their order."""
    other = folder / "other.pt"
    generator = torch.Generator().manual_seed(0)
    save_scores(other, ScoreFile(torch.rand(6, 12, generator=generator), QUERIES, GALLERY))
    out = ["--output_file", str(folder / "o.txt"), "--save_score", str(folder / "o.pt")]
    fuse(["--beit3_score", str(other), "--member", f"x={path}:0.6", *flags, *out])
    return load_scores(folder / "o.pt")


@pytest.mark.parametrize("name", [*WITHOUT_IDS, *WITH_IDS])
def test_whole_matrices(name: str, tmp_path: Path) -> None:
    flags = IDS if name in WITHOUT_IDS else []
    found = imported(name, tmp_path, *flags)
    assert (found.query_ids, found.gallery_ids) == (QUERIES, GALLERY)
    half = name == "dict_half.pt"
    torch.testing.assert_close(found.scores, MATRIX, atol=5e-4 if half else 1e-7, rtol=0)
    assert not found.scores.requires_grad
    assert found.listed is None

    direct = fused(tmp_path, DATA / name, *flags).scores
    assert torch.equal(direct, fused(tmp_path, tmp_path / "imported.pt").scores)
    save_scores(tmp_path / "own.pt", ScoreFile(MATRIX, QUERIES, GALLERY))
    own = fused(tmp_path, tmp_path / "own.pt").scores
    torch.testing.assert_close(direct, own, atol=5e-4 if half else 1e-6, rtol=0)


@pytest.mark.parametrize("name", WITHOUT_IDS)
def test_files_without_ids_ask_for_both_lists(name: str, tmp_path: Path) -> None:
    for run in (lambda: imported(name, tmp_path), lambda: fused(tmp_path, DATA / name)):
        with pytest.raises(InputError, match=f"{name}.*pass --queries FILE and --gallery FILE"):
            run()
    # Commands without these flags, such as uit.infer, name only the conversion.
    with pytest.raises(InputError, match=f"{name}.*any; convert it .* --queries FILE --gallery"):
        load_scores(DATA / name)
    assert not (tmp_path / "imported.pt").exists()
    assert not (tmp_path / "o.txt").exists()


@pytest.mark.parametrize("name", LISTED)
def test_forms_that_list_the_best(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gallery = ["--gallery", str(DATA / "gallery_ids.txt")]
    found = imported(name, tmp_path, *gallery)
    count = LISTED[name]
    assert (found.query_ids, found.gallery_ids) == (QUERIES, GALLERY)
    assert found.listed == dict.fromkeys(QUERIES, count)
    for row, names in enumerate(LISTS):
        scores = dict(zip(GALLERY, found.scores[row].tolist(), strict=True))
        listed = [scores[image] for image in names[:count]]
        if name == "rankings.jsonl":
            assert listed == pytest.approx([1 / r for r in range(1, count + 1)])
        elif name != "reranked.json":  # its scores are not those of MATRIX
            best = MATRIX[row].sort(descending=True).values[:count]
            assert listed == pytest.approx(best.tolist(), abs=1e-4)
        below = torch.nextafter(torch.tensor(min(listed)), torch.tensor(-torch.inf)).item()
        assert {scores[image] for image in names[count:]} == {below}
        assert ranked_names(found.scores[row : row + 1], GALLERY, count) == [names[:count]]
    assert f"lists {count} images of 12 per query" in capsys.readouterr().err

    direct = fused(tmp_path, DATA / name)
    assert torch.equal(direct.scores, fused(tmp_path, tmp_path / "imported.pt").scores)
    expected = "rank r scores 1 / r" if name == "rankings.jsonl" else f"lists {count} images"
    assert expected in capsys.readouterr().err


def test_reranked_scores() -> None:
    content = json.loads((DATA / "reranked.json").read_text())
    found = load_scores(DATA / "reranked.json", gallery_ids=GALLERY)
    for row, record in zip(found.scores, content, strict=True):
        for entry in record["reranked"]:
            column = GALLERY.index(entry["image"].removesuffix(".jpg"))
            assert row[column].item() == pytest.approx(entry["score"])


def test_rankings_fuse_as_the_ranked_list_of_the_same_names(tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_text("".join(" ".join(names[:8]) + "\n" for names in LISTS))
    lines = ["--queries", str(DATA / "query_ids.txt")]
    as_list = fused(tmp_path, tmp_path / "l.txt", *lines)
    assert torch.equal(as_list.scores, fused(tmp_path, DATA / "rankings.jsonl").scores)
    # The import records which images a list names, so the fusion is the same.
    imported_list = imported_from(tmp_path / "l.txt", tmp_path, *lines)
    assert torch.equal(as_list.scores, fused(tmp_path, imported_list).scores)


def imported_from(path: Path, folder: Path, *flags: str) -> Path:
    convert(["import", str(path), *flags, "--out", str(folder / "list.pt")])
    return folder / "list.pt"


def test_a_byte_order_mark_before_the_first_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "query.json").write_text(
        "".join(json.dumps({"query_index": q, "caption": "a person"}) + "\n" for q in QUERIES)
    )
    labels = ["--annotation", str(tmp_path / "query.json"), "--answers", str(DATA / "answers.json")]
    raw = (DATA / "list_bom.txt").read_bytes()
    plain = raw.removeprefix(b"\xef\xbb\xbf")
    assert plain != raw
    tables = []
    wide = [raw.decode().encode(encoding) for encoding in ("utf-16", "utf-32")]
    for content in (raw, plain, plain.replace(b"\n", b"\r\n"), *wide):
        (tmp_path / "list.txt").write_bytes(content)
        evaluate(["--predictions", str(tmp_path / "list.txt"), *labels])
        tables.append(capsys.readouterr().out)
    assert len(set(tables)) == 1
    right = json.loads((DATA / "answers.json").read_text())
    first = [line.split()[0] for line in plain.decode().splitlines()]
    hits = sum(right[q]["gallery"] == name for q, name in zip(QUERIES, first, strict=True))
    assert tables[0].splitlines()[1].split()[2] == f"{100 * hits / 6:.2f}"
    assert first[0] == right["q0"]["gallery"]  # the line after the byte-order mark is a hit

    save_scores(tmp_path / "own.pt", ScoreFile(MATRIX, QUERIES, GALLERY))
    for path in (DATA / "list_bom.txt", tmp_path / "list.txt"):
        lines = ["--queries", str(DATA / "query_ids.txt")]
        again = fused(tmp_path, path, *lines)
        assert again.gallery_ids == GALLERY


@pytest.mark.parametrize("name", [*WITHOUT_IDS, *WITH_IDS, *LISTED, "list_bom.txt"])
def test_every_form_is_explained(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    convert(["show", str(DATA / name)])
    out = capsys.readouterr().out
    assert out.splitlines()[0] == f"file      {DATA / name}"
    assert "form " in out
    if name in LISTED:
        assert f"listed    {LISTED[name]} images per query" in out
    elif name in WITHOUT_IDS or name == "list_bom.txt":
        assert "none for the rows" in out
        assert f"python -m pab.scores import {DATA / name} --queries FILE" in out
    else:
        assert "q0 ... q5" in out
        assert "IM00 ... IM11" in out
