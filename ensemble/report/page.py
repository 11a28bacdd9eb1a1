"""Write an HTML report with metrics and ranked images, in one self-contained file.

The file embeds thumbnails (base64 WebP), style and script, and makes no network requests. For
selected queries, the page shows the ten best listed images of the first ``--score``, the main score
file. Other score files add figures to the tables, lines to the curves, and a collapsed list of ten
images per displayed query. ``--steps`` names score files in fusion order; the page then counts the
queries that each step won and lost, and shows examples. ``--trials`` adds the weight sweep of the
search.

Command line::

    python -m ensemble.report --score NAME=FILE [--score NAME=FILE ...] --annotation FILE \\
        [--answers FILE] [--image_folder DIR] [--steps NAME NAME ...] [--trials FILE] --out FILE
"""

from __future__ import annotations

import random
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ensemble.report.findings import (
    LEAST_OF_AN_ACTION,
    by_action,
    duplicate_top1,
    recall_curve,
    weight_sweep,
)
from ensemble.report.inputs import UNLISTED, NamedScores, best_ranks, check_steps, read_inputs
from ensemble.report.pictures import SMALL_PX, Album, Picture
from ensemble.report.steps import steps_shown
from pab import __version__
from pab.core.config import CommandParser
from pab.core.errors import InputError
from pab.core.files import write_text
from pab.core.progress import progress
from pab.core.resources import CODE_ROOT
from pab.data.annotations import read_retrieval
from pab.data.images import list_gallery
from pab.data.label_config import add_label_flags, label_config
from pab.data.records import GalleryImage, Query, Retrieval
from pab.evaluate import text_table
from pab.metrics import paired_bootstrap
from pab.ranking import rows_in_order
from pab.training.run_log import git_state

TOP_IMAGES = 10
FAILURE_SHARE = 0.6  # of the displayed queries, if there are enough failures and successes
TITLE = "Text-based person anomaly retrieval"
FAILURES = {  # kinds of failure; a query can have several
    "near": f"right image at rank 2 to {TOP_IMAGES}",
    "far": f"right image beyond rank {TOP_IMAGES} or not listed",
    "twin": "twin at rank 1",
    "duplicate": "duplicate top-1",
}


@dataclass(frozen=True)
class Group:
    """Rankings shown in the same tables: the members, or the fusion steps."""

    title: str  # heading of the tables
    rankings: list[NamedScores]  # in the order of the rows
    metrics: list[dict[str, Any]]  # rows of :func:`_metrics_rows`
    duplicates: list[tuple[int, int]]  # counts: distinct top-1 images, queries with a duplicate
    actions: list[tuple[str, int, list[float]]]  # rows of :func:`by_action`


@dataclass(frozen=True)
class RankedList:
    """Best images of a query in one ranking."""

    name: str
    rank: int | None  # of the best right image; 0 if it is not listed, None without labels
    pictures: list[Picture]


@dataclass(frozen=True)
class Strip:
    """Displayed query, with its ranked lists."""

    query: Query
    kind: str  # normal, abnormal, or empty if unknown
    failures: list[str]  # keys of :data:`FAILURES`
    main: RankedList  # of the main score file
    below: Picture | None  # best right image of the main ranking, if beyond the first ten
    others: list[RankedList]  # of the other score files


