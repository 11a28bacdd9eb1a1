"""Scoring with LHP: score file, ranked list, metrics, and settings that must not change scores."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lhp.beit3 import Beit3Retrieval, model_config
from lhp.encode import CXX, LhpEncoder
from lhp.infer import main
from lhp.tokenizer import Tokenizer
from pab.core.checkpoints import checkpoint_hash, save_weights
from pab.core.errors import InputError
from pab.data.annotations import read_retrieval
from pab.data.images import load_image, recipe
from pab.ranking import read_ranked_list
from pab.scores import ScoreFile, load_scores
from pab.scoring.encoding import Compute, batches_by_length
from tests.conftest import MODEL, TEST_IMAGES, save_released
from tests.test_processes import run_in

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
needs_photographs = pytest.mark.skipif(
    not (SHARED / "people").is_dir(), reason=f"photographs not found ({SHARED})"
)


class Scoring:
    """Score the name-masked set of the tiny data, or another annotation."""

    def __init__(self, data: Path, checkpoint: Path, tokenizer: Path, folder: Path) -> None:
        self.data, self.checkpoint, self.tokenizer = data, checkpoint, tokenizer
        self.folder = folder

    def argv(self, name: str, **settings: Any) -> list[str]:
        masked = self.data / "name-masked_test-set"
        given = {
            "model": MODEL, "checkpoint": self.checkpoint, "tokenizer": self.tokenizer,
            "image_folder": masked / "gallery", "annotation": masked / "query.json",
            "save_score": self.folder / f"{name}.pt", "output_file": self.folder / f"{name}.txt",
            "num_workers": 0, "device": "cpu",
        } | settings  # fmt: skip
        return [word for k, v in given.items() if v is not None for word in (f"--{k}", str(v))]

    def __call__(self, name: str, **settings: Any) -> tuple[ScoreFile, list[list[str]]]:
        main(self.argv(name, **settings))
        ranked = read_ranked_list(self.folder / f"{name}.txt")
        return load_scores(self.folder / f"{name}.pt"), ranked


@pytest.fixture
def score(tiny_data: Path, debug_checkpoint: Path, tokenizer_file: Path, tmp_path: Path) -> Scoring:
    return Scoring(tiny_data, debug_checkpoint, tokenizer_file, tmp_path)


def assert_ranked_by_score(scores: ScoreFile, ranked: list[list[str]], k: int = 10) -> None:
    for row, names in zip(scores.scores.tolist(), ranked, strict=True):
        order = sorted(zip(row, scores.gallery_ids, strict=True), key=lambda p: (-p[0], p[1]))
        assert names == [name for _, name in order[:k]]


def test_score_file_and_list(
    score: Scoring, debug_model: Callable[..., Beit3Retrieval], tokenizer: Tokenizer
) -> None:
    found, ranked = score("plain")
    lines = (score.data / "name-masked_test-set/query.json").read_text().splitlines()
    queries = [json.loads(line) for line in lines]
    assert found.query_ids == [query["query_index"] for query in queries]
    assert found.gallery_ids == [f"G{i:02d}" for i in range(TEST_IMAGES)]
    assert found.scores.dtype == torch.float32
    assert_ranked_by_score(found, ranked)
    assert found.meta["model"] == MODEL
    assert found.meta["checkpoint_sha256"] == checkpoint_hash(score.checkpoint)
    assert found.meta["dtype"] == "fp32"
    assert found.meta.keys() >= {"data_sha256", "project_version"}

    model = debug_model().eval()
    transform = recipe("beit3", 64).transform()
    with torch.inference_mode():
        for row, query in enumerate(queries):
            ids, mask = tokenizer.batch([query["caption"]])
            text = model.encode_text(ids, mask)
            for column in (0, TEST_IMAGES - 1):
                name = f"name-masked_test-set/gallery/G{column:02d}.jpg"
                image = model.encode_image(transform(load_image(score.data / name))[None])
                alone = float((text @ image.T).squeeze())
                assert float(found.scores[row, column]) == pytest.approx(alone, abs=1e-5)
    assert found.scores.std() > 1e-3, "equal scores would pass the checks above"


@pytest.mark.parametrize("settings", [{"batch_size": 1}, {"batch_size": 3, "num_workers": 2}])
def test_batch_size_and_workers_do_not_change_scores(
    score: Scoring, settings: dict[str, int]
) -> None:
    first, ranked = score("first")
    other, other_ranked = score("other", **settings)
    torch.testing.assert_close(other.scores, first.scores, atol=1e-5, rtol=0)
    assert other_ranked == ranked


def test_the_same_command_gives_the_same_bytes(score: Scoring) -> None:
    score("a")
    score("b")
    for extension in ("pt", "txt"):
        one, two = (score.folder / f"{name}.{extension}" for name in "ab")
        assert one.read_bytes() == two.read_bytes()


def test_the_gallery_is_sorted_by_name_in_any_directory_order(
    score: Scoring, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, ranked = score("first")
    true_scandir = os.scandir

    class Backwards(list[os.DirEntry[str]]):
        """Entries of a folder by descending name; a context manager, like os.scandir's result."""

        def __enter__(self) -> Backwards:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    def backwards(path: Any = ".") -> Backwards:
        return Backwards(sorted(true_scandir(path), key=lambda entry: entry.name, reverse=True))

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", backwards)
        patch.setattr(os, "listdir", lambda path: [e.name for e in backwards(path)])
        other, other_ranked = score("other")
    assert other.gallery_ids == first.gallery_ids
    assert torch.equal(other.scores, first.scores)
    assert other_ranked == ranked


