"""Evaluate scores and ranked lists, overall and for normal and abnormal queries.

Command line::

    python -m pab.evaluate --score FILE --annotation FILE [--answers FILE]
    python -m pab.evaluate --predictions FILE.txt --annotation FILE [--query_order FILE]

Both flags accept every form in :mod:`pab.formats.forms`; ranked lists and scores are distinguished
by content. ``--json FILE`` writes the figures as JSON, and ``--trec PREFIX`` writes ``PREFIX.run``
and ``PREFIX.qrels`` for other tools. ``--intervals`` adds 95 % bootstrap intervals.
:mod:`pab.metrics` defines the metrics.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pab.core.config import CommandParser
from pab.core.counts import counted
from pab.core.errors import InputError, run_cli
from pab.core.files import write_json
from pab.core.notices import notice
from pab.core.outputs import check_inputs_are_kept, check_outputs
from pab.data.annotations import read_retrieval
from pab.data.id_lists import read_gallery_ids, read_query_ids, read_query_order
from pab.data.label_config import add_label_flags, add_path_flags, label_config
from pab.data.names import respelt
from pab.data.records import Relevance, Retrieval
from pab.formats.contents import Listing
from pab.formats.export import DEFAULT_TOP_K, Ranking, ranking_of, write_trec
from pab.formats.forms import read_form
from pab.metrics import (
    FloatArray,
    Metrics,
    bootstrap_interval,
    evaluate_lists,
    evaluate_scores,
    twin_preference,
)
from pab.ranking import order_queries, rows_in_order, some

if TYPE_CHECKING:
    from pab.formats.score_file import ScoreFile

TWIN = "over twin"  # mean of `twin_preference` over the queries with a twin
SHORT_LIST = 10  # number of places used by R@10 and mAP@10


@dataclass(frozen=True)
class Evaluation:
    """Per-query metrics of a ranking (``Q`` queries, ``M`` metrics).

    Attributes:
        metrics: per-query values of all metrics.
        groups: name -> mask ``[Q]``: ``"all"``, and ``"normal"`` and ``"abnormal"`` if the labels
            mark such queries.
        twin: :func:`pab.metrics.twin_preference` ``[Q]``; None for ranked lists.
        n_gallery: number of gallery images; None for ranked lists.
        relevance: relevance rule; see :class:`pab.data.records.Retrieval`.
    """

    metrics: Metrics
    groups: dict[str, NDArray[np.bool_]]
    twin: FloatArray | None
    n_gallery: int | None
    relevance: Relevance = "image_id"

    def summary(self, group: str = "all") -> dict[str, float]:
        """Average each metric over a group, in percent; with twins, also ``"over twin"``."""
        chosen = self.groups[group]
        figures = self.metrics.mean(chosen)
        twin = self._twin_values(chosen)
        if len(twin):
            figures[TWIN] = float(twin.mean())
        return figures

    def intervals(self, group: str = "all", seed: int = 0) -> dict[str, tuple[float, float]]:
        """Compute the 95 % bootstrap interval of each metric over a group, in percent."""
        chosen = self.groups[group]
        names = list(self.metrics.values)
        values = np.stack([self.metrics.values[name][chosen] for name in names], axis=1)  # [Q, M]
        low, high = bootstrap_interval(values, seed)
        bounds = {name: (float(low[i]), float(high[i])) for i, name in enumerate(names)}
        twin = self._twin_values(chosen)
        if len(twin):
            low, high = bootstrap_interval(twin, seed)
            bounds[TWIN] = (float(low), float(high))
        return bounds

    def _twin_values(self, chosen: NDArray[np.bool_]) -> FloatArray:
        if self.twin is None:
            return np.empty(0)
        return self.twin[chosen & ~np.isnan(self.twin)]

    def table(
        self, *, intervals: bool = False, seed: int = 0, only: Sequence[str] | None = None
    ) -> str:
        """Format the figures as text: one row per group, one column per metric, in percent.

        Args:
            intervals: add 95 % bootstrap intervals.
            seed: seed of the bootstrap.
            only: names of the metrics; None selects all.
        """
        names = [name for name in self.summary() if only is None or name in only]
        rows = [["queries", "n", *names]]
        for group, chosen in self.groups.items():
            figures = self.summary(group)
            bounds = self.intervals(group, seed) if intervals else {}
            cells = [group, str(int(chosen.sum()))]
            for name in names:
                cell = f"{figures[name]:.2f}" if name in figures else "-"
                if name in bounds:
                    cell += f" [{bounds[name][0]:.1f}, {bounds[name][1]:.1f}]"
                cells.append(cell)
            rows.append(cells)
        return text_table(rows)

    def to_json(self, *, intervals: bool = False, seed: int = 0) -> dict[str, Any]:
        """Return the figures as ``{"gallery": N, "relevance": RULE, "groups": {GROUP: figures}}``.

        The figures of a group are ``{"queries": N, METRIC: MEAN, ...}``. Those of scores also
        contain ``"queries_with_twin": N``, and ``intervals`` adds
        ``"intervals_95": {METRIC: [LOW, HIGH]}``. For ranked lists, ``"gallery"`` is None.
        """
        groups: dict[str, Any] = {}
        for group, chosen in self.groups.items():
            groups[group] = {"queries": int(chosen.sum()), **self.summary(group)}
            if self.twin is not None:
                groups[group]["queries_with_twin"] = len(self._twin_values(chosen))
            if intervals:
                bounds = self.intervals(group, seed)
                groups[group]["intervals_95"] = {name: list(pair) for name, pair in bounds.items()}
        return {"gallery": self.n_gallery, "relevance": self.relevance, "groups": groups}


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Format rows as a text table; the first column is left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def read_labels(
    annotation: str | Path, *, image_folder: str | Path | None, **reading: Any
) -> Retrieval:
    """Read an annotation; for a name-masked set, list the image folder, if any, as the gallery.

    Args:
        annotation: see :func:`read_retrieval`.
        image_folder: the gallery's folder, or the root of the annotation's image paths.
        reading: further arguments of :func:`read_retrieval`.

    Raises:
        InputError: see :func:`read_retrieval` and :func:`pab.data.images.list_gallery`.
    """
    retrieval = read_retrieval(annotation, image_folder=image_folder, **reading)
    if retrieval.gallery is None and image_folder:
        from pab.data.images import list_gallery  # imports Pillow, which other cases do not need

        retrieval = replace(retrieval, gallery=list_gallery(image_folder))
    return retrieval


def evaluate(
    score_file: ScoreFile, retrieval: Retrieval, *, where: str | Path = "score file"
) -> Evaluation:
    """Evaluate a score file against the labels of an annotation.

    If the scores list only some images per query (``score_file.listed``), queries and images may be
    missing. An unlisted right image counts as not found, and a missing query as a miss. Ids that
    differ only in spelling are matched.

    Args:
        score_file: scores ``[Q, G]``.
        retrieval: the same queries, with labels; the order of rows may differ.
        where: path of the score file, for messages.

    Raises:
        InputError: there are no labels, a query has no right image, or the query ids or image ids
            (including those of twins) do not match.
    """
    from pab.scores import respell  # imports torch, which ranked lists do not need

    relevant = _labels(retrieval)
    query_ids = [query.query_id for query in retrieval.queries]
    score_file = respell(score_file, query_ids, _known_images(retrieval, relevant), where=where)
    is_complete = score_file.listed is None
    missing: list[str] = []
    if not is_complete:
        there = set(score_file.query_ids)
        missing = [query_id for query_id in query_ids if query_id not in there]
        query_ids = [query_id for query_id in query_ids if query_id in there]
    rows_in_order(score_file.query_ids, query_ids, where=where, order_name="the annotation")
    if retrieval.gallery is not None:
        gallery_ids = sorted(image.gallery_id for image in retrieval.gallery)
        unknown = sorted(set(score_file.gallery_ids) - set(gallery_ids))
        if is_complete:
            rows_in_order(
                score_file.gallery_ids, gallery_ids, where=where, order_name="the gallery"
            )
        elif unknown:
            raise InputError(where, f"expected images of the gallery, found {some(unknown)}")
    metrics = evaluate_scores(score_file, relevant, where=where)
    twin = twin_preference(score_file, metrics, retrieval.twins, where=where)
    if missing:
        count = f"{len(missing)} of {len(missing) + len(query_ids)}"
        notice(where, f"missing queries count as misses ({count}): {some(missing)}")
        metrics = metrics.with_misses(missing)
        missed_twins = [0.0 if query_id in retrieval.twins else np.nan for query_id in missing]
        twin = np.concatenate([twin, missed_twins])
    groups = _groups(retrieval, metrics.query_ids)
    n_gallery = len(score_file.gallery_ids if retrieval.gallery is None else retrieval.gallery)
    return Evaluation(metrics, groups, twin, n_gallery, retrieval.relevance)


def _known_images(retrieval: Retrieval, relevant: Mapping[str, frozenset[str]]) -> list[str]:
    """Return the ids of the gallery's images, or of the right images without a gallery."""
    if retrieval.gallery is not None:
        return [image.gallery_id for image in retrieval.gallery]
    return sorted(frozenset().union(*relevant.values()))


