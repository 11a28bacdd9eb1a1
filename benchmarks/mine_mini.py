"""Mine questions for the small reranker from the mini training pairs.

`python benchmarks/mine_mini.py --out output/mined.jsonl` scores the first training shards with the
four shipped models. It fuses the scores with the shipped weights, and mines the ranking
(`ensemble.mine`). The questions are the training data of `configs/vlm/mini_reranker.yaml`, which
skips questions with validation images.
"""

from __future__ import annotations

from pathlib import Path

import mini_runs as mini
from machine import flag_parser

from ensemble.mine import main as mine
from pab.core.files import write_text

WEIGHTS = Path("configs/ensemble/mini.yaml")


def main() -> None:
    args = flag_parser(
        __doc__,
        out=(Path("output/mined.jsonl"), "file for the questions"),
        work=(Path("output/mined"), "folder for the score files; existing ones are reused"),
        shards=(3, "training shards to mine"),
        negatives=(8, "maximum number of wrong images per question"),
        depth=(10, "images per caption that the reranker will reorder"),
    ).parse_args()
    folder = mini.shipped_folder(args.work)
    lines = []
    for shard in sorted((mini.DATA / "annotation/train").glob("pair_*.json"))[: args.shards]:
        labelled = mini.LabelledSet(shard.stem, shard)
        members = mini.score_shipped(labelled, folder)
        score = mini.fused(WEIGHTS, members, folder / f"{shard.stem}_fused.pt")
        out = folder / f"{shard.stem}_mined.jsonl"
        limits = ("--negatives", str(args.negatives), "--depth", str(args.depth))
        mine(["--score", str(score), *labelled.flags(), "--out", str(out), *limits])
        lines.append(out.read_text())
    write_text(args.out, "".join(lines))


if __name__ == "__main__":
    main()
