"""Scores in all forms: id lists, export and import, order of ids, archives, fusion members."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble.run import main as fuse
from pab.core.errors import InputError
from pab.data.id_lists import read_gallery_ids, read_query_ids
from pab.evaluate import main as evaluate
from pab.formats import export as score_export
from pab.formats.forms import read_form
from pab.layout.files import archive_names
from pab.ranking import ranked_names, read_ranked_list, write_ranked_list
from pab.scores import ScoreFile, load_scores, main, save_scores
from tests.scores import IDS, SCORES, read, saved

# ------------------------------------------------------------------------------------- id lists


def test_a_gallery_folder_means_its_sorted_file_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`sorted(os.listdir(folder))` sorts names with extensions: "a-1.jpg" before "a.jpg"."""
    folder = tmp_path / "gallery"
    folder.mkdir()
    for name in ("a.jpg", "a-1.jpg", "B.png"):
        (folder / name).touch()
    assert read_gallery_ids(folder) == ["B", "a-1", "a"]
    np.save(tmp_path / "s.npy", np.array([[1.0, 2.0, 3.0]], dtype=np.float32))
    (tmp_path / "query.json").write_text('{"query_index": "q1", "caption": "a man"}\n')
    ids = ["--queries", str(tmp_path / "query.json"), "--gallery", str(folder)]
    main(["import", str(tmp_path / "s.npy"), *ids, "--out", str(tmp_path / "s.pt")])
    found = load_scores(tmp_path / "s.pt")
    assert dict(zip(found.gallery_ids, found.scores[0].tolist(), strict=True)) == {
        "B": 1, "a-1": 2, "a": 3,
    }  # fmt: skip
    assert "images read in order of their file names: 3" in capsys.readouterr().err


def test_id_lists(tmp_path: Path) -> None:
    path = saved(tmp_path, b"\xef\xbb\xbfb.jpg\r\na.jpg\r\n", "g.txt")
    assert read_gallery_ids(path) == ["b", "a"]
    assert read_gallery_ids(saved(tmp_path, b"b.jpg\r\ra.jpg\r", "mac.txt")) == ["b", "a"]
    assert read_query_ids(path) == ["b.jpg", "a.jpg"]
    labelled = saved(tmp_path, '{"image": "a.jpg", "image_id": "i", "caption": ["x", "y"]}\n', "l")
    with pytest.raises(InputError, match="found other JSON"):
        read_gallery_ids(labelled)
    array = saved(tmp_path, '["b.jpg", 7]', "ids.json")
    assert read_gallery_ids(array) == ["b", "7"]
    assert read_query_ids(array) == ["b.jpg", "7"]
    for lines in (["[1] a", "b"], ["{b} c", "d"], ["[a]", "{}b"]):
        path = saved(tmp_path, "".join(f"{one}\n" for one in lines), "lines.txt")
        assert read_query_ids(path) == read_gallery_ids(path) == lines
    for broken in ('[{"image": "a.jpg", "image', '{"image": "a.jpg", "image', '["a",\n"b",\n'):
        with pytest.raises(InputError, match="broken JSON"):
            read_query_ids(saved(tmp_path, broken, "l"))
    with pytest.raises(InputError, match="expected distinct ids, found 'a' twice"):
        read_query_ids(saved(tmp_path, '["a", "a"]', "ids.json"))
    with pytest.raises(InputError, match=r"found 'a\.jpg' and 'a\.png'"):
        read_gallery_ids(saved(tmp_path, "a.jpg\na.png\n", "g.txt"))
    with pytest.raises(InputError, match="found no such file"):
        read_gallery_ids(tmp_path / "none")