def respelt_lists(
    names: Sequence[Sequence[str]], retrieval: Retrieval, where: str | Path
) -> list[list[str]]:
    """Spell the names in ranked lists as in the gallery; without one, as in the labels.

    Raises:
        InputError: two names of the lists would become equal.
    """
    listed = {name for line in names for name in line}
    spelt = respelt(listed, _known_images(retrieval, retrieval.relevant or {}), where)
    return [[spelt[name] for name in line] for line in names]


def evaluate_predictions(
    names: Sequence[Sequence[str]],
    retrieval: Retrieval,
    *,
    query_order: Sequence[str] | None = None,
    where: str | Path = "predictions",
) -> Evaluation:
    """Evaluate ranked lists against the labels of an annotation.

    Args:
        names: gallery names per query, best first.
        retrieval: the queries, with labels; its gallery, if given, must contain every name.
        query_order: query id of each line; None uses the annotation's order.
        where: path of the list, for messages.

    Raises:
        InputError: there are no labels, a query has no right image, or the lists do not match the
            queries or the gallery.
    """
    relevant = _labels(retrieval)
    query_ids = order_queries([query.query_id for query in retrieval.queries], query_order)
    if len(names) != len(query_ids):
        problem = f"expected one line per query ({len(query_ids)}), found {len(names)}"
        raise InputError(where, problem)
    names = respelt_lists(names, retrieval, where)
    if retrieval.gallery is not None:
        known = {image.gallery_id for image in retrieval.gallery}
        for number, line in enumerate(names, start=1):
            unknown = next((name for name in line if name not in known), None)
            if unknown is not None:
                problem = f"expected names of the gallery, found {unknown!r}"
                raise InputError(where, problem, item=f"line {number}")
    right = frozenset().union(*relevant.values())
    if right.isdisjoint(name for line in names for name in line):
        examples = f"it has names like {names[0][0]!r}, the labels have names like {min(right)!r}"
        notice(where, f"contains no right image of any query: {examples}")
    n_gallery = None if retrieval.gallery is None else len(retrieval.gallery)
    shortest = min(map(len, names))
    if shortest < SHORT_LIST and shortest != n_gallery:
        limit = f"lists as few as {counted(shortest, 'image')} per query; an unlisted right image"
        notice(where, f"{limit} counts as not found, also in R@{SHORT_LIST} and mAP@{SHORT_LIST}")
    metrics = evaluate_lists(names, query_ids, relevant, n_gallery=n_gallery, where=where)
    return Evaluation(metrics, _groups(retrieval, query_ids), None, None, retrieval.relevance)


