"""Compute a report's recall curves, weight sweep, step changes, duplicate top-1 and action table.

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
LEAST_OF_AN_ACTION = 5  # actions with fewer queries are omitted from the table


@dataclass(frozen=True)
class Change:
    """Effect of one fusion step on the top-1 results."""

    before: str  # name of the ranking before the step
    after: str  # name of the ranking after it
    won: list[int]  # rows whose right image became top-1
    lost: list[int]  # rows whose right image stopped being top-1
    gain: Difference  # in R@1


def recall_curve(ranks: Sequence[tuple[str, np.ndarray]]) -> Chart:
    """Create a chart of R@K over K.

    Args:
        ranks: name and best rank of a right image per query [Q], for each ranking.
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
    """Create a chart of R@1 over the tried weights, per member, with a ring at the chosen weight.

    Args:
        path: trials file written by `ensemble.search`.

    Raises:
        InputError: the file cannot be read, is not a trials file, or has no member with several
            weights (as after ``--method simplex``).
    """
    path = existing_file(path, "the trials of ensemble.search")
    found: dict[str, dict[float, tuple[float, float]]] = defaultdict(dict)
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            for row in csv.DictReader(handle):
                # A greedy search repeats a member's weights; the last repetition adds the member.
                if row["weight"]:
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
            continue  # the member that starts the sum has a single trial
        x = sorted(tried)
        best = max(range(len(x)), key=lambda i: (*tried[x[i]], x[i]))
        recalls = [tried[weight][0] for weight in x]
        series.append(Series(f"+ {member}", x, recalls, recalls[best], best))
    if not series:
        raise InputError(
            path, "contains no member with several weights",
            todo="pass the trials of a search with --method steps",
        )  # fmt: skip
    return line_chart(
        "R@1 on the validation queries by weight; the ring marks the chosen one",
        series, "weight kept by the running sum", "R@1, %",
    )  # fmt: skip


def change(before: tuple[str, np.ndarray], after: tuple[str, np.ndarray], seed: int) -> Change:
    """Compare two rankings, each given as a name and best ranks [Q]."""
    first, second = before[1] == 1, after[1] == 1
    won, lost = (np.flatnonzero(rows).tolist() for rows in (~first & second, first & ~second))
    gain = paired_bootstrap(100.0 * first, 100.0 * second, seed)
    return Change(before[0], after[0], won, lost, gain)


def duplicate_top1(scores: ScoreFile) -> tuple[int, np.ndarray]:
    """Count distinct top-1 images; mark the queries with a duplicate top-1, bool [Q]."""
    first = top_k(scores.scores, 1)[:, 0].numpy()
    counts = np.bincount(first)
    return int((counts > 0).sum()), counts[first] > 1


def by_action(
    queries: Sequence[Query], ranks: Sequence[tuple[str, np.ndarray]]
) -> list[tuple[str, int, list[float]]]:
    """List actions with their number of queries and R@1 per ranking, in percent.

    Actions are sorted by ascending R@1 of the first ranking. Actions with fewer than
    :data:`LEAST_OF_AN_ACTION` queries are omitted.

    Args:
        queries: queries in the order of the ranks.
        ranks: name and best ranks [Q] per ranking.
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
