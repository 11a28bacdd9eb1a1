"""The commands `pab.search index` and `pab.search query`, with the shipped mini models."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import draw

from pab.core.errors import InputError
from pab.data.records import GalleryImage
from pab.search.__main__ import main
from pab.search.index import Index
from pab.search.members import split_members
from pab.search.rerank import open_reranker

ROOT = Path(__file__).resolve().parents[1]
CLIP = ["--model", "clip", "--arch", f"local-dir:{ROOT / 'checkpoints/mini/clip'}"]
LHP = ["--model", "lhp", "--config", "configs/lhp/mini_infer.yaml"]


def test_flags_are_split_by_member() -> None:
    words = ["--num_workers", "0", "--model", "clip", "--arch", "x", "--model=lhp", "--config", "y"]
    choices, shared = split_members([*words, "--model", "clip"])
    assert shared == ["--num_workers", "0"]
    assert [(one.name, one.model, one.arguments[2:]) for one in choices] == [
        ("clip", "clip", ("--arch", "x")),
        ("lhp", "lhp", ("--config", "y")),
        ("clip_2", "clip", ()),
    ]
    assert all(one.arguments[:2] == ("--num_workers", "0") for one in choices)


@pytest.mark.slow
def test_a_killed_command_continues(tmp_path: Path) -> None:
    """Kill a real run after at least one block."""
    photos, out = tmp_path / "photos", tmp_path / "index"
    for number in range(60):
        draw(photos / f"{number:02}.jpg", number, normal=True)
    words = [sys.executable, "-m", "pab.search", "index", *CLIP, "--num_workers", "0"]
    words += ["--image_folder", str(photos), "--out", str(out), "--block", "5", "--batch_size", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(words, env=environment, cwd=tmp_path, stderr=subprocess.PIPE)
    manifest = out / "manifest.json"
    while not manifest.is_file() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = Index.open(out).rows
    assert before > 0
    done = subprocess.run(
        words, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert f"{60 - before} images encoded" in done.stderr
    assert [entry.name for entry in Index.open(out).entries()] == [
        f"{number:02}.jpg" for number in range(60)
    ]


def make_photos(folder: Path) -> Path:
    """Draw photographs, and add a damaged one."""
    for number in range(6):
        draw(folder / f"p{number}.jpg", number, normal=number % 2 == 0)
    (folder / "cut.jpg").write_bytes((folder / "p1.jpg").read_bytes()[:600])
    return folder


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(ROOT)  # the mini configs have paths relative to ROOT
    return make_photos(tmp_path / "photos")


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs with an index beside them, for tests that only read it."""
    folder = make_photos(tmp_path_factory.mktemp("indexed") / "photos")
    main(index_words(folder))
    return folder


def index_words(photos: Path, *more: str) -> list[str]:
    out = photos.with_name("index")
    words = ["index", "--num_workers", "0", *CLIP, "--image_folder", str(photos), "--out", str(out)]
    return [*words, *more]


