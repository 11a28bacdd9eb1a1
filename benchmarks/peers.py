"""Check metrics and fusion with ir-measures and ranx: `benchmarks/peers.py [--out docs/peers.md]`.

The two tools are not dependencies of the project. They get their own environment on top of the
project's environment, which stays unchanged:

    .venv/bin/python -m venv /tmp/peers
    .venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \\
        > $(ls -d /tmp/peers/lib/python*/site-packages)/project.pth
    /tmp/peers/bin/pip install ranx==0.3.21 ir-measures==0.4.3
    PYTHONPATH=$PWD /tmp/peers/bin/python benchmarks/peers.py

The data are random: few distinct scores, so that many tie; 1 to 15 right images per query; runs
that list only some images; queries that a run lacks. Where definitions agree, figures must agree
within 1e-6. Where they differ, our definition is replaced by the other one, and then figures must
agree.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import ir_measures
import numpy as np
import ranx
import torch
from ir_measures import AP, IPrec, Qrel, ScoredDoc, Success
from torch import Tensor

from ensemble.fuse import aligned
from ensemble.members import Member, load_members
from pab.core.errors import InputError
from pab.core.files import write_text
from pab.data.records import Query, Retrieval
from pab.evaluate import evaluate
from pab.formats.export import export
from pab.metrics import MAP_DEPTH
from pab.scores import ScoreFile, load_scores, save_scores

QUERIES, IMAGES, VALUES = 400, 150, 40  # VALUES distinct scores for IMAGES images: most tie
MOST_RIGHT, MISSING = 15, 25
LIMIT = 1e-6
MEASURES = {
    "R@1": Success @ 1,
    "R@5": Success @ 5,
    "R@10": Success @ 10,
    "mAP": AP,
    "mAP@10": AP @ MAP_DEPTH,
    "mINP": IPrec @ 1.0,  # precision at the last right image, 0 if one is not listed
}
Relevant = dict[str, frozenset[str]]
Row = tuple[str, str, float]


def drawn(generator: np.random.Generator) -> tuple[dict[str, dict[str, float]], Relevant]:
    """Random run that lists some images of most queries, and the right images of all queries."""
    names = np.array([f"g{i:03}" for i in range(IMAGES)])
    run, relevant = {}, {}
    for number in range(QUERIES):
        right = generator.choice(names, generator.integers(1, MOST_RIGHT + 1), replace=False)
        relevant[f"q{number:03}"] = frozenset(map(str, right))
        if number < MISSING:
            continue
        listed = generator.choice(names, generator.integers(20, IMAGES + 1), replace=False)
        scores = generator.integers(0, VALUES, len(listed)) / VALUES
        scores += 0.2 * np.isin(listed, right)  # better than chance
        run[f"q{number:03}"] = dict(zip(map(str, listed), scores.tolist(), strict=True))
    return run, relevant


def ours(run: dict[str, dict[str, float]], relevant: Relevant, folder: Path) -> dict[str, Tensor]:
    """The project's metrics of a run by query id, as fractions of 1."""
    (folder / "run.json").write_text(json.dumps(run))
    score_file = load_scores(folder / "run.json", gallery_ids=images_of(run, relevant))
    retrieval = Retrieval([Query(query, "") for query in relevant], None, relevant, {})
    found = evaluate(score_file, retrieval, where="run").metrics
    order = [found.query_ids.index(query) for query in relevant]
    return {name: torch.from_numpy(v[order] / 100) for name, v in found.values.items()}


def images_of(run: dict[str, dict[str, float]], relevant: Relevant) -> list[str]:
    """All images named by a run or the labels."""
    named = {name for listed in run.values() for name in listed}
    return sorted(named.union(*relevant.values()))


