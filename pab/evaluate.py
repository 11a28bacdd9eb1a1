"""How well a score file or a ranked list retrieves, in total and for normal and abnormal queries.

Command line::

    python -m pab.evaluate --score FILE --annotation FILE [--answers FILE]
    python -m pab.evaluate --predictions FILE.txt --annotation FILE [--query_order FILE]

``--json FILE`` writes the figures for machines, ``--trec PREFIX`` writes ``PREFIX.run`` and
``PREFIX.qrels`` for other tools, ``--intervals`` adds 95 % bootstrap intervals. The metrics are
defined in :mod:`pab.metrics`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pab.annotations import Retrieval, read_query_order, read_retrieval
from pab.config import CommandParser
from pab.errors import InputError, run_cli
from pab.files import write_json, write_text
from pab.label_config import add_label_flags, label_config
from pab.metrics import (
    FloatArray,
    Metrics,
    bootstrap_interval,
    evaluate_lists,
    evaluate_scores,
    twin_preference,
)
from pab.ranking import order_queries, read_ranked_list, rows_in_order, top_k
from pab.records import Relevance

if TYPE_CHECKING:
    from pab.scores import ScoreFile

TWIN = "over twin"  # share of the queries with a twin that rank the right image above it
TREC_DEPTH = 1000  # places a query in a TREC run, that format's custom


@dataclass(frozen=True)
class Evaluation:
    """What a ranking scored, query by query.

    Attributes:
        metrics: per-query values, ``Q`` queries.
        groups: ``"all"``, and ``"normal"`` and ``"abnormal"`` where labelled -> mask ``[Q]``.
        twin: :func:`pab.metrics.twin_preference` ``[Q]``; None for ranked lists.
        n_gallery: images ranked for a query; None for ranked lists.
        relevance: rule of what is right; see :class:`pab.records.Retrieval`.
    """

    metrics: Metrics
    groups: dict[str, NDArray[np.bool_]]
    twin: FloatArray | None
    n_gallery: int | None
    relevance: Relevance = "image_id"

    def summary(self, group: str = "all") -> dict[str, float]:
        """Metric name -> percent over a group; ``"over twin"`` last, if a query has a twin."""
        chosen = self.groups[group]
        figures = self.metrics.mean(chosen)
        twin = self._twin_values(chosen)
        if len(twin):
            figures[TWIN] = float(twin.mean())
        return figures

    def intervals(self, group: str = "all", seed: int = 0) -> dict[str, tuple[float, float]]:
        """Metric name -> 95 % bootstrap interval over the group's queries, in percent."""
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
        """The figures as lines of text: a row a group, a column a metric, in percent.

        Args:
            intervals: add 95 % bootstrap intervals.
            seed: of the bootstrap.
            only: names of the metrics; None is all.
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
        """The figures as plain values: ``{"gallery", "groups": {GROUP: {"queries", METRIC ...}}}``.

        With ``intervals``, each group also has ``"intervals_95": {METRIC: [low, high]}``.
        """
        groups: dict[str, Any] = {}
        for group, chosen in self.groups.items():
            groups[group] = {"queries": int(chosen.sum()), **self.summary(group)}
            if self.twin is not None:
                groups[group]["queries_with_twin"] = len(self._twin_values(chosen))
            if intervals:
                groups[group]["intervals_95"] = {
                    name: list(bounds) for name, bounds in self.intervals(group, seed).items()
                }
        return {"gallery": self.n_gallery, "relevance": self.relevance, "groups": groups}


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Cells as aligned columns, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def evaluate(
    score_file: ScoreFile, retrieval: Retrieval, *, where: str | Path = "score file"
) -> Evaluation:
    """Evaluate a score file against the labels of an annotation.

    Args:
        score_file: scores ``[Q, G]``.
        retrieval: the same queries, with labels; the rows may be in another order.
        where: the score file's path, for messages.

    Raises:
        InputError: no labels, or ids of queries or images that do not match.
    """
    relevant = _labels(retrieval)
    query_ids = [query.query_id for query in retrieval.queries]
    rows_in_order(score_file.query_ids, query_ids, where=where, order_name="the annotation")
    if retrieval.gallery is not None:
        gallery_ids = sorted(image.gallery_id for image in retrieval.gallery)
        if gallery_ids != score_file.gallery_ids:
            rows_in_order(
                score_file.gallery_ids, gallery_ids, where=where, order_name="the gallery"
            )
    metrics = evaluate_scores(score_file, relevant, where=where)
    twin = twin_preference(score_file, metrics, retrieval.twins, where=where)
    groups = _groups(retrieval, score_file.query_ids)
    n_gallery = len(score_file.gallery_ids)
    return Evaluation(metrics, groups, twin, n_gallery, retrieval.relevance)


def evaluate_predictions(
    names: Sequence[Sequence[str]],
    retrieval: Retrieval,
    *,
    query_order: Sequence[str] | None = None,
    where: str | Path = "predictions",
) -> Evaluation:
    """Evaluate ranked lists against the labels of an annotation.

    Args:
        names: a list of gallery names for each query, best first.
        retrieval: the queries, with labels; a gallery, where it has one, must hold every name.
        query_order: the query id of each line; None: the annotation's order.
        where: the list's path, for messages.

    Raises:
        InputError: no labels, another number of lines than queries, or an unknown gallery name.
    """
    relevant = _labels(retrieval)
    query_ids = order_queries([query.query_id for query in retrieval.queries], query_order)
    if len(names) != len(query_ids):
        raise InputError(where, f"expected {len(query_ids)} lines, one a query, found {len(names)}")
    if retrieval.gallery is not None:
        known = {image.gallery_id for image in retrieval.gallery}
        for number, line in enumerate(names, start=1):
            for name in line:
                if name not in known:
                    raise InputError(
                        where,
                        f"expected names of the gallery, found {name!r}, which it does not hold",
                        item=f"line {number}",
                    )
    metrics = evaluate_lists(names, query_ids, relevant, where=where)
    return Evaluation(metrics, _groups(retrieval, query_ids), None, None, retrieval.relevance)


def _labels(retrieval: Retrieval, where: str | Path = "annotation") -> dict[str, frozenset[str]]:
    if retrieval.relevant is None:
        raise InputError(
            where,
            "expected labels to evaluate against, found a name-masked set without them",
            todo="give its key with --answers FILE",
        )
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


def write_trec(
    prefix: str | Path,
    query_ids: Sequence[str],
    ranking: Sequence[tuple[Sequence[str], FloatArray]],
    relevant: Mapping[str, frozenset[str]],
) -> None:
    """Write ``PREFIX.run`` (up to 1,000 places a query) and ``PREFIX.qrels`` in TREC's format.

    Other tools sort by score and break ties by rules of their own. A score that is not below
    the one before it is therefore written as the next smaller float32: the order is the same.

    Args:
        prefix: of the two files' names.
        query_ids: ``Q`` ids.
        ranking: for each query the gallery names, best first, and their scores.
        relevant: query id -> the gallery ids that are right.

    Raises:
        InputError: an id holds a blank, which the format cannot carry.
    """
    run: list[str] = []
    qrels: list[str] = []
    for query_id, (names, scores) in zip(query_ids, ranking, strict=True):
        right = sorted(relevant[query_id])
        for one in (query_id, *names, *right):
            if one.split() != [one]:
                raise InputError(f"{prefix}.run", f"expected ids without blanks, found {one!r}")
        below = np.float32(np.inf)
        for rank, (name, score) in enumerate(zip(names, scores, strict=True), start=1):
            below = min(np.float32(score), np.nextafter(below, np.float32(-np.inf)))
            run.append(f"{query_id} Q0 {name} {rank} {below:.9g} pab\n")
        qrels.extend(f"{query_id} 0 {name} 1\n" for name in right)
    write_text(f"{prefix}.run", "".join(run))
    write_text(f"{prefix}.qrels", "".join(qrels))


def _score_ranking(score_file: ScoreFile) -> list[tuple[list[str], FloatArray]]:
    ranking = []
    best = top_k(score_file.scores, TREC_DEPTH)
    values = score_file.scores.gather(1, best).double().numpy()
    for row, columns in enumerate(best.tolist()):
        ranking.append(([score_file.gallery_ids[column] for column in columns], values[row]))
    return ranking


def _list_ranking(names: Sequence[Sequence[str]]) -> list[tuple[Sequence[str], FloatArray]]:
    return [(line, np.arange(len(line), 0, -1, dtype=np.float64)) for line in names]


def main(argv: list[str] | None = None) -> None:
    """Print the metrics of a score file or of a ranked list."""
    parser = CommandParser(
        prog="python -m pab.evaluate", description=main.__doc__, allow_abbrev=False
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--score", type=Path, help="score file (.pt)")
    source.add_argument("--predictions", type=Path, help="ranked list (.txt)")
    parser.add_argument(
        "--annotation",
        type=Path,
        required=True,
        help="query.json, pair.json, attr.json or a training shard",
    )
    parser.add_argument("--answers", type=Path, help="key of a name-masked set")
    parser.add_argument(
        "--image_folder",
        type=Path,
        help="the gallery's folder, or the root of the annotation's image paths",
    )
    parser.add_argument(
        "--query_order", type=Path, help="the query id of each line of --predictions, one a line"
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--trec", metavar="PREFIX", help="also write PREFIX.run and PREFIX.qrels")
    parser.add_argument(
        "--intervals", action="store_true", help="with 95%% bootstrap intervals over queries"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    add_label_flags(parser)
    args = parser.parse_args(argv)
    if args.query_order and args.score:
        raise InputError(
            "--query_order",
            "a score file carries its query ids",
            todo="use --query_order with --predictions only",
        )
    retrieval = read_retrieval(
        args.annotation,
        image_folder=args.image_folder,
        answers=args.answers,
        **label_config(args).reading(),
    )
    if retrieval.gallery is None and args.image_folder:
        from pab.images import list_gallery  # imports Pillow, which score files do without

        retrieval = replace(retrieval, gallery=list_gallery(args.image_folder))
    relevant = _labels(retrieval, args.annotation)
    ranking: Sequence[tuple[Sequence[str], FloatArray]]
    if args.score:
        from pab.scores import load_scores  # imports torch, which --help should not wait for

        score_file = load_scores(args.score)
        evaluation = evaluate(score_file, retrieval, where=args.score)
        ranking = _score_ranking(score_file) if args.trec else []
    else:
        names = read_ranked_list(args.predictions)
        order = None
        if args.query_order:
            query_ids = [query.query_id for query in retrieval.queries]
            listed = read_query_order(args.query_order)
            order = order_queries(query_ids, listed, where=args.query_order)
        evaluation = evaluate_predictions(
            names, retrieval, query_order=order, where=args.predictions
        )
        ranking = _list_ranking(names)
    if args.trec:
        write_trec(args.trec, evaluation.metrics.query_ids, ranking, relevant)
    if args.json:
        figures = evaluation.to_json(intervals=args.intervals, seed=args.seed)
        source_file = str(args.score or args.predictions)
        write_json(args.json, {"file": source_file, "annotation": str(args.annotation), **figures})
    print(evaluation.table(intervals=args.intervals, seed=args.seed))


if __name__ == "__main__":
    run_cli(main)
