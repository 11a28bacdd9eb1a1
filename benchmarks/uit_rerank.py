"""Measure UIT's re-ranking speed: `python benchmarks/uit_rerank.py`.

Measures pairs per second of `uit.rerank` at full size, with random weights and image tokens. The
baseline is a plain loop in eager float32: per query, gather the candidates, repeat the text padded
to 56 ids, and run all six layers on all tokens. Caption lengths are drawn from those of the tests'
reference captions. `--ideas` also measures the gain of each optimization, by disabling it alone.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import torch
from machine import best_seconds, describe, flag_parser
from models import CPU, bert_rows, bert_tokenizer, number_formats
from torch import Tensor

import uit.rerank
from pab.data.wordpiece import Tokenizer
from uit.bert import Bert, FusedPairs, ImageMemory
from uit.model import MODELS, Uit
from uit.rerank import match_scores

# Lengths in BERT's ids of the tests' 41 reference captions (`tokens.json`), with special tokens.
LENGTHS = (
    5, 7, 15, 30, 31, 31, 31, 31, 31, 31, 31, 32, 32, 33, 34, 34, 35, 35, 35, 35, 35, 35, 36, 37,
    37, 37, 37, 38, 38, 39, 39, 40, 41, 41, 42, 42, 44, 47, 48, 56, 56,
)  # fmt: skip


def plain_loop(model: Uit, tokenizer: Tokenizer, rows: list[list[int]], tokens: Tensor,
               candidates: Tensor) -> Tensor:  # fmt: skip
    """Compute the baseline's scores, [queries, candidates]."""
    bert, scores = model.text_encoder, []
    for row, chosen in zip(rows, candidates, strict=True):
        ids, mask = tokenizer.pad_rows([row], tokenizer.max_length)
        text = bert.encode_text(ids, mask).expand(len(chosen), -1, -1)
        fused = bert.fuse(text, mask.expand(len(chosen), -1), bert.image_memory(tokens[chosen]))
        scores.append(model.match_logits(fused[:, 0])[:, 1])
    return torch.stack(scores)


def all_tokens(bert: Bert, pairs: FusedPairs, at: Tensor) -> Tensor:
    """Compute `Bert.fused_at` with all tokens in the last layer."""
    last = bert.fusion[-1]
    image = pairs.keys[pairs.images], pairs.values[pairs.images]
    whole = last.finish(last.attend(pairs.text, pairs.visible), image)
    return whole.gather(1, at[..., None].expand(-1, -1, whole.shape[-1]))


def repeated_texts(bert: Bert, text: Tensor, mask: Tensor, memory: ImageMemory, rows: Tensor,
                   images: Tensor) -> FusedPairs:  # fmt: skip
    """Compute `Bert.fuse_pairs`, with the first self-attention of the text in every pair."""
    return fuse_pairs(bert, text[rows], mask[rows], memory, torch.arange(len(rows)), images)


fuse_pairs = Bert.fuse_pairs
# Optimization -> context that disables it.
IDEAS = {
    "an image's keys and values once per group": patch.object(uit.rerank, "IMAGES_A_GROUP", 1),
    "a text's first self-attention once": patch.object(Bert, "fuse_pairs", repeated_texts),
    "only [CLS] in the last layer": patch.object(Bert, "fused_at", all_tokens),
}


@torch.inference_mode()
def measure(k: int, args: argparse.Namespace, tokenizer: Tokenizer) -> None:
    """Print the results for one number of candidates."""
    torch.manual_seed(0)
    model = Uit(MODELS["uit_base"]).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "embeddings" not in name:
            parameter.normal_(std=0.03)  # larger than the initialization, so that pairs differ
    tokens = torch.randn(args.gallery, 50, model.config.swin.width)
    rows = bert_rows(tokenizer, random.Random(0).choices(LENGTHS, k=args.queries))
    candidates = torch.stack([torch.randperm(args.gallery)[:k] for _ in rows])
    looped = args.loop if k > 32 else args.queries
    first = (rows[:looped], tokens, candidates[:looped])
    exact = plain_loop(model, tokenizer, *first)

    def rate_of(run: Callable[[], Tensor], queries: int, repeats: int) -> float:
        return queries * k / best_seconds(run, repeats, warm_up=0)

    loop = rate_of(lambda: plain_loop(model, tokenizer, *first), looped, args.repeats)
    print(f"\nk = {k}: plain loop, fp32 eager, {looped} queries: {loop:.1f} pairs/s")

    for kind, dtype, products in number_formats():
        model = model.to(dtype)
        run = partial(
            match_scores, model, tokenizer, rows, tokens, candidates, device=CPU, dtype=dtype
        )
        found = run()[:looped]
        rate = rate_of(run, len(rows), args.repeats)
        print(
            f"  {kind}: {rate:7.1f} pairs/s, {rate / loop:.2f}x the loop; largest difference "
            f"{float((found - exact).abs().max()):.1e} of scores with standard deviation "
            f"{float(exact.std()):.1e}; products at {products:.0f} GFLOP/s"
        )
        for idea, without in IDEAS.items() if args.ideas else ():
            with without:
                slower = rate_of(run, len(rows), 1)
            print(f"    without '{idea}': {slower:7.1f} pairs/s, {slower / rate:.2f}x")


def main() -> None:
    args = flag_parser(
        __doc__,
        k=[10, 128],
        queries=16,
        gallery=256,
        loop=(4, "queries of the baseline at large k"),
        repeats=2,
        ideas=(False, "also disable each optimization alone"),
        text_encoder=(None, "folder of BERT's vocab.txt (default: a synthetic one)"),
    ).parse_args()
    print(describe())
    tokenizer = bert_tokenizer(args.text_encoder)
    for k in args.k:
        measure(k, args, tokenizer)


if __name__ == "__main__":
    main()
