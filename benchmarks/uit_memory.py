"""Memory of re-ranking at the challenge's size: `python benchmarks/uit_memory.py`.

A full-size UIT with random weights re-ranks a sample of queries with 128 candidates each. The
36,773 synthetic images have their features in the memory-mapped file that `uit.infer` uses. Prints
the peak of anonymous memory (memory other than file pages, which the system may drop), and the
parts due to features, scores and weights.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from pathlib import Path

import torch
from machine import describe
from torch import Tensor

from pab.data.wordpiece import Tokenizer
from pab.scoring.rerank import choose_candidates, fill
from uit.encode import mapped_tensor
from uit.make_vocabulary import make_vocabulary
from uit.model import MODELS, Uit
from uit.rerank import match_scores

CPU = torch.device("cpu")
BLOCK = 512  # images written at a time


def anonymous_mib() -> float:
    """Anonymous memory of this process, MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024


class Peak(threading.Thread):
    """Thread that samples anonymous memory."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.stop = 0.0, False

    def run(self) -> None:
        while not self.stop:
            self.most = max(self.most, anonymous_mib())
            time.sleep(0.02)


def features(images: int, width: int, folder: Path) -> Tensor:
    """Random tokens [images, 50, width] in a mapped file."""
    tokens = mapped_tensor((images, 50, width), torch.float32, folder)
    block = torch.randn(BLOCK, 50, width)
    for start in range(0, images, BLOCK):
        tokens[start : start + BLOCK] = block[: images - start]
    return tokens


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--images", type=int, default=36773)
    parser.add_argument("--queries", type=int, default=1978, help="rows of the score matrix")
    parser.add_argument("--sample", type=int, default=12, help="queries that are re-ranked")
    parser.add_argument("--k", type=int, default=128)
    parser.add_argument("--folder", type=Path, default=None, help="for the features' file (7.5 GB)")
    args = parser.parse_args()
    print(describe())
    peak = Peak()
    peak.start()
    model = Uit(MODELS["uit_base"]).eval()
    print(f"weights: {anonymous_mib():.0f} MiB anonymous")
    with tempfile.TemporaryDirectory() as folder:
        make_vocabulary(["a man in a red coat"], Path(folder), 100)
        tokenizer = Tokenizer(folder, 56, 56)
    folder_of_features = args.folder or Path("output/benchmarks")
    tokens = features(args.images, model.config.swin.width, folder_of_features)
    size = tokens.nbytes / 2**30
    print(f"features mapped: {anonymous_mib():.0f} MiB anonymous, a file of {size:.1f} GiB")
    rows = [[tokenizer.cls, *torch.randint(1000, 30000, (38,)).tolist(), tokenizer.sep]
            for _ in range(args.sample)]  # fmt: skip
    scores = torch.rand(args.queries, args.images)
    candidates = choose_candidates(scores, args.k)
    print(f"score matrix and candidates: {anonymous_mib():.0f} MiB anonymous")
    start = time.perf_counter()
    match = match_scores(
        model, tokenizer, rows, tokens, candidates[: args.sample], device=CPU, dtype=torch.float32
    )
    seconds = time.perf_counter() - start
    filled = fill(match.repeat(-(-args.queries // args.sample), 1)[: args.queries], candidates,
                  args.images)  # fmt: skip
    peak.stop = True
    peak.join()
    print(
        f"{args.sample} queries x {args.k} candidates in {seconds:.1f} s; filled matrix "
        f"{list(filled.shape)}; peak {peak.most:.0f} MiB anonymous"
    )


if __name__ == "__main__":
    main()
