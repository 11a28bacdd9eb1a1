"""Validation split: whole source videos, chosen by seed, written as ids."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pab.core.errors import InputError
from pab.data.annotations import read_retrieval, retrieval_of_pairs
from pab.data.id_lists import read_id_list
from pab.data.splits import TRAIN_IDS, VAL_IDS, VAL_PAIRS, validation_split, write_split
from pab.data.training_set import TrainingSet


@pytest.fixture
def pairs(tmp_path: Path) -> TrainingSet:
    """Return 60 pairs: 20 videos of two pairs that are not adjacent, 20 pairs without a source."""
    folder = tmp_path / "annotation" / "train"
    folder.mkdir(parents=True)
    with (folder / "pair_0.json").open("w") as handle:
        for k in range(60):
            line = {"image": f"train/{k}.jpg", "caption": "a", "image_id": f"0_{k}"}
            if k < 40:
                line["source_id"] = f"{k % 20}_{k // 20}"
            handle.write(json.dumps(line) + "\n")
    return TrainingSet.open(tmp_path)


@pytest.mark.parametrize("n", [1, 7, 20, 45])
def test_no_video_is_on_both_sides(pairs: TrainingSet, n: int) -> None:
    train, val = validation_split(pairs, n, seed=3)
    assert sorted([*train, *val]) == list(range(60))
    assert n <= len(val) <= n + 1  # the largest video has two pairs
    assert not set(pairs.videos[train]) & set(pairs.videos[val])
    assert (np.diff(train) > 0).all()
    assert (np.diff(val) > 0).all()


def test_the_seed_determines_the_split(pairs: TrainingSet) -> None:
    first, again, other = (validation_split(pairs, 20, seed)[1] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert first.tolist() != other.tolist()


def test_a_smaller_split_is_part_of_a_larger_one(pairs: TrainingSet) -> None:
    small, large = (validation_split(pairs, n, seed=5)[1] for n in (10, 30))
    assert set(small) < set(large)


def test_an_image_with_two_ids_and_twins_without_a_source_stay_together(tmp_path: Path) -> None:
    folder = tmp_path / "annotation" / "train"
    folder.mkdir(parents=True)
    with (folder / "pair_0.json").open("w") as handle:
        for k in range(60):
            line = {"image": f"train/{k // 2}.jpg", "caption": "a", "image_id": f"0_{k}"}
            line["hard_i"] = f"{k // 2 ^ 1}.jpg"
            handle.write(json.dumps(line) + "\n")
    pairs = TrainingSet.open(tmp_path)
    train, val = validation_split(pairs, 20, seed=3)
    assert len(val) == 20
    assert not set(train // 4) & set(val // 4)


def test_a_split_much_larger_than_asked_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "annotation" / "train"
    folder.mkdir(parents=True)
    with (folder / "pair_0.json").open("w") as handle:
        for k in range(10):
            line = {"image": f"train/{k}.jpg", "caption": "a", "image_id": f"0_{k}"}
            handle.write(json.dumps({**line, "source_id": "1" if k else "2"}) + "\n")
    sizes = {len(validation_split(TrainingSet.open(tmp_path), 1, seed)[1]) for seed in range(9)}
    assert sizes == {1, 9}
    said = capsys.readouterr().err
    assert "--val_pairs: 9 pairs are held out instead of 1: videos are held out whole" in said


def test_zero_trains_on_everything(pairs: TrainingSet) -> None:
    train, val = validation_split(pairs, 0, seed=1)
    assert (train.tolist(), val.tolist()) == (list(range(60)), [])


@pytest.mark.parametrize("n", [-1, 60, 61, 10_000])
def test_impossible_sizes_are_refused(pairs: TrainingSet, n: int) -> None:
    with pytest.raises(InputError, match=r"--val_pairs: .*\b" + str(abs(n))):
        validation_split(pairs, n, seed=1)


def test_split_is_written_as_ids_and_read_back(pairs: TrainingSet, tmp_path: Path) -> None:
    train, val = validation_split(pairs, 9, seed=1)
    write_split(tmp_path / "out", pairs, train, val)
    for name, indices in ((TRAIN_IDS, train), (VAL_IDS, val)):
        ids = read_id_list(tmp_path / "out" / name)
        assert ids == [pairs.image_ids()[index] for index in indices]
    write_split(tmp_path / "all", pairs, *validation_split(pairs, 0, seed=1))
    assert (tmp_path / "all" / VAL_IDS).read_text() == ""


def test_numbered_ids_of_different_images_are_not_merged(tmp_path: Path) -> None:
    ids = [("clip#0", 0), ("clip#1", 1), ("a#0", 2), ("a#1", 2), ("b", 3), ("b#0", 4)]
    folder = tmp_path / "annotation" / "train"
    folder.mkdir(parents=True)
    lines = [
        json.dumps({"image": f"train/{image}.jpg", "caption": "a", "image_id": image_id})
        for image_id, image in ids
    ]
    (folder / "pair_0.json").write_text("\n".join(lines))
    pairs = TrainingSet.open(tmp_path)
    retrieval = retrieval_of_pairs(pairs, tmp_path)
    assert retrieval.gallery is not None
    gallery = [image.gallery_id for image in retrieval.gallery]
    assert gallery == ["a", "b", "b#0", "clip#0", "clip#1"]
    everything = np.arange(len(ids))
    write_split(tmp_path / "out", pairs, everything[:0], everything)
    read = read_retrieval(tmp_path / "out" / VAL_PAIRS, image_folder=tmp_path)
    assert [q.query_id for q in read.queries] == [q.query_id for q in retrieval.queries]
