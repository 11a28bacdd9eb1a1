"""Count what Qwen3-VL embedders and rerankers need for PAB: `python benchmarks/vlm_cost.py`.

Counts parameters, bytes of weights, operations and memory of activations, and derives the hours on
a card. Nothing is measured. The models are those of transformers, with the published sizes. Their
tensors are fake (a shape and a dtype, no values), so neither weights nor a GPU are needed.

The parameters must equal the published number. Operations are the multiplications and additions of
matrix products, of the patch convolution and of attention in a forward pass. Attention is counted
without causal skipping, as in PyTorch's counter. Memory counts tensors, not the allocator or the
kernels. Two steps depend on values: computing the positions of image tokens, and inserting the
vision features. They need no matrix products and are left out.

Shape letters: `B` pairs or images, `P` patches per image, `L` tokens, `D` width.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from machine import flag_parser
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import AutoModelForImageTextToText, Qwen3VLConfig

GIB = 2**30  # bytes
# Text tokens: per pair (template, instruction, caption), and per image or caption alone.
TOKENS = (150, 75)
QUERIES, CANDIDATES, GALLERY = 1978, 50, 36_773  # PAB's queries; Track 4's gallery
SHARE = 0.4  # assumed fraction of a card's bf16 rate, as in docs/reproduce.md
# Dense bf16 rates (without sparsity) in NVIDIA's data sheets, FLOP/s.
CARDS = {"RTX 4090 (24 GB)": 165e12, "A100 (80 GB)": 312e12, "H100 (80 GB)": 990e12}
CORNERS = 4  # bilinear interpolation of the position embeddings
AXES = 3  # of Qwen3-VL's rotary positions: time, height, width


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model, and its published number of parameters."""

    text: dict[str, Any]
    vision: dict[str, Any]
    tied: bool  # the output layer is the word embedding
    parameters: int
    shared: dict[str, Any] = field(
        default_factory=lambda: {
            "vocab_size": 151_936, "head_dim": 128, "num_key_value_heads": 8,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        }
    )  # fmt: skip

    def config(self) -> Qwen3VLConfig:
        """Build transformers' configuration."""
        text = self.shared | self.text | {"tie_word_embeddings": self.tied}
        return Qwen3VLConfig(
            text_config=text, vision_config=self.vision, tie_word_embeddings=self.tied
        )


# Source: config.json of Qwen/Qwen3-VL-2B-Instruct and 8B-Instruct on the Hugging Face hub, which
# are the base models of the rerankers and embedders. The parameters are those that the hub lists
# for the safetensors files. The embedders are used without the output layer.
MODELS = {
    "2B": Sizes(
        text={"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
              "num_attention_heads": 16},
        vision={"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16,
                "out_hidden_size": 2048, "deepstack_visual_indexes": [5, 11, 17]},
        tied=True,
        parameters=2_127_532_032,
    ),
    "8B": Sizes(
        text={"hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36,
              "num_attention_heads": 32},
        vision={"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16,
                "out_hidden_size": 4096, "deepstack_visual_indexes": [8, 16, 24]},
        tied=False,
        parameters=8_767_123_696,
    ),
}  # fmt: skip


class Cost(NamedTuple):
    """Cost of a forward pass of B pairs or images.

    Attributes:
        parameters: number of parameters, a tied output layer counted once.
        weights: bytes of the weights.
        flops: operations per pair, image or caption.
        activations: peak of the bytes of all other tensors together.
    """

    parameters: int
    weights: int
    flops: float
    activations: int


def attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Count the operations of PyTorch's attention kernel for the CPU, from the inputs' shapes."""
    return int(sdpa_flop_count(query, key, value))


def count(config: Qwen3VLConfig, batch: int, side: int, tokens: int, *, scores: bool) -> Cost:
    """Count the cost of a forward pass in bf16.

    Args:
        config: sizes of the model.
        batch: pairs, images or captions per forward pass (B).
        side: side of the square image, pixels; 0 for captions without an image.
        tokens: text tokens per pair, image or caption.
        scores: whether the output layer computes the last token's logits, as in a reranker;
            without it, the model has no output layer.
    """
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from tests.allocations import RecordAllocations

    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counted = FlopCounterMode(display=False, custom_mapping={kernel: attention_flops})
    vision = config.vision_config
    grid = side // vision.patch_size
    patches = grid**2  # P
    length = tokens + patches // vision.spatial_merge_size**2  # L
    with FakeTensorMode(), torch.no_grad():
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).eval()
        if not scores:
            del model.lm_head
        found = RecordAllocations("cpu")
        found.memory.add(model.parameters())
        weights = found.memory.live
        ids = torch.zeros(batch, length, dtype=torch.int64)
        with counted, found:
            embedded = model.model.get_input_embeddings()(ids)  # [B, L, D]
            seen = see(model.model.visual, vision, batch, grid) if side else None
            states = model.model.language_model(
                inputs_embeds=embedded, attention_mask=torch.ones_like(ids), use_cache=False,
                position_ids=torch.zeros(AXES, batch, length, dtype=torch.int64),
            ).last_hidden_state  # [B, L, D]  # fmt: skip
            if scores:
                model.lm_head(states[:, -1:])
        del seen  # the features of the image are held until the end, as in the model's own code
    return Cost(
        sum(parameter.numel() for parameter in model.parameters()),
        weights, counted.get_total_flops() / batch, found.memory.peak - weights,
    )  # fmt: skip


def see(visual: Any, vision: Any, batch: int, grid: int) -> Tensor:
    """Run the vision model on B images of `grid` x `grid` patches."""
    patches = grid**2
    rows = batch * patches
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    whole = {"dtype": torch.int64}
    return visual(
        torch.zeros(rows, values, dtype=torch.bfloat16),
        # The model derives these from the grids' values, which fake tensors lack.
        grid_thw=torch.zeros(batch, 3, **whole), position_ids=torch.zeros(rows, 2, **whole),
        interp_indices=torch.zeros(rows, CORNERS, **whole),
        interp_weights=torch.zeros(rows, CORNERS),
        cu_seqlens=np.arange(batch + 1) * patches, max_seqlen=patches,
    )  # fmt: skip


def hours(flops: float) -> str:
    """Format the time on each card."""
    times = {name: flops / (SHARE * rate) / 3600 for name, rate in CARDS.items()}
    return ", ".join(f"{name} {time:.2g} h" for name, time in times.items())


def memory(costs: dict[int, Cost]) -> str:
    """Format the parameters, and the memory per batch size."""
    first = next(iter(costs.values()))
    sums = (
        f"{(cost.weights + cost.activations) / GIB:.1f} with {batch}"
        for batch, cost in costs.items()
    )
    return (
        f"{first.parameters:,} parameters; GiB {first.weights / GIB:.1f} of weights, "
        f"{', '.join(sums)}"
    )


def main() -> None:
    args = flag_parser(
        __doc__,
        side=(512, "side of the images, pixels; a token stands for 32 x 32"),
        batches=([1, 8, 32], "pairs per forward pass"),
        models=(list(MODELS), "models to count"),
    ).parse_args()
    print(f"{args.side} px; {TOKENS[0]} text tokens per pair, {TOKENS[1]} per caption")
    print(f"hours assume {SHARE:.0%} of each card's dense bf16 rate")
    for name in args.models:
        sizes = MODELS[name]
        config = sizes.config()
        pairs = {
            batch: count(config, batch, args.side, TOKENS[0], scores=True) for batch in args.batches
        }
        pair = pairs[args.batches[0]]
        if pair.parameters != sizes.parameters:
            raise SystemExit(f"{name}: {pair.parameters} parameters, not {sizes.parameters}")
        print(f"reranker {name}: {memory(pairs)}")
        print(f"  {pair.flops / 1e12:.2f} TFLOP per pair")
        print(
            f"  {QUERIES:,} x {CANDIDATES}: {hours(pair.flops * QUERIES * CANDIDATES)}", flush=True
        )
        images = {
            batch: count(config, batch, args.side, TOKENS[1], scores=False)
            for batch in args.batches
        }
        image, text = images[args.batches[0]], count(config, 1, 0, TOKENS[1], scores=False)
        total = image.flops * GALLERY + text.flops * QUERIES
        print(f"embedder {name}: {memory(images)}")
        print(f"  {image.flops / 1e12:.2f} TFLOP per image, {text.flops / 1e12:.2f} per caption")
        print(f"  {GALLERY:,} images and {QUERIES:,} captions: {hours(total)}", flush=True)


if __name__ == "__main__":
    main()
