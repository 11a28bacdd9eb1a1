"""Compare the decodings on the mini data: `python benchmarks/decoding.py --out FILE`.

Fuses the shipped models with weights chosen on the validation pairs. Each decoding's slack or
factor is chosen on the same pairs. Decodes three sets: the mini test set, the test set with its
8,000 distractors, and the test set without the gallery images of half of its queries. For the third
set, slack and factor are chosen on validation pairs that also lack half of the images.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import mini_runs as mini
import numpy as np
from machine import flag_parser

from ensemble.decode import DecodeSettings, decode
from ensemble.stage_search import FACTORS, SLACKS
from pab.core.files import write_text
from pab.data.images import list_gallery
from pab.data.splits import validation_split
from pab.data.training_set import TrainingSet
from pab.metrics import Metrics, evaluate_scores
from pab.ranking import top_k
from pab.scores import ScoreFile, load_scores, save_scores

TRACK4 = mini.DATA / "track4/name-masked_test-set"
BANK_CAPTIONS = 1000
METRICS = ("R@1", "R@5", "R@10", "mAP@10")
DECODINGS = ("querybank", "dual_softmax", "sinkhorn", "assignment")
SEED = 0


@dataclass(frozen=True)
class Decodable:
    """Fused scores of a set, the score file of its query bank, and its labels.

    Queries without a right image are not evaluated.
    """

    name: str
    scores: ScoreFile
    bank: Path
    relevant: dict[str, frozenset[str]]

    def judged(self, settings: DecodeSettings) -> tuple[Metrics, int]:
        """Evaluate queries with a right image; count distinct top-1 images of all queries."""
        ids, names = self.scores.query_ids, self.scores.gallery_ids
        bank = str(self.bank) if settings.method == "querybank" else None
        found = decode(self.scores.scores, ids, names, replace(settings, bank=bank))
        rows = [row for row, one in enumerate(ids) if one in self.relevant]
        kept = ScoreFile(found[rows], [ids[row] for row in rows], names)
        return evaluate_scores(kept, self.relevant), len(set(top_k(found, 1)[:, 0].tolist()))


def bank_of(labelled: mini.LabelledSet, folder: Path) -> mini.LabelledSet:
    """Create the query bank of a set: its gallery, and captions of pairs used for training."""
    gallery = labelled.retrieval().gallery or list_gallery(labelled.root)
    images = folder / f"gallery_{labelled.name}"
    images.mkdir(parents=True, exist_ok=True)
    for image in gallery:
        link = images / f"{image.gallery_id}{image.path.suffix}"
        if not link.exists():
            link.symlink_to(image.path.resolve())
    pairs = TrainingSet.open(mini.DATA)
    train, _ = validation_split(pairs, 500, 0)
    chosen = np.random.default_rng(SEED).choice(train, BANK_CAPTIONS, replace=False)
    lines = [
        json.dumps({"query_index": f"b{n:06d}", "caption": pairs[int(i)].caption})
        for n, i in enumerate(sorted(chosen))
    ]
    path = folder / f"bank_{labelled.name}.json"
    write_text(path, "".join(f"{line}\n" for line in lines))
    return mini.LabelledSet(f"bank_{labelled.name}", path, images)


def decodable(labelled: mini.LabelledSet, weights: Path, folder: Path) -> Decodable:
    """Fuse the scores of a set and of its query bank."""
    relevant = labelled.retrieval().relevant
    assert relevant is not None
    queries, bank = (
        mini.fused(weights, mini.score_shipped(one, folder), folder / f"fused_{one.name}.pt")
        for one in (labelled, bank_of(labelled, folder))
    )
    return Decodable(labelled.name, load_scores(queries), bank, relevant)


def without_half(whole: Decodable, folder: Path) -> Decodable:
    """Copy a set without the gallery images of half of its queries."""
    ids, names = whole.scores.query_ids, whole.scores.gallery_ids
    out_of = set(np.random.default_rng(SEED).permutation(len(ids))[: len(ids) // 2].tolist())
    gone = {name for row in out_of for name in whole.relevant[ids[row]]}
    kept = [column for column, name in enumerate(names) if name not in gone]
    relevant = {one: right - gone for one, right in whole.relevant.items() if right - gone}
    bank = load_scores(whole.bank)
    path = folder / f"{whole.bank.stem}_half.pt"
    left = [names[column] for column in kept]
    save_scores(path, ScoreFile(bank.scores[:, kept].contiguous(), bank.query_ids, left))
    scores = ScoreFile(whole.scores.scores[:, kept].contiguous(), ids, left)
    return Decodable(f"{whole.name}, half absent", scores, path, relevant)


def best_settings(decoding: str, chosen_on: Decodable) -> DecodeSettings:
    """Choose the settings with the best R@1; mAP@10 breaks ties."""
    if decoding == "assignment":
        slacks = [None if math.isinf(slack) else slack for slack in SLACKS]
        if len(chosen_on.scores.query_ids) > len(chosen_on.scores.gallery_ids):
            slacks.remove(None)  # infeasible: not every query can have its own image
        tried = [DecodeSettings("assignment", slack=slack) for slack in slacks]
    else:
        tried = [DecodeSettings(decoding, factor=factor) for factor in FACTORS]  # type: ignore[arg-type]

    def key(settings: DecodeSettings) -> tuple[float, float]:
        mean = chosen_on.judged(settings)[0].mean()
        return mean["R@1"], mean["mAP@10"]

    return max(tried, key=key)


def row(one: Decodable, way: DecodeSettings, plain: Metrics) -> str:
    """Format the table row of one decoding of a set."""
    metrics, distinct = one.judged(way)
    mean, facts = metrics.mean(), way.facts()
    label = facts.pop("method")
    for name in ("factor", "slack"):
        if name in facts:
            label += f", {name} {'none' if facts[name] is None else format(facts[name], 'g')}"
    return mini.printed_row(
        one.name,
        label,
        "joint" if way.joint else "per query",
        *(f"{mean[metric]:.2f}" for metric in METRICS),
        "-" if way.method == "none" else mini.gain(plain, metrics),
        str(distinct),
    )


def main() -> None:
    args = flag_parser(__doc__, out=mini.PAGE, work=Path("output/decoding")).parse_args()
    folder = mini.shipped_folder(args.work)
    validation = mini.validation_set(folder)
    weights = mini.choose_weights(validation, mini.score_shipped(validation, folder), folder)
    chosen_on = decodable(validation, weights, folder)
    half = without_half(chosen_on, folder)
    for_all = [best_settings(name, chosen_on) for name in DECODINGS]
    for_half = [best_settings(name, half) for name in DECODINGS]

    track4 = mini.LabelledSet(
        "track4", TRACK4 / "query.json", TRACK4 / "gallery", TRACK4 / "answers.json"
    )
    test = decodable(mini.TEST, weights, folder)
    rows = []
    for one, settings in (
        (test, for_all),
        (decodable(track4, weights, folder), for_all),
        (without_half(test, folder), for_half),
    ):
        plain, _ = one.judged(DecodeSettings())
        for way in (DecodeSettings(), *settings):
            rows.append(row(one, way, plain))
    text = [
        f"Written by `python benchmarks/decoding.py --out {args.out}`, in percent. The shipped",
        "models are fused with weights chosen on the 501 validation pairs. Slack and factors are",
        "chosen on the same pairs, by R@1. For the set with half of the images absent, slack and",
        "factors are chosen on validation pairs with half of the images absent. All queries are",
        "decoded together, but only those with a right image in the gallery are evaluated. Gains",
        "in R@1 over no decoding are paired, with 95 % bootstrap intervals.",
    ]
    columns = ["set", "decoding", "kind", *METRICS, "R@1 over none", "distinct top-1 images"]
    mini.write_table(args.out, "Decodings on the mini data", text, columns, rows)


if __name__ == "__main__":
    main()