def theirs(run: dict[str, dict[str, float]], relevant: Relevant) -> dict[str, Tensor]:
    """ir-measures' metrics of a run, by query id."""
    docs = [
        ScoredDoc(q, name, score) for q, listed in run.items() for name, score in listed.items()
    ]
    qrels = [Qrel(q, name, 1) for q, right in relevant.items() for name in right]
    values = {name: dict.fromkeys(relevant, math.nan) for name in MEASURES}
    name_of = {str(measure): name for name, measure in MEASURES.items()}
    for metric in ir_measures.iter_calc(list(MEASURES.values()), qrels, docs):
        values[name_of[str(metric.measure)]][metric.query_id] = metric.value
    return {
        name: torch.tensor([found[query] for query in relevant], dtype=torch.float64)
        for name, found in values.items()
    }


def without_ties(run: dict[str, dict[str, float]], folder: Path) -> dict[str, dict[str, float]]:
    """Run as exported for other tools, with ties resolved by the project's rule."""
    (folder / "ties.json").write_text(json.dumps(run))
    export(load_scores(folder / "ties.json"), "trec", folder / "run.trec")
    found: dict[str, dict[str, float]] = {}
    for line in (folder / "run.trec").read_text().splitlines():
        query, _, name, _, score, _ = line.split()
        found.setdefault(query, {})[name] = float(score)
    return found


def mirrored(run: dict[str, dict[str, float]], relevant: Relevant) -> tuple[dict, Relevant]:
    """Run with the order of image names reversed, so that ties resolve the other way."""
    names = images_of(run, relevant)
    other = dict(zip(names, reversed(names), strict=True))
    turned = {q: {other[n]: s for n, s in listed.items()} for q, listed in run.items()}
    return turned, {q: frozenset(other[n] for n in right) for q, right in relevant.items()}


def compare_metrics(folder: Path) -> list[Row]:
    """Rows of the table: R@K, mAP, mAP@10 and mINP against ir-measures."""
    run, relevant = drawn(np.random.default_rng(0))
    mine, peer = ours(run, relevant, folder), theirs(without_ties(run, folder), relevant)
    n_right = torch.tensor([len(right) for right in relevant.values()])
    few = n_right <= MAP_DEPTH
    rows = []
    for name in MEASURES:
        chosen = few if name == "mAP@10" else torch.ones_like(few)
        rows.append(difference(f"{name}, run written by export", mine[name], peer[name], chosen))
    scaled = mine["mAP@10"] * n_right.clamp(max=MAP_DEPTH) / n_right
    rows.append(difference("mAP@10 x min(n, 10) / n, n > 10 right images", scaled, peer["mAP@10"]))

    raw = theirs(run, relevant)
    told = {name: int(((mine[name] - raw[name]).abs() > LIMIT).sum()) for name in MEASURES}
    print(f"queries whose figure differs on the raw run, ties open: {told}", file=sys.stderr)
    turned = ours(*mirrored(run, relevant), folder)
    for name in MEASURES:
        chosen = few if name == "mAP@10" else torch.ones_like(few)
        rows.append(
            difference(f"{name}, raw run, ties to the larger id", turned[name], raw[name], chosen)
        )
    return rows


def difference(what: str, a: Tensor, b: Tensor, chosen: Tensor | None = None) -> Row:
    """Row: number of compared values, and their largest difference."""
    if chosen is not None:
        a, b = a[chosen], b[chosen]
    return what, str(a.numel()), float((a.double() - b.double()).abs().max())


# ------------------------------------------------------------------------------------------ fusion


def drawn_member(
    generator: np.random.Generator, *, values: int | None, whole: bool
) -> dict[str, dict[str, float]]:
    """Random run of all queries.

    Args:
        generator: random generator of the scores.
        values: number of distinct scores; None: no ties within a query.
        whole: if true, all images are listed.
    """
    names = np.array([f"g{i:03}" for i in range(IMAGES)])
    run = {}
    for number in range(QUERIES):
        count = IMAGES if whole else generator.integers(20, IMAGES + 1)
        listed = generator.choice(names, count, replace=False)
        steps = generator.integers(0, values, count) if values else generator.permutation(count)
        scores = (steps / (values or count)).tolist()
        run[f"q{number:03}"] = dict(zip(map(str, listed), scores, strict=True))
    return run


