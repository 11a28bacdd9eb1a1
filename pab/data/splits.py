"""Hold out validation pairs from the training pairs, so that no decision depends on the test set.

Whole source videos are held out, so a pair and its twin, which show the same scene, are on the same
side of the split.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pab.core.errors import InputError
from pab.core.files import write_text
from pab.core.notices import notice
from pab.data.records import image_keys
from pab.data.training_set import TrainingSet

TRAIN_IDS, VAL_IDS = "train_ids.txt", "val_ids.txt"
VAL_PAIRS = "val_pairs.json"  # the held-out pairs, as an annotation for scoring commands


def validation_split(
    training_set: TrainingSet, n_val_pairs: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Split the pairs into training and validation by source video.

    Videos are drawn in a seeded order until they contain at least ``n_val_pairs`` pairs. The excess
    is less than the size of the last video drawn. All pairs of an image count as one video, and
    without ``source_id`` also the image and its twin.

    Args:
        training_set: the pairs.
        n_val_pairs: minimum number of held-out pairs; 0 trains on everything.
        seed: random seed; equal seeds and shards produce equal splits.

    Returns:
        Ascending indices of the training pairs and of the held-out pairs, int64. Together, they
        cover all pairs.

    Raises:
        InputError: ``n_val_pairs`` is negative, or no training pairs remain.
    """
    if n_val_pairs < 0:
        raise InputError("--val_pairs", f"expected 0 or more, found {n_val_pairs}")
    everything = np.arange(len(training_set), dtype=np.int64)
    if n_val_pairs == 0:
        return everything, everything[:0]
    videos = training_set.videos
    sizes = np.bincount(videos)
    order = np.random.default_rng(seed).permutation(len(sizes))
    reached = np.cumsum(sizes[order])
    n_videos = int(np.searchsorted(reached, n_val_pairs)) + 1
    held_out = np.zeros(len(sizes), dtype=bool)
    held_out[order[:n_videos]] = True
    is_val = held_out[videos]
    if is_val.all():
        some = f"{n_val_pairs} for validation, in whole source videos"
        problem = f"{some}, leaves no pair to train on (of {len(training_set)})"
        raise InputError("--val_pairs", problem, todo="set a smaller number")
    found = int(is_val.sum())
    if found > 2 * n_val_pairs:
        whole = "videos are held out whole, and pairs that share an image or a twin are one video"
        notice("--val_pairs", f"{found} pairs are held out instead of {n_val_pairs}: {whole}")
    return everything[~is_val], everything[is_val]


def write_split(
    folder: str | Path, training_set: TrainingSet, train: np.ndarray, val: np.ndarray
) -> None:
    """Write a split as ``train_ids.txt`` and ``val_ids.txt``, one ``image_id`` per line.

    The validation pairs are also written as an annotation, ``val_pairs.json``, for the scoring
    commands (``--annotation FOLDER/val_pairs.json --image_folder DATA_ROOT``). Captions of one
    image (:func:`pab.data.records.image_keys`) are on one line.

    Args:
        folder: output folder.
        training_set: the pairs.
        train: indices of the training pairs.
        val: indices of the held-out pairs; may be empty.

    Raises:
        InputError: the files cannot be written, or a shard has changed since it was indexed.
    """
    image_ids = training_set.image_ids()
    for name, indices in ((TRAIN_IDS, train), (VAL_IDS, val)):
        write_text(Path(folder) / name, "".join(f"{image_ids[i]}\n" for i in indices))
    lines: dict[object, dict[str, Any]] = {}
    pairs = [training_set[int(index)] for index in val]
    for number, (pair, image) in enumerate(zip(pairs, image_keys(pairs), strict=True)):
        fields = {key: value for key, value in asdict(pair).items() if value is not None}
        if image is not None:
            before = lines.get(image, {"caption": []})
            fields |= {"image_id": image[0], "caption": [*before["caption"], pair.caption]}
        lines[number if image is None else image] = fields
    text = "".join(f"{json.dumps(line)}\n" for line in lines.values())
    write_text(Path(folder) / VAL_PAIRS, text)
