"""Measure LHP's scoring speed: `python benchmarks/lhp_scoring.py`.

Measures images and texts per second of the production encoders at 384 px with random weights. Two
baselines process one image and one text at a time in eager float32, in the same run. The first uses
this network. The second follows the release: attention stores the matrix of all token pairs, the
last layer computes all tokens, and captions are padded to 64 ids. Ratios refer to the second
baseline. The ceiling is the machine's matrix-product rate in the same dtype. Operations are counted
as 2 x weights x tokens per matrix, plus 4 x tokens squared x width per layer. The operations that
the last layer skips are not counted.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from functools import partial

import torch
from machine import best_seconds, describe, flag_parser
from models import CPU, number_formats, released_way
from torch import Tensor

from lhp.beit3 import Beit3Config, Beit3Retrieval, model_config
from lhp.encode import compiled_image_encoder
from lhp.tokenizer import BOS, EOS, PAD, pad_batch
from pab.core.devices import keep_freed_memory
from pab.scoring.encoding import batches_by_length

# Caption lengths in BEiT-3's ids, with special tokens, about as in the published test set. Lengths
# are drawn from a seeded triangular distribution over this range.
SHORTEST, MODE, LONGEST = 24, 44, 64


def operations(config: Beit3Config, tokens: int, patch_weights: int = 0) -> float:
    """Count multiplications and additions in one pass over ``tokens`` tokens."""
    d, f = config.embed_dim, config.ffn_dim
    layer = 2 * (4 * d * d + 2 * d * f) * tokens + 4 * tokens**2 * d
    # Last layer: keys and values of all tokens, everything else only for the output token.
    last = 2 * (2 * d * d * (tokens + 1) + 2 * d * f) + 4 * tokens * d
    return (config.layers - 1) * layer + last + 2 * patch_weights * tokens + 2 * d * d


def captions(count: int) -> list[list[int]]:
    """Draw random ids with realistic lengths."""
    draw = random.Random(0)
    lengths = [round(draw.triangular(SHORTEST, LONGEST, MODE)) for _ in range(count)]
    return [[BOS, *(draw.randrange(4, 64000) for _ in range(n - 2)), EOS] for n in lengths]


def random_model(name: str) -> Beit3Retrieval:
    """Create a model with random weights, without the slow published initialization."""
    with torch.device("meta"):
        model = Beit3Retrieval(model_config(name))
    model = model.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(std=0.02, generator=generator)
            if "layer_norm.weight" in key or "layernorm.weight" in key or "_ln" in key:
                parameter.add_(1.0)
    return model


@torch.inference_mode()
def measure(name: str, args: argparse.Namespace) -> None:
    """Print the table for one model."""
    model = random_model(name)
    config = model.config
    tokens = config.patches + 1
    image_operations = operations(config, tokens, 3 * config.patch_size**2 * config.embed_dim)
    images = torch.randn(args.batch_size, 3, config.img_size, config.img_size)
    rows = captions(args.texts)
    text_operations = sum(operations(config, len(row)) for row in rows) / len(rows)

    def one_image() -> None:
        for image in images[: args.loop]:
            model.encode_image(image[None])

    def one_text(length: int = 0) -> None:
        for row in rows[: args.loop_texts]:  # padding is marked as visible, to include its cost
            model.encode_text(*pad_batch([row + [PAD] * (length - len(row))]))

    def text_batches(net: Beit3Retrieval) -> Tensor:
        vectors = torch.empty(len(rows), config.embed_dim)
        for positions in batches_by_length([len(r) for r in rows], args.batch_size * tokens):
            vectors[positions] = net.encode_text(*pad_batch([rows[i] for i in positions]))
        return vectors

    own_image = args.loop / best_seconds(one_image, args.repeats)
    own_text = args.loop_texts / best_seconds(one_text, args.repeats)
    with released_way():
        loop_image = args.loop / best_seconds(one_image, args.repeats)
        loop_text = args.loop_texts / best_seconds(partial(one_text, LONGEST), args.repeats)
    print(f"\n{name}, batch {args.batch_size}, {args.texts} texts; plain loops, fp32 eager:")
    print(f"  as released              {loop_image:8.3f} images/s {loop_text:8.2f} texts/s")
    print(f"  this network             {own_image:8.3f} images/s {own_text:8.2f} texts/s")
    for_images = model.encode_image(images), loop_image, image_operations
    for_texts = text_batches(model), loop_text, text_operations
    for kind, dtype, products in number_formats(*args.dtype):
        net = model.to(dtype)
        print(f"  {kind}: matrix products run at {products:.0f} GFLOP/s")
        pixels = images.to(dtype)
        ways: dict[str, tuple[Callable[[], Tensor], tuple[Tensor, float, float]]] = {
            "images, eager": (partial(net.encode_image, pixels), for_images),
            "texts, eager": (partial(text_batches, net), for_texts),
        }
        if not args.no_compile:
            compiled = partial(compiled_image_encoder(net), pixels)
            ways["images, compiled"] = (compiled, for_images)
        for way, (run, (exact, loop, count)) in ways.items():
            cosine = float((exact * run().float()).sum(1).min())
            rate = len(exact) / best_seconds(run, args.repeats)
            share = rate * count / (products * 1e9)
            print(
                f"    {kind} {way:17s} {rate:8.3f}/s  {rate / loop:6.2f}x released  {share:6.1%} "
                f"of the ceiling  minimum cosine to fp32 {cosine:.6f}"
            )


def main() -> None:
    parser = flag_parser(
        __doc__,
        model=["beit3_base_patch16_384", "beit3_large_patch16_384"],
        batch_size=(8, "images per batch"),
        texts=96,
        loop=(4, "number of images that each baseline encodes"),
        loop_texts=(16, "number of texts that each baseline encodes"),
        repeats=(3, "runs; the best is reported"),
        no_compile=(False, "skip torch.compile"),
    )
    kinds = ["fp32", "bf16"]
    parser.add_argument("--dtype", nargs="+", default=kinds, choices=kinds)
    args = parser.parse_args()
    print(describe())
    keep_freed_memory(CPU)  # as in `lhp.infer`
    for name in args.model:
        measure(name, args)


if __name__ == "__main__":
    main()