def fused(runs: Sequence[dict], weights: Sequence[float], folder: Path, **how: object) -> ScoreFile:
    """Fuse runs with the project, from files in ranx's format."""
    members = []
    for number, (run, weight) in enumerate(zip(runs, weights, strict=True)):
        path = folder / f"member{number}.json"
        path.write_text(json.dumps(run))
        members.append(Member(f"m{number}", str(path), weight))
    queries, images = list(runs[0]), [f"g{i:03}" for i in range(IMAGES)]
    fusion = aligned(members, load_members(members, queries, images), queries, **how)
    return ScoreFile(fusion.matrix(), fusion.query_ids, fusion.gallery_ids)


def as_matrix(run: ranx.Run, like: ScoreFile) -> Tensor:
    """Convert a ranx run to a matrix; unlisted images get 0."""
    content = run.to_dict()
    return torch.tensor(
        [[content[q].get(name, 0.0) for name in like.gallery_ids] for q in like.query_ids],
        dtype=torch.float64,
    )


def orders(run: dict[str, dict[str, float]]) -> dict[str, list[str]]:
    """Image names per query, best first."""
    return {q: sorted(listed, key=lambda n: (-listed[n], n)) for q, listed in run.items()}


def compare_fusion(folder: Path) -> list[Row]:
    """Rows of the table: weighted min-max sum and reciprocal rank fusion against ranx."""
    generator = np.random.default_rng(1)
    weights = (0.5, 0.3, 0.2)
    rows = []
    for ties in (None, VALUES):
        for whole in (True, False):
            runs = [drawn_member(generator, values=ties, whole=whole) for _ in weights]
            name = f"{'ties' if ties else 'no ties'}, {'all' if whole else 'some'} images listed"
            peers = [ranx.Run.from_dict(run) for run in runs]
            mine = fused(runs, weights, folder, scaling="minmax_query", rule="sum")
            peer = ranx.fuse(peers, norm="min-max", method="wsum", params={"weights": weights})
            rows.append(difference(f"min-max sum, {name}", mine.scores, as_matrix(peer, mine)))
            if ties:
                continue
            # Reciprocal rank fusion uses only the order.
            mine = fused([orders(run) for run in runs], weights, folder, rule="reciprocal_rank")
            peer = as_matrix(ranx.fuse(peers, method="rrf", params={"k": 60}), mine)
            rows.append(difference(f"reciprocal rank fusion, {name}", mine.scores, peer))
    rows.append(tied_ranks(generator, folder))
    return rows


def tied_ranks(generator: np.random.Generator, folder: Path) -> Row:
    """Compare reciprocal rank fusion of tied scores, to which ranx assigns consecutive ranks.

    This project assigns tied images the mean of their places. So only images without ties in every
    run must have equal scores.
    """
    runs = [drawn_member(generator, values=2 * IMAGES, whole=True) for _ in range(3)]
    mine = fused(runs, (1.0, 1.0, 1.0), folder, rule="reciprocal_rank")
    peers = [ranx.Run.from_dict(run) for run in runs]
    peer = as_matrix(ranx.fuse(peers, method="rrf", params={"k": 60}), mine)
    alone = torch.ones_like(peer, dtype=torch.bool)
    for run in runs:
        for row, query in enumerate(mine.query_ids):
            values = torch.tensor([run[query][name] for name in mine.gallery_ids])
            alone[row] &= (values[:, None] == values[None]).sum(1) == 1
    print(
        f"reciprocal rank fusion of tied scores: largest difference over all images "
        f"{float((mine.scores - peer).abs().max()):.1e}",
        file=sys.stderr,
    )
    return difference("reciprocal rank fusion, ties: images that tie with none",
                      mine.scores, peer, alone)  # fmt: skip


