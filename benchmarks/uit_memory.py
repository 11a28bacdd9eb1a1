"""Measure the memory of re-ranking at the challenge's size: `python benchmarks/uit_memory.py`.

A full-size UIT with random weights re-ranks a sample of queries with 128 candidates each. The
features of 36,773 synthetic images are in a memory-mapped file, as in `uit.infer`. Prints the peak
of anonymous memory (without file pages, which the system can evict). Also prints the anonymous
memory after each step: creating the weights, the features and the scores.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from machine import AnonymousPeak, anonymous_mib, describe, flag_parser
from models import CPU, bert_rows, bert_tokenizer
from torch import Tensor

from pab.scoring.mapped_rows import mapped_rows
from pab.scoring.rerank import choose_candidates, fill
from uit.model import MODELS, Uit
from uit.rerank import match_scores

BLOCK = 512  # images written at a time


def features(images: int, width: int, folder: Path) -> Tensor:
    """Write random tokens [images, 50, width] to a mapped file."""
    tokens = mapped_rows((images, 50, width), torch.float32, folder).rows
    block = torch.randn(BLOCK, 50, width)
    for start in range(0, images, BLOCK):
        tokens[start : start + BLOCK] = block[: images - start]
    return tokens


def main() -> None:
    args = flag_parser(
        __doc__,
        images=36773,
        queries=(1978, "rows of the score matrix"),
        sample=(12, "number of re-ranked queries"),
        k=128,
        folder=(Path("output/benchmarks"), "folder of the feature file (7.5 GB)"),
    ).parse_args()
    print(describe())
    with AnonymousPeak() as peak:
        model = Uit(MODELS["uit_base"]).eval()
        print(f"weights: {anonymous_mib():.0f} MiB anonymous")
        tokenizer = bert_tokenizer()
        tokens = features(args.images, model.config.swin.width, args.folder)
        size = tokens.nbytes / 2**30
        print(f"features mapped: {anonymous_mib():.0f} MiB anonymous, a file of {size:.1f} GiB")
        rows = bert_rows(tokenizer, [40] * args.sample)
        scores = torch.rand(args.queries, args.images)
        candidates = choose_candidates(scores, args.k)
        print(f"score matrix and candidates: {anonymous_mib():.0f} MiB anonymous")
        start = time.perf_counter()
        match = match_scores(
            model, tokenizer, rows, tokens, candidates[: args.sample],
            device=CPU, dtype=torch.float32,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        match = match.repeat(-(-args.queries // args.sample), 1)[: args.queries]
        filled = fill(match, candidates, args.images)
    print(
        f"{args.sample} queries x {args.k} candidates in {seconds:.1f} s; filled matrix "
        f"{list(filled.shape)}; peak {peak.most:.0f} MiB anonymous"
    )


if __name__ == "__main__":
    main()
