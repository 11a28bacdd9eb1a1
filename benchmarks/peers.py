"""Compare with ir-measures and ranx: `python benchmarks/peers.py [--out docs/peers.md]`.

The two libraries are not dependencies of the project. Install them in an additional environment on
top of the project's environment:

    .venv/bin/python -m venv /tmp/peers
    .venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \\
        > $(ls -d /tmp/peers/lib/python*/site-packages)/project.pth
    /tmp/peers/bin/pip install ranx==0.3.21 ir-measures==0.4.3
    PYTHONPATH=$PWD /tmp/peers/bin/python benchmarks/peers.py

The data are random: few distinct scores (so that many tie), 1 to 15 right images per query, runs
that list only some images, and queries that a run lacks. Figures must agree within 1e-6. Where
definitions differ, this project's inputs or figures are first converted to the other definition, or
only values for which both definitions agree are compared.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ir_measures
import numpy as np
import ranx
import torch
from ir_measures import AP, IPrec, Qrel, ScoredDoc, Success
from machine import flag_parser
from torch import Tensor

from ensemble.fuse import aligned
from ensemble.members import Member, load_members
from pab.core.errors import InputError
from pab.core.files import write_text
from pab.data.records import Query, Retrieval
from pab.evaluate import evaluate
from pab.formats.export import export
from pab.metrics import MAP_DEPTH
from pab.scores import ScoreFile, load_scores

QUERIES, IMAGES, VALUES = 400, 150, 40  # VALUES distinct scores for IMAGES images: most tie
MOST_RIGHT, MISSING = 15, 25
LIMIT = 1e-6
NAMES = [f"g{i:03}" for i in range(IMAGES)]
MEASURES = {
    "R@1": Success @ 1,
    "R@5": Success @ 5,
    "R@10": Success @ 10,
    "mAP": AP,
    "mAP@10": AP @ MAP_DEPTH,
    "mINP": IPrec @ 1.0,  # precision at the last right image, 0 if one is not listed
}
Run = dict[str, dict[str, float]]  # query id -> image id -> score
Relevant = dict[str, frozenset[str]]
Row = tuple[str, str, float]


def drawn(generator: np.random.Generator) -> tuple[Run, Relevant]:
    """Draw a run that lists some images for most queries, and the right images of all queries."""
    run, relevant = {}, {}
    for number in range(QUERIES):
        right = generator.choice(NAMES, generator.integers(1, MOST_RIGHT + 1), replace=False)
        relevant[f"q{number:03}"] = frozenset(map(str, right))
        if number < MISSING:
            continue
        listed = generator.choice(NAMES, generator.integers(20, IMAGES + 1), replace=False)
        scores = generator.integers(0, VALUES, len(listed)) / VALUES
        scores += 0.2 * np.isin(listed, right)  # better than chance
        run[f"q{number:03}"] = dict(zip(map(str, listed), scores.tolist(), strict=True))
    return run, relevant


def loaded(run: Run, folder: Path, **how: Any) -> ScoreFile:
    """Write a run in ranx's format, and load it with the project."""
    (folder / "run.json").write_text(json.dumps(run))
    return load_scores(folder / "run.json", **how)


def ours(run: Run, relevant: Relevant, folder: Path) -> dict[str, Tensor]:
    """Compute the project's metrics of a run per query, as fractions of 1."""
    score_file = loaded(run, folder, gallery_ids=images_of(run, relevant))
    retrieval = Retrieval([Query(query, "") for query in relevant], None, relevant, {})
    found = evaluate(score_file, retrieval, where="run").metrics
    order = [found.query_ids.index(query) for query in relevant]
    return {name: torch.from_numpy(v[order] / 100) for name, v in found.values.items()}


def images_of(run: Run, relevant: Relevant) -> list[str]:
    """Return all images named by a run or the labels."""
    named = {name for listed in run.values() for name in listed}
    return sorted(named.union(*relevant.values()))


def theirs(run: Run, relevant: Relevant) -> dict[str, Tensor]:
    """Compute ir-measures' metrics of a run per query."""
    docs = [ScoredDoc(q, name, run[q][name]) for q in run for name in run[q]]
    qrels = [Qrel(q, name, 1) for q, right in relevant.items() for name in right]
    values = {name: dict.fromkeys(relevant, math.nan) for name in MEASURES}
    name_of = {str(measure): name for name, measure in MEASURES.items()}
    for metric in ir_measures.iter_calc(list(MEASURES.values()), qrels, docs):
        values[name_of[str(metric.measure)]][metric.query_id] = metric.value
    return {
        name: torch.tensor([found[query] for query in relevant], dtype=torch.float64)
        for name, found in values.items()
    }


def without_ties(run: Run, folder: Path) -> Run:
    """Export a run for other tools; the export resolves ties by the project's rule."""
    export(loaded(run, folder), "trec", folder / "run.trec")
    found: Run = {}
    for line in (folder / "run.trec").read_text().splitlines():
        query, _, name, _, score, _ = line.split()
        found.setdefault(query, {})[name] = float(score)
    return found