def compare_files(folder: Path) -> list[Row]:
    """Rows of the table: our exports read by ranx, and ranx's files read here."""
    run, _ = drawn(np.random.default_rng(2))
    (folder / "run.json").write_text(json.dumps(run))
    score_file = load_scores(folder / "run.json")
    rows = []
    for form, kind in (("ranx", "json"), ("trec", "trec")):
        path = folder / f"export.{kind}"
        export(score_file, form, path)
        found = ranx.Run.from_file(str(path), kind=kind).to_dict()
        same = [
            {name: found[q].get(name, math.nan) for name in listed} for q, listed in run.items()
        ]
        values = [torch.tensor([*listed.values()], dtype=torch.float64) for listed in same]
        given = [torch.tensor([*listed.values()], dtype=torch.float64) for listed in run.values()]
        rows.append(
            difference(f"export --format {form}, read by ranx", torch.cat(values), torch.cat(given))
        )
        again = folder / f"saved.{kind}"
        ranx.Run.from_dict(run).save(str(again), kind=kind)
        back = load_scores(again, gallery_ids=score_file.gallery_ids)
        order = [back.query_ids.index(q) for q in score_file.query_ids]
        rows.append(
            difference(f"saved by ranx as {kind}, read here", back.scores[order], score_file.scores)
        )
    return rows


def missing_queries_are_refused(folder: Path) -> None:
    """Check that a fusion rejects a run that lacks queries."""
    run, _ = drawn(np.random.default_rng(3))
    whole = folder / "whole.pt"
    names = [f"g{i:03}" for i in range(IMAGES)]
    ids = [f"q{i:03}" for i in range(QUERIES)]
    save_scores(whole, ScoreFile(torch.rand(QUERIES, IMAGES), ids, names))
    (folder / "run.json").write_text(json.dumps(run))
    members = [Member("a", str(whole), 1.0), Member("b", str(folder / "run.json"), 0.5)]
    try:
        load_members(members)
    except InputError as error:
        print(f"a run that lacks queries in a fusion: {error}", file=sys.stderr)
    else:
        raise SystemExit("a run that lacks queries was fused")


def main() -> None:
    """Compare, print, and fail if a difference exceeds the limit."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, help="write the table to this page as well")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        groups = {
            "ir-measures": compare_metrics(folder),
            "ranx": [*compare_fusion(folder), *compare_files(folder)],
        }
        missing_queries_are_refused(folder)
    lines = ["| peer | figure | values | largest difference |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {peer} | {what} | {count} | {largest:.1e} |"
        for peer, rows in groups.items()
        for what, count, largest in rows
    ]
    print("\n".join(lines))
    worst = max(largest for rows in groups.values() for *_, largest in rows)
    holds = worst <= LIMIT
    print(f"largest difference {worst:.1e}, limit {LIMIT:.0e}: {'holds' if holds else 'FAILS'}")
    if args.out:
        write_text(args.out, PAGE.format(table="\n".join(lines), limit=LIMIT, worst=worst))
    sys.exit(not holds)


PAGE = """# Metrics and fusion compared with ir-measures and ranx

Written by `benchmarks/peers.py --out docs/peers.md` (ir-measures 0.4.3, ranx 0.3.21; its docstring
has the commands). The data are drawn: many tied scores, 1 to 15 right images per query, runs that
list only some images, and runs with missing queries. Figures that must agree within {limit:.0e}
differ by {worst:.1e} at most.

{table}

Definitions differ in these points:

- **Ties in metrics.** This project gives ties to the smaller image id; trec_eval, the base of
  ir-measures, gives them to the larger one. With reversed image names, both agree. The files of
  `--trec` and `--format trec` encode the order in their scores, so that other tools rank as this
  project does.
- **mAP@10.** This project divides the sum of precisions by min(n, 10), as Track 4 of the AI City
  Challenge. A list of ten can therefore score 100 with more than ten right images. trec_eval
  divides by n. Only queries with more than ten right images differ.
- **mINP** is `IPrec@1.0` of ir-measures: the precision at the last right image.
- **Missing queries and images.** In both, a missing query counts 0 in every metric, and a right
  image that is not listed counts as not found. A fusion rejects a run with missing queries.
- **Min-max sum.** ranx scales each query by its own bounds, as `--scaling minmax_query` does. The
  published fusion scales a matrix by the bounds of all queries. An image that a run does not list
  scores 0 in ranx. Here it gets the float32 below the smallest listed score, which scales to 0 too.
- **Ties in reciprocal rank fusion.** ranx ranks equal scores one after the other in its own order;
  this project gives them their mean rank. Images without ties agree.
"""


if __name__ == "__main__":
    main()
