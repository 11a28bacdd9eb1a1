"""Bad input, end to end: commands exit with code 2 and one error line, and write no results.

Most tests damage the valid inputs of scoring, training or evaluation in one way, and check words of
the error line.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import lhp.infer
import lhp.train
import pab.evaluate
from lhp.beit3 import Beit3Retrieval
from pab.core.checkpoints import read_checkpoint
from pab.core.errors import InputError, run_cli
from pab.core.files import atomic_path, write_text
from pab.training.loop import LAST
from tests.conftest import MODEL, write_lines

MakeModel = Callable[..., Beit3Retrieval]
Refused = Callable[..., str]


class Case:
    """Valid inputs of the three commands; tests damage them."""

    def __init__(self, data: Path, checkpoint: Path, tokenizer: Path, out: Path) -> None:
        self.data, self.out = data, out
        self.masked = data / "name-masked_test-set"
        self.gallery, self.query = self.masked / "gallery", self.masked / "query.json"
        self.shard = data / "annotation/train/pair_0.json"
        self.checkpoint = Path(shutil.copy(checkpoint, data.parent / "weights.pth"))
        self.tokenizer = Path(shutil.copy(tokenizer, data.parent / "pieces.spm"))
        self.infer: dict[str, Any] = {
            "model": MODEL, "checkpoint": self.checkpoint, "tokenizer": self.tokenizer,
            "image_folder": self.gallery, "annotation": self.query, "device": "cpu",
            "save_score": out / "deep/score.pt", "output_file": out / "list.txt", "num_workers": 0,
        }  # fmt: skip
        self.train: dict[str, Any] = {
            "model": MODEL, "input_size": 64, "data_path": data, "batch_size": 4, "epochs": 1,
            "sentencepiece_model": self.tokenizer, "output_dir": out, "warmup_steps": 2,
            "num_workers": 0, "dtype": "fp32", "device": "cpu", "cache_dir": data.parent / "cache",
            "max_steps": 1,
        }  # fmt: skip
        self.evaluate: dict[str, Any] = {
            "predictions": data.parent / "list.txt", "annotation": self.query,
            "answers": self.masked / "answers.json", "json": out / "metrics.json",
        }  # fmt: skip
        names = sorted(path.stem for path in self.gallery.iterdir())
        count = len(self.query.read_text().splitlines())
        write_text(data.parent / "list.txt", (" ".join(names) + "\n") * count)

    def edit(self, path: Path, number: int, change: Callable[[dict[str, Any]], Any]) -> None:
        """Apply ``change`` to the fields of one annotation line; ``number`` counts from 1."""
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        change(rows[number - 1])
        write_lines(path, rows)


@pytest.fixture
def case(data_copy: Path, debug_checkpoint: Path, tokenizer_file: Path, tmp_path: Path) -> Case:
    return Case(data_copy, debug_checkpoint, tokenizer_file, tmp_path / "out")


COMMANDS: dict[str, Callable[[list[str] | None], None]] = {
    "infer": lhp.infer.main,
    "train": lhp.train.main,
    "evaluate": pab.evaluate.main,
}


def words(settings: dict[str, Any], *more: str) -> list[str]:
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))] + [*more]


@pytest.fixture
def refuse(case: Case, refused: Refused) -> Callable[..., None]:
    """Return a function that runs a command on bad input and checks error and outputs."""

    def run(command: str, *expected: str, flags: tuple[str, ...] = ()) -> None:
        line = refused(COMMANDS[command], words(getattr(case, command), *flags))
        for word in expected:
            assert word in line
        left = [p for p in case.out.rglob("*") if p.is_file()] if case.out.exists() else []
        assert left == []
        assert list(case.data.parent.rglob("*.tmp")) == []

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_valid_inputs_are_accepted(command: str, case: Case) -> None:
    COMMANDS[command](words(getattr(case, command)))
    assert any(path.is_file() for path in case.out.rglob("*"))


# ------------------------------------------------------------------------------ missing, misplaced

PATHS = [
    ("infer", "checkpoint"), ("infer", "tokenizer"), ("infer", "annotation"), ("infer", "answers"),
    ("infer", "query_order"), ("infer", "config"), ("train", "sentencepiece_model"),
    ("train", "finetune"), ("train", "config"), ("evaluate", "predictions"),
    ("evaluate", "annotation"), ("evaluate", "answers"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "name"), PATHS)
def test_missing_file(command: str, name: str, case: Case, refuse: Callable[..., None]) -> None:
    path = case.data.parent / "nowhere" / "file"
    getattr(case, command)[name] = path
    refuse(command, str(path), "no such file")


@pytest.mark.parametrize(("command", "name"), PATHS)
def test_directory_instead_of_a_file(
    command: str, name: str, case: Case, refuse: Callable[..., None]
) -> None:
    getattr(case, command)[name] = case.data
    refuse(command, str(case.data), "found a directory")


@pytest.mark.parametrize(("command", "name"), [("infer", "image_folder"), ("train", "data_path")])
def test_missing_folder(command: str, name: str, case: Case, refuse: Callable[..., None]) -> None:
    getattr(case, command)[name] = case.data / "nowhere"
    refuse(command, str(case.data / "nowhere"))


def test_file_instead_of_the_gallery_folder(case: Case, refuse: Callable[..., None]) -> None:
    case.infer["image_folder"] = case.query
    refuse("infer", str(case.query), "found a file")


@pytest.mark.parametrize("name", ["save_score", "output_file"])
def test_outputs_that_cannot_be_written(name: str, case: Case, refuse: Callable[..., None]) -> None:
    case.infer[name] = case.data
    refuse("infer", f"--{name}", "is a directory")
    case.infer[name] = case.query / "below" / "a_file"
    refuse("infer", f"--{name}", str(case.query))


@pytest.mark.parametrize("name", ["save_score", "output_file"])
def test_outputs_that_are_not_regular_files(
    name: str, case: Case, refuse: Callable[..., None]
) -> None:
    pipe = case.data / "pipe"
    os.mkfifo(pipe)
    case.infer[name] = pipe
    refuse("infer", f"--{name}", "none writes nothing")
    with pytest.raises(InputError, match="found something else"), atomic_path(pipe):
        pass
    assert pipe.is_fifo()


def test_training_into_a_file(case: Case, refuse: Callable[..., None]) -> None:
    case.train["output_dir"] = case.query / "run"
    refuse("train", str(case.query / "run"))


def test_one_file_for_both_outputs(case: Case, refuse: Callable[..., None]) -> None:
    case.infer["save_score"] = case.infer["output_file"]
    refuse("infer", "--save_score", "--output_file")


# ------------------------------------------------------------------------------------------ images


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def rewrite(content: bytes) -> Callable[[Path], None]:
    return lambda path: (path.write_bytes(content), None)[1]


BAD_IMAGES = {
    "truncated": truncated,
    "empty": rewrite(b""),
    "text": rewrite(b"This is not an image.\n"),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("kind", ["truncated", "empty", "text"])
@pytest.mark.parametrize("workers", [0, 2])
def test_bad_gallery_images_are_all_named(
    kind: str, workers: int, case: Case, refuse: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Encoding stops at the first bad image, but the error also names later bad images."""
    encoded: list[int] = []

    def encode(model: Beit3Retrieval, pixels: Tensor) -> Tensor:
        encoded.append(len(pixels))
        return torch.zeros(len(pixels), 4)

    monkeypatch.setattr(Beit3Retrieval, "encode_image", encode)
    for name in ("G02.jpg", "G07.jpg"):
        BAD_IMAGES[kind](case.gallery / name)
    case.infer |= {"num_workers": workers, "batch_size": 2}
    refuse("infer", "2 of 10 images: cannot be read: ", "G02.jpg (", "G07.jpg (", "replace or")
    assert sum(encoded) <= 2


