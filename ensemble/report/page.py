"""HTML report with metrics and ranked images, in one self-contained file.

The file embeds everything (thumbnails as base64 JPEG, style, script) and makes no network requests.
The first ``--score`` is the main one, and the page shows its ten best images. Further ones add rows
to the metrics, curves and tables. ``--steps`` names the score files in fusion order, and the page
shows each step's won and lost queries. ``--trials`` adds the weight sweep of the search.

Command line::

    python -m ensemble.report --score NAME=FILE [--score NAME=FILE ...] --annotation FILE \\
        [--answers FILE] [--image_folder DIR] [--steps NAME NAME ...] [--trials FILE] --out FILE
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ensemble.report.findings import (
    LEAST_OF_AN_ACTION,
    by_action,
    collisions,
    recall_curve,
    weight_sweep,
)
from ensemble.report.members import Member, ranks_of_members
from ensemble.report.pictures import Picture, Thumbnails
from ensemble.report.steps import steps_shown
from pab.core.config import CommandParser
from pab.core.errors import InputError
from pab.core.files import write_text
from pab.data.annotations import read_retrieval
from pab.data.images import list_gallery
from pab.data.label_config import add_label_flags, label_config
from pab.data.records import GalleryImage, Query, Retrieval
from pab.evaluate import evaluate, text_table
from pab.metrics import paired_bootstrap
from pab.ranking import rows_in_order, top_k

TOP_IMAGES = 10
FAILURE_SHARE = 0.6  # of the displayed queries, if there are enough failures
TITLE = "Text-based person anomaly retrieval"


@dataclass(frozen=True)
class Strip:
    """Displayed query.

    Attributes:
        query: the query.
        kind: normal, abnormal, or empty if unknown.
        rank: rank of the best right image in the main score file; None without labels.
        others: (name, rank) for each other score file.
        pictures: the ten best images.
        below: the best right image, if it is not among the ten.
    """

    query: Query
    kind: str
    rank: int | None
    others: list[tuple[str, int]]
    pictures: list[Picture]
    below: Picture | None


def write_report(
    path: str | Path,
    members: Sequence[Member],
    retrieval: Retrieval,
    gallery: Sequence[GalleryImage],
    *,
    n_queries: int = 40,
    title: str = TITLE,
    seed: int = 0,
    steps: Sequence[str] = (),
    trials: Path | None = None,
) -> None:
    """Write the report.

    Args:
        path: output HTML file.
        members: one or more members with the same queries and images; the first is the main one.
        retrieval: queries, with labels if there are any.
        gallery: the images.
        n_queries: number of displayed queries.
        title: title of the page.
        seed: seed of the sample of successes and of the bootstrap.
        steps: names of members in fusion order, whose changes are shown.
        trials: trials file of the search, for its weight sweep.

    Raises:
        InputError: a displayed image is missing or unreadable, or the trials file is invalid.
    """
    main = members[0]
    queries = {query.query_id: query for query in retrieval.queries}
    kinds = [_kind(queries[query_id]) for query_id in main.scores.query_ids]
    ranks = None if main.evaluation is None else main.evaluation.metrics.best_rank.tolist()
    rows = choose_queries(ranks, kinds, n_queries, seed)
    thumbnails = Thumbnails(gallery)
    strips = [_strip(row, members, retrieval, queries, thumbnails) for row in rows]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,  # captions and file names are untrusted text
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        title=title,
        main=main,
        metrics=None if ranks is None else _metrics_table(members, seed),
        curve=None if ranks is None else recall_curve(ranks_of_members(members)),
        sweep=None if trials is None else weight_sweep(trials),
        steps=steps_shown(members, steps, retrieval, queries, thumbnails, seed),
        collisions=[
            (m.name, *collisions(m.scores), m.scores.meta.get("per_query") is False)
            for m in members
        ],
        actions=by_action(
            [queries[one] for one in main.scores.query_ids], ranks_of_members(members)
        ),
        least=LEAST_OF_AN_ACTION,
        names=[member.name for member in members],
        strips=strips,
        failures=None if ranks is None else sum(rank > 1 for rank in ranks),
        n_gallery=len(main.scores.gallery_ids),
        n_queries=len(main.scores.query_ids),
        kinds=sorted({strip.kind for strip in strips if strip.kind}, reverse=True),
        has_twins=any(picture.mark == "twin" for strip in strips for picture in strip.pictures),
    )
    write_text(path, page)


def choose_queries(
    ranks: Sequence[int] | None, kinds: Sequence[str], n: int, seed: int = 0
) -> list[int]:
    """Choose the rows of the displayed queries: the worst failures, then a sample of successes.

    Normal and abnormal queries alternate while both last, so that both appear.

    Args:
        ranks: ``[Q]``, rank of the right image; above 1 is a failure. None draws a plain sample.
        kinds: ``[Q]``, normal, abnormal or empty.
        n: number of queries.
        seed: seed of the sample.

    Returns:
        Up to ``n`` rows: failures by descending rank, then successes in input order.
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


