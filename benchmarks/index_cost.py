"""Estimate bytes, hours and price of large search indexes: `python benchmarks/index_cost.py`.

Nothing is measured. Operations are the multiplications and additions of matrix products,
convolutions and attention. They are counted in a forward pass of this project's CLIP and of
transformers' Qwen3-VL, on tensors without values; for BEiT-3, a formula gives them. Hours assume a
share of a card's dense bf16 rate, as in docs/reproduce.md. Prices are examples; --price sets
others.

    hours = images x operations per image / (share x rate of the card)
    price = hours x price per hour
    cores = images per second of the card / images per second that a core decodes
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from lhp_scoring import operations
from machine import flag_parser
from torch.utils.flop_counter import FlopCounterMode
from vlm_cost import CARDS, MODELS, SHARE, count

from lhp.beit3 import model_config
from pab.encoders.clip.model import build

IMAGES = [1_000_000, 10_000_000, 100_000_000]
VECTOR_BYTES = 2  # float16
# Bytes of the metadata per image: 87 with names of 11 characters (benchmarks/index_scale.py).
METADATA_BYTES = 90
CODE_BYTES = 1  # per dimension in an approximate index, 8 bits
# Dimensions in an approximate index: the number that `pab.search index --ann` chooses for the
# clustered vectors of benchmarks/search_speed.py.
ANN_WIDTH = 256
HNSW_LINKS, LINK_BYTES = 2 * 32, 4  # FAISS's HNSW32: 64 neighbours in the lowest layer, int32
IVF_BYTES = 8  # number of the image in its list, int64


class Model(NamedTuple):
    """Operations per image, and width of its vector."""

    flops: float
    width: int


def clip(name: str) -> Model:
    """Count the operations of CLIP's image encoder; its last block returns only the class token."""
    counted = FlopCounterMode(display=False)
    model = build(name).eval()
    side = model.visual.image_size[0]  # type: ignore[union-attr, index]
    with torch.device("meta"), torch.no_grad(), counted:
        found = model.to("meta").encode_image(torch.zeros(1, 3, side, side))  # type: ignore[operator]
    return Model(counted.get_total_flops(), found.shape[1])


def lhp(name: str) -> Model:
    """Count the operations of BEiT-3's image encoder."""
    config = model_config(name)
    weights = 3 * config.patch_size**2 * config.embed_dim
    return Model(operations(config, config.patches + 1, weights), config.embed_dim)


def embedder(name: str) -> Model:
    """Count a Qwen3-VL embedder's operations per 512 x 512 image, with 75 text tokens."""
    sizes = MODELS[name]
    config = sizes.config()
    return Model(count(config, 1, 512, 75, scores=False).flops, config.text_config.hidden_size)


def main() -> None:
    args = flag_parser(
        __doc__,
        price=([0.5, 1.5, 2.5], f"example prices per hour of {', '.join(CARDS)}"),
        decoded=(100.0, "images per second that a core decodes and resizes"),
        images=(IMAGES, "sizes of the index"),
        shard=(10_000_000, "largest index of a machine, images"),
    ).parse_args()
    models = {
        "CLIP ViT-L/14, 336 px": clip("ViT-L-14-336-quickgelu"),
        "LHP, BEiT-3 large, 384 px": lhp("beit3_large_patch16_384"),
        "Qwen3-VL embedder 2B, 512 px": embedder("2B"),
    }
    print(f"{SHARE:.0%} of a card's dense bf16 rate; a core decodes {args.decoded:g} images/s")
    for name, model in models.items():
        print(f"{name}: {model.flops / 1e12:.2f} TFLOP per image, {model.width} numbers")
        for (card, rate), price in zip(CARDS.items(), args.price, strict=True):
            per_second = SHARE * rate / model.flops
            hours = 1e6 / per_second / 3600
            print(
                f"  {card}: {per_second:,.0f} images/s, {hours:.2g} h and {hours * price:.2g} per "
                f"million at {price:g}/h, {math.ceil(per_second / args.decoded)} cores to decode"
            )
    width = models["CLIP ViT-L/14, 336 px"].width
    kinds = f"HNSW and IVF of {ANN_WIDTH} dimensions"
    print(f"GB with {width} numbers per image: vectors, metadata, {kinds}; machines")
    sizes = (
        width * VECTOR_BYTES, METADATA_BYTES, ANN_WIDTH * CODE_BYTES + HNSW_LINKS * LINK_BYTES,
        ANN_WIDTH * CODE_BYTES + IVF_BYTES,
    )  # fmt: skip
    for images in args.images:
        shown = ", ".join(f"{images * size / 1e9:,.1f}" for size in sizes)
        print(f"  {images:,}: {shown}; {math.ceil(images / args.shard)}")


if __name__ == "__main__":
    main()
