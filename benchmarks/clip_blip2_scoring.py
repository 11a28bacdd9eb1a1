"""Scoring speed of CLIP and BLIP-2: `python benchmarks/clip_blip2_scoring.py`.

Measures images and captions per second of the published sizes with random weights, encoded as in
the scoring scripts. The baseline is the libraries' own modules with one image and one caption at a
time in eager float32 (as in the release; CLIP's captions padded to 77 ids, as in OpenCLIP). Also
prints the minimum cosine similarity to the baseline's vectors, and the CPU's matrix-product rate.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from machine import best_seconds, describe, product_rate
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from torch import Tensor, nn

from pab.core.devices import DTYPES, autocast, cpu_has_bf16, keep_freed_memory
from pab.encoders.blip2.model import Blip2, Blip2Config
from pab.encoders.clip.blocks import ClassTokenBlock, InPlaceQuickGELU, SelfAttention
from pab.encoders.clip.model import ClipModel, Tokenize, build
from pab.scoring.encoding import batches_by_length

CPU = torch.device("cpu")
CLIP = "ViT-L-14-336-quickgelu"
SHORTEST, LONGEST = 28, 48  # ids of a real caption, with special tokens
Batch = Callable[[list[int]], Tensor]
Model = TypeVar("Model", bound=nn.Module)
Ways = dict[str, Batch]  # "images" and "texts": functions from rows to vectors


def clip_ways() -> tuple[nn.Module, Ways, Ways, int]:
    """CLIP: our model, its encoders, the library's encoders, ids of a padded caption."""
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
    """The same for BLIP-2."""
    config = Blip2Config()
    ours = Blip2(config).eval()
    pixels = torch.randn(64, 3, config.image_size, config.image_size)
    lengths = [SHORTEST + i % (LONGEST - SHORTEST) for i in range(512)]
    rows_of = [torch.randint(1000, 30000, (n,)) for n in lengths]

    def ways(model: Blip2) -> Ways:
        def images(rows: list[int]) -> Tensor:
            return model.encode_queries(pixels[rows].to(model.ln_vision.weight.dtype)).flatten(1)

        def texts(rows: list[int]) -> Tensor:
            longest = max(lengths[i] for i in rows)
            ids = torch.zeros(len(rows), longest, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for at, i in enumerate(rows):
                ids[at, : lengths[i]], mask[at, : lengths[i]] = rows_of[i], 1
            return model.encode_text(ids, mask)

        return {"images": images, "texts": texts}

    return ours, ways(ours), ways(as_the_library_has_it(ours)), LONGEST


def as_the_library_has_it(model: Model) -> Model:
    """Copy of a model with OpenCLIP's original blocks."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if isinstance(module, SelfAttention):
            module.__class__ = nn.MultiheadAttention
        elif isinstance(module, InPlaceQuickGELU):
            module.__class__ = QuickGELU
        elif isinstance(module, ClassTokenBlock):
            module.__class__ = ResidualAttentionBlock
    return copied


@torch.inference_mode()
def measure(name: str, args: argparse.Namespace) -> None:
    """Print the results for one model."""
    torch.manual_seed(0)
    model, encode, plain, width = clip_ways() if name == "clip" else blip2_ways()
    gallery = list(range(args.images))
    batches = {
        "images": [
            gallery[i : i + args.batch_size] for i in range(0, len(gallery), args.batch_size)
        ],
        "texts": list(batches_by_length([width] * args.texts, args.batch_size * width)),
    }
    exact, loop = {}, {}
    for kind in ("images", "texts"):
        exact[kind] = torch.cat([plain[kind](rows) for rows in batches[kind]])
        seconds = best_seconds(
            lambda k=kind: [plain[k]([i]) for i in range(args.loop)],  # type: ignore[misc]
            args.repeats,
        )
        loop[kind] = args.loop / seconds
        print(f"  {name} {kind}, one at a time, fp32: {loop[kind]:.2f} a second")
    for dtype_name in ("fp32", "bf16"):
        if dtype_name == "bf16" and not cpu_has_bf16():
            print("  bf16: this processor has no bf16 units")
            continue
        dtype = DTYPES[dtype_name]
        model.to(dtype)
        ceiling = product_rate(dtype) / 1e9
        for kind in ("images", "texts"):
            with autocast(CPU, dtype):
                found = torch.cat([encode[kind](rows) for rows in batches[kind]]).float()
                seconds = best_seconds(
                    lambda k=kind: [encode[k](rows) for rows in batches[k]],  # type: ignore[misc]
                    args.repeats, warm_up=0,
                )  # fmt: skip
            rate = len(found) / seconds
            width_of_one = exact[kind].shape[1] if name == "clip" else 256
            pairs = (t.reshape(-1, width_of_one) for t in (found, exact[kind]))
            cosine = torch.cosine_similarity(*pairs, dim=1).min()
            print(
                f"  {name} {kind}, {dtype_name}: {rate:.2f} a second, {rate / loop[kind]:.2f}x; "
                f"least cosine {float(cosine):.6f}; products at {ceiling:.0f} GFLOP/s"
            )


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--models", nargs="+", default=["clip", "blip2"])
    parser.add_argument("--images", type=int, default=32, help="at most 64")
    parser.add_argument("--texts", type=int, default=256, help="at most 512")
    parser.add_argument("--loop", type=int, default=6, help="images and captions of the loop")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    print(describe(), json.dumps(vars(args)))
    keep_freed_memory(CPU)  # as in the scoring scripts
    for name in args.models:
        measure(name, args)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"  peak RSS {peak:.0f} MiB")


if __name__ == "__main__":
    main()