def test_index_and_query_agree_with_the_search_without_an_index(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(index_words(photos, "--vectors", "float32"))
    out = photos.with_name("index")
    listing = out / "unreadable.txt"
    assert listing.read_text().startswith("cut.jpg\tcannot be read")
    last = f"6 images indexed, 1 not readable (listed in {listing})"
    assert capsys.readouterr().err.splitlines()[-1] == last
    found, once = photos.with_name("found.json"), photos.with_name("once.json")
    main(["query", "--index", str(out), "--text", "a man falls", "--json", str(found)])
    printed = capsys.readouterr().out
    main([*CLIP, "--image_folder", str(photos), "--query", "a man falls", "--json", str(once)])
    assert capsys.readouterr().out == printed
    (one,), (other,) = (json.loads(path.read_text())["queries"] for path in (found, once))
    assert [image["path"] for image in one["images"]] == [i["path"] for i in other["images"]]
    for image, expected in zip(one["images"], other["images"], strict=True):
        assert image["score"] == pytest.approx(expected["score"], abs=1e-6)
        assert image["scores"] == {"clip": image["score"]}


def test_several_members_queries_and_reranking(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(index_words(photos, *LHP))
    out, found = photos.with_name("index"), photos.with_name("found.json")
    queries = ["--text", "a man falls", "--text", "a woman walks", "--minus", "a park"]
    main(
        ["query", "--index", str(out), *queries, "--image", str(photos / "p0.jpg"), "--json"]
        + [str(found), "--weights", "image=0.5", "minus=0.2", "clip=2", "--one_to_one"]
        + ["--rerank", "configs/uit/mini_infer.yaml", "--rerank_depth", "3"]
    )
    results = json.loads(found.read_text())
    assert results["weights"] == {"clip": 2.0, "lhp": 1.0}
    assert [one["query"] for one in results["queries"]] == ["a man falls", "a woman walks"]
    for one in results["queries"]:
        assert (one["image"], one["minus"]) == (str(photos / "p0.jpg"), ["a park"])
        assert len(one["images"]) == 6
        reranked = [image["rerank_score"] for image in one["images"] if "rerank_score" in image]
        assert len(reranked) == 3
        assert reranked[1:] == sorted(reranked[1:], reverse=True)
        assert all(image["scores"].keys() == {"clip", "lhp"} for image in one["images"])
    first, second = (one["images"][0]["path"] for one in results["queries"])
    assert first != second
    title = f"a man falls + [{photos / 'p0.jpg'}] - a park"
    assert capsys.readouterr().out.splitlines()[0] == title


def test_reranking_gives_the_scores_of_uit(indexed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pictures are small, upright JPEGs, so search and scoring read the same pixels."""
    monkeypatch.chdir(ROOT)
    out, found = indexed.with_name("index"), indexed.with_name("found.json")
    main(
        ["query", "--index", str(out), "--text", "a man falls", "--json", str(found)]
        + ["--rerank", "configs/uit/mini_infer.yaml"]
    )
    (one,) = json.loads(found.read_text())["queries"]
    images = [GalleryImage(i["path"], indexed / i["path"]) for i in one["images"]]
    scores = open_reranker("configs/uit/mini_infer.yaml").rerank(
        ["a man falls"], images, torch.arange(6)[None]
    )
    for image, expected in zip(one["images"], scores[0].tolist(), strict=True):
        assert image["rerank_score"] == pytest.approx(expected, abs=1e-4)


def test_only_the_index_needs_the_extra(
    photos: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    install = r"not installed; run python -m pip install \"person-anomaly-retrieval\[search\]\""
    out = photos.with_name("index")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "av", None)
        words = ["index", *CLIP, "--video", str(photos), "--out", str(out)]
        assert re.search(f"videos: need av, which is {install}", refused(main, words))
        patch.setitem(sys.modules, "pyarrow.parquet", None)
        need = f"search indexes: need pyarrow, which is {install}"
        assert re.search(need, refused(main, index_words(photos)))
        assert re.search(need, refused(main, ["query", "--index", str(out), "--text", "a"]))
        assert re.search(need, refused(main, ["serve", "--index", str(out)]))
        main([*CLIP, "--image_folder", str(photos), "--query", "a man", "--num_workers", "0"])


def test_reranking_with_a_vision_language_model(
    indexed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A YAML file for `rerank_infer.py` also configures the re-ranking of a search."""
    pytest.importorskip("sentence_transformers")
    from tests.vlm import small_vlm

    monkeypatch.chdir(ROOT)
    settings, found = tmp_path / "rerank.yaml", tmp_path / "found.json"
    settings.write_text(f"model: {small_vlm('reranker')}\ncandidates: none.pt\nk_test: 3\n")
    main(
        ["query", "--index", str(indexed.with_name("index")), "--text", "a man falls"]
        + ["--rerank", str(settings), "--rerank_depth", "3", "--json", str(found)]
    )
    (one,) = json.loads(found.read_text())["queries"]
    scores = [image["rerank_score"] for image in one["images"][:3]]
    assert scores == sorted(scores, reverse=True)
    assert len({*scores}) == 3
    assert not any("rerank_score" in image for image in one["images"][3:])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--video", "v.avi"], "expected one of --image_folder, --csv, --webdataset, --video"),
        (["--every", "1"], "--every: is only for --video"),
        (["--every", "-1"], "--every: expected seconds"),
        (["--csv_image_key", "x"], "--csv_image_key: is only for --csv"),
        (["--block", "0"], "--block: must be at least 1"),
        (["--model"], "--model: expected the name of a member"),
        (["--model", "nothing"], "member: expected one of"),
        (["--no_such_flag"], "no_such_flag"),
        (["--annotation", "a.json"], "--annotation: .*photo search has no such flag"),
        (["--arch"], "--arch: expected one argument"),
        (["--arch=x", "--arch", "y"], "--arch: passed twice"),
        (["--csv", "none.csv"], "none.csv: expected a table, found no such file"),
    ],
)
def test_flags_of_index_that_are_refused(
    photos: Path, flags: list[str], expected: str, refused: Callable[..., str]
) -> None:
    assert re.search(expected, refused(main, index_words(photos, *flags)))
    assert not photos.with_name("index").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "expected --text or --image, found neither"),
        (["--text", ""], "--text: expected words, found an empty string"),
        (["--text", "a", "--minus", "..."], "--minus: expected words"),
        (["--text", "a", "--top_k", "0"], "--top_k: must be at least 1"),
        (
            ["--text", "a", "--weights", "x=1"],
            "expected each of text, image, minus, clip",
        ),
        (["--text", "a", "--weights", "clip"], "--weights: expected NAME=NUMBER"),
        (["--text", "a", "--weights", "clip=-1"], "--weights: expected a number of at least 0"),
        (["--text", "a", "--weights", "clip=nan"], "--weights: expected a number of at least 0"),
        (["--text", "a", "--weights", "clip=0"], "expected a member with a positive weight"),
        (["--text", "a", "--members", "lhp"], "expected one of the members clip, found 'lhp'"),
        (["--text", "a", "--image", "none.jpg"], "none.jpg"),
        (["--text", "a", "--json", "{index}/manifest.json"], "is in the folder of the index"),
        (["--text", "a", "--json", "{index}/../photos/p1.jpg"], "it would be overwritten"),
        (["--text", "a", "--json", "pab"], "--json: pab is a directory"),
        (
            ["--text", "a", "--rerank", "clip"],
            "--rerank: expected a member with a cross encoder, found 'clip'",
        ),
        (["--text", "a", "--rerank", "nothing"], "--rerank: expected a member or a YAML file"),
        (["--text", "a", "--rerank", "none.yaml"], "none.yaml"),
    ],
)
def test_flags_of_query_that_are_refused(
    indexed: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    expected: str,
    refused: Callable[..., str],
) -> None:
    monkeypatch.chdir(ROOT)
    index = indexed.with_name("index")
    words = ["query", "--index", str(index), *(flag.format(index=index) for flag in flags)]
    assert expected in refused(main, words)


