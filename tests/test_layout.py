"""Layout check of a data root: counts, missing parts and errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pab.core.errors import InputError
from pab.layout.check import main


def write(path: Path, *objects: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in objects))


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "PAB"
    for shard in range(2):
        pairs = [
            {
                "image": f"train/imgs_{shard}/wentwrong/{k}.jpg",
                "caption": "a",
                "image_id": f"{shard}_{k}",
            }
            for k in range(3)
        ]
        write(root / f"annotation/train/pair_{shard}.json", *pairs)
        write(root / f"annotation/train_attr/attr_{shard}.json", *pairs)
        for k in range(3):  # some releases of PAB spell the folder "wentrong"
            touch(root / f"train/imgs_{shard}/wentrong/{k}.jpg")
    tests = [{"image": f"test/{k}.jpg", "caption": ["a"], "image_id": f"{k}"} for k in range(4)]
    ucc = [{"image": "ucc/0.jpg", "caption": ["a"], "image_id": "0"}]
    write(root / "annotation/test/pair.json", *tests)
    write(root / "annotation/test/attr.json", *({**t, "normal": "Walking"} for t in tests))
    write(root / "annotation/test/ucc.json", *ucc)
    touch(root / "ucc/0.jpg")
    masked = root / "name-masked_test-set"
    write(masked / "query.json", *({"query_index": str(k), "caption": "a"} for k in range(5)))
    for k in range(7):
        touch(root / f"test/{k}.jpg")
        touch(masked / f"gallery/{k}.jpg")
    touch(masked / "gallery/notes.txt")
    return root


def rows(output: str) -> dict[str, list[str]]:
    """Map each part to the figures in its row: lines, lines of the released PAB, images."""
    found = {}
    for line in output.splitlines():
        for part in ("training actions", "training", "test actions", "test", "out of domain"):
            if line.startswith(f"{part} "):
                found[part] = line[61:].split()
                break
        for part in ("masked test", "Track 4"):
            if line.startswith(part):
                found[part] = line[61:].split()
    return found


def test_a_complete_root_is_reported(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["check", str(root)])
    output = capsys.readouterr().out
    assert rows(output) == {
        "training": ["6", "1,013,605", "6", "of", "6"],
        "training actions": ["6", "1,013,605", "6", "of", "6"],
        "test": ["4", "1,978", "4", "of", "4"],
        "test actions": ["4", "1,978", "4", "of", "4"],
        "out of domain": ["1", "5,320", "1", "of", "1"],
        "masked test": ["5", "1,978", "7"],
    }
    assert "annotation/train/pair_*.json (2)" in output
    assert "all parts found" in output
    assert "https://" not in output


def test_missing_parts_and_images_are_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "train/imgs_1/wentrong/1.jpg").unlink()
    (root / "annotation/test/ucc.json").unlink()
    shutil.rmtree(root / "annotation/train_attr")
    shutil.rmtree(root / "name-masked_test-set/gallery")
    main(["check", str(root)])
    output = capsys.readouterr().out
    assert rows(output)["training"][2:] == ["5", "of", "6"]
    assert rows(output)["out of domain"] == ["-", "5,320", "-"]
    assert (
        "  1 image of annotation/train/pair_*.json (2), the first train/imgs_1/wentwrong/1.jpg"
        in output
    )
    assert "  annotation/test/ucc.json: 5,320 lines" in output
    assert "  annotation/train_attr/: 75 shards" in output
    assert "  name-masked_test-set/gallery/: the images to search in" in output
    assert "https://github.com/Shuyu-XJTU/CMP" in output


def test_a_release_with_actions_in_its_training_shards(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(root / "annotation/train")
    (root / "annotation/train_attr").rename(root / "annotation/train")
    main(["check", str(root)])
    output = capsys.readouterr().out
    assert "annotation/train/attr_*.json (2)" in output
    assert "all parts found" in output


def test_track_4(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    masked = root / "track4/name-masked_test-set"
    shutil.copytree(root / "name-masked_test-set", masked)
    (masked / "query_index.txt").write_text("4\n3\n2\n1\n0\n")
    main(["check", str(root)])
    assert rows(capsys.readouterr().out)["Track 4"] == ["5", "1,978", "7"]
    (masked / "query_index.txt").write_text("4\n3\n")
    with pytest.raises(InputError, match=r"query_index.txt: expected the query ids of"):
        main(["check", str(root)])


def test_a_root_without_usable_parts_is_an_error(tmp_path: Path, root: Path) -> None:
    with pytest.raises(
        InputError, match=r"found neither; check its spelling, or download PAB from https://"
    ):
        main(["check", str(tmp_path / "missing")])
    for folder in ("train", "test", "ucc", "name-masked_test-set/gallery"):
        shutil.rmtree(root / folder)
    with pytest.raises(InputError, match="no part that can be used"):
        main(["check", str(root)])


def test_bad_lines_are_listed_and_do_not_hide_the_other_parts(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, ucc = root / "annotation/train/pair_1.json", root / "annotation/test/ucc.json"
    two = {"image": "a.jpg", "image_id": "x", "caption": ["a", "b"]}
    again = {"image": "train/imgs_0/wentrong/0.jpg", "image_id": "0_0", "caption": "a"}
    with path.open("a") as shard:
        shard.writelines(f"{json.dumps(line)}\n" for line in ({"image": "a.jpg"}, two, again))
    ucc.write_text("no JSON\n")
    main(["check", str(root)])
    output = capsys.readouterr().out
    assert rows(output)["training"][:1] == ["6"]
    assert "annotation/train/pair_*.json (2): 3 bad lines (" in output
    for number, fault in ((4, "'caption'"), (5, "one caption, found a list"), (6, "pair_0.json")):
        assert any(
            f"{path}, line {number}" in line and fault in line for line in output.splitlines()
        )
    assert "annotation/test/ucc.json: 1 bad line (1 x expected a JSON object)" in output
    assert f"lhp.train --config configs/lhp/finetune.yaml --data_path {root} --skip_bad" in output
    assert f"{ucc} --image_folder" not in output
    assert f"DATA={root} bash scripts/reproduce.sh" in output


def test_nothing_but_bad_lines_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "annotation/test/pair.json", {"image": "a.jpg"})
    with pytest.raises(InputError, match=r"pair.json, line 1: field 'image_id'"):
        main(["check", str(tmp_path)])
