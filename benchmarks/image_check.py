"""Measure the check that every training image exists, on a tree of PAB's size.

    python benchmarks/image_check.py --out /tmp/tree      # creates 75 shards of 13,515 empty files

The tree has 225 image folders and 1,013,625 images. Prints the CPU time of several operations, and
the peak memory so far: opening the set, listing its images, the check, and single look-ups. The
first opening builds the index, which also stores the list of images. First-time figures may include
reads from the disk.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import flag_parser, peak_mib

from pab.data.training_set import TrainingSet

SHARDS, PER_FOLDER = 75, 4505  # three folders per shard
SAMPLE = 20_000


def make_tree(root: Path) -> None:
    """Write shards in the authors' layout, with empty image files."""
    (root / "annotation/train").mkdir(parents=True)
    for shard in range(SHARDS):
        with (root / f"annotation/train/attr_{shard}.json").open("w") as lines:
            for kind in ("goal", "wentwrong", "full"):
                folder = root / f"train/imgs_{shard}/{kind}"
                folder.mkdir(parents=True)
                for number in range(PER_FOLDER):
                    (folder / f"{number}.jpg").touch()
                    row = {
                        "image": f"train/imgs_{shard}/{kind}/{number}.jpg",
                        "caption": "A person in a red coat walks over the road. " * 6,
                        "image_id": f"{shard}_{kind}_{number}",
                        "source_id": f"{shard}-{number}_{int(kind != 'goal')}",
                    }
                    lines.write(json.dumps(row) + "\n")


def timed(what: str, step: Callable[[], Any]) -> Any:
    """Run a step; print its CPU time and the peak memory so far."""
    started = time.process_time()
    result = step()
    seconds = time.process_time() - started
    print(f"{what:<32} {seconds:8.2f} s   peak {peak_mib():6.0f} MiB", flush=True)
    return result


def main() -> None:
    args = flag_parser(__doc__, out=(Path, "folder of the tree")).parse_args()
    if not args.out.exists():
        make_tree(args.out)
    shutil.rmtree(args.out / ".cache", ignore_errors=True)
    timed("open for the first time", lambda: TrainingSet.open(args.out))
    pairs = timed("open again", lambda: TrainingSet.open(args.out))
    timed("list images for the first time", pairs.images)
    timed("list images again", pairs.images)
    missing = timed("look for every image", pairs.missing_images)
    print(f"{len(missing)} of {len(pairs):,} images are missing")
    some = [pairs[row] for row in random.Random(0).sample(range(len(pairs)), SAMPLE)]
    timed(f"find {SAMPLE:,} images one by one", lambda: [pairs.image_path(pair) for pair in some])


if __name__ == "__main__":
    main()
