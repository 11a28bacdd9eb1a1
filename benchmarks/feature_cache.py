"""Measure the time that the feature cache saves: `python benchmarks/feature_cache.py`.

Scores noise images and captions three times in one process: with an empty cache, with a full cache,
and after changing one image. The model is LHP's base model (or `--model`) with random weights. The
time covers the whole command, including loading the weights and checking the images. The scores of
unchanged images must be equal.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from machine import describe, flag_parser
from models import write_lhp, write_queries
from PIL import Image

from lhp.beit3 import model_config
from lhp.infer import main as infer
from pab.scores import load_scores
from pab.scoring.feature_cache import HASHES


def main() -> None:
    args = flag_parser(
        __doc__, model="beit3_base_patch16_384", items=(120, "number of images, and of captions")
    ).parse_args()
    print(describe(), json.dumps(vars(args)))
    draw = np.random.default_rng(0)
    with TemporaryDirectory() as name:
        folder = Path(name)
        images, kept = folder / "images", folder / "features"
        images.mkdir()
        for number in range(args.items):
            noise = Image.fromarray(draw.integers(0, 256, (24, 16, 3), dtype=np.uint8))
            noise.resize((256, 384)).save(images / f"{number:04d}.jpg", quality=90)
        inputs = write_queries(folder, args.items)
        inputs += write_lhp(folder, args.model, model_config(args.model))

        def timed(out: str) -> tuple[float, torch.Tensor]:
            start = time.perf_counter()
            infer(
                [*inputs, "--image_folder", str(images), "--feature_cache_dir", str(kept)]
                + ["--save_score", str(folder / out), "--output_file", str(folder / "l.txt")]
            )
            seconds = time.perf_counter() - start
            vectors = sum(path.stat().st_size // 32 for path in kept.rglob(f"*{HASHES}"))
            print(f"  {out}: {seconds:.2f} s, {vectors} cached vectors", flush=True)
            return seconds, load_scores(folder / out).scores

        first, scores = timed("first.pt")
        second, again = timed("second.pt")
        Image.new("RGB", (256, 384), (200, 0, 0)).save(images / "0003.jpg")
        third, changed = timed("one_changed.pt")
    others = [column for column in range(args.items) if column != 3]
    same = torch.equal(scores, again) and torch.equal(scores[:, others], changed[:, others])
    print(
        f"full cache: {first / second:.1f} times as fast; one image changed: "
        f"{first / third:.1f} times; scores {'equal' if same else 'NOT EQUAL'}"
    )


if __name__ == "__main__":
    main()