def _metrics_table(members: Sequence[Member], seed: int) -> dict[str, Any]:
    """Column names, and per member and group a row of (value, low, high) by column."""
    columns: list[str] = []
    rows = []
    for member in members:
        evaluation = member.evaluation
        assert evaluation is not None  # all members have the annotation's labels
        for group, chosen in evaluation.groups.items():
            values, bounds = evaluation.summary(group), evaluation.intervals(group, seed)
            columns = columns if len(columns) >= len(values) else list(values)
            cells = {name: (value, *bounds[name]) for name, value in values.items()}
            rows.append({"name": member.name, "group": group, "n": chosen.sum(), "cells": cells})
    return {"columns": columns, "rows": rows}


def _strip(
    row: int,
    members: Sequence[Member],
    retrieval: Retrieval,
    queries: dict[str, Query],
    thumbnails: Thumbnails,
) -> Strip:
    main = members[0]
    scores = main.scores.scores[row]  # [G]
    query = queries[main.scores.query_ids[row]]
    right = (retrieval.relevant or {}).get(query.query_id, frozenset())
    twin = retrieval.twins.get(query.query_id)

    def picture(column: int, rank: int) -> Picture:
        name = main.scores.gallery_ids[column]
        mark = "right" if name in right else "twin" if name == twin else ""
        return Picture(name, rank, float(scores[column]), mark, thumbnails[name])

    best = top_k(scores[None], TOP_IMAGES)[0].tolist()
    pictures = [picture(column, rank) for rank, column in enumerate(best, start=1)]
    rank, below = None, None
    if main.evaluation is not None:
        rank = int(main.evaluation.metrics.best_rank[row])
        if rank > len(best):
            below = picture(int(top_k(scores[None], rank)[0, -1]), rank)
    others = [
        (member.name, int(member.evaluation.metrics.best_rank[row]))
        for member in members[1:]
        if member.evaluation is not None
    ]
    return Strip(query, _kind(query), rank, others, pictures, below)


def comparison(members: Sequence[Member], seed: int = 0) -> str:
    """Format all members' overall metrics, and the gain of the first over each other in R@1.

    The gain is in percentage points, with its paired 95 % bootstrap interval over queries.
    """
    rows: list[list[str]] = []
    main = members[0].evaluation
    assert main is not None  # all members have the annotation's labels
    for member in members:
        evaluation = member.evaluation
        assert evaluation is not None
        figures, bounds = evaluation.summary(), evaluation.intervals(seed=seed)
        if not rows:
            rows = [["", *figures, f"R@1 of {member.name} over it"]]
        cells = [f"{value:.2f}" for value in figures.values()]
        cells[0] += " [{:.1f}, {:.1f}]".format(*bounds["R@1"])
        gain = "-"
        if member is not members[0]:
            ours, theirs = (e.metrics.values["R@1"] for e in (main, evaluation))
            found = paired_bootstrap(theirs, ours, seed)
            gain = f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"
        rows.append([member.name, *cells, gain])
    return text_table(rows)