def _score(argv: list[str], folder: Path) -> None:
    main(argv)


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_write_the_same_file(score: Scoring, tmp_path: Path, world: int) -> None:
    alone, ranked = score("alone", feature_cache_dir=tmp_path / "f1")
    (tmp_path / "ranks").mkdir()
    for name, batch_size in (("shared", 4), ("again", 3)):  # the second reads the cache
        argv = score.argv(name, feature_cache_dir=tmp_path / "f2", batch_size=batch_size)
        run_in(world, partial(_score, argv), tmp_path / "ranks")
        found = load_scores(score.folder / f"{name}.pt")
        assert found.query_ids == alone.query_ids
        assert found.gallery_ids == alone.gallery_ids
        torch.testing.assert_close(found.scores, alone.scores, atol=1e-6, rtol=0)
        assert read_ranked_list(score.folder / f"{name}.txt") == ranked
    hashes = [path for path in (tmp_path / "f2").rglob("*.sha256") if path.stat().st_size]
    assert len(hashes) == world, "each process writes its features to one file"
    assert sum(path.stat().st_size for path in hashes) == 32 * (TEST_IMAGES + len(alone.query_ids))


def test_bf16_is_close(score: Scoring) -> None:
    first, _ = score("first")
    half, _ = score("half", dtype="bf16")
    assert half.meta["dtype"] == "bf16"
    torch.testing.assert_close(half.scores, first.scores, atol=0.03, rtol=0)


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which(CXX) is None, reason=f"compiling for the CPU needs a C++ compiler ({CXX})"
)
def test_compiled_equals_eager(score: Scoring, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def counting(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        compiled.append(function)
        return true_compile(function, **options)

    true_compile = torch.compile
    first, _ = score("first")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", counting)
        main([*score.argv("compiled", batch_size=4), "--compile"])  # the last batch has two images
    assert len(compiled) == 1
    other = load_scores(score.folder / "compiled.pt")
    torch.testing.assert_close(other.scores, first.scores, atol=1e-5, rtol=0)


def test_compiling_without_a_compiler_is_refused(
    score: Scoring, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lhp.encode.CXX", "no-such-compiler")
    words = [*score.argv("none", batch_size=4, checkpoint="missing.pth"), "--compile"]
    expected = r"^--compile: needs a C\+\+ compiler on a CPU, found no no-such-compiler"
    with pytest.raises(InputError, match=expected):  # before the checkpoint is read
        main(words)


@pytest.mark.parametrize("k", [1, 3, 50])
def test_length_of_the_list(score: Scoring, k: int) -> None:
    found, ranked = score("short", top_k=k)
    assert {len(line) for line in ranked} == {min(k, TEST_IMAGES)}
    assert_ranked_by_score(found, ranked, k)


def test_metrics_are_printed_with_labels(
    score: Scoring, capsys: pytest.CaptureFixture[str]
) -> None:
    score("silent")
    assert capsys.readouterr().out == ""
    answers = score.data / "name-masked_test-set/answers.json"
    found, _ = score("labelled", answers=answers)
    table = capsys.readouterr().out
    for word in ("R@1", "R@10", "mAP", "mINP", "all", "normal", "abnormal"):
        assert word in table
    key = json.loads(answers.read_text())
    hits = [
        found.gallery_ids[int(row.argmax())] == key[query]["gallery"]
        for query, row in zip(found.query_ids, found.scores, strict=True)
    ]
    line = next(line for line in table.splitlines() if line.startswith("all"))
    assert f"{100 * sum(hits) / len(hits):.2f}"[:4] in line


def test_answers_may_name_files(score: Scoring, tmp_path: Path) -> None:
    """Names of the answer key may have an extension, as in `pab.evaluate`."""
    answers = score.data / "name-masked_test-set/answers.json"
    key = json.loads(answers.read_text())
    for answer in key.values():
        answer["gallery"] += ".jpg"
    named = tmp_path / "answers.json"
    named.write_text(json.dumps(key))
    files, _ = score("files", answers=named)
    ids, _ = score("ids", answers=answers)
    assert torch.equal(files.scores, ids.scores)


def test_names_with_blanks_need_no_ranked_list(score: Scoring, tmp_path: Path) -> None:
    gallery = shutil.copytree(score.data / "name-masked_test-set/gallery", tmp_path / "gallery")
    (gallery / "G00.jpg").rename(gallery / "G 00.jpg")
    with pytest.raises(InputError, match=r"image 'G 00': .*or set --output_file none"):
        score("list", image_folder=gallery)
    main(score.argv("alone", image_folder=gallery, output_file="none"))
    assert "G 00" in load_scores(tmp_path / "alone.pt").gallery_ids


def test_query_order(score: Scoring) -> None:
    found, ranked = score("file_order")
    order = score.data / "name-masked_test-set/query_index.txt"
    ordered, lines = score("ordered", query_order=order)
    wanted = order.read_text().split()
    assert wanted != found.query_ids
    assert ordered.query_ids == found.query_ids, "the score file keeps the annotation's order"
    by_query = dict(zip(found.query_ids, ranked, strict=True))
    assert lines == [by_query[query] for query in wanted]


def test_labelled_test_set(score: Scoring, capsys: pytest.CaptureFixture[str]) -> None:
    annotation = score.data / "annotation/test/pair.json"
    found, ranked = score("pair", annotation=annotation, image_folder=None)
    assert found.gallery_ids == sorted(f"t{i}" for i in range(TEST_IMAGES))
    assert found.query_ids[:3] == ["t0#0", "t1#0", "t1#1"]
    assert len(found.query_ids) == TEST_IMAGES * 3 // 2
    assert_ranked_by_score(found, ranked)
    assert "R@1" in capsys.readouterr().out
    # The name-masked set holds the same images and (first) captions under other names.
    masked, _ = score("masked")
    key = json.loads((score.data / "name-masked_test-set/answers.json").read_text())
    column = {key[q]["gallery"]: f"t{i}" for i, q in enumerate(masked.query_ids)}
    for i, query in enumerate(masked.query_ids):
        for name in masked.gallery_ids:
            one = masked.scores[masked.query_ids.index(query), masked.gallery_ids.index(name)]
            row = found.query_ids.index(f"t{i}#0")
            two = found.scores[row, found.gallery_ids.index(column[name])]
            assert float(one) == pytest.approx(float(two), abs=1e-5)


def test_training_shard_as_annotation(score: Scoring, capsys: pytest.CaptureFixture[str]) -> None:
    shard = score.data / "annotation/train/pair_1.json"
    found, ranked = score("shard", annotation=shard, image_folder=None)
    assert len(found.query_ids) == len(found.gallery_ids) == 12
    assert_ranked_by_score(found, ranked)
    assert "twin" in capsys.readouterr().out.lower()


def test_checkpoint_formats(
    score: Scoring, debug_model: Callable[..., Beit3Retrieval], tmp_path: Path
) -> None:
    first, _ = score("first")
    state = debug_model().state_dict()
    save_weights(tmp_path / "w.safetensors", state)
    torch.save(state, tmp_path / "bare.pth")
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save({"state_dict": wrapped}, tmp_path / "wrapped.pth")
    for name in ("w.safetensors", "bare.pth", "wrapped.pth"):
        other, _ = score("other", checkpoint=tmp_path / name)
        assert torch.equal(other.scores, first.scores), name


def test_another_resolution(score: Scoring) -> None:
    first, _ = score("first")
    larger, _ = score("larger", input_size=96)
    assert (larger.scores - first.scores).abs().max() > 1e-4
    named, _ = score("named", model="beit3_debug_patch16_96")
    assert torch.equal(named.scores, larger.scores)


def test_batched_texts_equal_texts_encoded_one_by_one(
    debug_model: Callable[..., Beit3Retrieval], tokenizer: Tokenizer
) -> None:
    model = debug_model().eval()
    words = [
        "A",
        "woman",
        "in",
        "a",
        "red",
        "coat",
        "is",
        "walking",
        "in",
        "the",
        "park",
        "number",
        "seven",
    ]
    captions = [" ".join(words[: 1 + (i * 5) % len(words)]) for i in range(17)]
    four = Compute(torch.device("cpu"), torch.float32, torch.float32, 4, 0)
    together = LhpEncoder(four, model, tokenizer).encode_texts(captions)
    one = LhpEncoder(replace(four, batch_size=1), model, tokenizer)
    alone = torch.cat([one.encode_texts([caption]) for caption in captions])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_text_batches_stay_within_the_token_budget() -> None:
    lengths = [9, 3, 3, 50, 64, 12, 3, 12]
    batches = list(batches_by_length(lengths, 40))
    assert sorted(sum(batches, [])) == list(range(8))  # noqa: RUF017 - a short list
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 40
    assert [lengths[i] for batch in batches for i in batch] == sorted(lengths)
    assert list(batches_by_length([], 40)) == []


def photographs(folder: Path, **settings: Any) -> list[str]:
    people = SHARED / "people"
    given = {
        "image_folder": people / "gallery", "annotation": people / "query.json",
        "answers": people / "answers.json", "tokenizer": SHARED / "tokenizers/beit3.spm",
        "save_score": folder / "score.pt", "output_file": folder / "list.txt", "device": "cpu",
    } | settings  # fmt: skip
    return [word for key, value in given.items() for word in (f"--{key}", str(value))]


def check_photographs(folder: Path) -> None:
    scores = load_scores(folder / "score.pt")
    count = len(list((SHARED / "people/gallery").iterdir()))
    retrieval = read_retrieval(SHARED / "people/query.json")
    assert scores.query_ids == [query.query_id for query in retrieval.queries]
    assert list(scores.scores.shape) == [len(retrieval.queries), count]
    assert scores.gallery_ids == sorted(path.stem for path in (SHARED / "people/gallery").iterdir())
    assert scores.scores.abs().max() <= 1 + 1e-5
    assert_ranked_by_score(scores, read_ranked_list(folder / "list.txt"))


@pytest.mark.slow
@needs_photographs
def test_real_photographs(
    tmp_path: Path,
    debug_model: Callable[..., Beit3Retrieval],
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = save_released(tmp_path / "debug.pth", debug_model(vocab_size=64010))
    main(photographs(tmp_path, checkpoint=checkpoint, model=MODEL))
    check_photographs(tmp_path)
    assert "R@1" in capsys.readouterr().out


@pytest.mark.slow
@needs_photographs
@pytest.mark.skipif(
    os.environ.get("PAB_LARGE") != "1", reason="slow, and needs 2.7 GB of disk; set PAB_LARGE=1"
)
def test_the_large_model_fits_in_8_gib(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Beit3Retrieval(model_config("beit3_large_patch16_384"))
    save_released(tmp_path / "large.pth", model)
    del model
    command = [sys.executable, "-m", "lhp.infer"]
    argv = photographs(tmp_path, checkpoint=tmp_path / "large.pth", num_workers=2)
    subprocess.run([*command, *argv], cwd=ROOT, check=True)
    # ru_maxrss (KiB) is the peak of the largest child process so far: the command above.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"peak memory {peak:.2f} GiB")
    assert peak < 8
    check_photographs(tmp_path)
    (tmp_path / "large.pth").unlink()  # pytest keeps the folder: free its 2.7 GB