def test_files_without_content_are_found_before_the_model_is_loaded(
    case: Case, refuse: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error also names damaged files, so that the user can replace all files at once."""

    def no_model(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("lhp.encode.load_model", no_model)
    truncated(case.gallery / "G01.jpg")
    (case.gallery / "G03.jpg").write_bytes(b"")
    (case.gallery / "G05.jpg").unlink()
    os.mkfifo(case.gallery / "G05.jpg")
    expected = ("3 of 10 images", "G01.jpg (image file is truncated", "G03.jpg (an empty file)")
    refuse("infer", *expected, "G05.jpg (not a regular file)")


def test_zero_byte_png(case: Case, refuse: Callable[..., None]) -> None:
    (case.gallery / "new.png").touch()
    refuse("infer", "new.png", "an empty file")


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_bad_image_of_an_annotated_set(kind: str, case: Case, refuse: Callable[..., None]) -> None:
    case.infer["annotation"] = case.data / "annotation/test/pair.json"
    case.infer["image_folder"] = case.data
    BAD_IMAGES[kind](case.data / "test/4.jpg")
    refuse("infer", "test/4.jpg")


@pytest.mark.parametrize("kind", sorted(BAD_IMAGES.keys() - {"gone"}))
@pytest.mark.parametrize("workers", [0, 1])
def test_bad_training_image(
    kind: str, workers: int, case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training reads images when it needs them, so the error follows the run's first lines."""
    for image in (case.data / "train").rglob("*.jpg"):
        BAD_IMAGES[kind](image)
    case.train["num_workers"] = workers
    with pytest.raises(SystemExit) as stop:
        run_cli(lhp.train.main, words(case.train))
    printed = capsys.readouterr().err
    assert stop.value.code == 2
    assert printed.splitlines()[-1].startswith("error: ")
    assert ".jpg: expected an image" in printed.splitlines()[-1]
    assert "Traceback" not in printed
    assert list(case.out.rglob("*.pth")) == []


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_bad_validation_images_are_found_before_training(
    kind: str, case: Case, refuse: Callable[..., None]
) -> None:
    for image in (case.data / "train").rglob("*.jpg"):
        BAD_IMAGES[kind](image)
    case.train["val_pairs"] = 4
    missing = "missing training images (24 of 24)"
    refuse("train", missing if kind == "gone" else "4 of 4 images: cannot be read")


def test_empty_gallery(case: Case, refuse: Callable[..., None]) -> None:
    for image in case.gallery.iterdir():
        image.unlink()
    refuse("infer", str(case.gallery), "found none")


def test_gallery_name_with_a_blank(case: Case, refuse: Callable[..., None]) -> None:
    (case.gallery / "G03.jpg").rename(case.gallery / "G 03.jpg")
    refuse("infer", "'G 03'", "blank")


def test_two_images_that_differ_only_in_the_extension(
    case: Case, refuse: Callable[..., None]
) -> None:
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(case.gallery / "G03.png")
    refuse("infer", "G03.jpg", "G03.png")


# ------------------------------------------------------------------------------------- annotations


def break_line(number: int) -> Callable[[Case, Path], None]:
    def run(case: Case, path: Path) -> None:
        row = json.loads(path.read_text().splitlines()[0])
        key = "query_index" if "query_index" in row else "image_id"
        lines = [json.dumps({**row, key: f"many{i}"}) for i in range(20)]
        lines[number - 1] = lines[number - 1][:-20]
        write_text(path, "\n".join(lines) + "\n")

    return run


def edit_line(change: Callable[[dict[str, Any]], Any]) -> Callable[[Case, Path], None]:
    return lambda case, path: case.edit(path, 3, change)


BAD_ANNOTATIONS: dict[str, tuple[Callable[[Case, Path], None], tuple[str, ...]]] = {
    "broken line 17": (break_line(17), ("line 17", "broken JSON")),
    "no caption": (edit_line(lambda row: row.pop("caption")), ("line 3", "'caption'")),
    "empty caption": (edit_line(lambda row: row.update(caption="")), ("line 3", "empty string")),
    "blank caption": (edit_line(lambda row: row.update(caption=" \n")), ("line 3", "empty string")),
    "number": (edit_line(lambda row: row.update(caption=7)), ("line 3", "the number 7")),
    "null": (edit_line(lambda row: row.update(caption=None)), ("line 3", "null")),
    "two captions": (
        edit_line(lambda row: row.update(caption=["a", "b"])),
        ("line 3", "a list of 2"),
    ),
    "nothing visible": (
        edit_line(lambda row: row.update(caption="\u200b")),
        ("line 3", "a visible character"),
    ),
    "a list of numbers": (
        lambda case, path: write_text(path, "[1, 2]\n"),
        ("2 bad ones", "line 1", "the number 1"),
    ),
    "no lines": (lambda case, path: write_text(path, ""), (".json",)),
    "blank lines": (lambda case, path: write_text(path, "\n \n"), (".json",)),
    "no text": (lambda case, path: rewrite(b"\xff\x00{")(path), ("line 1", "UTF-8")),
    "half of UTF-16": (lambda case, path: rewrite(b"\xff\xfe{")(path), ("UTF-8", "UTF-16")),
}


@pytest.mark.parametrize("kind", BAD_ANNOTATIONS)
@pytest.mark.parametrize("command", COMMANDS)
def test_bad_annotation(kind: str, command: str, case: Case, refuse: Callable[..., None]) -> None:
    spoil, expected = BAD_ANNOTATIONS[kind]
    path = case.shard if command == "train" else case.query
    spoil(case, path)
    refuse(command, path.name, *expected)


@pytest.mark.parametrize("command", COMMANDS)
def test_duplicate_id(command: str, case: Case, refuse: Callable[..., None]) -> None:
    path, key = (case.shard, "image_id") if command == "train" else (case.query, "query_index")
    first = json.loads(path.read_text().splitlines()[0])[key]
    case.edit(path, 3, lambda row: row.update({key: first}))
    refuse(command, path.name, "line 3", repr(first))


@pytest.mark.parametrize("image", ["../../secret.jpg", "/etc/secret.jpg", "train/../../a.jpg"])
@pytest.mark.parametrize("command", ["infer", "train"])
def test_image_path_that_leaves_the_root(
    image: str, command: str, case: Case, refuse: Callable[..., None]
) -> None:
    case.infer["annotation"] = case.shard
    case.infer["image_folder"] = case.data
    case.edit(case.shard, 3, lambda row: row.update(image=image))
    refuse(command, "pair_0.json", "line 3", "inside the data root")


def test_link_to_nothing(case: Case, refuse: Callable[..., None]) -> None:
    (case.data / "test/4.jpg").unlink()
    (case.data / "test/4.jpg").symlink_to(case.data.parent / "gone.jpg")
    case.infer["annotation"] = case.data / "annotation/test/pair.json"
    case.infer["image_folder"] = case.data
    refuse("infer", "test/4.jpg", "a link to a missing file")


@pytest.mark.parametrize("command", ["infer", "evaluate"])
def test_answers_that_do_not_match(command: str, case: Case, refuse: Callable[..., None]) -> None:
    path = case.masked / "answers.json"
    case.infer["answers"] = path
    key = json.loads(path.read_text())
    first, *rest = key
    path.write_text(json.dumps({query: key[query] for query in rest}))
    refuse(command, "answers.json" if command == "evaluate" else str(path), repr(first))
    path.write_text(json.dumps({**key, "nobody": key[first]}))
    refuse(command, "answers.json", "nobody")


def test_answer_that_is_not_in_the_gallery(case: Case, refuse: Callable[..., None]) -> None:
    case.infer["answers"] = case.masked / "answers.json"
    (case.gallery / "G03.jpg").unlink()
    refuse("infer", "answers.json", "'G03'")


def test_query_order_that_does_not_match(case: Case, refuse: Callable[..., None]) -> None:
    order = case.masked / "query_index.txt"
    case.infer["query_order"] = order
    lines = order.read_text().splitlines()
    for wrong in (lines[1:], [*lines, "q99"], [*lines, lines[0]]):
        write_text(order, "\n".join(wrong) + "\n")
        refuse("infer", "query_index.txt")


# ------------------------------------------------------------------------------------- checkpoints


class Bomb:
    """Object whose unpickling would run a command."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.trace}",)


CHECKPOINT_OF = [("infer", "checkpoint"), ("train", "finetune")]


@pytest.mark.parametrize(("command", "name"), CHECKPOINT_OF)
@pytest.mark.parametrize("way", ["pickle", "torch", "inside"])
def test_malicious_pickle_is_not_run(
    way: str, command: str, name: str, case: Case, refuse: Callable[..., None]
) -> None:
    trace, path = case.data.parent / "trace", case.checkpoint
    if way == "pickle":
        path.write_bytes(pickle.dumps(Bomb(trace)))
    elif way == "torch":
        torch.save(Bomb(trace), path)
    else:
        bad = path.with_name("bad.pth")  # a new file: the old one is memory-mapped
        torch.save({**read_checkpoint(path), "args": argparse.Namespace(bomb=Bomb(trace))}, bad)
        bad.replace(path)
    getattr(case, command)[name] = path
    refuse(command, str(path))
    assert not trace.exists()


@pytest.mark.parametrize(("command", "name"), CHECKPOINT_OF)
@pytest.mark.parametrize(
    "content", [b"", b"no checkpoint", b"PK\x03\x04" + b"\0" * 200, b"\x80\x02}q\x00."]
)
def test_file_that_is_not_a_checkpoint(
    content: bytes, command: str, name: str, case: Case, refuse: Callable[..., None]
) -> None:
    case.checkpoint.write_bytes(content)
    getattr(case, command)[name] = case.checkpoint
    refuse(command, str(case.checkpoint))


@pytest.mark.parametrize(("command", "name"), CHECKPOINT_OF)
@pytest.mark.parametrize("kind", ["size", "missing", "extra", "none", "numbers", "nan"])
def test_checkpoint_that_does_not_fit(
    kind: str,
    command: str,
    name: str,
    case: Case,
    refuse: Callable[..., None],
    debug_model: MakeModel,
) -> None:
    sizes = {} if command == "infer" else {"vocab_size": 65, "text_positions": 66}
    other = "beit3_mini_patch16_64" if kind == "size" else MODEL
    state: dict[str, Any] = dict(debug_model(name=other, **sizes).state_dict())
    spoilt = "beit3.encoder.layers.1.ffn.B.fc1.weight"
    expected = spoilt
    if kind == "size":
        expected = "of another shape"
    elif kind == "missing":
        del state[spoilt]
    elif kind == "extra":
        state["beit3.extra"] = torch.zeros(2)
        expected = "beit3.extra"
    elif kind == "none":
        state, expected = {}, "weights"
    elif kind == "numbers":
        state[spoilt] = 3
    else:
        state[spoilt][4, 5] = float("nan")
    torch.save({"model": state}, case.checkpoint)
    getattr(case, command)[name] = case.checkpoint
    refuse(command, str(case.checkpoint), expected)


def test_finite_weights_with_non_finite_scores(
    case: Case, refuse: Callable[..., None], debug_model: MakeModel
) -> None:
    model = debug_model()
    torch.nn.init.constant_(model.vision_head.weight, 3e38)
    torch.save({"model": model.state_dict()}, case.checkpoint)
    refuse("infer", str(case.checkpoint), "not finite")


@pytest.mark.parametrize("content", [b"", b"no pieces"])
@pytest.mark.parametrize("command", ["infer", "train"])
def test_file_that_is_not_a_tokenizer(
    content: bytes, command: str, case: Case, refuse: Callable[..., None]
) -> None:
    case.tokenizer.write_bytes(content)
    refuse(command, str(case.tokenizer), "SentencePiece")


def test_tokenizer_with_more_tokens_than_the_model(
    case: Case, refuse: Callable[..., None], debug_model: MakeModel
) -> None:
    torch.save({"model": debug_model(vocab_size=40).state_dict()}, case.checkpoint)
    refuse("infer", str(case.tokenizer), "embeds only 40")


def test_max_text_length_beyond_the_model(case: Case, refuse: Callable[..., None]) -> None:
    refuse("infer", "--max_text_length", "1022", flags=("--max_text_length", "1023"))


def test_resuming_from_a_bad_checkpoint(case: Case, refused: Refused) -> None:
    case.out.mkdir()
    last = case.out / LAST
    last.write_bytes(b"no state")
    assert str(last) in refused(lhp.train.main, words(case.train))
    shutil.copy(case.checkpoint, last)
    assert "--resume_from newest_good" in refused(lhp.train.main, words(case.train))
    assert [path.name for path in case.out.iterdir()] == [last.name]


# ------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flags", [("--colour", "red"), ("--annotatio", "x"), ("word",)])
def test_unknown_flag(flags: tuple[str, ...], command: str, refuse: Callable[..., None]) -> None:
    refuse(command, flags[0], flags=flags)


@pytest.mark.parametrize("command", ["infer", "train"])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("colour: red\n", "unknown setting 'colour'"),
        ("batch_size: many\n", "batch_size"),
        ("batch_size: [\n", "YAML"),
        ("- batch_size\n", "mapping"),
    ],
)
def test_bad_config(
    text: str, expected: str, command: str, case: Case, refuse: Callable[..., None]
) -> None:
    path = case.data.parent / "bad.yaml"
    path.write_text(text)
    getattr(case, command)["config"] = path
    refuse(command, str(path), expected)


WRONG_VALUES = [
    ("infer", "batch_size", "0"), ("infer", "batch_size", "many"), ("infer", "top_k", "0"),
    ("infer", "num_workers", "-1"), ("infer", "device", "tpu"), ("infer", "dtype", "int8"),
    ("infer", "dtype", "fp16"), ("infer", "model", "beit3_huge_patch16_384"),
    ("infer", "input_size", "100"), ("infer", "input_size", "0"), ("infer", "max_text_length", "2"),
    ("train", "batch_size", "0"), ("train", "batch_size", "25"), ("train", "local_prob", "1.5"),
    ("train", "crop_scale", "0.5"), ("train", "lr", "nan"), ("train", "lr", "-1"),
    ("train", "min_lr", "1"), ("train", "epochs", "0"), ("train", "drop_path", "1"),
    ("train", "layer_decay", "0"), ("train", "seed", "-1"), ("train", "val_seed", "-1"),
    ("train", "val_pairs", "24"), ("train", "val_pairs", "-1"), ("train", "task", "coco"),
    ("train", "dtype", "fp16"), ("train", "model", "beit3_huge_patch16_384"),
    ("train", "input_size", "60"), ("train", "train_shards", "annotation/none_*.json"),
    ("train", "ema_decay", "1"), ("train", "clip_grad", "0"), ("train", "max_text_length", "2"),
    ("evaluate", "seed", "many"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "name", "value"), WRONG_VALUES)
def test_wrong_value(
    command: str, name: str, value: str, case: Case, refuse: Callable[..., None]
) -> None:
    getattr(case, command)[name] = value
    at_fault = {"min_lr": "lr"}.get(name, name)
    refuse(command, f"--{at_fault}")


@pytest.mark.parametrize("command", ["infer", "train"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_missing_gpu(command: str, case: Case, refuse: Callable[..., None]) -> None:
    getattr(case, command)["device"] = "cuda"
    refuse(command, "--device", "CUDA")


CONTRADICTIONS = [
    ("train", ("--save_ckpt", "--no_save_ckpt"), "no_save_ckpt"),
    ("train", ("--grad_cache_chunk", "4"), "--grad_cache_chunk"),
    ("train", ("--grad_cache_chunk", "2", "--update_freq", "2"), "--grad_cache_chunk"),
    ("train", ("--debug", "--config", "configs/lhp/mini.yaml"), "--debug"),
    ("evaluate", ("--score", "score.pt"), "--score"),
]


@pytest.mark.parametrize(("command", "flags", "expected"), CONTRADICTIONS)
def test_contradicting_flags(
    command: str, flags: tuple[str, ...], expected: str, refuse: Callable[..., None]
) -> None:
    refuse(command, expected, flags=flags)


def test_answers_for_a_labelled_set(case: Case, refuse: Callable[..., None]) -> None:
    case.infer["annotation"] = case.data / "annotation/test/pair.json"
    case.infer["image_folder"] = case.data
    case.infer["answers"] = case.masked / "answers.json"
    refuse("infer", "has its own labels")


# -------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("text", ["", "\n", "G00 G01\n", "G00 G00\n" * 10])
def test_bad_ranked_list(text: str, case: Case, refuse: Callable[..., None]) -> None:
    case.evaluate["predictions"].write_text(text)
    refuse("evaluate", "list.txt")


@pytest.mark.parametrize("content", [b"", b"no scores", pickle.dumps({"a": 1})])
def test_bad_score_file(content: bytes, case: Case, refuse: Callable[..., None]) -> None:
    path = case.evaluate["predictions"]
    path.write_bytes(content)
    case.evaluate["score"] = case.evaluate.pop("predictions")
    refuse("evaluate", str(path))


def test_evaluation_without_labels(case: Case, refuse: Callable[..., None]) -> None:
    del case.evaluate["answers"]
    refuse("evaluate", "query.json", "--answers")