def _labels(retrieval: Retrieval, where: str | Path = "annotation") -> dict[str, frozenset[str]]:
    if retrieval.relevant is None:
        problem = "expected labels to evaluate against, found a name-masked set without them"
        raise InputError(where, problem, todo="pass its answer key with --answers FILE")
    return retrieval.relevant


def _groups(retrieval: Retrieval, query_ids: Sequence[str]) -> dict[str, NDArray[np.bool_]]:
    is_normal = {query.query_id: query.is_normal for query in retrieval.queries}
    kinds = [is_normal[query_id] for query_id in query_ids]
    masks = {
        "all": np.ones(len(kinds), dtype=bool),
        "normal": np.array([kind is True for kind in kinds]),
        "abnormal": np.array([kind is False for kind in kinds]),
    }
    return {group: mask for group, mask in masks.items() if mask.any()}


def main(argv: list[str] | None = None) -> None:
    """Print the metrics of scores or of a ranked list, in any form."""
    parser = CommandParser(prog="python -m pab.evaluate")
    data, output = parser.groups["data"], parser.groups["output"]
    source = data.add_mutually_exclusive_group(required=True)
    rankings = {
        "--score": "score file (.pt), or scores in another form",
        "--predictions": "ranked list (.txt, answer.zip), or a ranked list in another form",
    }
    add_path_flags(source, rankings)
    about = "annotation (JSON, CSV, TSV), or a folder of images with captions"
    data.add_argument("--annotation", type=Path, required=True, help=about)
    others = {
        "--answers": "answer key of a name-masked set",
        "--image_folder": "gallery folder, or root of the annotation's image paths",
        "--query_order": "query id of each line of a ranked list, one per line",
        "--queries": "query ids of the rows, for scores without ids",
        "--gallery": "image names of the columns, or the gallery folder, for scores without ids",
    }
    add_path_flags(data, others)
    output.add_argument("--json", type=Path, help="also write the figures to this file")
    output.add_argument("--trec", metavar="PREFIX", help="also write PREFIX.run and PREFIX.qrels")
    most = f"images per query in PREFIX.run (default: {DEFAULT_TOP_K} at most)"
    output.add_argument("--top_k", type=int, help=most)
    output.add_argument(
        "--intervals", action="store_true", help="add 95%% bootstrap intervals over queries"
    )
    advanced = parser.groups["advanced"]
    advanced.add_argument("--seed", type=int, default=0, help="seed of the bootstrap (default: 0)")
    add_label_flags(parser)
    args = parser.parse_args(argv)
    if args.seed < 0:
        raise InputError("--seed", f"must be at least 0, found {args.seed}")
    path = args.score or args.predictions
    if args.top_k is not None and (not args.trec or args.top_k < 1):
        raise InputError(
            "--top_k", f"requires --trec and a value of at least 1, found {args.top_k}"
        )
    trec = [f"{args.trec}.{ending}" for ending in ("run", "qrels")] if args.trec else [None]
    inputs = {f"--{name}": value for name, value in vars(args).items() if name != "json"}
    for written in trec:
        check_outputs({"json": args.json, "trec": written}, omit="leave out --{}")
        check_inputs_are_kept({"trec": written}, inputs)
    reading = {"answers": args.answers, **label_config(args).reading()}
    retrieval = read_labels(args.annotation, image_folder=args.image_folder, **reading)
    relevant = _labels(retrieval, args.annotation)
    found = read_form(path)
    is_list = isinstance(found, Listing) and found.query_ids is None
    if args.query_order and not is_list:
        problem = "expected a ranked list without query ids, found another form"
        todo = "use --query_order with ranked lists, and --queries with scores without ids"
        raise InputError("--query_order", problem, todo=todo)
    top_k = args.top_k or DEFAULT_TOP_K
    ranking: Sequence[Ranking]
    query_ids = [query.query_id for query in retrieval.queries]
    if isinstance(found, Listing) and is_list:
        order, order_file = None, args.query_order or args.queries
        if order_file:
            order = order_queries(query_ids, read_query_order(order_file), where=order_file)
        evaluation = evaluate_predictions(found.names, retrieval, query_order=order, where=path)
        ranked_ids = evaluation.metrics.query_ids
        # The run and the qrels must use the same spelling of each name.
        lists = respelt_lists(found.names, retrieval, path)
        places = [np.arange(len(line), 0, -1, dtype=np.float32) for line in lists]
        ranking = [(a[:top_k], b[:top_k]) for a, b in zip(lists, places, strict=True)]
    else:
        from pab.formats.conversion import to_score_file  # imports torch
        from pab.scores import respell

        rows = read_query_ids(args.queries) if args.queries else None
        columns = read_gallery_ids(args.gallery) if args.gallery else None
        score_file = to_score_file(found, path, query_ids=rows, gallery_ids=columns)
        known_images = _known_images(retrieval, relevant)
        score_file = respell(score_file, query_ids, known_images, where=path)
        evaluation = evaluate(score_file, retrieval, where=path)
        ranked_ids = score_file.query_ids
        ranking = ranking_of(score_file, top_k) if args.trec else []
    if args.trec:
        write_trec(args.trec, ranked_ids, ranking, relevant)
    if args.json:
        figures = evaluation.to_json(intervals=args.intervals, seed=args.seed)
        write_json(args.json, {"file": str(path), "annotation": str(args.annotation), **figures})
    print(evaluation.table(intervals=args.intervals, seed=args.seed))


class _Callable(ModuleType):
    """Callable module: ``pab.evaluate`` is both this module and the public function."""

    def __call__(self, *args: Any, **options: Any) -> Evaluation:
        """Evaluate scores; see :func:`pab.api.evaluate`."""
        from pab import api

        return api.evaluate(*args, **options)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    run_cli(main)
