"""Measure baselines that use only colours and words, no learned features, on the mini data.

Ridge regression, fitted on the training pairs, maps colour histograms on a grid over an image to
the bag of words of the caption. A query's score for an image is the cosine of the query's bag of
words and the predicted bag. Two bags are compared: words for colours and scenes, and all words (the
strongest linear baseline found). For each bag, the grid, the ridge strength and the colour balance
are chosen by R@1 on training videos that the fit does not use. The chosen regression is fitted
again on all training pairs, and scored once on the test split.

    python benchmarks/bag_of_words.py --data data/mini

Needs no deep-learning library.
"""

from __future__ import annotations

import itertools
import json
import re
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from machine import flag_parser
from PIL import Image

from pab.core.errors import InputError, run_cli
from pab.core.files import existing_file
from pab.mini.captions import COLOUR, SCENE

SIDE = 48  # pixels per side of the thumbnail
HUES, SATURATIONS, VALUES = 12, 3, 4  # histogram bins; colours below MIN_SATURATION have no hue
MIN_SATURATION = 40  # of 255
CELLS = 12  # cells per side of the finest grid; coarser grids are summed from it
MIDDLE_GREY = 118.0  # mean per channel after colour balance
GRIDS = (1, 2, 3, 4)  # cells per side; 1 is a single histogram of the whole image
RIDGES = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)  # times 1 % of the mean Gram diagonal
VALIDATION_SHARE = 0.12  # of the videos
MIN_COUNT = 5  # words in fewer training captions are ignored
FUNCTION_WORDS = {
    "a", "an", "at", "before", "below", "between", "by", "for", "full", "in", "inside", "near",
    "of", "on", "the", "through", "to", "with",
}  # fmt: skip
BOOTSTRAP = 2000
RECALLS = (1, 5, 10)


def main(argv: list[str] | None = None) -> None:
    args = flag_parser(__doc__, data=Path("data/mini"), workers=2, seed=0).parse_args(argv)
    start = time.perf_counter()

    shards = sorted((args.data / "annotation/train").glob("pair_*.json"))
    if not shards:
        raise InputError(
            args.data, "no annotation/train/pair_*.json", todo="build it: python -m pab.mini"
        )
    train = [line for shard in shards for line in _read(shard)]
    test = _read(existing_file(args.data / "annotation/test/attr.json", "the test annotation"))

    videos = np.array([int(line["source_id"].split("_")[0]) for line in train])
    rng = np.random.default_rng(args.seed)
    held = rng.permutation(videos.max() + 1)[: int(VALIDATION_SHARE * (videos.max() + 1))]
    is_held = np.isin(videos, held)
    words = _vocabulary([line["caption"] for line in train])
    train_bags = _bags([line["caption"] for line in train], words)
    weight = np.log(len(train) / (1 + (train_bags > 0).sum(0)))  # rare words are more informative
    train_bags *= weight
    test_bags = _bags([line["caption"][0] for line in test], words) * weight

    thumbnails = _thumbnails(args.data, [line["image"] for line in train], args.workers)
    kept = _colour_and_scene_words()
    bags = {
        "words for colours and scenes": np.array([words[word] for word in words if word in kept]),
        "all words": np.arange(len(words)),
    }
    tried = []
    for balance, grid in itertools.product((False, True), GRIDS):
        features = _features(thumbnails, balance, grid)
        fit = _Ridge(features[~is_held], train_bags[~is_held])
        for strength in RIDGES:
            predicted = fit.predict(features[is_held], strength)
            ranks = {
                name: _ranks(_cosine(train_bags[is_held][:, columns], predicted[:, columns]))
                for name, columns in bags.items()
            }
            shares = {name: float((found < 1).mean()) for name, found in ranks.items()}
            tried.append((shares, grid, balance, strength))
    print(
        f"{len(train)} training pairs, {int(is_held.sum())} of them for validation, "
        f"{len(test)} test queries; {HUES}x{SATURATIONS}x{VALUES} HSV bins, seed {args.seed}"
    )
    test_thumbnails = _thumbnails(args.data, [line["image"] for line in test], args.workers)
    for name, columns in bags.items():
        _, grid, balance, strength = max((one[0][name], *one[1:]) for one in tried)
        fit = _Ridge(_features(thumbnails, balance, grid), train_bags)
        features = _features(test_thumbnails, balance, grid)
        predicted = fit.predict(features, strength)[:, columns]
        chosen = f"grid {grid}, colour balance {balance}, ridge {strength}"
        print(f"\n{name}: {len(columns)} words, {chosen}")
        _report(_cosine(test_bags[:, columns], predicted), test, rng)
    print(f"\n{time.perf_counter() - start:.0f} s")


