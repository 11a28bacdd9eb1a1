"""UIT's re-ranking speed: `python benchmarks/uit_rerank.py`.

Measures pairs per second of `uit.rerank` at full size, with random weights and image tokens. The
baseline is a plain loop in eager float32: per query, gather the candidates, repeat the text padded
to 56 ids, run all six layers on all tokens. Caption lengths are drawn from those of the reference
captions. `--ideas` also measures the gain of each idea, by disabling it alone.
"""

from __future__ import annotations

import argparse
import random
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from machine import best_seconds, describe, product_rate
from torch import Tensor

import uit.rerank
from pab.core.devices import DTYPES, cpu_has_bf16
from pab.data.wordpiece import Tokenizer
from uit.bert import Bert, FusedPairs, ImageMemory
from uit.make_vocabulary import make_vocabulary
from uit.model import MODELS, Uit
from uit.rerank import match_scores

CPU = torch.device("cpu")
# Lengths in BERT's ids of the 41 reference captions (`tokens.json`), with special tokens.
LENGTHS = (
    5, 7, 15, 30, 31, 31, 31, 31, 31, 31, 31, 32, 32, 33, 34, 34, 35, 35, 35, 35, 35, 35, 36, 37,
    37, 37, 37, 38, 38, 39, 39, 40, 41, 41, 42, 42, 44, 47, 48, 56, 56,
)  # fmt: skip


def captions(tokenizer: Tokenizer, count: int) -> list[list[int]]:
    """Random ids with realistic lengths."""
    draw = random.Random(0)
    lengths = draw.choices(LENGTHS, k=count)
    return [[tokenizer.cls, *draw.choices(range(1000, 30000), k=n - 2), tokenizer.sep]
            for n in lengths]  # fmt: skip


def plain_loop(model: Uit, tokenizer: Tokenizer, rows: list[list[int]], tokens: Tensor,
               candidates: Tensor) -> Tensor:  # fmt: skip
    """Baseline scores, [Q, K]."""
    bert, scores = model.text_encoder, []
    for row, chosen in zip(rows, candidates, strict=True):
        ids, mask = tokenizer.pad_rows([row], tokenizer.max_length)
        text = bert.encode_text(ids, mask).expand(len(chosen), -1, -1)
        fused = bert.fuse(text, mask.expand(len(chosen), -1), bert.image_memory(tokens[chosen]))
        scores.append(model.match_logits(fused[:, 0])[:, 1])
    return torch.stack(scores)


def without(idea: str) -> AbstractContextManager[object]:
    """Disable one idea in the block."""
    if idea == "only [CLS] in the last layer":

        def everywhere(bert: Bert, pairs: FusedPairs, at: Tensor) -> Tensor:
            last = bert.fusion[-1]
            whole = last.finish(last.attend(pairs.text, pairs.visible), pairs.image)
            return whole.gather(1, at[..., None].expand(-1, -1, whole.shape[-1]))

        return patch.object(Bert, "fused_at", everywhere)
    if idea == "a text's first self-attention once":
        original = Bert.fuse_pairs

        def repeated(
            bert: Bert, text: Tensor, mask: Tensor, memory: ImageMemory, rows: Tensor,
            images: Tensor,
        ) -> FusedPairs:  # fmt: skip
            own = torch.arange(len(rows))
            return original(bert, text[rows], mask[rows], memory, own, images)

        return patch.object(Bert, "fuse_pairs", repeated)
    if idea == "an image's keys and values once a group":
        return patch.object(uit.rerank, "IMAGES_A_GROUP", 1)  # one query per group
    if idea == "queries batched together":
        return patch.object(uit.rerank, "PAIRS_A_PASS", 1)
    return nullcontext()


IDEAS = (
    "an image's keys and values once a group", "a text's first self-attention once",
    "only [CLS] in the last layer",
)  # fmt: skip


@torch.inference_mode()
def measure(k: int, args: argparse.Namespace, tokenizer: Tokenizer) -> None:
    """Print the results for one number of candidates."""
    torch.manual_seed(0)
    model = Uit(MODELS["uit_base"]).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "embeddings" not in name:
            parameter.normal_(std=0.03)  # larger than the initialization, so that pairs differ
    tokens = torch.randn(args.gallery, 50, model.config.swin.width)
    rows = captions(tokenizer, args.queries)
    candidates = torch.stack([torch.randperm(args.gallery)[:k] for _ in rows])
    looped = args.loop if k > 32 else args.queries
    exact = plain_loop(model, tokenizer, rows[:looped], tokens, candidates[:looped])
    seconds = best_seconds(
        lambda: plain_loop(model, tokenizer, rows[:looped], tokens, candidates[:looped]),
        args.repeats,
        warm_up=0,
    )
    loop = looped * k / seconds
    print(f"\nk = {k}: plain loop, fp32 eager, {looped} queries: {loop:.1f} pairs/s")

    def run(dtype: torch.dtype) -> Tensor:
        return match_scores(model, tokenizer, rows, tokens, candidates, device=CPU, dtype=dtype)

    for kind in ("fp32", "bf16"):
        if kind == "bf16" and not cpu_has_bf16():
            print("  bf16: this processor has no bf16 units")
            continue
        dtype = DTYPES[kind]
        model = model.to(dtype)
        found = run(dtype)[:looped]
        rate = len(rows) * k / best_seconds(lambda d=dtype: run(d), args.repeats, warm_up=0)  # type: ignore[misc]
        print(
            f"  {kind}: {rate:7.1f} pairs/s, {rate / loop:.2f}x the loop; largest difference "
            f"{float((found - exact).abs().max()):.1e} of scores with deviation "
            f"{float(exact.std()):.1e}; products at {product_rate(dtype) / 1e9:.0f} GFLOP/s"
        )
        for idea in IDEAS if args.ideas else ():
            with without(idea):
                slower = len(rows) * k / best_seconds(lambda d=dtype: run(d), 1, warm_up=0)  # type: ignore[misc]
            print(f"    without '{idea}': {slower:7.1f} pairs/s, {slower / rate:.2f} of it")


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--k", type=int, nargs="+", default=[10, 128])
    parser.add_argument("--queries", type=int, default=16)
    parser.add_argument("--gallery", type=int, default=256)
    parser.add_argument("--loop", type=int, default=4, help="queries of the plain loop at large k")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--ideas", action="store_true", help="also turn each idea off alone")
    parser.add_argument(
        "--text_encoder", type=Path, help="folder of BERT's vocab.txt (default: a made-up one)"
    )
    args = parser.parse_args()
    print(describe())
    folder = args.text_encoder
    if folder is None:
        folder = Path("output/benchmarks/vocabulary")
        make_vocabulary(["a man in a red coat"], folder, 100)
    for k in args.k:
        measure(k, args, Tokenizer(folder, 56, 56))


if __name__ == "__main__":
    main()
