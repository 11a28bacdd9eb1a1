"""Compare metrics with the paper's: `python -m ensemble.published STEP --score FILE ...`.

`scripts/reproduce.sh` calls this module after each step. The published figures (arXiv 2511.22470)
are percentages of PAB's 1,978 test queries.
"""

from __future__ import annotations

from pathlib import Path

from pab.core.config import CommandParser
from pab.core.errors import run_cli
from pab.data.annotations import read_retrieval
from pab.data.label_config import add_label_flags, label_config
from pab.evaluate import evaluate, text_table

QUERIES = 1978
METRICS = ("R@1", "R@5", "R@10")
PUBLISHED = {
    "lhp_0.1M_global": (85.24, 99.44, 99.95),  # --local_prob 0
    "lhp_0.1M_local": (85.39, 99.44, 99.90),  # --local_prob 1
    "lhp_0.1M": (85.39, 99.49, 99.95),
    "lhp": (87.11, 99.65, 99.85),
    "lhp+uit": (88.37, 99.70, 99.85),
    "lhp+uit+blip2": (88.88, 99.75, 99.90),
    "lhp+uit+blip2+clip": (89.23, 99.70, 99.85),
}


def main(argv: list[str] | None = None) -> None:
    """Print a score file's metrics on the labelled test set beside the published ones."""
    from pab.scores import load_scores  # imports torch, which --help does not need

    parser = CommandParser(prog="python -m ensemble.published")
    data = parser.groups["data"]
    parser.add_argument("step", choices=PUBLISHED, help="published step to compare with")
    data.add_argument("--score", type=Path, required=True, help="score file")
    data.add_argument("--annotation", type=Path, required=True, help="labelled test set")
    data.add_argument("--image_folder", type=Path, help="root of the images (see pab.evaluate)")
    data.add_argument("--answers", type=Path, help="answer key of a name-masked set")
    add_label_flags(parser)
    args = parser.parse_args(argv)
    reading = label_config(args).reading()
    retrieval = read_retrieval(
        args.annotation, image_folder=args.image_folder, answers=args.answers, **reading
    )
    found = evaluate(load_scores(args.score), retrieval, where=args.score)
    figures, bounds = found.summary(), found.intervals()
    rows = [["", *METRICS]]
    rows.append(["published", *(f"{value:.2f}" for value in PUBLISHED[args.step])])
    rows.append(["obtained", *(f"{figures[name]:.2f}" for name in METRICS)])
    rows.append(["95 % interval", *("{:.1f} to {:.1f}".format(*bounds[name]) for name in METRICS)])
    print(f"{args.step}\n{text_table(rows)}")
    if len(retrieval.queries) != QUERIES:
        print(f"(published on {QUERIES} queries of PAB, obtained on {len(retrieval.queries)})")


if __name__ == "__main__":
    run_cli(main)