# -------------------------------------------------------------------------------------- round trips


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_export_is_read_back(data: st.DataObject, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("export")
    n_queries, n_gallery = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    name = st.text(st.sampled_from("abé.,\u4e2d-0;"), min_size=1, max_size=4).map(
        lambda s: f"x{s}x"
    )
    gallery = sorted(data.draw(st.sets(name, min_size=n_gallery, max_size=n_gallery)))
    queries = [f"q{i}" for i in range(n_queries)]
    value = st.floats(width=32, min_value=-(2.0**99), max_value=2.0**99)
    rows = st.lists(value, min_size=n_gallery, max_size=n_gallery)
    scores = torch.tensor(data.draw(st.lists(rows, min_size=n_queries, max_size=n_queries)))
    score_file = ScoreFile(scores, queries, gallery)
    for form in score_export.FORMATS:
        out = folder / {"bare": "s.pt", "pt": "s.pt"}.get(form, f"s.{form}")
        written = score_export.export(score_file, form, out)
        first = [path.read_bytes() for path in written]
        assert first == [p.read_bytes() for p in score_export.export(score_file, form, out)]
        ids = {} if len(written) == 1 else {
            "query_ids": read_query_ids(written[1]), "gallery_ids": read_gallery_ids(written[2]),
        }  # fmt: skip
        found = load_scores(out, **(ids or {"gallery_ids": gallery}))
        assert (found.query_ids, found.gallery_ids) == (queries, gallery)
        if form != "trec":
            assert torch.equal(found.scores, scores)
        assert ranked_names(found.scores, gallery, 9) == ranked_names(scores, gallery, 9)


@pytest.mark.parametrize("name", ["wide.csv", "wide.tsv", "wide.txt"])
def test_tables_of_large_galleries(tmp_path: Path, name: str) -> None:
    """A line may exceed 131,072 characters, the limit of the csv module for one cell."""
    ids = [f"image_{number:06d}" for number in range(12_000)]
    wide = ScoreFile(torch.rand(2, len(ids), generator=torch.manual_seed(0)), ["q1", "q2"], ids)
    score_export.export(wide, "csv", tmp_path / name)
    assert torch.equal(load_scores(tmp_path / name).scores, wide.scores)


def test_partial_scores_round_trip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = {"q1": {"a": 1.0, "c": 0.5}, "q2": {"b": 2.0}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    for form in ("trec", "ranx", "rankings"):
        out = tmp_path / f"out.{form}"
        main(["export", str(tmp_path / "run.json"), "--format", form, "--out", str(out)])
        again = load_scores(out)
        assert again.listed == {"q1": 2, "q2": 1}
        assert torch.equal(again.scores, load_scores(tmp_path / "run.json").scores)
    assert (tmp_path / "out.trec").read_text().splitlines()[-1] == "q2 Q0 b 1 2 pab"
    main(
        ["export", str(tmp_path / "run.json"), "--format", "csv", "--out", str(tmp_path / "o.tsv")]
    )
    assert (tmp_path / "o.tsv").read_text().startswith("query\ta\tb\tc\nq1\t1\t0.49999")
    assert "unlisted images are written" in capsys.readouterr().err
    (tmp_path / "order.json").write_text('{"q1": ["c", "a"]}')
    main(["export", str(tmp_path / "order.json"), "--format", "rankings", "--out",
          str(tmp_path / "o.jsonl")])  # fmt: skip
    assert (
        tmp_path / "o.jsonl"
    ).read_text() == '{"query_index": "q1", "topk_gallery": ["c", "a"]}\n'


def test_how_many_images_are_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gallery = [f"g{i:04}" for i in range(1001)]
    save_scores(tmp_path / "s.pt", ScoreFile(torch.rand(1, 1001), ["q"], gallery))
    words = ["export", str(tmp_path / "s.pt"), "--format", "trec", "--out", str(tmp_path / "o.run")]
    for more, count in (([], 1000), (["--top_k", "3"], 3), (["--top_k", "2000"], 1001)):
        main([*words, *more])
        assert len((tmp_path / "o.run").read_text().splitlines()) == count
    assert capsys.readouterr().err.count("holds the first 1000 images of each query") == 1
    few = ScoreFile(torch.rand(1, 1001), ["q"], gallery, {"listed": {"q": 10}})
    save_scores(tmp_path / "few.pt", few)
    main(["export", str(tmp_path / "few.pt"), *words[2:]])
    assert len((tmp_path / "o.run").read_text().splitlines()) == 10
    assert "holds the first" not in capsys.readouterr().err
    for flags, message in (
        (["--format", "csv", "--top_k", "3"], "--top_k: requires --format trec or ranx or"),
        (["--format", "ranx", "--top_k", "0"], "--top_k: must be at least 1"),
    ):
        with pytest.raises(InputError, match=message):
            main(["export", str(tmp_path / "s.pt"), *flags, "--out", str(tmp_path / "x")])
    with pytest.raises(InputError, match="--out: expected the file to write"):
        main(["export", str(tmp_path / "s.pt"), "--format", "csv"])
    with pytest.raises(InputError, match="it would be overwritten"):
        main(
            ["export", str(tmp_path / "s.pt"), "--format", "bare", "--out", str(tmp_path / "s.pt")]
        )
    save_scores(tmp_path / "s.pt", ScoreFile(torch.rand(1, 1), ["q"], ["two words"]))
    with pytest.raises(InputError, match=r"o\.run: expected ids without blanks, found 'two words'"):
        main(words)


# ------------------------------------------------------------------------------------ order of ids


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_rows_and_columns_in_any_order_give_the_same_file(
    data: st.DataObject, tmp_path_factory: Any
) -> None:
    folder = tmp_path_factory.mktemp("order")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    scores = torch.randint(0, 5, (3, 5), generator=generator).float()
    queries, gallery = ["q1", "q2", "q3"], ["a", "b", "c", "d", "e"]
    rows = data.draw(st.permutations(range(3)))
    columns = data.draw(st.permutations(range(5)))
    moved = scores[list(rows)][:, list(columns)]
    ids = [queries[i] for i in rows], [gallery[i] for i in columns]
    extension = data.draw(st.sampled_from(["", ".jpg", ".PNG"]))
    names = [name + extension for name in ids[1]]
    form = data.draw(st.sampled_from(["pt", "npz", "csv", "json"]))
    path = folder / f"s.{form}"
    if form == "pt":
        torch.save({"scores": moved, "query_ids": ids[0], "gallery_ids": names}, path)
    elif form == "npz":
        np.savez(path, scores=moved.numpy(), query_ids=ids[0], gallery_ids=names)
    elif form == "csv":
        lines = [",".join(["", *names])]
        lines += [
            ",".join([q, *map(str, row)]) for q, row in zip(ids[0], moved.tolist(), strict=True)
        ]
        path.write_text("\n".join(lines))
    else:
        run = {
            q: dict(zip(names, row, strict=True))
            for q, row in zip(ids[0], moved.tolist(), strict=True)
        }
        path.write_text(json.dumps(run))
    found = load_scores(path)
    assert found.gallery_ids == gallery
    order = [found.query_ids.index(query) for query in queries]
    assert torch.equal(found.scores[order], scores)


# -------------------------------------------------------------------------------------- answer.zip


def test_answer_zip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_scores(tmp_path / "s.pt", ScoreFile(SCORES, **IDS))
    for name in ("answer.txt", "answer.zip"):
        fuse(["--beit3_score", str(tmp_path / "s.pt"), "--output_file", str(tmp_path / name)])
    text = (tmp_path / "answer.txt").read_bytes()
    with zipfile.ZipFile(tmp_path / "answer.zip") as archive:
        assert archive.namelist() == ["answer.txt"]
        assert archive.read("answer.txt") == text
    again = tmp_path / "again.zip"
    fuse(["--beit3_score", str(tmp_path / "s.pt"), "--output_file", str(again)])
    assert again.read_bytes() == (tmp_path / "answer.zip").read_bytes()
    assert not list(tmp_path.glob(".*"))

    rows = [{"image": f"test/{n}.jpg", "image_id": n, "caption": [n]} for n in "abc"]
    labelled = tmp_path / "annotation/labels.json"
    labelled.parent.mkdir()
    labelled.write_text("".join(json.dumps(row) + "\n" for row in rows[:1]))
    (tmp_path / "one.txt").write_text("a\n")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.write(tmp_path / "one.txt", "submission/list.txt")
        archive.writestr("__MACOSX/submission/._list.txt", "")
    capsys.readouterr()
    evaluate(["--predictions", str(tmp_path / "other.zip"), "--annotation", str(labelled)])
    said = capsys.readouterr()
    assert said.out.splitlines()[1].split()[2] == "100.00"
    assert "its file 'submission/list.txt' is read as answer.txt" in said.err


@pytest.mark.parametrize("members", [[], ["a.txt", "b.txt"], ["a.csv"]])
def test_zips_that_hold_no_list(tmp_path: Path, members: list[str]) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in members:
            archive.writestr(name, "a b\n")
    with pytest.raises(InputError, match=r"x\.zip: expected a score file"):
        read_form(tmp_path / "x.zip")


def test_a_zip_with_a_damaged_name_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("é.txt", "a b\n")
    raw = (tmp_path / "x.zip").read_bytes()
    (tmp_path / "x.zip").write_bytes(raw.replace("é".encode(), b"\xff\xfe"))
    for reader in (read_form, read_ranked_list, archive_names):
        with pytest.raises(InputError, match=r"x\.zip: (expected .*, found a|cannot be read)"):
            reader(tmp_path / "x.zip")


def test_a_name_with_a_blank_leaves_no_zip(tmp_path: Path) -> None:
    save_scores(tmp_path / "s.pt", ScoreFile(SCORES, ["q1", "q2"], ["a", "b", "c d"]))
    with pytest.raises(InputError, match="'c d' cannot be written"):
        fuse(["--beit3_score", str(tmp_path / "s.pt"), "--output_file", str(tmp_path / "x.zip")])
    assert [path.name for path in tmp_path.iterdir()] == ["s.pt"]


def declaring(path: Path, size: int) -> Path:
    """Make the first member of a zip file declare ``size`` as its unpacked size."""
    raw = bytearray(path.read_bytes())
    at = raw.index(b"PK\1\2") + 24  # in the central directory
    raw[at : at + 4] = struct.pack("<I", size)
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("name", ["answer.zip", "s.npz"])
def test_an_archive_with_a_huge_unpacked_size_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "s.npz":
        np.savez_compressed(path, scores=SCORES.numpy())
    else:
        write_ranked_list(path, [["a", "b"], ["b", "a"]])
    before = path.read_bytes()
    with pytest.raises(
        InputError, match=r"expected a zip file .*, found 2\.0 GiB packed in \d+ bytes"
    ):
        read_form(declaring(path, 1 << 31))
    path.write_bytes(before)
    read_form(declaring(path, struct.unpack_from("<I", before, before.index(b"PK\1\2") + 24)[0]))


# ------------------------------------------------------------------------------------------ members


def member_words(folder: Path, *paths: Path) -> list[str]:
    words = ["--beit3_score", str(paths[0])]
    for number, path in enumerate(paths[1:]):
        words += ["--member", f"m{number}={path}:0.5"]
    return [*words, "--output_file", str(folder / "o.txt"), "--save_score", str(folder / "o.pt")]


def test_members_in_two_spellings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = ScoreFile(torch.rand(1, 3), ["q"], ["B", "C", "Caf\u00e9"])
    other = ScoreFile(torch.rand(1, 3), ["q"], ["B.jpg", "C.jpg", "Cafe\u0301.jpg"])
    save_scores(tmp_path / "1.pt", one)
    save_scores(tmp_path / "2.pt", other)
    fuse(member_words(tmp_path, tmp_path / "1.pt", tmp_path / "2.pt"))
    assert load_scores(tmp_path / "o.pt").gallery_ids == one.gallery_ids
    assert capsys.readouterr().err.count("names matched to") == 1
    both = ScoreFile(torch.rand(1, 3), ["q"], ["B", "Cafe\u0301", "Caf\u00e9"])
    save_scores(tmp_path / "3.pt", both)  # two images, whose names look alike
    with pytest.raises(InputError, match=r"3\.pt: expected distinct names, found .* both match"):
        fuse(member_words(tmp_path, tmp_path / "1.pt", tmp_path / "3.pt"))


def test_runs_alone_have_the_images_that_they_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text('{"q": {"x.jpg": 1, "y.jpg": 0.5}}')
    (tmp_path / "b.json").write_text('{"q": {"z": 3, "y": 1}}')
    fuse(member_words(tmp_path, tmp_path / "a.json", tmp_path / "b.json"))
    assert load_scores(tmp_path / "o.pt").gallery_ids == ["x", "y", "z"]
    assert "the gallery is assumed to be the listed images (3)" in capsys.readouterr().err
    main(["import", str(tmp_path / "a.json"), "--out", str(tmp_path / "a.pt")])
    whole = (tmp_path / "o.txt").read_text()
    fuse(member_words(tmp_path, tmp_path / "a.pt", tmp_path / "b.json"))
    assert (tmp_path / "o.txt").read_text() == whole
    (tmp_path / "g.txt").write_text("w\nx\ny\nz\n")
    words = [*member_words(tmp_path, tmp_path / "a.json"), "--gallery", str(tmp_path / "g.txt")]
    fuse(words)
    assert load_scores(tmp_path / "o.pt").gallery_ids == ["w", "x", "y", "z"]


def test_a_run_that_lacks_queries_is_not_fused(tmp_path: Path) -> None:
    save_scores(tmp_path / "s.pt", ScoreFile(SCORES, **IDS))
    (tmp_path / "run.json").write_text('{"q2": {"a": 1}}')
    with pytest.raises(InputError, match=r"run\.json: expected all 2 queries, .*'q1'; complete"):
        fuse(member_words(tmp_path, tmp_path / "s.pt", tmp_path / "run.json"))
    (tmp_path / "run.json").write_text('{"q1": {"a": 1}, "q2": {"a": 1}, "q3": {"a": 1}}')
    with pytest.raises(InputError, match=r"run\.json, query_ids: .*not in .*: 'q3'"):
        fuse(member_words(tmp_path, tmp_path / "s.pt", tmp_path / "run.json"))
    (tmp_path / "run.json").write_text('{"q1": {"z": 1}, "q2": {"a": 1}}')
    with pytest.raises(InputError, match=r"run\.json, query 'q1': the name 'z' is not in the gall"):
        fuse(member_words(tmp_path, tmp_path / "s.pt", tmp_path / "run.json"))


def test_files_of_other_forms_are_not_read_as_ranked_lists(tmp_path: Path) -> None:
    """Words of a JSON file or of a TREC run must not pass as names of images."""
    for text, form in (
        ('{"query_index": "q", "topk_gallery": ["a"]}\n', "JSON"),
        ('[\n {"query_index": "q"}]\n', "JSON"),
        ("q Q0 a 1 0.5 tag\nq Q0 b 2 0.4 tag\n", "a TREC run"),
        ("q Q0 a - 0.5\rq Q0 b - 0.4\r", "a TREC run"),
        ("q 0 a 1 0.5\nr 0 b 2 0.4\n", "a TREC run"),
    ):
        with pytest.raises(InputError, match=f"found {form}"):
            read_ranked_list(saved(tmp_path, text, "l.txt"))


def test_text_in_a_pt_file_is_not_a_list(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a score file"):
        load_scores(saved(tmp_path, "no scores\n", "x.pt"), query_ids=["q"])


@pytest.mark.parametrize("make", [io.BytesIO], ids=["old format"])
def test_files_in_the_old_format_of_torch(tmp_path: Path, make: Callable[[], io.BytesIO]) -> None:
    stream = make()
    torch.save({"sims": SCORES}, stream, _use_new_zipfile_serialization=False)
    assert torch.equal(read(saved(tmp_path, stream.getvalue(), "old.pt")).scores, SCORES)
