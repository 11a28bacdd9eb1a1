"""Measure the scoring speed of CLIP and BLIP-2: `python benchmarks/clip_blip2_scoring.py`.

Encodes images and captions as the scoring scripts do, with models of the published sizes and random
weights. Prints images and captions per second. The baseline runs the libraries' original modules on
one image and one caption at a time in eager float32, as in the release. It pads CLIP's captions to
77 ids, as OpenCLIP does. Also prints the minimum cosine similarity to the baseline's vectors, and
the rate of matrix products in GFLOP/s.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from machine import best_seconds, describe, flag_parser, peak_mib
from models import BERT_WORDS, CPU, number_formats
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from pab.core.devices import keep_freed_memory
from pab.encoders.blip2.model import Blip2, Blip2Config
from pab.encoders.clip.blocks import ClassTokenBlock, InPlaceQuickGELU, SelfAttention
from pab.encoders.clip.model import ClipModel, Tokenize, build
from pab.scoring.encoding import batches_by_length

CLIP = "ViT-L-14-336-quickgelu"
SHORTEST, LONGEST = 28, 48  # ids of a real caption, with special tokens
ORIGINALS: dict[type, type] = {  # our blocks -> OpenCLIP's
    SelfAttention: nn.MultiheadAttention,
    InPlaceQuickGELU: QuickGELU,
    ClassTokenBlock: ResidualAttentionBlock,
}
Batch = Callable[[list[int]], Tensor]
Model = TypeVar("Model", bound=nn.Module)
Ways = dict[str, Batch]  # "images" or "texts" -> function that encodes the given rows


def clip_ways() -> tuple[nn.Module, Ways, Ways, int]:
    """Return our CLIP, its encoders, the library's encoders, and the padded caption length."""
    ours = build(CLIP).eval()
    theirs = as_the_library_has_it(ours)
    encoder = ClipModel(CLIP, ours, lambda image: torch.empty(0), Tokenize(CLIP), Path())
    size = ours.visual.image_size[0]  # type: ignore[union-attr, index]
    pixels = torch.randn(64, 3, size, size)
    words = ["man", "street", "falls", "red", "bicycle", "road", "wet", "jacket"]
    captions = [" ".join(words[(i + j) % 8] for j in range(26 + i % 20)) for i in range(512)]
    ids = encoder.tokenize(captions)

    def images(rows: list[int]) -> Tensor:
        weights = ours.visual.conv1.weight.dtype  # type: ignore[union-attr]
        return encoder.encode_image(pixels[rows].to(weights))

    return (
        ours,
        {"images": images, "texts": lambda rows: encoder.encode_text(ids[rows])},
        {
            "images": lambda rows: theirs.encode_image(pixels[rows], normalize=True),  # type: ignore[operator]
            "texts": lambda rows: theirs.encode_text(ids[rows], normalize=True),  # type: ignore[operator]
        },
        ids.shape[1],
    )


def blip2_ways() -> tuple[nn.Module, Ways, Ways, int]:
    """Return the same as :func:`clip_ways`, for BLIP-2."""
    config = Blip2Config()
    ours = Blip2(config).eval()
    pixels = torch.randn(64, 3, config.image_size, config.image_size)
    lengths = (SHORTEST + i % (LONGEST - SHORTEST) for i in range(512))
    rows_of = [torch.randint(*BERT_WORDS, (n,)) for n in lengths]

    def ways(model: Blip2) -> Ways:
        def images(rows: list[int]) -> Tensor:
            return model.encode_queries(pixels[rows].to(model.ln_vision.weight.dtype)).flatten(1)

        def texts(rows: list[int]) -> Tensor:
            ids = pad_sequence([rows_of[i] for i in rows], batch_first=True)
            return model.encode_text(ids, (ids != 0).long())

        return {"images": images, "texts": texts}

    return ours, ways(ours), ways(as_the_library_has_it(ours)), LONGEST


def as_the_library_has_it(model: Model) -> Model:
    """Copy a model, and replace our blocks in the copy with OpenCLIP's."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        module.__class__ = ORIGINALS.get(type(module), type(module))
    return copied


def encoded(encode: Batch, batches: Iterable[list[int]]) -> Tensor:
    """Encode all batches."""
    return torch.cat([encode(rows) for rows in batches])


@torch.inference_mode()
def measure(name: str, args: argparse.Namespace) -> None:
    """Print the results for one model."""
    torch.manual_seed(0)
    model, encode, plain, width = clip_ways() if name == "clip" else blip2_ways()
    gallery = torch.arange(args.images).split(args.batch_size)
    batches = {
        "images": [rows.tolist() for rows in gallery],
        "texts": list(batches_by_length([width] * args.texts, args.batch_size * width)),
    }
    exact, loop = {}, {}
    for kind in ("images", "texts"):
        exact[kind] = encoded(plain[kind], batches[kind])
        singly = [[row] for row in range(args.loop)]
        loop[kind] = args.loop / best_seconds(partial(encoded, plain[kind], singly), args.repeats)
        print(f"  {name} {kind}, one at a time, fp32: {loop[kind]:.2f} per second")
    for dtype_name, dtype, products in number_formats():
        model.to(dtype)
        for kind in ("images", "texts"):
            run = partial(encoded, encode[kind], batches[kind])
            found = run().float()
            seconds = best_seconds(run, args.repeats, warm_up=0)
            rate = len(found) / seconds
            width_of_one = exact[kind].shape[1] if name == "clip" else 256
            pairs = (t.reshape(-1, width_of_one) for t in (found, exact[kind]))
            cosine = torch.cosine_similarity(*pairs, dim=1).min()
            print(
                f"  {name} {kind}, {dtype_name}: {rate:.2f} per second, {rate / loop[kind]:.2f}x; "
                f"minimum cosine {float(cosine):.6f}; products at {products:.0f} GFLOP/s"
            )


def main() -> None:
    args = flag_parser(
        __doc__,
        models=["clip", "blip2"],
        images=(32, "at most 64"),
        texts=(256, "at most 512"),
        loop=(6, "number of images and captions of the baseline"),
        batch_size=32,
        repeats=2,
    ).parse_args()
    print(describe(), json.dumps(vars(args)))
    keep_freed_memory(CPU)  # as in the scoring scripts
    for name in args.models:
        measure(name, args)
    print(f"  peak RSS {peak_mib():.0f} MiB")


if __name__ == "__main__":
    main()
