"""Small, untrained vision-language models and images for tests; each folder is made once."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from pab.encoders.st.make_small import SmallConfig, make_small

pytest.importorskip("sentence_transformers")

CAPTIONS = [
    "A man in a red jacket is falling off a bicycle.",
    "A woman in a blue coat is walking a dog down the street.",
    "Two people fight.",
    "A child climbs over a fence while an old man in a green hat looks on from the other side.",
    "yes",
]


@cache
def small_vlm(kind: Literal["reranker", "dense", "late"]) -> Path:
    """Make a small model of a kind; the folder is shared by all tests, which must not change it."""
    folder = Path(tempfile.mkdtemp(prefix="vlm-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    config = SmallConfig(
        kind=kind, out=str(folder / kind), width=48, layers=2, heads=2, side=64, vocab_size=400,
        dims=16,
    )  # fmt: skip
    make_small(config, CAPTIONS * 20)
    return folder / kind


def noise(width: int, height: int, seed: int) -> Image.Image:
    """Draw an RGB image of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def images_of_many_sizes(count: int) -> list[Image.Image]:
    """Draw images of different sizes, and so of different numbers of tokens."""
    return [noise(40 + 37 * (i % 5), 50 + 23 * (i % 3), i) for i in range(count)]