def mirrored(run: Run, relevant: Relevant) -> tuple[dict, Relevant]:
    """Reverse the order of a run's image names, so that ties are resolved in reverse."""
    names = images_of(run, relevant)
    other = dict(zip(names, reversed(names), strict=True))
    turned = {q: {other[n]: s for n, s in listed.items()} for q, listed in run.items()}
    return turned, {q: frozenset(other[n] for n in right) for q, right in relevant.items()}


def compare_metrics(folder: Path) -> list[Row]:
    """Compare R@K, mAP, mAP@10 and mINP with ir-measures; return table rows."""
    run, relevant = drawn(np.random.default_rng(0))
    mine, peer = ours(run, relevant, folder), theirs(without_ties(run, folder), relevant)
    n_right = torch.tensor([len(right) for right in relevant.values()])
    few = n_right <= MAP_DEPTH

    def of_all(what: str, a: dict[str, Tensor], b: dict[str, Tensor]) -> list[Row]:
        return [
            difference(f"{name}, {what}", a[name], b[name], few if name == "mAP@10" else None)
            for name in MEASURES
        ]

    rows = of_all("run written by export", mine, peer)
    scaled = mine["mAP@10"] * n_right.clamp(max=MAP_DEPTH) / n_right
    rows.append(difference("mAP@10 x min(n, 10) / n, n > 10 right images", scaled, peer["mAP@10"]))

    raw = theirs(run, relevant)
    told = {name: int(((mine[name] - raw[name]).abs() > LIMIT).sum()) for name in MEASURES}
    print(f"queries whose figure differs on the raw run, with ties: {told}", file=sys.stderr)
    turned = ours(*mirrored(run, relevant), folder)
    return rows + of_all("raw run, ties to the larger id", turned, raw)


def difference(what: str, a: Tensor, b: Tensor, chosen: Tensor | None = None) -> Row:
    """Return a row: description, number of compared values, and their largest difference."""
    if chosen is not None:
        a, b = a[chosen], b[chosen]
    return what, str(a.numel()), float((a.double() - b.double()).abs().max())


# ------------------------------------------------------------------------------------------ fusion


def drawn_member(generator: np.random.Generator, *, values: int | None, whole: bool) -> Run:
    """Draw a run of all queries that lists some images, or all if ``whole``.

    ``values`` is the number of possible scores. None draws different scores for all images of a
    query.
    """
    run = {}
    for number in range(QUERIES):
        count = IMAGES if whole else generator.integers(20, IMAGES + 1)
        listed = generator.choice(NAMES, count, replace=False)
        steps = generator.integers(0, values, count) if values else generator.permutation(count)
        scores = (steps / (values or count)).tolist()
        run[f"q{number:03}"] = dict(zip(map(str, listed), scores, strict=True))
    return run


def written(runs: Sequence[dict], weights: Sequence[float], folder: Path) -> list[Member]:
    """Write runs in ranx's format; return them as members of a fusion."""
    members = []
    for number, (run, weight) in enumerate(zip(runs, weights, strict=True)):
        path = folder / f"member{number}.json"
        path.write_text(json.dumps(run))
        members.append(Member(f"m{number}", str(path), weight))
    return members


def fused(runs: Sequence[dict], weights: Sequence[float], folder: Path, **how: object) -> ScoreFile:
    """Fuse runs with the project."""
    members = written(runs, weights, folder)
    queries = list(runs[0])
    fusion = aligned(members, load_members(members, queries, NAMES), queries, **how)
    return ScoreFile(fusion.matrix(), fusion.query_ids, fusion.gallery_ids)


def as_matrix(run: ranx.Run, like: ScoreFile) -> Tensor:
    """Convert a ranx run to a matrix; unlisted images get 0."""
    content = run.to_dict()
    return torch.tensor(
        [[content[q].get(name, 0.0) for name in like.gallery_ids] for q in like.query_ids],
        dtype=torch.float64,
    )


def compare_fusion(folder: Path) -> list[Row]:
    """Compare weighted min-max sum and reciprocal rank fusion with ranx; return table rows."""
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
            # Reciprocal rank fusion uses only the order: image names per query, best first.
            orders = [
                {q: sorted(run[q], key=lambda n: (-run[q][n], n)) for q in run} for run in runs
            ]
            mine = fused(orders, weights, folder, rule="reciprocal_rank")
            peer = as_matrix(ranx.fuse(peers, method="rrf", params={"k": 60}), mine)
            rows.append(difference(f"reciprocal rank fusion, {name}", mine.scores, peer))
    rows.append(tied_ranks(generator, folder))
    return rows


