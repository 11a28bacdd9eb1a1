"""Findings of a report: recall curves, weight sweeps, fusion steps, duplicate top-1, actions.

Shape letters: `Q` queries.
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ensemble.report.charts import Chart, Series, line_chart
from pab.core.errors import InputError
from pab.core.files import existing_file
from pab.data.records import Query
from pab.metrics import Difference, paired_bootstrap
from pab.ranking import top_k
from pab.scores import ScoreFile

CURVE_K = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50)
LEAST_OF_AN_ACTION = 5  # minimum number of queries for an action's row


@dataclass(frozen=True)
class Change:
    """Effect of one fusion step on the top-1 results."""

    before: str  # names of the two rankings
    after: str
    won: list[int]  # rows whose right image became top-1
    lost: list[int]  # rows whose right image stopped being top-1
    gain: Difference  # in R@1


def recall_curve(ranks: Sequence[tuple[str, np.ndarray]]) -> Chart:
    """Chart R@K over K.

    Args:
        ranks: per ranking, its name and the best rank of every query's right image [Q].
    """
    series = []
    for name, rank in ranks:
        recalls = [100 * float((rank <= k).mean()) for k in CURVE_K]
        series.append(Series(name, CURVE_K, recalls, recalls[0]))
    return line_chart(
        "Share of queries whose right image is among the first K",
        series, "K", "R@K, %", x_ticks=(1, 2, 5, 10, 20, 50), log_x=True,
    )  # fmt: skip


def weight_sweep(path: str | Path) -> Chart:
    """Chart R@1 over the tried weights, one line per member, with the chosen weight ringed.

    Args:
        path: trials file written by `ensemble.search`.

    Raises:
        InputError: the file is missing or not from the search.
    """
    path = existing_file(path, "the trials of ensemble.search")
    found: dict[str, dict[float, tuple[float, float]]] = defaultdict(dict)
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            for row in csv.DictReader(handle):
                if row["weight"]:  # a later trial of the same weight is the final one
                    figures = [float(row[name]) for name in ("weight", "R@1", "mAP")]
                    if not all(map(math.isfinite, figures)):
                        raise ValueError("a number that is not finite")
                    found[row["member"]][figures[0]] = figures[1], figures[2]
    except (KeyError, TypeError, ValueError, csv.Error) as error:  # ValueError: also not UTF-8
        raise InputError(
            path, "expected the columns member, weight, R@1 and mAP of ensemble.search"
        ) from error
    series = []
    for member, tried in found.items():
        if len(tried) < 2:
            continue  # the search's starting point has no weight
        x = sorted(tried)
        best = max(range(len(x)), key=lambda i: (*tried[x[i]], x[i]))
        recalls = [tried[weight][0] for weight in x]
        series.append(Series(f"+ {member}", x, recalls, recalls[best], best))
    if not series:
        raise InputError(
            path, "holds no member with several weights",
            todo="give the trials of a search by steps",
        )  # fmt: skip
    return line_chart(
        "R@1 on the validation queries by weight; the ring marks the chosen one",
        series, "weight kept by the running sum", "R@1, %",
    )  # fmt: skip


def change(before: tuple[str, np.ndarray], after: tuple[str, np.ndarray], seed: int) -> Change:
    """Compare two rankings, each a name and its best ranks [Q]."""
    first, second = before[1] == 1, after[1] == 1
    won, lost = (np.flatnonzero(rows).tolist() for rows in (~first & second, first & ~second))
    gain = paired_bootstrap(100.0 * first, 100.0 * second, seed)
    return Change(before[0], after[0], won, lost, gain)


def duplicate_top1(scores: ScoreFile) -> tuple[int, np.ndarray]:
    """Count the distinct top-1 images, and find the queries that share theirs [Q]."""
    first = top_k(scores.scores, 1)[:, 0].numpy()
    counts = np.bincount(first)
    return int((counts > 0).sum()), counts[first] > 1


def by_action(
    queries: Sequence[Query], ranks: Sequence[tuple[str, np.ndarray]]
) -> list[tuple[str, int, list[float]]]:
    """R@1 per action in percent for each ranking, with the action's number of queries.

    Args:
        queries: in the order of the ranks.
        ranks: name and best rank [Q] per ranking; the first one sorts the actions, hardest first.
    """
    if not ranks:
        return []
    rows: dict[str, list[int]] = defaultdict(list)
    for number, query in enumerate(queries):
        if query.action is not None:
            rows[query.action].append(number)
    table = [
        (action, len(chosen), [100 * float((rank[chosen] == 1).mean()) for _, rank in ranks])
        for action, chosen in rows.items()
        if len(chosen) >= LEAST_OF_AN_ACTION
    ]
    return sorted(table, key=lambda row: (row[2][0], row[0]))
