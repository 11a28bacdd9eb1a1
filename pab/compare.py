"""Compare two ranked lists.

Command line::

    python -m pab.compare A.txt B.txt [--answers FILE] [--annotation FILE] [--query_order FILE]

The command counts equal top-1 images, shared images within the first ten places, and queries with a
duplicate top-1 image. In a one-to-one set, an image that is top-1 for several queries is right for
at most one of them. With labels, the command also reports how often each list is right, with paired
bootstrap intervals of the metrics. Name matching ignores image extensions and Unicode
normalization.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pab.core.config import CommandParser
from pab.core.counts import counted
from pab.core.errors import InputError, run_cli
from pab.core.files import write_json
from pab.core.outputs import check_outputs
from pab.data.annotations import read_retrieval
from pab.data.id_lists import read_query_order
from pab.data.label_config import add_label_flags, add_path_flags, label_config
from pab.data.masked_queries import answered, read_answers
from pab.data.names import respelt
from pab.data.records import Query, Retrieval
from pab.evaluate import Evaluation, evaluate_predictions
from pab.metrics import paired_bootstrap
from pab.ranking import read_ranked_list

DEPTH = 10


@dataclass(frozen=True)
class Comparison:
    """Differences between two ranked lists of the same queries.

    Attributes:
        lines: number of queries.
        depth: number of compared places per query: ten, or fewer if the lists are shorter.
        same_first: queries with the same top-1 image.
        same_set: queries with the same first ``depth`` images in any order.
        same_order: queries with the same first ``depth`` images in the same order.
        overlap: mean number of shared images within ``depth``.
        distinct_first: number of distinct top-1 images, per list.
        duplicate_top1: number of queries with a duplicate top-1 image, per list.
        differing: numbers (from 1) of the lines whose top-1 images differ.
    """

    lines: int
    depth: int
    same_first: int
    same_set: int
    same_order: int
    overlap: float
    distinct_first: tuple[int, int]
    duplicate_top1: tuple[int, int]
    differing: list[int]

    def table(self) -> str:
        """Format the figures as lines of text."""
        n, depth = self.lines, self.depth
        rows = [
            ("queries", f"{n}"),
            ("same first image", f"{self.same_first} ({self.same_first / n:.1%})"),
            (f"shared of the first {depth}", f"{self.overlap:.2f} images on average"),
            (f"same {depth}, any order", f"{self.same_set}"),
            (f"same {depth}, same order", f"{self.same_order}"),
            ("distinct first images", "A {}, B {}".format(*self.distinct_first)),
            ("queries with duplicate top-1", "A {}, B {}".format(*self.duplicate_top1)),
        ]
        return "\n".join(f"{label:<28} {value}" for label, value in rows)


def compare(a: Sequence[Sequence[str]], b: Sequence[Sequence[str]]) -> Comparison:
    """Compare two ranked lists line by line; both contain the same queries in the same order.

    Raises:
        ValueError: the lists have different lengths.
    """
    if len(a) != len(b):
        raise ValueError(f"expected lists of equal length, found {len(a)} and {len(b)}")
    depth = min(DEPTH, len(a[0]), len(b[0]))
    heads = [(list(x[:depth]), list(y[:depth])) for x, y in zip(a, b, strict=True)]
    shared = [len(set(x) & set(y)) for x, y in heads]
    first_a, first_b = (Counter(line[0] for line in names) for names in (a, b))
    return Comparison(
        lines=len(a),
        depth=depth,
        same_first=sum(x[0] == y[0] for x, y in heads),
        same_set=sum(n == depth for n in shared),
        same_order=sum(x == y for x, y in heads),
        overlap=sum(shared) / len(shared),
        distinct_first=(len(first_a), len(first_b)),
        duplicate_top1=(_duplicates(first_a), _duplicates(first_b)),
        differing=[number for number, (x, y) in enumerate(heads, start=1) if x[0] != y[0]],
    )


def _duplicates(first: Counter[str]) -> int:
    return sum(n for n in first.values() if n > 1)


def read_labels(
    answers: Path | None, annotation: Path | None, query_order: Path | None, **reading: Any
) -> tuple[Retrieval, list[str]] | None:
    """Read the labels and the query id of each line; return None if no file of labels is given.

    Without ``query_order``, the lines have the order of the annotation, or else of the answer key.
    """
    if annotation is not None:
        retrieval = read_retrieval(annotation, answers=answers, **reading)
    elif answers is not None:
        key = read_answers(answers)
        retrieval = answered((Query(query_id, "") for query_id in key), key)
    else:
        return None
    ids = [query.query_id for query in retrieval.queries]
    return retrieval, read_query_order(query_order) if query_order else ids


def labelled_table(a: Evaluation, b: Evaluation) -> str:
    """Format the counts of right top-1 images per group, and the paired differences B - A."""
    lines = ["", "first place right        n    both  only A  only B  neither"]
    for group, chosen in a.groups.items():
        right_a = a.metrics.values["R@1"][chosen] > 0
        right_b = b.metrics.values["R@1"][chosen] > 0
        counts = (right_a & right_b, right_a & ~right_b, ~right_a & right_b, ~right_a & ~right_b)
        both, only_a, only_b, neither = (int(count.sum()) for count in counts)
        n = int(chosen.sum())
        lines.append(f"{group:<16} {n:>9} {both:>7} {only_a:>7} {only_b:>7} {neither:>8}")
    lines += ["", "metric               A       B   B - A  95 % interval"]
    for group, chosen in a.groups.items():
        for name in filter(b.metrics.values.__contains__, a.metrics.values):
            values_a, values_b = a.metrics.values[name][chosen], b.metrics.values[name][chosen]
            change = paired_bootstrap(values_a, values_b)
            lines.append(
                f"{group + ' ' + name:<16} {values_a.mean():>6.2f}  {values_b.mean():>6.2f} "
                f"{change.mean:>+7.2f}  [{change.low:+.2f}, {change.high:+.2f}]"
            )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Compare two ranked lists of the same queries."""
    parser = CommandParser(prog="python -m pab.compare")
    output = parser.groups["output"]
    parser.add_argument("a", type=Path, metavar="A.txt", help="first ranked list")
    parser.add_argument("b", type=Path, metavar="B.txt", help="second ranked list")
    flags = {
        "--answers": "answer key of a name-masked set; shows which list is right",
        "--annotation": "annotation of the queries, in line order (default: order of --answers)",
        "--query_order": "query id of each line, one per line",
    }
    add_path_flags(parser.groups["data"], flags)
    output.add_argument("--json", type=Path, help="also write the figures to this file")
    output.add_argument(
        "--show", type=int, default=20, help="number of differing lines to print (default: 20)"
    )
    add_label_flags(parser)
    args = parser.parse_args(argv)
    if args.show < 0:
        raise InputError("--show", f"expected 0 or more, found {args.show}")
    if args.query_order and not (args.annotation or args.answers):
        raise InputError("--query_order", "expected --answers or --annotation with it")
    check_outputs({"json": args.json}, omit="leave out --{}")
    a, b = read_ranked_list(args.a), read_ranked_list(args.b)
    if len(a) != len(b):
        wanted = counted(len(a), "line")
        raise InputError(args.b, f"expected {wanted} as in {args.a}, found {len(b)}")
    known = {name for line in a for name in line}
    listed = {name for line in b for name in line}
    spelt = respelt(listed, known, args.b, known_name=str(args.a))
    b = [[spelt[name] for name in line] for line in b]
    comparison = compare(a, b)
    report = comparison.table()
    figures = asdict(comparison)
    reading = label_config(args).reading()
    labels = read_labels(args.answers, args.annotation, args.query_order, **reading)
    right: list[str] = []
    if labels is not None:
        retrieval, order = labels
        evaluations = [
            evaluate_predictions(names, retrieval, query_order=order, where=path)
            for names, path in ((a, args.a), (b, args.b))
        ]
        report += "\n" + labelled_table(*evaluations)
        for name, evaluation in zip(("a", "b"), evaluations, strict=True):
            figures[name] = evaluation.to_json()["groups"]
        figures["relevance"] = retrieval.relevance
        assert retrieval.relevant is not None  # otherwise evaluate_predictions has raised
        right = [", ".join(sorted(retrieval.relevant[query_id])) for query_id in order]
    if comparison.differing and args.show:
        shown = comparison.differing[: args.show]
        part = f"; the first {len(shown)}" * (len(shown) < len(comparison.differing))
        lines = counted(len(comparison.differing), "line")
        report += f"\n\nfirst images differ in {lines}{part}:"
        for number in shown:
            answer = f"  right: {right[number - 1]}" if right else ""
            report += f"\nline {number}  A {a[number - 1][0]}  B {b[number - 1][0]}{answer}"
    if args.json:
        write_json(args.json, {"a_file": str(args.a), "b_file": str(args.b), **figures})
    print(report)


if __name__ == "__main__":
    run_cli(main)
