"""Training questions of a reranker: mined files, twins of pairs, wrong images drawn at random."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pab.core.errors import InputError
from pab.data.image_paths import ImageFinder
from pab.data.training_set import TrainingSet
from pab.encoders.st.questions import (
    Draws,
    PairQuestions,
    Question,
    QuestionSamples,
    question_of_pair,
    read_mined,
    without_held_out,
)
from pab.encoders.st.tune_config import RandomCrop

LINE = {
    "caption": "A man falls.", "query_id": "0_1#0", "image": "train/imgs_0/goal/0.jpg",
    "wrong": ["train/imgs_0/wentwrong/0.jpg"], "kind": "failure", "source": "pair_0.json",
}  # fmt: skip


def mined(folder: Path, *lines: dict[str, Any]) -> Path:
    path = folder / "mined.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def unchanged(image: Image.Image) -> Image.Image:
    return image


@pytest.fixture(scope="module")
def pairs(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingSet:
    return TrainingSet.open(tiny_data, cache_dir=tmp_path_factory.mktemp("index"))


def samples(pairs: TrainingSet, draws: Draws, seed: int = 0) -> QuestionSamples:
    rows = np.arange(len(pairs))
    return QuestionSamples(PairQuestions(pairs, rows), pairs, rows, draws, seed, unchanged)


def test_a_mined_file_is_read(tmp_path: Path) -> None:
    path = mined(tmp_path, LINE, {**LINE, "wrong": ["train\\b.jpg", "c.jpg"], "query_id": "2"})
    assert read_mined(path, tmp_path) == [
        Question("A man falls.", "train/imgs_0/goal/0.jpg", ("train/imgs_0/wentwrong/0.jpg",)),
        Question("A man falls.", "train/imgs_0/goal/0.jpg", ("train/b.jpg", "c.jpg")),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"caption": " "}, "field 'caption'"),
        ({"image": "../secret.jpg"}, "field 'image': expected a path inside the data root"),
        ({"wrong": ["a.jpg", "../../b.jpg"]}, "field 'wrong': expected a path inside"),
        ({"wrong": []}, "field 'wrong': expected a list of image paths, found an empty list"),
        ({"wrong": "a.jpg"}, "field 'wrong': expected a list of image paths, found the string"),
        ({"wrong": [LINE["image"]]}, "expected wrong images, found the right one"),
        ({"wrong": ["a.jpg", "b.jpg", "a.jpg"]}, "expected distinct images, found 'a.jpg' twice"),
    ],
)
def test_a_bad_mined_line_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = mined(tmp_path, LINE, {**LINE, **change})
    with pytest.raises(InputError, match="line 2") as error:
        read_mined(path, tmp_path)
    assert message in str(error.value)


def test_an_empty_mined_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found none"):
        read_mined(mined(tmp_path), tmp_path)
    with pytest.raises(InputError, match=r"mined training questions"):
        read_mined(tmp_path / "missing.jsonl", tmp_path)


def test_questions_with_validation_images_are_left_out(tmp_path: Path) -> None:
    questions = [Question("a", "1", ("2",)), Question("b", "3", ("4",)), Question("c", "5", ("1",))]
    finder = ImageFinder(tmp_path)
    held_out = frozenset(tmp_path / name for name in "135")
    assert without_held_out(questions, frozenset([tmp_path / "1"]), finder, "f") == questions[1:2]
    with pytest.raises(InputError, match=r"found none \(of 3\)"):
        without_held_out(questions, held_out, finder, "file")


def test_a_validation_image_is_left_out_under_any_path(tmp_path: Path) -> None:
    image = tmp_path / "wentwrong" / "7.jpg"
    draw(image)
    questions = [
        Question("a", "b.jpg", (name,))
        for name in ("wentrong/7.jpg", "wentwrong/7.jpeg", "./wentwrong/7.jpg", "wentwrong/8.jpg")
    ]
    finder = ImageFinder(tmp_path)
    assert without_held_out(questions, frozenset([image]), finder, "f") == questions[3:]
    pairs = [("0", "7.jpg", "8.jpg"), ("1", "8.jpg", "7.jpeg"), ("2", "9.jpg", "8.jpg")]
    draw(tmp_path / "train/7.jpg")
    shard = tmp_path / "pairs_0.json"
    lines = [
        {"image": f"train/{image}", "caption": "a", "image_id": number, "hard_i": twin}
        for number, image, twin in pairs
    ]
    shard.write_text("\n".join(map(json.dumps, lines)))
    opened = TrainingSet.open(tmp_path, [shard])
    held_out = frozenset([tmp_path / "train/7.jpg"])
    path = mined(tmp_path, {**LINE, "image": "wentrong/7.jpeg", "wrong": ["wentwrong/7.jpg"]})
    with pytest.raises(InputError, match="expected wrong images, found the right one"):
        read_mined(path, tmp_path)
    found = PairQuestions(opened, np.array([1, 2]), held_out)
    assert [question.wrong for question in found] == [(), ("train/8.jpg",)]


def draw(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def test_the_twin_of_a_pair_is_its_wrong_image(pairs: TrainingSet) -> None:
    questions = PairQuestions(pairs, np.arange(len(pairs)))
    assert len(questions) == len(pairs)
    by_image = {pair.image: pair for pair in pairs}
    for question in questions:
        twin = by_image[question.wrong[0]]
        assert twin.source_video == by_image[question.image].source_video
        assert twin.image != question.image


def test_images_with_the_same_caption_are_not_wrong(pairs: TrainingSet) -> None:
    pair = pairs[0]
    assert question_of_pair(pair).wrong == (f"train/{pair.hard_i}",)
    assert question_of_pair(replace(pair, hard_c=pair.caption)).wrong == ()
    data = samples(pairs, Draws(hard=0, easy=len(pairs) - 2))
    question = Question(pairs[5].caption, pair.image, ())
    assert pairs[5].image not in data.wrong(question, epoch=0)


def test_drawn_images_are_wrong_and_differ(pairs: TrainingSet) -> None:
    data = samples(pairs, Draws(hard=1, easy=3, hard_from=1))
    for position, question in enumerate(data.questions):
        for epoch in (0, 1):
            sample = data[(position, epoch)]
            assert not isinstance(sample, InputError)
            assert sample.caption == question.caption
            names = [path.relative_to(pairs.root).as_posix() for path in sample.paths]
            assert names[0] == question.image
            assert len(set(names)) == len(names) == 5
            assert (question.wrong[0] in names) == (epoch == 1), "hard images start in epoch 1"


def test_draws_depend_only_on_seed_epoch_and_position(pairs: TrainingSet) -> None:
    draws = Draws(hard=1, easy=4)

    def paths(seed: int, epoch: int) -> list[Path]:
        sample = samples(pairs, draws, seed)[(3, epoch)]
        assert not isinstance(sample, InputError)
        return sample.paths

    assert paths(0, 0) == paths(0, 0)
    assert paths(0, 0) != paths(0, 1)
    assert paths(0, 0) != paths(1, 0)


def test_an_unreadable_image_is_an_error_of_the_sample(pairs: TrainingSet) -> None:
    data = samples(pairs, Draws(hard=1, easy=0))
    data.questions = [Question("a", "train/imgs_0/none.jpg", ())]
    error = data[(0, 0)]
    assert isinstance(error, InputError)
    assert "none.jpg" in str(error)


def test_crops_stay_in_their_limits() -> None:
    image = Image.new("RGB", (100, 80))
    assert RandomCrop(0.0, (0.5, 0.6), (1.0, 1.0))(image) is image
    crop = RandomCrop(1.0, (0.5, 0.6), (1.0, 1.0))(image)
    assert abs(crop.width - crop.height) <= 1
    assert 0.45 < crop.width * crop.height / (100 * 80) < 0.65