def _report(scores: np.ndarray, test: list[dict[str, Any]], rng: np.random.Generator) -> None:
    """Print R@K with bootstrap intervals, and how often the right image scores above its twin."""
    ranks = _ranks(scores)
    draws = rng.integers(len(ranks), size=(BOOTSTRAP, len(ranks)))
    for k in RECALLS:
        hits = ranks < k
        low, high = np.percentile(hits[draws].mean(1) * 100, (2.5, 97.5))
        print(f"R@{k}: {hits.mean() * 100:.2f} % (95 % interval {low:.2f} to {high:.2f})")
    column = {line["image_id"]: i for i, line in enumerate(test)}
    pairs = [(i, column[line["hard_i_id"]]) for i, line in enumerate(test) if "hard_i_id" in line]
    wins = np.mean([scores[i, i] > scores[i, twin] for i, twin in pairs])
    print(f"right image above its twin: {wins * 100:.2f} % of {len(pairs)}")


def _colour_and_scene_words() -> set[str]:
    phrases = [phrase for table in (COLOUR, SCENE) for some in table.values() for phrase in some]
    return {word for phrase in phrases for word in _words(phrase)} - FUNCTION_WORDS


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _words(caption: str) -> list[str]:
    return re.findall(r"[a-z'-]+", caption.lower())


def _vocabulary(captions: list[str]) -> dict[str, int]:
    counts = Counter(word for caption in captions for word in set(_words(caption)))
    kept = sorted(word for word, count in counts.items() if count >= MIN_COUNT)
    return {word: i for i, word in enumerate(kept)}


def _bags(captions: list[str], words: dict[str, int]) -> np.ndarray:
    """Return bags of words, [captions, words], 1 for words that occur."""
    bags = np.zeros((len(captions), len(words)), dtype=np.float32)
    for row, caption in enumerate(captions):
        bags[row, [words[word] for word in _words(caption) if word in words]] = 1.0
    return bags


def _small(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX))


def _thumbnails(root: Path, images: list[str], workers: int) -> np.ndarray:
    """Load thumbnails, uint8 [images, SIDE, SIDE, 3]."""
    paths = [str(root / image) for image in images]
    with ProcessPoolExecutor(workers) as pool:
        return np.stack(list(pool.map(_small, paths, chunksize=64)))


def _histogram(pixels: np.ndarray, balance: bool) -> np.ndarray:
    """Count colours per cell of an image, uint8 [CELLS, CELLS, bins]."""
    if balance:  # grey world: equal means in all channels
        means = pixels.mean((0, 1), dtype=np.float32)
        pixels = np.clip(pixels * (MIDDLE_GREY / np.maximum(means, 1)), 0, 255).astype(np.uint8)
    hsv = np.asarray(Image.fromarray(pixels).convert("HSV")).astype(np.int64)
    hue, saturation, value = hsv[..., 0], hsv[..., 1], hsv[..., 2]
    v_bin = value * VALUES // 256
    s_bin = (saturation - MIN_SATURATION) * SATURATIONS // (256 - MIN_SATURATION)
    coloured = VALUES + ((hue * HUES // 256) * SATURATIONS + s_bin) * VALUES + v_bin
    index = np.where(saturation >= MIN_SATURATION, coloured, v_bin)
    bins = VALUES + HUES * SATURATIONS * VALUES
    rows, columns = np.indices((SIDE, SIDE)) * CELLS // SIDE
    flat = (rows * CELLS + columns) * bins + index
    counts = np.bincount(flat.ravel(), minlength=CELLS * CELLS * bins)
    return counts.astype(np.uint8).reshape(CELLS, CELLS, bins)


def _features(thumbnails: np.ndarray, balance: bool, grid: int) -> np.ndarray:
    """Return square roots of the cells' normalized histograms, [images, grid * grid * bins]."""
    step = CELLS // grid
    rows = []
    for pixels in thumbnails:
        cells = _histogram(pixels, balance)
        level = cells.reshape(grid, step, grid, step, -1).sum((1, 3), dtype=np.float32)
        rows.append(np.sqrt(level / level[0, 0].sum()).ravel())
    return np.stack(rows)


class _Ridge:
    """Ridge regression with an unpenalized mean; all strengths share one eigendecomposition."""

    def __init__(self, features: np.ndarray, targets: np.ndarray) -> None:
        self.mean, self.target_mean = features.mean(0), targets.mean(0)
        centred = features - self.mean
        gram = (centred.T @ centred).astype(np.float64)
        self.scale = float(np.trace(gram)) / len(gram) / 100
        self.values, self.vectors = np.linalg.eigh(gram)
        self.projected = self.vectors.T @ (centred.T @ (targets - self.target_mean))

    def predict(self, features: np.ndarray, strength: float) -> np.ndarray:
        penalty = np.maximum(self.values, 0) + strength * self.scale
        weights = self.vectors @ (self.projected / penalty[:, None])
        # The mean bag is omitted: it is equal for all images, and the cosine centres the queries.
        return (features - self.mean) @ weights


def _cosine(queries: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    queries = queries - queries.mean(0)
    norms = np.linalg.norm(predicted, axis=1) + 1e-9
    return (queries @ (predicted / norms[:, None]).T).astype(np.float64)


def _ranks(scores: np.ndarray) -> np.ndarray:
    """Count, per query, the other images that score at least as high as the right image."""
    return (scores >= np.diag(scores)[:, None]).sum(1) - 1


if __name__ == "__main__":
    run_cli(main)
