"""Mining of training questions: a hand-made example, omitted images, bad inputs, vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ensemble import image_vectors
from ensemble.mine import MineConfig
from ensemble.mine import main as mine
from pab.core.config import load_config
from pab.core.errors import InputError
from pab.data.records import GalleryImage
from pab.data.training_set import TrainingSet
from pab.scores import ScoreFile, save_scores
from tests.conftest import write_lines
from tests.scores import saved

IDS = ["a0", "a1", "b0", "b1", "c0", "d0"]
CAPTIONS = ["walks", "falls", "walks a dog", "hits a dog", "runs", "runs"]
# Twins: a0 and a1, b0 and b1 (c0's is outside the annotation). c0 and d0 share a caption.
# The comments below give the rank of each query's right image.
SCORES = torch.tensor(
    [
        [0.9, 0.8, 0.7, 0.6, 0.5, 0.4],  # a0: first; its twin a1 is second
        [0.9, 0.2, 0.8, 0.7, 0.6, 0.5],  # a1: last
        [0.1, 0.2, 0.8, 0.3, 0.9, 0.4],  # b0: second, behind c0; its twin b1 is fourth
        [0.9, 0.1, 0.2, 0.8, 0.3, 0.4],  # b1: second, behind a0
        [0.1, 0.2, 0.3, 0.4, 0.8, 0.9],  # c0: second, behind d0 with the same caption
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.9],  # d0: first; c0 has the same caption
    ]
)


def image_of(image_id: str) -> str:
    return f"train/imgs_0/goal/{image_id}.jpg"


@pytest.fixture
def annotation(tmp_path: Path) -> Path:
    twins = {"a0": "a1", "a1": "a0", "b0": "b1", "b1": "b0", "c0": "c1"}
    rows = []
    for image_id, caption in zip(IDS, CAPTIONS, strict=True):
        row = {"image": image_of(image_id), "image_id": image_id, "caption": caption}
        twin = twins.get(image_id)
        if twin is not None:
            row |= {"hard_i": f"imgs_0/goal/{twin}.jpg", "hard_i_id": twin}
            row["hard_c"] = CAPTIONS[IDS.index(twin)] if twin in IDS else "sleeps"
        rows.append(row)
    path = tmp_path / "annotation/val.json"
    write_lines(path, rows)
    return path


@pytest.fixture
def words(annotation: Path, tmp_path: Path) -> list[str]:
    """Return the flags that mine the example, with up to two wrong images per question."""
    score = write_scores(tmp_path, SCORES)
    return [
        *("--score", score, "--annotation", str(annotation), "--out", str(tmp_path / "m.jsonl")),
        *("--negatives", "2"),
    ]


def write_scores(folder: Path, scores: Tensor, **meta: Any) -> str:
    path = folder / "fused.pt"
    save_scores(path, ScoreFile(scores, [f"{one}#0" for one in IDS], IDS, meta))
    return str(path)


def lines(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """Return the written lines by query."""
    found = map(json.loads, (tmp_path / "m.jsonl").read_text().splitlines())
    return {line["query_id"].removesuffix("#0"): line for line in found}


def wrong(tmp_path: Path) -> dict[str, list[str]]:
    """Return the names of the wrong images by query."""
    return {one: [Path(p).stem for p in line["wrong"]] for one, line in lines(tmp_path).items()}


def test_the_example(
    words: list[str], annotation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine(words)
    found = lines(tmp_path)
    assert list(found) == IDS
    assert found["b0"] == {
        "caption": "walks a dog",
        "query_id": "b0#0",
        "image": image_of("b0"),
        "wrong": [image_of("b1"), image_of("c0")],
        "kind": "failure",
        "source": str(annotation),
    }
    assert wrong(tmp_path) == {
        "a0": ["a1", "b0"],
        "a1": ["a0", "b0"],
        "b0": ["b1", "c0"],
        "b1": ["b0", "a0"],
        "c0": ["c1", "b1"],  # c1 is outside the annotation; d0 has c0's caption
        "d0": ["b1", "b0"],
    }
    kinds = {one: line["kind"] for one, line in found.items()}
    assert [one for one in IDS if kinds[one] == "regression"] == ["a0", "d0"]
    assert capsys.readouterr().out.splitlines() == [
        f"6 questions -> {tmp_path / 'm.jsonl'}",
        "failures: 4 of 4; left out: 0 with the right image beyond the first 50, "
        "0 without a wrong image",
        "regressions: 2 of 2; left out: 0 with larger margins (--regressions), "
        "0 without a wrong image",
        "wrong images: 12 (twins: 5); left out: 2 with the same caption, "
        "near-duplicates not checked (--encoder or --features)",
    ]


def test_a_twin_with_the_same_caption_is_left_out(
    words: list[str], annotation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotation.write_text(annotation.read_text().replace("sleeps", "runs"))
    mine(words)
    assert wrong(tmp_path)["c0"] == ["b1", "b0"]
    said = capsys.readouterr().out
    assert "wrong images: 12 (twins: 4); left out: 3 with the same caption" in said


def test_images_with_the_same_caption_may_count_as_right(words: list[str], tmp_path: Path) -> None:
    mine([*words, "--same_caption_counts"])
    assert lines(tmp_path)["c0"]["kind"] == "regression"  # d0, which ranks first, is also right
    assert wrong(tmp_path)["c0"] == ["c1", "b1"]


def test_failures_beyond_the_reach_of_the_reranker(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine([*words, "--depth", "3"])
    assert "a1" not in lines(tmp_path)
    said = capsys.readouterr().out
    assert "failures: 3 of 4; left out: 1 with the right image beyond the first 3" in said


@pytest.mark.parametrize("meta", [{"k_test": 1}, {"listed": {f"{one}#0": 1 for one in IDS}}])
def test_images_without_a_score_are_beyond_the_reach(
    words: list[str], tmp_path: Path, meta: dict[str, Any]
) -> None:
    best = SCORES.argmax(dim=1, keepdim=True)
    write_scores(tmp_path, torch.zeros(6, 6).scatter(1, best, 1.0), **meta)
    mine(words)
    # Only a0 and d0 have their right image within reach, and d0 has no twin.
    assert wrong(tmp_path) == {"a0": ["a1"]}


def test_a_limited_number_of_regressions(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine([*words, "--regressions", "0.25"])  # one per four failures; a0 has the smaller margin
    assert list(lines(tmp_path)) == ["a0", "a1", "b0", "b1", "c0"]
    said = capsys.readouterr().out
    assert "1 with larger margins (--regressions)" in said
    assert "wrong images: 10 (twins: 5); left out" in said
    mine([*words, "--regressions", "0"])
    assert list(lines(tmp_path)) == ["a1", "b0", "b1", "c0"]


def test_near_duplicates_of_the_right_image_are_left_out(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vectors = np.eye(6, 8)
    vectors[2] = 3.0 * (vectors[0] + 0.1 * vectors[2])  # b0 is a near-duplicate of a0
    vectors[4] = vectors[0] + vectors[4]  # c0 has a cosine of 0.7 with a0
    vectors[3] = vectors[2]  # twins may be near-duplicates
    np.save(tmp_path / "v.npy", vectors.astype(np.float32))
    mine([*words, "--features", str(tmp_path / "v.npy")])
    found = wrong(tmp_path)
    assert found["a0"] == ["a1", "c0"]  # neither b0 nor b1
    assert found["b0"] == ["b1", "c0"]
    assert found["b1"] == ["b0", "d0"]  # not a0; d0 ranks above c0
    assert "near-duplicates (cosine above 0.95)" in capsys.readouterr().out
    mine([*words, "--features", str(tmp_path / "v.npy"), "--duplicates_above", "0.6"])
    assert wrong(tmp_path)["a0"] == ["a1", "d0"]
    mine([*words, "--features", str(tmp_path / "v.npy"), "--duplicates_above", "1"])
    assert wrong(tmp_path)["a0"] == ["a1", "b0"]


@pytest.mark.parametrize("form", ["list", "inside"])
def test_vectors_are_matched_by_id(words: list[str], tmp_path: Path, form: str) -> None:
    vectors = torch.eye(6)
    vectors[2] = vectors[0]  # b0 has a0's vector
    turned, names = vectors.flip(0).contiguous(), IDS[::-1]
    flags = ["--features", str(tmp_path / "v.pt")]
    if form == "list":
        torch.save(turned, tmp_path / "v.pt")
        (tmp_path / "ids.txt").write_text("".join(f"{name}.jpg\n" for name in names))
        flags += ["--feature_ids", str(tmp_path / "ids.txt")]
    else:
        torch.save({"features": turned, "image_ids": names}, tmp_path / "v.pt")
    mine([*words, *flags])
    assert wrong(tmp_path)["a0"] == ["a1", "b1"]
    assert wrong(tmp_path)["a1"] == ["a0", "b0"]


def test_vectors_of_an_encoder(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[tuple[str, dict[str, Any]]] = []

    class Colours:
        def encode_images(self, images: list[GalleryImage]) -> Tensor:
            assert [image.gallery_id for image in images] == IDS
            vectors = torch.eye(6)
            vectors[2] = 5.0 * vectors[0]  # not unit vectors
            return vectors

    def load(name: str, **settings: Any) -> Colours:
        loaded.append((name, settings))
        return Colours()

    monkeypatch.setattr(image_vectors, "load_encoder", load)
    mine([*words, "--encoder", "clip", "--checkpoint", "some/folder"])
    assert wrong(tmp_path)["a0"] == ["a1", "b1"]
    expected = {"config": None, "feature_cache": True, "checkpoint": "some/folder"}
    assert loaded == [("clip", expected)]


def test_training_pairs_with_a_real_encoder(tiny_data: Path, tmp_path: Path) -> None:
    annotation = tiny_data / "annotation/train/pair_0.json"
    pairs = TrainingSet.open(tiny_data, [annotation], tmp_path / "index")
    ids = pairs.image_ids()
    scores = torch.rand(len(ids), len(ids), generator=torch.Generator().manual_seed(0))
    file = ScoreFile(scores, [f"{one}#0" for one in ids], sorted(ids))
    save_scores(tmp_path / "fused.pt", file)
    out = tmp_path / "m.jsonl"
    checkpoint = Path(__file__).resolve().parents[1] / "checkpoints/mini/clip"
    mine(["--score", str(tmp_path / "fused.pt"), "--annotation", str(annotation), "--out", str(out)]
         + ["--encoder", "clip", "--checkpoint", str(checkpoint)]
         + ["--duplicates_above", "-1"])  # fmt: skip
    found = [json.loads(line) for line in out.read_text().splitlines()]
    by_image = {pair.image: pair for pair in pairs}
    assert len(found) == len(ids)
    for line in found:  # every other image is above the threshold, so only the twin remains
        pair = by_image[line["image"]]
        assert line["wrong"] == [f"train/{pair.hard_i}"]
        assert (tiny_data / line["wrong"][0]).is_file()


def test_a_test_set_is_refused(words: list[str], annotation: Path, tmp_path: Path) -> None:
    path = tmp_path / "annotation/test/pair.json"
    path.parent.mkdir()
    annotation.rename(path)
    words = [*words, "--annotation", str(path)]
    with pytest.raises(InputError, match=r"is a test set: .*--allow_test"):
        mine(words)
    assert not (tmp_path / "m.jsonl").exists()
    mine([*words, "--allow_test"])
    assert len(lines(tmp_path)) == 6


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--score", ""], "--score: expected a file of scores, found none"),
        (["--annotation", ""], "--annotation: expected a file of labelled pairs"),
        (["--encoder", "clip", "--features", "v.npy"], "--features: contradicts --encoder"),
        (["--checkpoint", "c"], "--checkpoint: needs --encoder"),
        (["--encoder_config", "c.yaml"], "--encoder_config: needs --encoder"),
        (["--feature_ids", "ids.txt"], "--feature_ids: needs --features"),
        (["--negatives", "0"], "--negatives"),
        (["--duplicates_above", "1.5"], "--duplicates_above"),
        (["--features", "missing.npy"], "missing.npy: expected"),
        (["--encoder", "nobody"], "expected one of .*, found 'nobody'"),
    ],
)
def test_invalid_settings(
    words: list[str], tmp_path: Path, flags: list[str], expected: str
) -> None:
    with pytest.raises(InputError, match=expected):
        mine([*words, *flags])
    assert not (tmp_path / "m.jsonl").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (torch.eye(5), r"expected one vector per image \(6\), found 5"),
        (torch.full((6, 2), torch.nan), "expected finite vectors"),
        ({"features": torch.eye(6), "image_ids": [*IDS[:5], "z"]}, "missing: 'd0'"),
        (b"q1 Q0 a0 1 0.5 run\n", "expected a matrix of image vectors .*found a TREC run"),
    ],
)
def test_unusable_vectors(words: list[str], tmp_path: Path, content: object, expected: str) -> None:
    path = saved(tmp_path, content, "v.txt" if isinstance(content, bytes) else "v.pt")
    with pytest.raises(InputError, match=expected):
        mine([*words, "--features", str(path)])
    assert not (tmp_path / "m.jsonl").exists()


def test_other_images_than_the_annotation(words: list[str], tmp_path: Path) -> None:
    others = [*IDS[:5], "x0"]
    save_scores(tmp_path / "fused.pt", ScoreFile(SCORES, [f"{one}#0" for one in IDS], others))
    with pytest.raises(InputError, match="x0"):
        mine(words)


def test_a_matrix_without_ids_needs_an_import(words: list[str], tmp_path: Path) -> None:
    np.save(tmp_path / "bare.npy", SCORES.numpy())
    with pytest.raises(InputError) as error:
        mine([*words, "--score", str(tmp_path / "bare.npy")])
    assert "convert it with: python -m pab.scores import" in str(error.value)
    assert "pass --queries" not in str(error.value)


def test_captions_without_images_are_refused(words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "query.json"
    write_lines(path, [{"query_index": f"{one}#0", "caption": one} for one in IDS])
    with pytest.raises(InputError, match="expected labelled images with their paths"):
        mine([*words, "--annotation", str(path)])


def test_nothing_to_mine(words: list[str], tmp_path: Path) -> None:
    write_scores(tmp_path, torch.eye(6))
    with pytest.raises(InputError, match=r"nothing to mine: 0 questions .*6 with larger margins"):
        mine([*words, "--regressions", "1"])
    assert not (tmp_path / "m.jsonl").exists()


def test_an_input_is_not_overwritten(words: list[str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="would be overwritten"):
        mine([*words, "--out", str(tmp_path / "fused.pt")])


def test_a_path_that_leaves_the_data_root(words: list[str], annotation: Path) -> None:
    annotation.write_text(annotation.read_text().replace("imgs_0/goal/c1.jpg", "../../c1.jpg"))
    with pytest.raises(InputError, match="field 'hard_i': expected a path inside the data root"):
        mine(words)


def test_defaults() -> None:
    config = load_config(MineConfig, None, {})
    assert (config.negatives, config.depth, config.duplicates_above) == (4, 50, 0.95)
