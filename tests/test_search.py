"""Photo search with the shipped mini models, through the commands of a first-time user."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pytest
import torch
from conftest import SHARED, draw
from PIL import Image

import pab.data.photos
from pab.core.errors import InputError
from pab.data.photos import list_photos, load_photo
from pab.scoring.encoder import Encoder, Origin
from pab.search.__main__ import main
from pab.search.engine import search
from pab.search.members import read_member
from pab.search.texts import TOP_K, check_query
from scripts import clip_infer

ROOT = Path(__file__).parents[1]
LHP = ["--model", "lhp", "--config", "configs/lhp/mini_infer.yaml"]
CLIP = ["--model", "clip", "--arch", "local-dir:checkpoints/mini/clip"]
UIT = ["--model", "uit", "--config", "configs/uit/mini_infer.yaml"]
BLIP2 = ["--model", "blip2", "--arch", "mini", "--text_encoder", "checkpoints/mini/bert"]
HERE = ["--num_workers", "0"]
CASES = SHARED / "cases/photos"
NARROW = "\u202f"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Photographs of several kinds, with two files that cannot be read."""
    monkeypatch.chdir(ROOT)  # the mini configs have paths relative to ROOT
    monkeypatch.setattr("pab.search.results.UNREADABLE", tmp_path / "default/unreadable.txt")
    photos = tmp_path / "photos"
    for number in range(4):
        draw(photos / f"p{number}.jpg", number, normal=number % 2 == 0)
    drawn = Image.open(photos / "p0.jpg")
    drawn.save(photos / f"Screenshot 9.41{NARROW}AM.png")
    pillow_heif.from_pillow(drawn).save(photos / "IMG_1 (2).HEIC")
    drawn.save(photos / "p0.png")
    (photos / "cut.jpg").write_bytes((photos / "p1.jpg").read_bytes()[:600])
    (photos / "text.png").write_text("not an image")
    (photos / "sub").mkdir()
    drawn.save(photos / "sub/deep.webp")
    return photos


READABLE = [
    "IMG_1 (2).HEIC", f"Screenshot 9.41{NARROW}AM.png", "p0.jpg", "p0.png", "p1.jpg", "p2.jpg",
    "p3.jpg",
]  # fmt: skip


def empty(folder: Path) -> None:
    """Remove the files directly in a folder."""
    for path in list(folder.iterdir()):
        if path.is_file():
            path.unlink()


def ranked(output: str) -> dict[str, list[str]]:
    """Map each query of the printed lists to its image names."""
    found: dict[str, list[str]] = {}
    for line in output.splitlines():
        match = re.fullmatch(r" {0,3}(\d+) +(-?\d+\.\d{4})  (.*)", line)
        if match is None:
            names = found.setdefault(line, [])
        else:
            names.append(match[3])
            assert int(match[1]) == len(names)
    return found


# ------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize("model", [LHP, UIT, CLIP, BLIP2], ids=lambda words: words[1])
def test_every_member_finds_every_readable_image(
    folder: Path, model: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    json_file = folder.parent / "out/found.json"
    main([*model, "--image_folder", str(folder), "--query", "a man falls", "--query", "é"]
         + ["--json", str(json_file), *HERE])  # fmt: skip
    said = capsys.readouterr()
    found = ranked(said.out)
    assert list(found) == ["a man falls", "é"]
    assert all(sorted(names) == READABLE for names in found.values())
    notes = [line for line in said.err.splitlines() if line.startswith("note: ")]
    nested = "not searched: 1 image in 1 nested folder; --recursive also searches nested folders"
    assert f"note: {folder}: {nested}" in notes
    listing = json_file.with_name("found.unreadable.txt")
    assert said.err.splitlines()[-1] == (f"7 images indexed, 2 not readable (listed in {listing})")
    lines = [line.split("\t") for line in listing.read_text().splitlines()]
    assert [name for name, _ in lines] == ["cut.jpg", "text.png"]
    assert "truncated" in lines[0][1].lower()
    assert "not a JPEG, PNG, WebP, BMP, GIF, TIFF, HEIC or AVIF image" in lines[1][1]
    results = json.loads(json_file.read_text())
    assert [one["query"] for one in results["queries"]] == ["a man falls", "é"]
    for one in results["queries"]:
        assert [image["path"] for image in one["images"]] == found[one["query"]]
        assert [image["rank"] for image in one["images"]] == list(range(1, 8))
        scores = [image["score"] for image in one["images"]]
        assert scores == sorted(scores, reverse=True)
    assert results["unreadable"] == [{"path": name, "problem": why} for name, why in lines]
    assert (results["model"], results["indexed"]) == (model[1], 7)


def test_nested_folders(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*CLIP, "--image_folder", str(folder), "--query", "a", "--recursive", *HERE])
    said = capsys.readouterr()
    assert sorted(ranked(said.out)["a"]) == sorted([*READABLE, "sub/deep.webp"])
    assert "not searched" not in said.err
    assert said.err.splitlines()[-1] == (
        f"8 images indexed, 2 not readable (listed in {folder.parent / 'default/unreadable.txt'})"
    )


