"""Ladder table: metrics after every stage of a fusion, with the gain of each stage."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from pab.evaluate import text_table
from pab.metrics import MAP_DEPTH, Metrics, paired_bootstrap

METRICS = ("R@1", f"mAP@{MAP_DEPTH}")


def ladder_table(rungs: Sequence[tuple[str, Metrics]], seed: int = 0) -> str:
    """Format R@1 and mAP@10 after every stage as lines of text, in percent.

    Args:
        rungs: name and metrics per stage, with the same queries in the same order.
        seed: seed of the bootstrap.

    Returns:
        One line per stage. The last cell is the gain in R@1 over the previous stage, in percentage
        points, with its paired 95 % bootstrap interval over queries.
    """
    gains = ["-"]
    for (_, before), (_, after) in pairwise(rungs):
        gain = paired_bootstrap(before.values["R@1"], after.values["R@1"], seed)
        gains.append(f"{gain.mean:+.2f} [{gain.low:+.2f}, {gain.high:+.2f}]")
    rows = [["stage", *METRICS, "R@1 over the previous stage"]]
    for (name, metrics), gain_cell in zip(rungs, gains, strict=True):
        means = metrics.mean()
        rows.append([name, *(f"{means[metric]:.2f}" for metric in METRICS), gain_cell])
    return text_table(rows)