def tied_ranks(generator: np.random.Generator, folder: Path) -> Row:
    """Compare reciprocal rank fusion of tied scores, to which ranx assigns consecutive ranks.

    This project assigns tied images the mean of their ranks. Therefore, scores must be equal only
    for images without ties in any run.
    """
    runs = [drawn_member(generator, values=2 * IMAGES, whole=True) for _ in range(3)]
    mine = fused(runs, (1.0, 1.0, 1.0), folder, rule="reciprocal_rank")
    peers = [ranx.Run.from_dict(run) for run in runs]
    peer = as_matrix(ranx.fuse(peers, method="rrf", params={"k": 60}), mine)
    scores = [as_matrix(run, mine) for run in peers]
    alone = torch.stack([(one[:, :, None] == one[:, None]).sum(2) == 1 for one in scores]).all(0)
    print(
        f"reciprocal rank fusion of tied scores: largest difference over all images "
        f"{float((mine.scores - peer).abs().max()):.1e}",
        file=sys.stderr,
    )
    what = "reciprocal rank fusion, ties: images that tie with none"
    return difference(what, mine.scores, peer, alone)


def compare_files(folder: Path) -> list[Row]:
    """Compare our exports read by ranx, and ranx's files read here; return table rows."""
    run, _ = drawn(np.random.default_rng(2))
    score_file = loaded(run, folder)
    rows = []
    for form, kind in (("ranx", "json"), ("trec", "trec")):
        path = folder / f"export.{kind}"
        export(score_file, form, path)
        found = ranx.Run.from_file(str(path), kind=kind).to_dict()
        there, here = (
            torch.tensor(
                [one[q].get(name, math.nan) for q in run for name in run[q]], dtype=torch.float64
            )
            for one in (found, run)
        )
        rows.append(difference(f"export --format {form}, read by ranx", there, here))
        again = folder / f"saved.{kind}"
        ranx.Run.from_dict(run).save(str(again), kind=kind)
        back = load_scores(again, gallery_ids=score_file.gallery_ids)
        order = [back.query_ids.index(q) for q in score_file.query_ids]
        what = f"saved by ranx as {kind}, read here"
        rows.append(difference(what, back.scores[order], score_file.scores))
    return rows


def missing_queries_are_refused(folder: Path) -> None:
    """Check that a fusion rejects a run that lacks queries."""
    run, _ = drawn(np.random.default_rng(3))
    whole = drawn_member(np.random.default_rng(4), values=None, whole=True)
    try:
        load_members(written([whole, run], (1.0, 0.5), folder))
    except InputError as error:
        print(f"a run that lacks queries in a fusion: {error}", file=sys.stderr)
    else:
        raise SystemExit("a run that lacks queries was fused")


def main() -> None:
    args = flag_parser(__doc__, out=(None, "also write the table to this page")).parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        groups = {
            "ir-measures": compare_metrics(folder),
            "ranx": [*compare_fusion(folder), *compare_files(folder)],
        }
        missing_queries_are_refused(folder)
    lines = ["| peer | figure | values | largest difference |", "| --- | --- | --- | --- |"]
    rows = [(peer, *row) for peer, group in groups.items() for row in group]
    lines += [f"| {peer} | {what} | {count} | {most:.1e} |" for peer, what, count, most in rows]
    print("\n".join(lines))
    worst = max(most for *_, most in rows)
    holds = worst <= LIMIT
    print(f"largest difference {worst:.1e}, limit {LIMIT:.0e}: {'holds' if holds else 'FAILS'}")
    if args.out:
        write_text(args.out, PAGE.format(table="\n".join(lines), limit=LIMIT, worst=worst))
    sys.exit(not holds)


PAGE = """# Metrics and fusion compared with ir-measures and ranx

Written by `benchmarks/peers.py --out docs/peers.md` with ir-measures 0.4.3 and ranx 0.3.21. The
script's docstring lists the commands. The data are synthetic: many tied scores, 1 to 15 right
images per query, runs that list only some images, and runs with missing queries. All differences
are within the limit of {limit:.0e}; the largest is {worst:.1e}.

{table}

Definitions differ in these points:

- **Ties in metrics.** This project gives ties to the smaller image id; trec_eval, the base of
  ir-measures, gives them to the larger one. If the image names are reversed, both agree. The files
  of `--trec` and `--format trec` encode the order in their scores, so that other tools rank as this
  project does.
- **mAP@10.** This project divides the sum of precisions by min(n, 10), as Track 4 of the AI City
  Challenge does. A list of ten can therefore score 100 even if more than ten images are right.
  trec_eval divides by n. Only queries with more than ten right images differ.
- **mINP** is `IPrec@1.0` of ir-measures: the precision at the last right image.
- **Missing queries and images.** As in ir-measures, a missing query counts 0 in every metric, and a
  right image that is not listed counts as not found. A fusion rejects a run with missing queries.
- **Min-max sum.** ranx scales each query by its own bounds, as `--scaling minmax_query` does. The
  published fusion scales a matrix by the bounds of all queries. An image that a run does not list
  scores 0 in ranx. Here it gets the float32 below the smallest listed score, which scales to 0 too.
- **Ties in reciprocal rank fusion.** ranx ranks equal scores one after the other in its own order;
  this project gives them their mean rank. The scores of images without ties agree.
"""


if __name__ == "__main__":
    main()
