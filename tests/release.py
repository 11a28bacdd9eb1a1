"""A small data set in the layout of the authors' release, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pab.core.files import write_text
from tests.conftest import ACTIONS, draw, write_lines

FOLDERS = ((True, "goal"), (False, "wentwrong"))


def make_release(
    root: Path,
    *,
    shards: int = 75,
    videos: int = 2,
    test_images: int = 12,
    numeric_ids: bool = False,
    extra_fields: bool = False,
) -> None:
    """Write annotations, images, poses and out-of-domain data, but no name-masked set.

    Of every three shards, one has a linked folder of images, and one has linked image files, as in
    a hub cache. Odd shards have the folder name ``wentrong`` on disk.

    Args:
        root: data root to create.
        shards: number of training shards, ``attr_N.json``.
        videos: source videos per shard, each with two pairs.
        test_images: lines of ``test/attr.json`` and of ``test/ucc.json``.
        numeric_ids: whether ids of the labelled files are numbers, as published.
        extra_fields: whether lines have unknown fields, and optional fields that are empty or null.
    """
    store = root.parent / f"{root.name}-store"
    for shard in range(shards):
        rows = []
        home = root / f"train/imgs_{shard}"
        place = store / f"imgs_{shard}" if shard % 3 else home
        for video in range(videos):
            number = shard * videos + video
            twins = []
            for normal, folder in FOLDERS:
                on_disk = "wentrong" if shard % 2 and not normal else folder
                caption = draw(place / on_disk / f"{video}.jpg", number, normal)
                kind = "normal" if normal else "anomaly"
                twins.append({
                    "image": f"train/imgs_{shard}/{folder}/{video}.jpg", "caption": caption,
                    "image_id": f"{shard}_{2 * video + (not normal)}",
                    "source_id": f"{number}_{int(not normal)}", "source_caption": "a street",
                    kind: ACTIONS[normal], "scene": "street",
                })  # fmt: skip
            for own, twin in (twins, twins[::-1]):
                own["hard_i"] = twin["image"].removeprefix("train/")
                own["hard_c"], own["hard_i_id"] = twin["caption"], twin["image_id"]
            rows += twins
        if extra_fields:
            for row in rows:
                row |= {"pose": f"pose/{row['image']}", "keypoints": None, "scene": ""}
        write_lines(root / f"annotation/train/attr_{shard}.json", rows)
        if shard % 3 == 1:
            home.parent.mkdir(parents=True, exist_ok=True)
            home.symlink_to(place)
        elif shard % 3 == 2:
            for file in place.rglob("*.jpg"):
                link = home / file.relative_to(place)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(file)
    for name, folder in (("attr", "test"), ("ucc", "ucc")):
        rows = []
        for number in range(test_images):
            normal = number % 2 == 0
            image = f"{folder}/{number}.jpg"
            caption = draw(root / image, 1000 + number, normal)
            row: dict[str, Any] = {
                "image": image, "caption": [caption] if number % 3 else caption,
                "image_id": number if numeric_ids else str(number),
                "normal" if normal else "anomaly": ACTIONS[normal],
            }  # fmt: skip
            rows.append(row | ({"camera": 3, "hard_i": None} if extra_fields else {}))
        write_lines(root / f"annotation/test/{name}.json", rows)
    write_text(root / "annotation/source_caption.json", json.dumps({"0": "a street"}))
    draw(root / "pose/train/imgs_0/goal/0.jpg", 0, True)