def test_an_image_query_needs_a_text_to_be_reranked(
    indexed: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    monkeypatch.chdir(ROOT)
    words = [
        "query",
        "--index",
        str(indexed.with_name("index")),
        "--image",
        str(indexed / "p0.jpg"),
    ]
    assert "needs a text" in refused(main, [*words, "--rerank", "configs/uit/mini_infer.yaml"])


def test_the_type_of_the_vectors_does_not_change(photos: Path, refused: Callable[..., str]) -> None:
    main(index_words(photos, "--vectors", "float32"))
    found = "--vectors: expected float32, as the index has, found float16"
    assert found in refused(main, index_words(photos, "--vectors", "float16"))
    main(index_words(photos))
    assert Index.open(photos.with_name("index")).members[0].dtype == "float32"


def test_another_checkpoint_is_not_compared_with_the_index(
    photos: Path, refused: Callable[..., str]
) -> None:
    main(index_words(photos))
    manifest = photos.with_name("index") / "manifest.json"
    text = json.loads(manifest.read_text())
    text["members"][0]["fingerprint"]["checkpoint"] = "0" * 64
    manifest.write_text(json.dumps(text))
    said = refused(main, ["query", "--index", str(manifest.parent), "--text", "a"])
    assert f"member 'clip': expected checkpoint {'0' * 64}, found " in said


def test_a_late_interaction_model_is_refused(photos: Path) -> None:
    """Refuse it even if all images have the same number of vectors."""
    pytest.importorskip("sentence_transformers")
    from tests.vlm import small_vlm

    out = photos.with_name("late")
    words = ["index", "--num_workers", "0", "--model", "embed", "--arch", str(small_vlm("late"))]
    words += ["--device", "cpu", "--image_folder", str(photos), "--out", str(out)]
    problem = "member 'embed': a model with one vector per token cannot be indexed"
    with pytest.raises(InputError, match=problem):
        main(words)
    assert not (out / "manifest.json").exists()


def test_a_model_folder_may_be_renamed(photos: Path, tmp_path: Path) -> None:
    """Weights at another path open the index, and the index stores the new path."""
    for name in ("a", "b"):
        shutil.copytree(ROOT / "checkpoints/mini/clip", tmp_path / name)
    words = ["index", "--num_workers", "0", "--image_folder", str(photos)]
    words += ["--out", str(tmp_path / "index"), "--model", "clip", "--arch"]
    main([*words, f"local-dir:{tmp_path / 'a'}"])
    shutil.rmtree(tmp_path / "a")
    main([*words, f"local-dir:{tmp_path / 'b'}"])
    (member,) = Index.open(tmp_path / "index").members
    assert member.arguments[-1] == f"local-dir:{tmp_path / 'b'}"
    assert member.origin["architecture"] == member.arguments[-1]
    main(["query", "--index", str(tmp_path / "index"), "--text", "a man falls"])


def test_an_index_with_the_path_of_a_model_folder_is_read(photos: Path) -> None:
    """Earlier versions stored the path of the folder as a fact of the vectors."""
    main(index_words(photos))
    manifest = photos.with_name("index") / "manifest.json"
    text = json.loads(manifest.read_text())
    text["members"][0]["fingerprint"]["model"] = "local-dir:elsewhere"
    manifest.write_text(json.dumps(text))
    main(["query", "--index", str(manifest.parent), "--text", "a man falls"])


def test_a_typo_in_settings_of_a_vision_language_model(tmp_path: Path) -> None:
    settings = tmp_path / "rerank.yaml"
    settings.write_text("model: checkpoints/vlm/qwen3-vl-reranker-2b\npromt: Find it.\n")
    with pytest.raises(
        InputError, match="unknown setting 'promt'; the closest setting is 'prompt'"
    ):
        open_reranker(str(settings))


def test_a_filter_without_images_is_named(
    indexed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    words = ["query", "--index", str(indexed.with_name("index")), "--text", "a man"]
    main([*words, "--folder", "typo", "--start", "0"])
    found = capsys.readouterr()
    assert found.out == "a man\n"
    assert "note: --folder, --start: the index has no such images" in found.err
    main([*words, "--least", "2"])
    assert "note: --least: no image has such a score" in capsys.readouterr().err


@pytest.mark.parametrize("member", [CLIP, LHP], ids=["clip", "lhp"])
def test_a_query_beyond_the_token_limit_is_named(
    member: list[str], photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = " ".join(["a man falls off a red bicycle"] * 15)
    words = [*member, "--image_folder", str(photos), "--num_workers", "0", "--query"]
    main([*words, long, "--query", "a man falls " * 7])
    lines = [line for line in capsys.readouterr().err.splitlines() if "the rest is" in line]
    assert len(lines) == 1
    found = re.fullmatch(
        rf"note: query 'a man .*: member {member[1]} reads only its first (\d+) of 105 words: "
        "the rest is ignored", lines[0],
    )  # fmt: skip
    assert found
    count = int(found[1])
    assert 40 < count < 80
    main([*words, " ".join(long.split()[:count])])
    assert "the rest is" not in capsys.readouterr().err


def test_each_text_is_checked_alone(photos: Path) -> None:
    """Another text must not hide that the words of a text are unknown to BERT's vocabulary."""
    words = ["--model", "blip2", "--config", "configs/blip2/mini_infer.yaml", "--num_workers", "0"]
    words += [
        "--image_folder",
        str(photos),
        "--query",
        "\u96ea\u5d29",
        "--query",
        "a man falls down",
    ]
    with pytest.raises(
        InputError, match=r"text '\u96ea\u5d29': \[UNK\] in this vocabulary: 2 of 2 pieces"
    ):
        main(words)
