"""Count duplicate top-1 images: `python benchmarks/real_rankings.py LHP.txt BLIP2.txt CLIP.txt`.

Reads three ranked lists of one query set. Reports the number of distinct top-1 images in each list,
and how many queries can be assigned distinct images of the first list. Also reports the effect of
fusing the lists (rank r scores 1 / r; published weights) and of decoding the fused scores. There
are no labels, so fewer duplicate top-1 images do not prove fewer errors.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from machine import flag_parser
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from ensemble.decode import DecodeSettings, decode
from ensemble.fuse import aligned
from ensemble.members import Member, load_members
from pab.ranking import top_k

NAMES = ("LHP", "BLIP-2", "CLIP")
KEEPS = (1.0, 0.9, 0.9)
WAYS = {
    "no decoding": DecodeSettings(),
    "dual_softmax, factor 20": DecodeSettings("dual_softmax", factor=20.0),
    "sinkhorn, factor 20": DecodeSettings("sinkhorn", factor=20.0),
    "assignment, slack 0.1": DecodeSettings("assignment", slack=0.1),
    "assignment, slack 0.5": DecodeSettings("assignment", slack=0.5),
    "assignment of all queries": DecodeSettings("assignment"),
}


def largest_matching(scores: torch.Tensor) -> int:
    """Count the queries of a maximum one-to-one matching with listed images."""
    graph = csr_array((scores > 0).numpy())
    return int((maximum_bipartite_matching(graph, perm_type="column") >= 0).sum())


def first_images(scores: torch.Tensor) -> np.ndarray:
    """Return the column of each query's top-1 image."""
    return top_k(scores, 1)[:, 0].numpy()


def row(name: str, found: np.ndarray, before: np.ndarray | None) -> str:
    """Format a row: distinct top-1 images, queries with a duplicate top-1, changed queries."""
    counts = np.bincount(found)
    changed = "-" if before is None else (found != before).sum()
    return f"| {name} | {(counts > 0).sum()} | {(counts[found] > 1).sum()} | {changed} |"


def main() -> None:
    parser = flag_parser(__doc__)
    parser.add_argument("lists", nargs=3, type=Path, help="LHP's, BLIP-2's and CLIP's ranked list")
    args = parser.parse_args()
    members = [Member(n, str(p), k) for n, p, k in zip(NAMES, args.lists, KEEPS, strict=True)]
    fusion = aligned(members, load_members(members))
    count = len(fusion.query_ids)
    print(f"{count} queries, {len(fusion.gallery_ids)} images named by any list")
    inside = largest_matching(fusion.files[0].scores)
    print(f"within {NAMES[0]}'s list, {inside} queries can be assigned distinct images")
    columns = "distinct top-1 images | queries with duplicate top-1 | changed top-1 images"
    print(f"| ranking | {columns} |")
    print("| --- | --- | --- | --- |")
    for name, file in zip(NAMES, fusion.files, strict=True):
        print(row(f"{name} alone", first_images(file.scores), None))
    scores = fusion.matrix()
    plain = first_images(scores)
    for name, settings in WAYS.items():
        found = decode(scores, fusion.query_ids, fusion.gallery_ids, settings)
        print(row(f"fused, {name}", first_images(found), None if name == "no decoding" else plain))


if __name__ == "__main__":
    main()
