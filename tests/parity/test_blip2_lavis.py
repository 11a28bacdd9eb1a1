"""Compare the BLIP-2 port with reference vectors from LAVIS (`make_blip2_lavis.py`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pab.core.checkpoints import read_checkpoint
from pab.data.images import recipe
from pab.data.wordpiece import Tokenizer
from pab.encoders.blip2.model import Blip2, Blip2Config, load_blip2
from pab.encoders.captions import blip_caption
from pab.encoders.pooling import Pooling, pooled_similarity
from tests.parity.blip2_lavis_captions import CAPTIONS

HERE = Path(__file__).resolve().parent
VECTOR = HERE / "blip2_lavis.pt"
SIZES = Blip2Config(
    image_size=28, image_width=32, image_layers=2, image_heads=2, queries=4, width=32, layers=4,
    heads=2, ffn_dim=64, vocab_size=693, positions=80, embed_dim=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def lavis() -> dict[str, Any]:
    return read_checkpoint(VECTOR)


@pytest.fixture(scope="module")
def port() -> Blip2:
    return load_blip2(SIZES, VECTOR)


def test_captions_and_their_ids(lavis: dict[str, Any]) -> None:
    assert [blip_caption(caption) for caption in CAPTIONS] == lavis["captions"]
    tokenizer = Tokenizer(HERE.parents[1] / "checkpoints/mini/bert", max_words=80, max_length=80)
    assert [tokenizer.encode(caption) for caption in lavis["captions"]] == lavis["ids"]


def test_pixels(lavis: dict[str, Any]) -> None:
    image = Image.effect_mandelbrot((90, 50), (-2, -1, 1, 1), 50).convert("RGB")
    transform = recipe("blip2", SIZES.image_size).transform()
    ours = torch.stack([transform(turned) for turned in (image, image.rotate(90))])
    torch.testing.assert_close(ours, lavis["pixels"], rtol=0, atol=1e-6)


@torch.inference_mode()
def test_vectors_and_both_poolings(lavis: dict[str, Any], port: Blip2) -> None:
    images = port.encode_queries(lavis["pixels"])
    rows = lavis["ids"]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    texts = port.encode_text(ids, mask)
    torch.testing.assert_close(images, lavis["image"], rtol=0, atol=1e-5)
    torch.testing.assert_close(texts, lavis["text"], rtol=0, atol=1e-5)
    assert lavis["image"].std() > 0.1, "vectors must differ between inputs"
    assert (images[0] - images[1]).abs().max() > 0.01
    for pooling in ("first", "max"):
        kind: Pooling = pooling  # type: ignore[assignment]
        found = pooled_similarity(images, texts, kind)
        torch.testing.assert_close(found, lavis[pooling], rtol=0, atol=1e-5)


def test_the_temperature_is_that_of_lavis(lavis: dict[str, Any], port: Blip2) -> None:
    assert float(port.temp.detach()) == pytest.approx(float(lavis["model"]["temp"]))