def read_members(named: Sequence[str], retrieval: Retrieval) -> list[Member]:
    """Read ``NAME=FILE`` score files, align their order, and evaluate them.

    Raises:
        InputError: malformed, a duplicate name, or files whose queries or galleries do not match
            the annotation or each other.
    """
    from pab.scores import align, load_scores, reorder  # imports torch, which --help does not need

    members: list[Member] = []
    for text in named:
        name, sign, file = text.partition("=")
        if not (name.strip() and sign and file):
            raise InputError("--score", f"expected NAME=FILE, found {text!r}")
        if name in {member.name for member in members}:
            raise InputError("--score", f"expected distinct names, found {name!r} twice")
        scores = load_scores(file)
        if members:
            scores = align(
                scores, members[0].scores, where=file, reference_name=f"{members[0].name}'s file"
            )
        else:
            ids = [query.query_id for query in retrieval.queries]
            scores = reorder(scores, ids, where=file)
        evaluation = (
            evaluate(scores, retrieval, where=file) if retrieval.relevant is not None else None
        )
        members.append(Member(name, scores, evaluation))
    return members


def check_steps(steps: Sequence[str], members: Sequence[Member]) -> None:
    """Reject steps that are not a fusion of the given files.

    Raises:
        InputError: a name without ``--score``, a single step, or no labels.
    """
    known = [member.name for member in members]
    unknown = next((name for name in steps if name not in known), None)
    if unknown is not None:
        raise InputError(
            "--steps", f"expected names of --score ({', '.join(known)}), found {unknown!r}"
        )
    if len(steps) == 1:
        raise InputError("--steps", f"expected two names or more, found {steps[0]!r} alone")
    if steps and members[0].evaluation is None:
        raise InputError("--steps", "cannot be judged without labels", todo="give --answers")


def main(argv: list[str] | None = None) -> None:
    """Write a self-contained HTML report of one or more score files."""
    parser = CommandParser(
        prog="python -m ensemble.report", description=main.__doc__, allow_abbrev=False
    )
    parser.add_argument(
        "--score",
        action="append",
        required=True,
        metavar="NAME=FILE",
        help="score file and its name (repeatable; the first is the main one)",
    )
    parser.add_argument(
        "--annotation",
        type=Path,
        required=True,
        help="query.json, pair.json, attr.json or a training shard",
    )
    parser.add_argument("--answers", type=Path, help="answer key of a name-masked set")
    parser.add_argument(
        "--image_folder", type=Path, help="gallery folder, or root of the annotation's image paths"
    )
    parser.add_argument("--out", type=Path, required=True, help="HTML file to write")
    parser.add_argument("--queries", type=int, default=40, help="displayed queries (default: 40)")
    parser.add_argument(
        "--steps", nargs="+", default=[], metavar="NAME",
        help="names given with --score, in fusion order: shows the changes of each step",
    )  # fmt: skip
    parser.add_argument("--trials", type=Path, help="trials.csv of ensemble.search")
    parser.add_argument("--title", default=TITLE, help="title of the page")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the sample and the bootstrap (default: 0)"
    )
    add_label_flags(parser)
    args = parser.parse_args(argv)
    if args.queries < 1:
        raise InputError("--queries", f"expected at least 1, found {args.queries}")
    retrieval = read_retrieval(
        args.annotation,
        image_folder=args.image_folder,
        answers=args.answers,
        **label_config(args).reading(),
    )
    gallery = retrieval.gallery
    if gallery is None:
        if args.image_folder is None:
            raise InputError(
                args.annotation,
                "a name-masked set does not say where its images are",
                todo="give their folder with --image_folder",
            )
        gallery = list_gallery(args.image_folder)
    members = read_members(args.score, retrieval)
    check_steps(args.steps, members)
    names = [image.gallery_id for image in gallery]
    rows_in_order(
        members[0].scores.gallery_ids,
        sorted(names),
        where=args.score[0].partition("=")[2],
        order_name="the image folder" if retrieval.gallery is None else "the annotation",
    )
    write_report(
        args.out,
        members,
        retrieval,
        gallery,
        n_queries=args.queries,
        title=args.title,
        seed=args.seed,
        steps=args.steps,
        trials=args.trials,
    )
    if members[0].evaluation is not None and len(members) > 1:
        print(comparison(members, args.seed))
    print(f"{args.out}: {args.out.stat().st_size / 2**20:.1f} MiB")
