"""Layout check of files and folders: the printed facts and the next command."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pillow_heif
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pab.core.errors import InputError
from pab.core.files import write_text
from pab.layout.check import explain, main
from pab.layout.weights import known_model
from pab.scores import ScoreFile, save_scores
from tests.conftest import write_lines
from tests.release import make_release

ROOT = Path(__file__).resolve().parents[1]
CASES = ROOT / "tests/data"


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6)).save(path)


def captioned(folder: Path) -> None:
    for n in range(3):
        picture(folder / f"a/{n}.jpg")
    for n in range(2):
        write_text(folder / f"a/{n}.txt", "A man walks.")


def photographs(folder: Path) -> None:
    picture(folder / "one.jpg")
    picture(folder / "trip/two words.png")
    (folder / "trip/IMG_1.HEIC").touch()
    (folder / ".hidden.jpg").touch()


def track4(folder: Path) -> None:
    picture(folder / "gallery/A.jpg")
    rows = [{"query_index": q, "caption": "a man"} for q in ("1", "0")]
    write_lines(folder / "query.json", rows)
    write_text(folder / "query_index.txt", "0\n1\n")


def bert(folder: Path) -> None:
    write_text(folder / "config.json", json.dumps({"model_type": "bert"}))
    write_text(folder / "vocab.txt", "[PAD]\n[UNK]\nman\n")
    (folder / "model.safetensors").touch()


def webdataset(folder: Path) -> None:
    folder.mkdir()
    for name in ("000.tar", "001.tar"):
        with tarfile.open(folder / name, "w") as archive:
            for member in ("0.jpg", "0.txt", "1.jpg", "1.txt"):
                archive.addfile(tarfile.TarInfo(member), io.BytesIO())


def search_index(folder: Path) -> None:
    members = [{"name": name} for name in ("clip", "lhp")]
    shards = [{"rows": 3}, {"rows": 4}]
    manifest = {"root": "/photos", "members": members, "shards": shards}
    write_text(folder / "manifest.json", json.dumps(manifest))


# Folder name -> function that creates the folder, facts and next command that the check prints.
FOLDERS: dict[str, tuple[Callable[[Path], None], list[str], str]] = {
    "captioned": (
        captioned,
        [
            "images with captions",
            "3 images",
            "2 captions",
            "1 image that cannot be used",
            "'a/2.jpg'",
        ],
        "python scripts/finetune_clip.py --config configs/clip/finetune.yaml --data_path {path} "
        "--skip_bad_lines",
    ),
    "weights and a video": (
        lambda path: [
            write_text(path / "yard.mp4", ""),
            *(score_file(path / f"{name}.pt") for name in "ab"),
        ],
        ["a folder of files", "2 .pt"],
        "python -m pab.search index --model clip --video {path}/*.mp4 --out output/index",
    ),
    "photo s": (
        photographs,
        ["a folder of photographs", "3 images", "2 of them in 1 nested folder"],
        'python -m pab.search --model clip --image_folder {path} --recursive --query "TEXT"',
    ),
    "track": (
        track4,
        ["a name-masked set", "2 queries, 1 image in gallery/"],
        "python -m lhp.infer --annotation {path}/query.json --image_folder {path}/gallery "
        "--query_order {path}/query_index.txt",
    ),
    "words": (
        bert,
        ["a BERT folder", "vocab.txt: present"],
        "python -m uit.run --task cmp --checkpoint '' --swin SWIN --bert {path}",
    ),
    "tars": (
        webdataset,
        ["2 WebDataset tars", "000.tar holds 2 .jpg, 2 .txt", "check {path}/unpacked"],
        "python -m pab.search index --model clip --webdataset {path} --out output/index",
    ),
    "index": (
        search_index,
        ["a search index", "7 images of /photos", "members: clip, lhp", "query --index"],
        "python -m pab.search serve --index {path}",
    ),
    "films": (
        lambda path: write_text(path / "yard.mp4", ""),
        ["1 video"],
        "python -m pab.search index --model clip --video {path}/*.mp4 --out output/index",
    ),
    "photographs and films": (
        lambda path: [picture(path / "0.jpg"), write_text(path / "yard.MOV", "")],
        ["a folder of photographs", "1 video beside them"],
        "python -m pab.search index --model clip --video {path}/*.MOV --out output/index",
    ),
    "clip": (
        lambda path: shutil.copytree(ROOT / "checkpoints/mini/clip", path) and None,
        ["a folder of OpenCLIP weights"],
        "python scripts/clip_infer.py --model local-dir:{path}",
    ),
    "Part 2": (
        lambda path: [picture(path / f"imgs_{n}/goal/0.jpg") for n in (8, 15)] and None,
        ["images of PAB's training shards", "2 folders imgs_N, N from 8 to 15", "part 2 of"],
        "python -m pab.layout check {folder}",
    ),
    "own data": (
        lambda path: [picture(path / "p/0.jpg"), write_text(path / "a.csv", "filepath,title\n")],
        ["a folder of photographs", "1 table beside them: a.csv"],
        "python -m pab.layout check {table}",
    ),
    "run": (
        lambda path: [
            write_text(path / f"{name}.pth", "") for name in ("checkpoint-0", "checkpoint-best")
        ],
        ["a folder of files"],
        "python -m pab.layout check {path}/checkpoint-best.pth",
    ),
    "tuned": (
        lambda path: [
            write_text(path / "checkpoint-best.pth", ""),
            write_text(path / "model/config.json", json.dumps({"model_type": "qwen3_vl"})),
            (path / "model/model.safetensors").touch(),
        ],
        ["a folder of files", "the model of this run: model/"],
        "python -m pab.layout check {path}/model",
    ),
    "tables": (
        lambda path: write_text(path / "a.csv", "filepath,title\n"),
        ["files of known kinds to check: 1 .csv"],
        "python -m pab.layout check {path}/a.csv",
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders(tmp_path: Path, name: str) -> None:
    make, facts, command = FOLDERS[name]
    path = tmp_path / name
    make(path)
    text = explain(path)
    for fact in facts:
        assert fact.format(path=path) in text
    names = {"path": shlex.quote(str(path)), "table": shlex.quote(f"{path}/a.csv")}
    assert f"  {command.format(**names, folder=tmp_path)}" in text.splitlines()
    linked = tmp_path / "link"
    linked.symlink_to(path)
    assert explain(linked).splitlines()[0].replace(str(linked), str(path)) == text.splitlines()[0]


def score_file(path: Path) -> None:
    save_scores(path, ScoreFile(torch.rand(2, 3), ["a", "b"], ["X", "Y", "Z"], {"model": "m"}))


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("answer.txt", "A B\n")


def tensors(*names: str) -> Callable[[Path], None]:
    return lambda path: torch.save({"model": {name: torch.ones(2) for name in names}}, path)


PAIR = {"image": "test/0.jpg", "caption": ["a", "b"], "image_id": "0", "normal": "Walking"}
FILES: dict[str, tuple[Callable[[Path], Any], list[str], str]] = {
    "s.pt": (
        score_file,
        ["a score file", "2 queries x 3 images", 'model: "m"'],
        "python -m ensemble.run --member NAME={path}:WEIGHT ...",
    ),
    "m.pt": (
        lambda path: torch.save(torch.rand(2, 3), path),
        ["a bare tensor", "2 rows x 3 columns"],
        "python -m pab.scores import {path} --queries FILE --gallery FILE "
        "--out {folder}/m_with_ids.pt",
    ),
    "d.pt": (
        lambda path: torch.save({"sims": torch.rand(2, 3).half()}, path),
        ["a dict with a matrix"],
        "python -m pab.scores import {path} --queries FILE --gallery FILE "
        "--out {folder}/d_with_ids.pt",
    ),
    "list.txt": (
        lambda path: write_text(path, "A B C\nA C B\n"),
        ["a ranked list", "2 lines of 3 images"],
        "python -m pab.evaluate --predictions {path} --annotation FILE",
    ),
    "query_index.txt": (
        lambda path: write_text(path, "q1\nq0\n"),
        ["a list of ids", "2 ids, q1 ... q0"],
        "python -m ensemble.run --query_order {path} ...",
    ),
    "vocab.txt": (
        lambda path: write_text(path, "[PAD]\n[UNK]\nman\n"),
        ["BERT's vocabulary"],
        "python -m uit.infer --text_encoder {folder}",
    ),
    "query.json": (
        lambda path: write_lines(path, [{"query_index": "q", "caption": "a"}]),
        ["queries of a name-masked set", "1 query, q ... q"],
        "python -m lhp.infer --annotation {path} --image_folder FOLDER",
    ),
    "pair.json": (
        lambda path: write_lines(path, [PAIR]),
        ["annotated images", "1 image, 2 captions", "1 normal, 0 abnormal"],
        "python -m lhp.infer --annotation {path} --image_folder FOLDER",
    ),
    "key.json": (
        lambda path: write_text(path, json.dumps({"q": {"gallery": "A", "anomaly": "Falling"}})),
        ["the answer key", "1 answer", "0 normal"],
        "python -m pab.evaluate --predictions LIST.txt --annotation QUERIES --answers {path}",
    ),
    "a.csv": (
        lambda path: [
            *(picture(path.with_name(name)) for name in ("0.jpg", "1.jpg")),
            write_text(path, 'filepath,title\n0.jpg,"a, b"\n1.jpg,c\n'),
        ],
        ["a table of images and captions", "2 images, 2 captions", "columns: filepath, title"],
        "python scripts/clip_infer.py --annotation {path} --image_folder {folder}",
    ),
    "b.tsv": (
        lambda path: [
            picture(path.with_name("0.jpg")),
            write_text(path, "path\ttext\n0.jpg\ta\n"),
        ],
        ["a table of images and captions", "1 image, 1 caption", "columns: path, text"],
        "python scripts/finetune_clip.py --config configs/clip/finetune.yaml --data_path {path} "
        "--csv_image_key path --csv_caption_key text",
    ),
    "bad.csv": (
        lambda path: [
            picture(path.with_name("a b.jpg")),
            write_text(path, "filepath,title\na b.jpg,a\n0.jpg,b\n"),
        ],
        ["1 image name with a blank, such as 'a b'", "1 image not found, the first"],
        "python -m pab.layout check {path}",
    ),
    "c.tsv": (
        lambda path: write_text(path, "where\twords\n0.jpg\ta\n"),
        ["columns: where, words"],
        "python scripts/clip_infer.py --annotation {path} --image_folder FOLDER "
        "--csv_image_key COLUMN --csv_caption_key COLUMN",
    ),
    "wide.txt": (
        lambda path: path.write_bytes("q1\nq0\n".encode("utf-32")),
        ["a list of ids", "2 ids, q1 ... q0"],
        "python -m ensemble.run --query_order {path} ...",
    ),
    "x.heic": (
        lambda path: pillow_heif.from_pillow(Image.new("RGB", (64, 48))).save(path),
        ["an image", "HEIF, 64 x 48 pixels"],
        'python -m pab.search --model clip --image_folder {folder} --query "TEXT"',
    ),
    "x.jpg": (
        picture,
        ["an image", "JPEG, 8 x 6 pixels"],
        'python -m pab.search --model clip --image_folder {folder} --query "TEXT"',
    ),
    "yard.mp4": (
        lambda path: path.touch(),
        ["a video"],
        "python -m pab.search index --model clip --video {path} --out output/index",
    ),
    "shard.tar": (
        lambda path: [webdataset(path.with_name("w")), (path.parent / "w/000.tar").rename(path)],
        ["an archive", "holds 2 .jpg, 2 .txt"],
        "python -m pab.search index --model clip --webdataset {path} --out output/index",
    ),
    "manifest.json": (
        lambda path: search_index(path.parent),
        ["a search index"],
        "python -m pab.search serve --index {folder}",
    ),
    "answer.zip": (
        zipped,
        ["a zipped ranked list for submission"],
        "python -m pab.evaluate --predictions {path} --annotation FILE",
    ),
    "c.yaml": (
        lambda path: write_text(path, "# python -m lhp.train --config c.yaml\nlr: 1.0\n"),
        ["a config"],
        "python -m lhp.train --config c.yaml",
    ),
    "beit3.pth": (
        tensors("module.beit3.encoder.x", "module.vision_head.weight"),
        ["BEiT-3 for retrieval (LHP)", "2 tensors, 4 weights"],
        "python -m lhp.infer --checkpoint {path}",
    ),
    "uit.pth": (
        tensors("text_encoder.x", "vision_encoder.x"),
        ["a checkpoint of UIT"],
        "python -m uit.infer --checkpoint {path} --candidates SCORES.pt",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_files(tmp_path: Path, name: str) -> None:
    make, facts, command = FILES[name]
    path = tmp_path / name
    make(path)
    text = explain(path)
    for fact in facts:
        assert fact in text
    assert f"  {command.format(path=path, folder=tmp_path)}" in text.splitlines()


# File of another tool -> what the check calls it, and whether its rows and columns lack ids.
FORMS = {
    "bare.npy": ("a bare array", True), "bare.pt": ("a bare tensor", True),
    "dict_half.pt": ("a dict with a matrix", True),
    "with_ids.npz": ("arrays with ids", False),
    "table.csv": ("table", False), "run.trec": ("TREC run", False),
    "ranx_run.json": ("ranx", False), "rankings.jsonl": ("rankings", False),
    "reranked.json": ("reranked", False),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_scores_of_other_tools(name: str) -> None:
    what, lacks_ids = FORMS[name]
    text = explain(CASES / "scores" / name)
    assert what in text.splitlines()[0]
    assert ("python -m pab.scores import" in text) == lacks_ids
    assert ("python -m ensemble.run --member" in text) != lacks_ids


def test_a_score_table_of_a_large_gallery(tmp_path: Path) -> None:
    names = [f"image_{number:06d}" for number in range(6_000)]  # a header of more than 64 KiB
    rows = [["query", *names], ["q1", *("0.5" for _ in names)]]
    write_text(tmp_path / "wide.csv", "".join(",".join(row) + "\n" for row in rows))
    text = explain(tmp_path / "wide.csv")
    assert "a CSV table" in text.splitlines()[0]
    assert "1 query x 6000 images" in text


@pytest.mark.parametrize(
    ("names", "model"),
    [
        (["beit3.x", "language_head.weight"], "beit3"),
        (["beit3.x"], "beit3 without heads"),
        (["text_encoder.a", "vision_encoder.b"], "uit"),
        (["Qformer.bert.x", "visual_encoder.y"], "blip2"),
        (["visual.proj", "token_embedding.weight"], "clip"),
        (["vision_model.x", "text_model.y"], "transformers clip"),
        (["layers.0.blocks.0.attn"], "swin"),
        (["bert.embeddings.x"], "bert"),
        (["encoder.layer.0.attention.x"], "bert"),
        (["fc.weight"], None),
    ],
)
def test_models_are_recognized_by_their_tensor_names(names: list[str], model: str | None) -> None:
    assert known_model(names) == model


@pytest.mark.parametrize(
    ("name", "what"),
    [("lhp", "BEiT-3 for retrieval"), ("uit", "of UIT"), ("blip2", "of BLIP-2")],
)
def test_shipped_checkpoints(name: str, what: str) -> None:
    text = explain(ROOT / f"checkpoints/mini/{name}.safetensors")
    assert what in text.splitlines()[0]
    assert "  architecture: " in text
    if name != "blip2":  # the command for BLIP-2 has no --model
        assert f"--model {name_of_model(text)}" in text.splitlines()[-1]


def test_a_tuned_folder_model_is_named_by_its_folder(tmp_path: Path) -> None:
    state, facts = {"visual.x": torch.ones(2)}, {"architecture": "clip"}
    torch.save({"model": state, "metadata": facts}, tmp_path / "checkpoint-best.pth")
    write_text(tmp_path / "config.yaml", "model: local-dir:models/clip\nlr: 1.0\n")
    assert "--model local-dir:models/clip --pretrained" in explain(tmp_path / "checkpoint-best.pth")


def name_of_model(text: str) -> str:
    line = next(line for line in text.splitlines() if line.startswith("  architecture: "))
    return line.removeprefix("  architecture: ")


UNKNOWN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty.json": (lambda path: path.touch(), "an empty file"),
    "blank.txt": (lambda path: path.write_text("\n \n"), "found"),
    "bytes.bin.x": (lambda path: path.write_bytes(bytes(range(256))), "a file that is not text"),
    "notes.md": (lambda path: path.write_text("# Notes\n\nToday it rained.\n"), "text that begins"),
    "odd.json": (lambda path: path.write_text("[1]"), "expected a JSON object, found the number 1"),
    "broken.json": (lambda path: path.write_text('{"a": '), "broken JSON"),
    "other.safetensors": (
        lambda path: save_file({"fc.weight": torch.ones(2)}, path), "tensors of a model"
    ),
    "damaged.jpg": (lambda path: path.write_text("x"), "expected an image"),
    "damaged.zip": (lambda path: path.write_text("x"), "cannot be read"),
    "folder": (lambda path: path.mkdir(), "0 files of other kinds and 0 folders"),
    "pipe": (os.mkfifo, "a device or pipe"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_unrecognized_paths_are_refused(
    tmp_path: Path, name: str, refused: Callable[..., str]
) -> None:
    make, found = UNKNOWN[name]
    make(tmp_path / name)
    line = refused(main, ["check", str(tmp_path / name)])
    assert str(tmp_path / name) in line
    assert found in line


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "pair.json", [PAIR, {**PAIR, "image_id": "1", "caption": []}])
    with pytest.raises(InputError, match=r"pair.json, line 2: field 'caption'"):
        explain(tmp_path / "pair.json")


# ------------------------------------------------------------------------------------ data roots


@pytest.fixture
def release(tmp_path: Path) -> Path:
    make_release(tmp_path / "PAB", shards=3)
    return tmp_path / "PAB"


def test_a_release_names_its_commands(release: Path) -> None:
    text = explain(release)
    assert "annotation/train/attr_*.json (3)" in text
    assert "annotation/test/attr.json" in text
    assert "test actions" not in text
    assert "annotation/source_caption.json (captions of the source videos)" in text
    assert "pose/ (pose images: train)" in text
    for command in (
        f"python -m lhp.train --config configs/lhp/finetune.yaml --data_path {release}",
        f"python -m uit.run --task cmp --data_path {release}",
        f"python -m lhp.infer --annotation {release}/annotation/test/attr.json "
        f"--image_folder {release}",
        f"python -m lhp.infer --annotation {release}/annotation/test/ucc.json "
        f"--image_folder {release}",
        f"DATA={release} bash scripts/reproduce.sh",
    ):
        assert f"  {command}" in text.splitlines()
    assert explain(release / "annotation") == text
    shard = release / "annotation/train/attr_1.json"
    assert "--train_shards annotation/train/attr_1.json" in explain(shard)
    assert "captions of the source videos" in explain(release / "annotation/source_caption.json")


def test_trees_that_hold_one_part(release: Path, tiny_data: Path, tmp_path: Path) -> None:
    test, train, masked = tmp_path / "test", tmp_path / "train", tmp_path / "masked"
    shutil.copytree(release / "annotation/test", test / "annotation/test")
    shutil.copytree(release / "test", test / "test")
    (test / "annotation/train").mkdir()
    text = explain(test)
    assert "12 of 12" in text
    assert "annotation/train/: 75 shards" in text
    assert "lhp.train" not in text
    assert "reproduce.sh" in text
    shutil.copytree(tiny_data / "train", train / "Part 1/train")
    shutil.copytree(tiny_data / "annotation/train", train / "annotation/train")
    text = explain(train)
    assert "24 of 24" in text
    assert "lhp.train" in text
    assert "reproduce.sh" not in text
    shutil.copytree(tiny_data / "name-masked_test-set", masked / "name-masked_test-set")
    text = explain(masked)
    assert "--query_order" in text
    assert "--answers" in text
    assert "reproduce.sh" in text
