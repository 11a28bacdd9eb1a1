"""Measure the time that the feature cache saves: `python benchmarks/feature_cache.py`.

Scores the same noise images and captions with LHP's base model (random weights; `--model` names
another) three times in one process: with an empty cache, again, and after one image has changed.
The time covers the whole command, including reading the weights and checking the images. All score
files must be equal.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from machine import describe
from PIL import Image

from lhp.beit3 import Beit3Retrieval, model_config
from lhp.infer import main as infer
from lhp.train_tokenizer import train_tokenizer
from pab.scores import load_scores
from pab.scoring.feature_cache import HASHES

WORDS = ["man", "street", "falls", "red", "bicycle", "road", "wet", "jacket", "crowd", "runs"]


def kept(folder: Path) -> int:
    """Number of vectors in the cache."""
    return sum(path.stat().st_size // 32 for path in folder.rglob(f"*{HASHES}"))


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", default="beit3_base_patch16_384")
    parser.add_argument("--items", type=int, default=120, help="images, and captions")
    args = parser.parse_args()
    print(describe(), json.dumps(vars(args)))
    draw = np.random.default_rng(0)
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        captions = [" ".join(draw.choice(WORDS, 40)) for _ in range(args.items)]
        for number in range(args.items):
            noise = Image.fromarray(draw.integers(0, 256, (24, 16, 3), dtype=np.uint8))
            noise.resize((256, 384)).save(folder / f"images/{number:04d}.jpg", quality=90)
        queries = [{"query_index": f"q{i}", "caption": text} for i, text in enumerate(captions)]
        lines = "".join(json.dumps(query) + "\n" for query in queries)
        (folder / "query.json").write_text(lines)
        train_tokenizer(captions, folder / "t.spm", 64)
        torch.manual_seed(0)
        model = Beit3Retrieval(model_config(args.model))
        torch.save({"model": model.state_dict()}, folder / "lhp.pth")
        del model

        def timed(out: str) -> tuple[float, torch.Tensor]:
            start = time.perf_counter()
            infer(
                ["--model", args.model, "--checkpoint", str(folder / "lhp.pth")]
                + ["--tokenizer", str(folder / "t.spm"), "--annotation", str(folder / "query.json")]
                + ["--image_folder", str(folder / "images"), "--device", "cpu"]
                + ["--feature_cache_dir", str(folder / "features")]
                + ["--save_score", str(folder / out), "--output_file", str(folder / "l.txt")]
            )
            seconds = time.perf_counter() - start
            print(f"  {out}: {seconds:.2f} s, {kept(folder / 'features')} vectors kept", flush=True)
            return seconds, load_scores(folder / out).scores

        first, scores = timed("first.pt")
        second, again = timed("second.pt")
        Image.new("RGB", (256, 384), (200, 0, 0)).save(folder / "images/0003.jpg")
        third, changed = timed("one_changed.pt")
        others = [column for column in range(args.items) if column != 3]
        same = torch.equal(scores, again) and torch.equal(scores[:, others], changed[:, others])
        print(
            f"again {first / second:.1f} times as fast, one image changed {first / third:.1f} "
            f"times; scores {'equal' if same else 'NOT EQUAL'}"
        )


if __name__ == "__main__":
    main()