def test_equal_queries_and_top_k(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    queries = ["a man", "a woman", "a man"]
    words = [word for query in queries for word in ("--query", query)]
    page, json_file = folder.parent / "page.html", folder.parent / "found.json"
    main([*CLIP, "--image_folder", str(folder), *words, "--top_k", "2", *HERE]
         + ["--html", str(page), "--json", str(json_file)])  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert lines[::3] == queries
    assert len(lines) == 9
    assert lines[1:3] == lines[7:9]
    assert [one["query"] for one in json.loads(json_file.read_text())["queries"]] == queries
    text = page.read_text()
    assert re.findall(r"<h2 .*?>(.*?)</h2>", text) == queries
    assert text.count("<img ") == 6


def test_twenty_results_by_default(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(30):
        draw(folder / f"more{number}.jpg", number, normal=True)
    main([*CLIP, "--image_folder", str(folder), "--query", "a", *HERE])
    assert len(capsys.readouterr().out.splitlines()) == TOP_K + 1 == 21


def test_the_unreadable_list_of_an_earlier_search_is_removed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*CLIP, "--image_folder", str(folder), "--query", "a", *HERE]
    main(words)
    assert (folder.parent / "default/unreadable.txt").is_file()
    for name in ("cut.jpg", "text.png"):
        (folder / name).unlink()
    main(words)
    assert not (folder.parent / "default/unreadable.txt").exists()
    assert capsys.readouterr().err.splitlines()[-1] == "7 images indexed, 0 not readable"


def test_the_scores_are_those_of_the_scoring_command(folder: Path) -> None:
    """Both commands read the same pixels from small upright photographs."""
    empty(folder)
    for number in range(4):
        draw(folder / f"p{number}.jpg", number, normal=number % 2 == 0)
    query = folder.parent / "query.json"
    query.write_text(json.dumps({"query_index": "q", "caption": "a man falls"}) + "\n")
    scores, found = folder.parent / "scores.pt", folder.parent / "found.json"
    clip_infer.main(
        ["--model", CLIP[-1], "--image_folder", str(folder), "--annotation", str(query), *HERE]
        + ["--save_score", str(scores), "--output_file", "none"]
    )
    main([*CLIP, "--image_folder", str(folder), "--query", "a man falls", *HERE]
         + ["--json", str(found)])  # fmt: skip
    expected = torch.load(scores, weights_only=True)
    images = json.loads(found.read_text())["queries"][0]["images"]
    assert len(images) == 4
    for image in images:
        column = expected["gallery_ids"].index(Path(image["path"]).stem)
        assert image["score"] == pytest.approx(float(expected["scores"][0, column]), abs=1e-6)


def test_a_repeated_search_decodes_only_what_is_new(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []
    true_decode = pab.data.photos.decode_photo

    def decode(file: Any, path: Path, **options: Any) -> Image.Image:
        decoded.append(path.name)
        return true_decode(file, path, **options)

    monkeypatch.setattr("pab.data.photos.decode_photo", decode)
    words = [*CLIP, "--image_folder", str(folder), *HERE]
    main([*words, "--query", "a"])
    assert sorted(decoded) == sorted([*READABLE, "cut.jpg", "text.png"])
    decoded.clear()
    draw(folder / "new.jpg", 9, normal=True)
    (folder / "p1.jpg").rename(folder / "renamed.jpg")
    main([*words, "--query", "b"])
    assert sorted(decoded) == ["cut.jpg", "new.jpg", "text.png"]


def test_scoring_and_search_cache_separate_features(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both share a cache, but scoring reads pixels as stored, and search rotates them upright."""
    empty(folder)
    exif = Image.Exif()
    exif[0x0112] = 6
    draw(folder / "lying.png", 1, normal=True)
    upright = Image.open(folder / "lying.png").convert("RGB")
    upright.transpose(Image.Transpose.ROTATE_90).save(folder / "lying.png", exif=exif)
    query = folder.parent / "query.json"
    query.write_text(json.dumps({"query_index": "q", "caption": "a man"}) + "\n")
    scores = folder.parent / "scores.pt"
    clip_infer.main(
        ["--model", CLIP[-1], "--image_folder", str(folder), "--annotation", str(query), *HERE]
        + ["--save_score", str(scores), "--output_file", "none"]
    )
    upright.save(folder / "upright.png")
    found = folder.parent / "found.json"
    main([*CLIP, "--image_folder", str(folder), "--query", "a man", "--json", str(found), *HERE])
    first, second = json.loads(found.read_text())["queries"][0]["images"]
    assert first["score"] == second["score"]
    as_stored = float(torch.load(scores, weights_only=True)["scores"][0, 0])
    assert abs(first["score"] - as_stored) > 1e-3


# ---------------------------------------------------------------------------------------- the page


def test_the_page(folder: Path) -> None:
    page = folder.parent / "out/page.html"
    main([*CLIP, "--image_folder", str(folder), "--query", "a <b>man</b> & 'co'", *HERE]
         + ["--html", str(page), "--top_k", "5", "--recursive"])  # fmt: skip
    text = page.read_text()
    escaped = "a &lt;b&gt;man&lt;/b&gt; &amp; &#39;co&#39;"
    assert f"<title>{escaped} – photo search</title>" in text
    assert f'<h1 dir="auto">{escaped}</h1>' in text
    assert text.count("<img ") == 5
    assert len(re.findall(r'src="data:image/jpeg;base64,', text)) == 5
    names = re.findall(r'class="name" dir="auto">(.*?)</span>', text)
    assert len(names) == 5
    assert set(names) <= {*READABLE, "sub/deep.webp"}
    for address in re.findall(r'<a href="(.*?)">', text):
        assert address.startswith("../photos/")
    assert not re.search(r"R@1|mAP|<table|<script|https?://", text)
    assert "8 images indexed, 2 not readable" in text
    listing = page.with_name("page.unreadable.txt")
    assert len(listing.read_text().splitlines()) == 2


def test_thumbnails_are_upright(folder: Path) -> None:
    empty(folder)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 90), "red").transpose(Image.Transpose.ROTATE_90).save(
        folder / "phone.jpg", exif=exif
    )
    page = folder.parent / "page.html"
    main([*CLIP, "--image_folder", str(folder), "--query", "a", "--html", str(page), *HERE])
    (code,) = re.findall(r"base64,([^\"]+)", page.read_text())
    assert Image.open(io.BytesIO(base64.b64decode(code))).size == (60, 90)


def test_names_that_would_break_the_output(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty(folder)
    names = ["two\nlines.png", "\x1b[31mred.png", 'quo"te<i>.png', "javascript:alert(1).png"]
    for name in names:
        Image.new("RGB", (8, 8)).save(folder / name)
    (folder / "bad\n.jpg").touch()
    page, found = folder / "page.html", folder.parent / "found.json"
    main([*CLIP, "--image_folder", str(folder), "--query", "a", *HERE]
         + ["--html", str(page), "--json", str(found)])  # fmt: skip
    printed = ranked(capsys.readouterr().out)["a"]
    assert set(printed) == {r"two\nlines.png", r"\x1b[31mred.png", *names[2:]}
    paths = [image["path"] for image in json.loads(found.read_text())["queries"][0]["images"]]
    assert set(paths) == set(names)
    assert found.with_name("found.unreadable.txt").read_text().startswith("bad\\n.jpg\tan empty")
    text = page.read_text()
    assert 'alt="quo&#34;te&lt;i&gt;.png"' in text
    assert 'href="javascript:' not in text


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--query", ""], "--query: expected words, found an empty string"),
        (["--query", " \t "], "--query: expected words, found none in"),
        (["--query", "\u200b\u0301\ufe0f"], "--query: expected words, found none in"),
        (["--query", "\u3164\u2800"], "--query: expected words, found none in"),
        (["--query", "...!"], "--query: expected words, found none in"),
        (["--query", "a\udcff"], "--query: expected UTF-8 text"),
        (["--top_k", "0"], "--top_k: must be at least 1"),
        (["--top_k", "3", "--top_k", "3"], "--top_k: passed twice"),
        (["--image_folder", "b"], "--image_folder: passed twice: .* and b; pass it once"),
        (["--model", "lhp"], "--model: passed twice: clip and lhp; --arch names the architecture"),
        (["--annotation", "a.json"], "--annotation: .*set queries with --query"),
        (["--answers", "none"], "--answers: .*no labels"),
        (["--query_order=a"], "--query_order: .*in the order of --query"),
        (["--save_score", "a.pt"], "--save_score: .*--json FILE"),
        (["--output_file", "a.txt"], "--output_file: .*--json FILE"),
        (["--no_such_flag"], "--no_such_flag"),
        (["--pretrained", "none.pth"], "none.pth"),
        (["--html", "x.out", "--json", "x.out"], "--html: x.out is also --json"),
        (["--html", "pab"], "--html: pab is a directory"),
        (["--json", "/dev/null"], "--json: /dev/null is not a regular file"),
        (["--json", "a.json", "--html", "a.unreadable.txt"], "--html: .*list of unreadable images"),
    ],
)
def test_errors_for_wrong_flags(
    folder: Path, flags: list[str], expected: str, refused: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (folder / "sub/deep.webp").unlink()  # no note about nested folders
    said = refused(main, [*CLIP, "--image_folder", str(folder), "--query", "a", *HERE, *flags])
    assert re.search(expected, said), said
    assert "Temporary" not in said
    assert "/tmp/pab-" not in said
    assert not list(ROOT.glob("a.*"))


def test_unusable_folders_are_refused(folder: Path, refused: Callable[..., str]) -> None:
    def said(where: Path) -> str:
        return refused(main, [*CLIP, "--image_folder", str(where), "--query", "a", *HERE])

    assert "no such folder" in said(folder / "missing")
    empty = folder.parent / "empty"
    empty.mkdir()
    assert re.search(r"empty: expected images \(.*\.heic.*\), found none", said(empty))
    above = folder.parent / "above"
    (above / "one").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(above / "one/a.png")
    assert "not searched: 1 image in 1 nested folder; add --recursive" in said(above)
    bad = folder.parent / "bad"
    bad.mkdir()
    for name in ("a.jpg", "b.heic"):
        (bad / name).write_text("text")
    listing = folder.parent / "default/unreadable.txt"
    assert f"found 2 that cannot be read (listed in {listing})" in said(bad)
    assert len(listing.read_text().splitlines()) == 2
    for name in ("a.jpg", "b.heic"):
        (bad / name).write_text("")
    assert "found 2 that cannot be read" in said(bad)


def test_an_output_never_replaces_a_photograph(folder: Path, refused: Callable[..., str]) -> None:
    (folder / "sub/deep.webp").unlink()
    before = (folder / "p0.jpg").read_bytes()
    words = [*CLIP, "--image_folder", str(folder), "--query", "a", *HERE]
    assert "is a photograph" in refused(main, [*words, "--html", str(folder / "p0.jpg")])
    (folder / "sub").mkdir(exist_ok=True)
    same = str(folder / "sub/../p0.jpg")
    assert "is a photograph" in refused(main, [*words, "--json", same])
    assert (folder / "p0.jpg").read_bytes() == before


def test_settings_that_search_ignores_in_a_config_are_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*LHP, "--image_folder", str(folder), "--query", "a", *HERE])
    names = "image_folder, annotation, answers, save_score, output_file"
    note = f"note: configs/lhp/mini_infer.yaml: photo search ignores its {names}"
    assert note in capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    "query", ["a", "é", "人", "مرحبا", "7", "?", "😀", "a\u0301", "'", "-", "€", "\u200ba"]
)
def test_short_queries_in_any_script_are_accepted(query: str) -> None:
    check_query(query)


# ------------------------------------------------------------------------------------- the engine


class ByName(Encoder):
    """Encoder that scores images with "good" in their name above all others, which tie."""

    origin = Origin("none", "none.pth")

    def __init__(self, text: float = 1.0) -> None:
        self.text = text

    def encode_images(self, images: Any, *, reader: Any = None) -> torch.Tensor:
        return torch.tensor([[1.0] if "good" in image.gallery_id else [0.5] for image in images])

    def encode_texts(self, captions: Any) -> torch.Tensor:
        return torch.full((len(captions), 1), self.text)


def test_ties_go_to_the_smaller_name(tmp_path: Path) -> None:
    for name in ("b.png", "a.png", "good.png", "c.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    photos = list_photos(tmp_path).photos
    answers = search(ByName(), photos, ["x"], top_k=3)
    assert [hit.name for hit in answers.hits[0]] == ["good.png", "a.png", "b.png"]
    assert answers.indexed == 4
    with pytest.raises(InputError, match=r"none.pth, query 'x': the model's scores are not finite"):
        search(ByName(torch.inf), photos, ["x"], top_k=3)


def test_flags_of_a_member() -> None:
    config = read_member("clip", "RN50", ["--batch_size", "3"], prog="p")
    assert (config.model, config.batch_size) == ("RN50", 3)  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="--k_test: photo search has no such flag"):
        read_member("uit", None, ["--k_test", "3"], prog="p")


def test_the_command_runs_in_any_folder(tmp_path: Path) -> None:
    """Run the command in a subprocess, with loader processes; check streams and exit code."""
    photos = tmp_path / "my photos"
    for number in range(3):
        draw(photos / f"IMG {number}.jpg", number, normal=True)
    (photos / "bad.jpg").write_text("bad")
    done = subprocess.run(
        [sys.executable, "-m", "pab.search", "--model", "clip", "--image_folder", "my photos"]
        + ["--arch", f"local-dir:{ROOT / 'checkpoints/mini/clip'}", "--query", "a man"]
        + ["--batch_size", "1"],  # a single batch would be loaded without loader processes
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(ranked(done.stdout)["a man"]) == ["IMG 0.jpg", "IMG 1.jpg", "IMG 2.jpg"]
    last = "3 images indexed, 1 not readable (listed in output/search/unreadable.txt)"
    assert done.stderr.splitlines() == [last]
    assert (tmp_path / "output/search/unreadable.txt").read_text().startswith("bad.jpg\t")


# ------------------------------------------------------------------------------- real photographs


@pytest.mark.skipif(not CASES.is_dir(), reason="photographs (../shared/cases) not found")
def test_real_photographs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = folder.parent / "found.json"
    main([*CLIP, "--image_folder", str(CASES), "--query", "a person", "--recursive", *HERE]
         + ["--json", str(found)])  # fmt: skip
    capsys.readouterr()
    results = json.loads(found.read_text())
    scores = {image["path"]: image["score"] for image in results["queries"][0]["images"]}
    everything = {path.relative_to(CASES).as_posix() for path in CASES.rglob("*") if path.is_file()}
    assert everything - scores.keys() == {"truncated.jpg"}
    assert [one["path"] for one in results["unreadable"]] == ["truncated.jpg"]
    assert {"IMG 0001 (1).jpg", f"Screenshot 2026-01-02 at 9.41.00{NARROW}AM.png"} < scores.keys()
    assert {"g.HEIC", "nested/sub/e.jpg", "same.jpg", "same.png"} < scores.keys()
    assert scores["exif6.jpg"] == pytest.approx(scores["upright.jpg"], abs=0.02)  # the same picture
    turned, upright = (load_photo(CASES / f"{name}.jpg") for name in ("exif6", "upright"))
    assert turned.size == upright.size
    assert np.abs(np.subtract(turned, upright, dtype=np.int16)).mean() < 8  # compressed twice
