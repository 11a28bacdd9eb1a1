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
import torch
from PIL import Image

from pab.encoders.st.make_small import (
    IMAGE,
    PAD,
    VIDEO,
    VISION_END,
    VISION_START,
    SmallConfig,
    make_small,
    train_tokenizer,
)

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
    """Draw images of up to 15 sizes, and so of several numbers of tokens."""
    return [noise(40 + 37 * (i % 5), 50 + 23 * (i % 3), i) for i in range(count)]


def write_colqwen2(folder: Path) -> None:
    """Write a small, untrained ColQwen2 in the format of transformers, without modules.json."""
    from transformers import (
        ColQwen2Config,
        ColQwen2ForRetrieval,
        ColQwen2Processor,
        Qwen2VLConfig,
        Qwen2VLImageProcessor,
    )

    tokenizer = train_tokenizer(CAPTIONS * 20, 400)
    ids = tokenizer.get_vocab()
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 48, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
        "pad_token_id": ids[PAD], "rope_parameters": {
            "rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 4, 4],
        },
    }  # fmt: skip
    vision = {
        "depth": 2, "embed_dim": 32, "hidden_size": 48, "num_heads": 2, "mlp_ratio": 2,
        "patch_size": 16, "spatial_merge_size": 2,
    }  # fmt: skip
    backbone = Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=ids[IMAGE],
        video_token_id=ids[VIDEO], vision_start_token_id=ids[VISION_START],
        vision_end_token_id=ids[VISION_END],
    )  # fmt: skip
    torch.manual_seed(0)
    model = ColQwen2ForRetrieval(ColQwen2Config(vlm_config=backbone, embedding_dim=16))
    model.save_pretrained(folder)
    pixels = {"shortest_edge": 2048, "longest_edge": 4096}
    images = Qwen2VLImageProcessor(size=pixels, patch_size=16, merge_size=2)
    ColQwen2Processor(images, tokenizer).save_pretrained(folder)