def write_report(
    path: str | Path,
    rankings: Sequence[NamedScores],
    retrieval: Retrieval,
    gallery: Sequence[GalleryImage],
    *,
    n_queries: int,
    title: str,
    seed: int,
    steps: Sequence[str],
    trials: Path | None,
    command: str,
) -> None:
    """Write the report on rankings of the same queries and images.

    Args:
        path: output HTML file.
        rankings: one or more rankings with equal query order; the first is the main ranking.
        retrieval: queries, with labels if there are any.
        gallery: images of the gallery.
        n_queries: number of displayed queries.
        title: title of the page.
        seed: seed of the samples (displayed queries, examples of steps) and of the bootstrap.
        steps: names of rankings in fusion order; the page shows the changes between them.
        trials: trials file of the search, for its weight sweep.
        command: command line to show on the page.

    Raises:
        InputError: a displayed image is missing or unreadable, the trials file is invalid, or the
            report cannot be written.
    """
    main = rankings[0]
    sweep = None if trials is None else weight_sweep(trials)  # rejects a bad file early
    queries = {query.query_id: query for query in retrieval.queries}
    kinds = [_kind(queries[query_id]) for query_id in main.scores.query_ids]
    all_ranks = best_ranks(rankings)  # of all rankings, or none without labels
    ranks = all_ranks[0][1].tolist() if all_ranks else None
    rows = choose_queries(ranks, kinds, n_queries, seed)
    album = Album(gallery, retrieval)
    changes = steps_shown(rankings, steps, queries, album, seed)
    strips = _strips(rows, rankings, queries, album)
    environment = Environment(  # autoescape: captions and file names are untrusted text
        loader=PackageLoader("ensemble.report"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    groups = _groups(rankings, steps, [queries[one] for one in main.scores.query_ids], seed)
    page = environment.get_template("report.html.j2").render(
        title=title,
        main=main,
        groups=groups,
        curve=recall_curve(all_ranks) if all_ranks else None,
        sweep=sweep,
        steps=changes,
        least=LEAST_OF_AN_ACTION,
        strips=strips,
        failures=None if ranks is None else sum(rank > 1 for rank in ranks),
        failure_names=FAILURES,
        failure_kinds=_options((key for one in strips for key in one.failures), **FAILURES),
        kinds=_options(one.kind for one in strips),
        actions=_options(one.query.action for one in strips),
        n_gallery=len(main.scores.gallery_ids),
        n_queries=len(main.scores.query_ids),
        has_twins=bool(retrieval.twins),
        thumbnails=album.thumbnails,
        command=command,
        version=__version__,
        git=git_state(CODE_ROOT),
        date=datetime.now(UTC),
    )
    write_text(path, page)


def _options(values: Iterable[str | None], **names: str) -> list[tuple[str, str]]:
    """Return the choices of a filter: each value, and a label with its number of queries."""
    counts = sorted(Counter(filter(None, values)).items())
    return [(value, f"{names.get(value, value)} ({n})") for value, n in counts]


def choose_queries(
    ranks: Sequence[int] | None, kinds: Sequence[str], n: int, seed: int = 0
) -> list[int]:
    """Choose the rows of the displayed queries: the worst failures, then a sample of successes.

    The choice alternates between normal and abnormal queries as long as both kinds remain.

    Args:
        ranks: ``[Q]``, rank of the right image; above 1 is a failure. None draws a random sample.
        kinds: ``[Q]``, normal, abnormal or empty.
        n: number of queries.
        seed: seed of the sample.

    Returns:
        Up to ``n`` rows: failures by descending rank, then successes in input order. Without ranks,
        all rows are in input order.
    """
    rows = list(range(len(kinds)))
    shuffled = random.Random(seed).sample(rows, len(rows))
    if ranks is None:
        return sorted(_take_turns(shuffled, kinds)[:n])
    failures = sorted((row for row in rows if ranks[row] > 1), key=lambda row: (-ranks[row], row))
    successes = [row for row in shuffled if ranks[row] == 1]
    n_failures = min(len(failures), max(round(FAILURE_SHARE * n), n - len(successes)))
    worst = _take_turns(failures, kinds)[:n_failures]
    sample = _take_turns(successes, kinds)[: n - n_failures]
    return sorted(worst, key=lambda row: (-ranks[row], row)) + sorted(sample)


def _take_turns(rows: Sequence[int], kinds: Sequence[str]) -> list[int]:
    """Alternate between the kinds, and keep the row order within each kind."""
    piles = [[row for row in rows if kinds[row] == kind] for kind in sorted(set(kinds))]
    return [row for row in chain.from_iterable(zip_longest(*piles)) if row is not None]


def _kind(query: Query) -> str:
    return {True: "normal", False: "abnormal", None: ""}[query.is_normal]


def _groups(
    rankings: Sequence[NamedScores], steps: Sequence[str], queries: Sequence[Query], seed: int
) -> list[Group]:
    """Build the non-empty groups: the members, and the fusion steps in order."""
    fused = [i for i, one in enumerate(rankings) if one.is_fusion or one.name in steps[1:]]
    order = {name: place for place, name in enumerate(steps)}
    fused.sort(key=lambda i: order.get(rankings[i].name, len(order)))
    single = [i for i in range(len(rankings)) if i not in fused]
    duplicates = [duplicate_top1(one.scores) for one in rankings]
    actions = by_action(queries, best_ranks(rankings))
    return [
        Group(
            title,
            [rankings[i] for i in places],
            [row for i in places for row in _metrics_rows(rankings[i], seed)],
            [(duplicates[i][0], int(duplicates[i][1].sum())) for i in places],
            [(name, n, [shares[i] for i in places]) for name, n, shares in actions],
        )
        for title, places in (("Members", single), ("Fusion steps", fused))
        if places
    ]


def _metrics_rows(ranking: NamedScores, seed: int) -> list[dict[str, Any]]:
    """Build one row per group of queries: (value, low, high) by metric; empty without labels."""
    if ranking.evaluation is None:
        return []
    rows = []
    for group, chosen in ranking.evaluation.groups.items():
        bounds = ranking.evaluation.intervals(group, seed)
        values = ranking.evaluation.summary(group).items()
        cells = {name: (value, *bounds[name]) for name, value in values}
        rows.append({"name": ranking.name, "group": group, "n": chosen.sum(), "cells": cells})
    return rows


def _strips(
    rows: Sequence[int], rankings: Sequence[NamedScores], queries: dict[str, Query], album: Album
) -> list[Strip]:
    """Build the displayed queries, with thumbnails of their ranked lists."""
    main = rankings[0]
    shared = duplicate_top1(main.scores)[1]
    listed = [one.scores.listed_counts().tolist() for one in rankings]

    def ranked(number: int, row: int, **size: int) -> RankedList:
        one, places = rankings[number], range(1, min(TOP_IMAGES, listed[number][row]) + 1)
        rank = None if one.evaluation is None else int(one.evaluation.metrics.best_rank[row])
        return RankedList(one.name, rank, album.ranked(one.scores, row, places, **size))

    strips = []
    for row in progress(rows, "creating thumbnails", "queries"):
        found = ranked(0, row)
        rank = 1 if found.rank is None else found.rank or UNLISTED
        tests = {
            "near": 1 < rank <= TOP_IMAGES,
            "far": rank > TOP_IMAGES,
            "twin": rank > 1 and found.pictures[0].mark == "twin",
            "duplicate": rank > 1 and shared[row],
        }
        failures = [key for key, holds in tests.items() if holds]
        beyond = TOP_IMAGES < rank < UNLISTED
        below = album.ranked(main.scores, row, [rank])[0] if beyond else None
        query = queries[main.scores.query_ids[row]]
        strips.append(Strip(query, _kind(query), failures, found, below, []))
    # The other lists come last, so that only images outside the main lists have small thumbnails.
    for i in progress(range(len(rows)), "creating small thumbnails", "queries"):
        others = range(1, len(rankings))
        strips[i].others.extend(ranked(number, rows[i], side=SMALL_PX) for number in others)
    return strips


def comparison(rankings: Sequence[NamedScores], seed: int) -> str:
    """Format all rankings' overall metrics, and the gain in R@1 of the first over the others.

    Gains are in percentage points, with paired 95 % bootstrap intervals over queries.
    """
    found = [one.evaluation for one in rankings if one.evaluation]  # all or none have labels
    rows = [["", *found[0].summary(), f"R@1 gain of {rankings[0].name} over this row"]]
    for ranking, evaluation in zip(rankings, found, strict=True):
        cells = [f"{value:.2f}" for value in evaluation.summary().values()]
        cells[0] += " [{:.1f}, {:.1f}]".format(*evaluation.intervals(seed=seed)["R@1"])
        ours, theirs = (e.metrics.values["R@1"] for e in (found[0], evaluation))
        gain = "-" if evaluation is found[0] else str(paired_bootstrap(theirs, ours, seed))
        rows.append([ranking.name, *cells, gain])
    return text_table(rows)


def main(argv: list[str] | None = None) -> None:
    """Write a self-contained HTML report of one or more score files."""
    parser = CommandParser(prog="python -m ensemble.report")
    data, output = parser.groups["data"], parser.groups["output"]
    data.add_argument(
        "--score", action="append", required=True, metavar="NAME=FILE",
        help="score file and its name (repeatable; the first is the main score file)",
    )  # fmt: skip
    data.add_argument(
        "--annotation", type=Path, required=True,
        help="query.json, pair.json, attr.json, training shard, table, or folder of captions",
    )  # fmt: skip
    data.add_argument("--answers", type=Path, help="answer key of a name-masked set")
    data.add_argument(
        "--image_folder", type=Path, help="gallery folder, or root of the annotation's image paths"
    )
    output.add_argument("--out", type=Path, required=True, help="HTML file to write")
    output.add_argument("--queries", type=int, default=40, help="displayed queries (default: 40)")
    output.add_argument(
        "--steps", nargs="+", default=[], metavar="NAME",
        help="names of score files in fusion order; the report shows the changes of each step",
    )  # fmt: skip
    data.add_argument("--trials", type=Path, help="trials.csv of ensemble.search")
    output.add_argument("--title", default=TITLE, help="title of the page")
    parser.groups["advanced"].add_argument(
        "--seed", type=int, default=0, help="seed of the sample and the bootstrap (default: 0)"
    )
    add_label_flags(parser)
    args = parser.parse_args(argv)
    if args.queries < 1:
        raise InputError("--queries", f"expected at least 1, found {args.queries}")
    if args.seed < 0:
        raise InputError("--seed", f"must be at least 0, found {args.seed}")
    images, reading = args.image_folder, label_config(args).reading()
    retrieval = read_retrieval(
        args.annotation, image_folder=images, answers=args.answers, **reading
    )
    if retrieval.gallery is None and images is None:
        raise InputError(
            args.annotation, "a name-masked set does not record its image folder",
            todo="pass the folder of the images with --image_folder",
        )  # fmt: skip
    gallery = list_gallery(images) if retrieval.gallery is None else retrieval.gallery
    names = sorted(image.gallery_id for image in gallery)
    rankings = read_inputs(args.score, retrieval, names)
    check_steps(args.steps, rankings)
    where = args.score[0].partition("=")[2]
    source = "the image folder" if retrieval.gallery is None else "the annotation"
    rows_in_order(rankings[0].scores.gallery_ids, names, where=where, order_name=source)
    command = shlex.join([*parser.prog.split(), *(sys.argv[1:] if argv is None else argv)])
    write_report(
        args.out, rankings, retrieval, gallery, n_queries=args.queries, title=args.title,
        seed=args.seed, steps=args.steps, trials=args.trials, command=command,
    )  # fmt: skip
    if rankings[0].evaluation is not None and len(rankings) > 1:
        print(comparison(rankings, args.seed))
    print(f"{args.out}: {args.out.stat().st_size / 2**20:.1f} MiB")
