"""Image paths: the text that is allowed, and the layouts in which files are found."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pab.core.errors import InputError
from pab.core.files import write_json
from pab.data.annotations import read_retrieval
from pab.data.image_paths import ImageFinder, checked_path
from pab.data.splits import write_split
from pab.data.training_set import TrainingSet
from tests.conftest import draw, write_lines
from tests.train_pairs import read_train_pairs


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def notes(capsys: pytest.CaptureFixture[str]) -> list[str]:
    lines = capsys.readouterr().err.splitlines()
    return [line for line in lines if line.startswith("note: ")]


# ----------------------------------------------------------------------------------------- text


@pytest.mark.parametrize(
    ("text", "below", "expected"),
    [
        ("train/imgs_0/goal/0.jpg", "", "train/imgs_0/goal/0.jpg"),
        ("train\\imgs_0\\goal\\0.jpg", "", "train/imgs_0/goal/0.jpg"),
        ("train/../test/0.jpg", "", "train/../test/0.jpg"),
        ("../test/0.jpg", "train", "../test/0.jpg"),
        ("{root}/test/0.jpg", "", "test/0.jpg"),
        ("{root}//test/./0.jpg", "", "test/0.jpg"),
        ("{root}/train/imgs_0/0.jpg", "train", "imgs_0/0.jpg"),
        ("{root}/test/0.jpg", "train", "../test/0.jpg"),
        ("{real}/test/0.jpg", "", "test/0.jpg"),
        ("a..b/0.jpg", "", "a..b/0.jpg"),
    ],
)
def test_paths_inside_the_root(tmp_path: Path, text: str, below: str, expected: str) -> None:
    (tmp_path / "real").mkdir()
    root = tmp_path / "link"
    root.symlink_to(tmp_path / "real")
    value = text.format(root=root, real=tmp_path / "real")
    source = root / "annotation/train/pair_0.json"
    assert checked_path(value, "image", source, "line 1", below=below) == expected
    elsewhere = tmp_path / "pairs.json"
    assert checked_path(value, "image", elsewhere, "line 1", below=below, root=root) == expected


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("/etc/passwd", "an absolute path outside it"),
        ("{root}/../x.jpg", "an absolute path outside it"),
        ("{root}x/0.jpg", "an absolute path outside it"),
        ("C:\\PAB\\0.jpg", "an absolute path outside it"),
        ("\\\\server\\0.jpg", "an absolute path outside it"),
        ("../x.jpg", "a path that leaves it"),
        ("a\\..\\..\\x.jpg", "a path that leaves it"),
        ("a\0.jpg", "a path with a NUL character"),
    ],
)
def test_paths_that_leave_the_root(tmp_path: Path, text: str, found: str) -> None:
    value = text.format(root=tmp_path)
    with pytest.raises(InputError, match=f"a.json, line 7: field 'image': .*{found}"):
        checked_path(value, "image", tmp_path / "a.json", "line 7", root=tmp_path)


def test_assumptions_are_reported_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"image": f"test\\{n}.jpg", "caption": ["a"], "image_id": f"{n}"} for n in range(9)]
    rows += [{"image": f"{tmp_path}/test/{n}.jpg", "caption": ["a"], "image_id": f"a{n}"}
             for n in range(9)]  # fmt: skip
    path = tmp_path / "annotation/test/pair.json"
    write_lines(path, rows)
    found = read_retrieval(path)
    assert found.gallery is not None
    assert {image.path.parent for image in found.gallery} == {tmp_path / "test"}
    assert notes(capsys) == [
        f"note: {path}: backslashes in image paths are read as '/'",
        f"note: {path}: absolute image paths under the data root are converted to relative paths",
    ]


def test_absolute_paths_in_training_shards(tmp_path: Path) -> None:
    """Paths must be below the opened data root, wherever the shard is."""
    row = {"image": f"{tmp_path}/data/train/imgs_0/goal/0.jpg", "caption": "a", "image_id": "0"}
    (tmp_path / "data").mkdir()
    shard = tmp_path / "shards/pair_0.json"
    write_lines(shard, [row])
    pairs = TrainingSet.open(tmp_path / "data", [shard])
    assert pairs[0].image == "train/imgs_0/goal/0.jpg"
    with pytest.raises(InputError, match=r"pair_0.json, line 1: .*an absolute path outside it"):
        TrainingSet.open(tmp_path / "shards", [shard])
    with pytest.raises(InputError, match=r"pair_0.json, line 1: .*an absolute path outside it"):
        list(read_train_pairs(shard))


# ---------------------------------------------------------------------------------------- files

WRITTEN = "train/imgs_9/wentwrong/0.jpg"
SPELT = "'wentwrong' and 'wentrong' are treated as the same folder"
LAYOUTS = {
    WRITTEN: [],
    "train/imgs_9/wentrong/0.jpg": [SPELT],
    "Part 2/imgs_9/wentwrong/0.jpg": ["train/imgs_N are read from 'Part K/imgs_N'"],
    "Part 2/imgs_9/wentrong/0.jpg": ["train/imgs_N are read from 'Part K/imgs_N'", SPELT],
    "Part 2/train/imgs_9/wentwrong/0.jpg": ["are read from 'Part K/train/imgs_N'"],
    "train/Part 2/imgs_9/wentwrong/0.jpg": ["are read from 'train/Part K/imgs_N'"],
    "train/imgs_9/wentwrong/0.webp": ["end in .jpg are read from .webp files"],
    "train/imgs_9/wentwrong/0.JPG": ["end in .jpg are read from .JPG files"],
    "Part 2/imgs_9/wentrong/0.png": [".png files", "'Part K/imgs_N'", SPELT],
}


@pytest.mark.parametrize("place", LAYOUTS)
def test_every_layout_is_found(
    tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # If no file exists, the path is returned as written.
    assert ImageFinder(tmp_path).find(WRITTEN) == tmp_path / WRITTEN
    touch(tmp_path / place, *(tmp_path / place.replace("0.", f"{n}.") for n in range(1, 4)))
    finder = ImageFinder(tmp_path)
    for name in (f"{n}.jpg" for n in range(4)):
        image = WRITTEN.replace("0.jpg", name)
        assert finder.find(image) == (tmp_path / place).with_stem(name[0])
        assert finder.absent([image, image]) == []
        assert pickle.loads(pickle.dumps(finder)).find(image).exists()  # noqa: S301 - pickled here
    printed = notes(capsys)
    assert len(printed) == len(LAYOUTS[place])
    for line, part in zip(printed, LAYOUTS[place], strict=True):
        assert part in line
    wrong_part = "train/imgs_8/wentwrong/0.jpg" if place != WRITTEN else "train/imgs_1/goal/0.jpg"
    assert finder.absent([wrong_part, WRITTEN]) == [wrong_part]


def test_a_file_at_the_written_path_takes_precedence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in LAYOUTS:
        touch(tmp_path / place)
    assert ImageFinder(tmp_path).find(WRITTEN) == tmp_path / WRITTEN
    assert ImageFinder(tmp_path).absent([WRITTEN]) == []
    assert notes(capsys) == []


@pytest.mark.parametrize(
    "two", [("0.webp", "0.png"), ("../wentrong/0.jpg", "0.webp"), ("0.JPG", "0.jpeg")]
)
def test_two_files_for_one_image_are_refused(tmp_path: Path, two: tuple[str, str]) -> None:
    folder = (tmp_path / WRITTEN).parent
    touch(*(Path(os.path.normpath(folder / name)) for name in two))
    for use in (ImageFinder(tmp_path).find, lambda image: ImageFinder(tmp_path).absent([image])):
        with pytest.raises(InputError, match=f"image '{WRITTEN}': expected one file") as caught:
            use(WRITTEN)
        for name in two:
            assert Path(name).name in str(caught.value)


def test_a_folder_with_two_image_formats(tmp_path: Path) -> None:
    touch(*(tmp_path / f"test/{n}.{'webp' if n % 2 else 'jpg'}" for n in range(6)))
    touch(tmp_path / "test/odd.jfif", tmp_path / "test/.hidden")
    images = [f"test/{n}.jpg" for n in range(8)] + ["test/odd.jfif", "test/3"]
    finder = ImageFinder(tmp_path)
    assert finder.absent(images) == ["test/6.jpg", "test/7.jpg"]
    assert [finder.find(image).name for image in images[:6]] == [
        "0.jpg", "1.webp", "2.jpg", "3.webp", "4.jpg", "5.webp",
    ]  # fmt: skip
    assert finder.find("test/7.jpg") == tmp_path / "test/7.jpg"
    assert finder.find("test/odd.jfif").exists()
    assert finder.find("test/3") == tmp_path / "test/3.webp"


def test_a_known_layout_costs_no_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("goal", "wentrong", "full"):
        touch(*(tmp_path / f"Part 1/imgs_0/{kind}/{n}.webp" for n in range(50)))
    images = [f"train/imgs_0/{kind}/{n}.jpg" for kind in ("goal", "wentwrong") for n in range(50)]
    calls: list[object] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: calls.append(path) or scandir(path))
    monkeypatch.setattr(Path, "exists", lambda path: calls.append(path) or path.is_file())
    finder = ImageFinder(tmp_path)
    found = [finder.find(image) for image in images]
    assert len(calls) == 4  # one check for a file and one listing per folder
    monkeypatch.undo()
    assert all(path.is_file() for path in found)


# ---------------------------------------------------------------------------------------- links


def test_links_may_lead_anywhere(tmp_path: Path) -> None:
    """In a hub cache, every file is a link to a blob."""
    root, blobs = tmp_path / "root", tmp_path / "blobs"
    touch(*(blobs / f"b{n}" for n in range(3)))
    for n in range(3):
        link = root / f"test/{n}.jpg"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blobs / f"b{n}")
    touch(tmp_path / "moved/imgs_0/goal/0.jpg")
    (root / "train").symlink_to(tmp_path / "moved")
    (root / "test/3.jpg").symlink_to(blobs / "none")
    (root / "test/4.jpg").symlink_to(root / "test/4.jpg")
    rows: list[dict[str, Any]] = [
        {"image": f"test/{n}.jpg", "caption": ["a"], "image_id": f"{n}"} for n in range(3)
    ]
    rows += [{"image": "train/imgs_0/goal/0.jpg", "caption": ["b"], "image_id": "t"}]
    write_lines(tmp_path / "blobs/pair", rows)
    (root / "annotation/test").mkdir(parents=True)
    (root / "annotation/test/pair.json").symlink_to(tmp_path / "blobs/pair")
    found = read_retrieval(root / "annotation/test/pair.json")
    assert found.gallery is not None
    assert all(image.path.is_file() for image in found.gallery)
    names = [f"test/{n}.jpg" for n in range(5)]
    assert ImageFinder(root).absent([*names, "train/imgs_0/goal/0.jpg"]) == names[3:]


def test_errors_name_the_link_of_a_linked_shard(tmp_path: Path) -> None:
    write_json(tmp_path / "blob", {"image": "../x.jpg", "caption": "a", "image_id": "0"})
    (tmp_path / "blob").write_text('{"image": "../../x.jpg", "caption": "a", "image_id": "0"}\n')
    shard = tmp_path / "root/annotation/train/pair_0.json"
    shard.parent.mkdir(parents=True)
    shard.symlink_to(tmp_path / "blob")
    with pytest.raises(InputError, match=r"pair_0.json, line 1: .*leaves it"):
        TrainingSet.open(tmp_path / "root")


def test_paths_of_a_table_follow_the_same_rule(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "real").mkdir()
    root = tmp_path / "link"
    root.symlink_to(tmp_path / "real")
    table = root / "pairs.csv"
    names = ["a\\0.jpg", f"{root}/a/1.jpg", f"{tmp_path}/real/a/2.jpg", "a/../a/3.jpg"]
    table.write_text("filepath,title\n" + "".join(f"{name},a man\n" for name in names))
    found = read_retrieval(table)
    assert found.gallery is not None
    assert [image.gallery_id for image in found.gallery] == ["a/0", "a/1", "a/2", "a/3"]
    assert f"note: {table}: backslashes in image paths are read as '/'" in notes(capsys)


def test_a_backslash_in_a_file_name_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """If a file has this name, no later step may read its backslash as a separator."""
    draw(tmp_path / "a\\b.jpg", 1, True)
    (tmp_path / "a\\b.txt").write_text("a man falls")
    draw(tmp_path / "c.jpg", 2, True)
    (tmp_path / "c.txt").write_text("a woman runs")
    pairs = TrainingSet.open(tmp_path)
    assert [(pair.image, pair.image_id) for pair in pairs] == [
        ("a\\b.jpg", "a\\b#0"), ("c.jpg", "c#0"),
    ]  # fmt: skip
    assert pairs.image_path(pairs[0]) == tmp_path / "a\\b.jpg"
    assert pairs.missing_images() == []
    gallery = read_retrieval(tmp_path).gallery
    assert gallery is not None
    assert [image.path for image in gallery] == [tmp_path / "a\\b.jpg", tmp_path / "c.jpg"]
    write_split(tmp_path / "out", pairs, np.array([1]), np.array([0]))
    held_out = read_retrieval(tmp_path / "out/val_pairs.json", image_folder=tmp_path).gallery
    assert held_out is not None
    assert [image.path for image in held_out] == [tmp_path / "a\\b.jpg"]
    table = tmp_path / "pairs.csv"
    table.write_text("filepath,title\na\\b.jpg,a man falls\n")
    assert TrainingSet.open(table)[0].image == "a\\b.jpg"
    assert not any("backslashes" in note for note in notes(capsys))
