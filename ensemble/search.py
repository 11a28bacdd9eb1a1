"""Choose the fusion's weights on labelled validation scores: `python -m ensemble.search`.

Algorithm 2 of the paper (arXiv 2511.22470): the members come in one after the other, and each
weight is the best of a grid in [0, 1] by R@1, by mAP where R@1 ties, with the earlier weights kept.
Weights chosen on a test set are worth nothing there, so a test annotation is refused.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from torch import Tensor

from ensemble.config import FusionConfig
from ensemble.fuse import Fusion, aligned, blend, check_members
from ensemble.members import load_members
from pab.annotations import Retrieval, read_retrieval
from pab.config import config_from_args, flag
from pab.errors import InputError, run_cli
from pab.files import write_text
from pab.metrics import Difference, Metrics, evaluate_scores, paired_bootstrap
from pab.scores import ScoreFile

WEIGHT_FLAGS = {"uit": "beit3_weight", "blip2": "blip2_weight", "clip": "clip_weight"}
TEST_FOLDERS = frozenset(("test", "ucc", "name-masked_test-set"))  # of PAB's layout


@dataclass(frozen=True)
class SearchConfig(FusionConfig):
    """Members and labels; each field is a flag of `python -m ensemble.search`."""

    annotation: str = flag("", "labelled annotation of the validation split")
    image_folder: str | None = flag(
        None, "root of the annotation's image paths, where it lies in no annotation folder"
    )
    answers: str | None = flag(None, "key of a name-masked set")
    grid_step: float = flag(0.0125, "distance of the weights tried in [0, 1]")
    trials: str = flag("output/ensemble/trials.csv", "every trial")
    out: str = flag("output/ensemble/weights.yaml", "the weights, as ensemble.run --config reads")
    allow_test: bool = flag(False, "accept a test set; the written weights say so")
    seed: int = flag(0, "of the bootstrap")

    def check(self) -> None:
        """Refuse values that make no sense.

        Raises:
            InputError: naming the flag.
        """
        super().check()
        if not self.annotation:
            raise InputError("--annotation", "expected a labelled validation split, found none")
        if not 0 < self.grid_step <= 1:
            raise InputError("--grid_step", f"must lie in (0, 1], found {self.grid_step}")
        if self.chosen_on or self.chosen_on_test:
            raise InputError("--chosen_on", "is written by the search, not given to it")


@dataclass(frozen=True)
class Trial:
    """One weight tried: the member that came in, what `S` kept, metrics in percent."""

    member: str
    weight: float
    metrics: dict[str, float]


@dataclass(frozen=True)
class Step:
    """What a member added at its best weight, on the queries searched on."""

    member: str
    weight: float
    before: Metrics
    after: Metrics

    def gain(self, seed: int) -> Difference:
        """Difference in R@1, percentage points, with its paired bootstrap interval."""
        return paired_bootstrap(self.before.values["R@1"], self.after.values["R@1"], seed)


def grid(step: float) -> list[float]:
    """Weights from 1 down to 0; 0 is among them whatever the step."""
    count = int(round(1.0 / step, 9))
    weights = [round(1.0 - i * step, 9) for i in range(count + 1)]
    return weights if weights[-1] == 0.0 else [*weights, 0.0]


def search(
    fusion: Fusion, relevant: dict[str, frozenset[str]], weights: Sequence[float]
) -> tuple[list[Step], list[Trial]]:
    """Each member's weight in turn.

    Args:
        fusion: the members; their own weights are not looked at.
        relevant: query id -> ids of the right images.
        weights: to try, in the order that breaks ties of R@1 and mAP.

    Returns:
        A step for each member after the first, and every trial.
    """
    ids, count = (fusion.query_ids, fusion.gallery_ids), len(fusion.query_ids)

    def judged(scores: Tensor) -> Metrics:
        return evaluate_scores(ScoreFile(scores, *ids), relevant)

    members = fusion.members
    fused = fusion.member_block(0, 0, count)
    best = judged(fused)
    steps: list[Step] = []
    trials = [Trial(members[0].name, 1.0, best.mean())]
    for number, member in enumerate(members[1:], start=1):
        other, before = fusion.member_block(number, 0, count), best
        found: tuple[tuple[float, float], float, Metrics] | None = None
        for weight in weights:
            metrics = judged(blend(fused, other, weight))
            mean = metrics.mean()
            trials.append(Trial(member.name, weight, mean))
            key = (mean["R@1"], mean["mAP"])
            if found is None or key > found[0]:
                found = key, weight, metrics
        assert found is not None
        _, weight, best = found
        steps.append(Step(member.name, weight, before, best))
        fused = blend(fused, other, weight)
    return steps, trials


def is_test_set(retrieval: Retrieval, annotation: str | Path) -> bool:
    """Whether an annotation belongs to one of PAB's test sets, by the folders of its files."""
    paths = [Path(annotation), *(image.path for image in (retrieval.gallery or []))]
    return any(TEST_FOLDERS & set(path.parts[-4:]) for path in paths)


def write_trials(path: str | Path, trials: Sequence[Trial]) -> None:
    """Every trial as CSV."""
    text = io.StringIO()
    names = list(trials[0].metrics)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["member", "weight", *names])
    for trial in trials:
        figures = [f"{trial.metrics[name]:.4f}" for name in names]
        writer.writerow([trial.member, f"{trial.weight:g}", *figures])
    write_text(path, text.getvalue())


def run(config: SearchConfig) -> None:
    """Search, print the steps, write weights and trials.

    Raises:
        InputError: a test set without ``--allow_test``, no labels, fewer than two members, ids that
            do not fit together.
    """
    members = config.members()
    if len(members) < 2:
        raise InputError("ensemble", f"expected two members or more, found {len(members)}")
    retrieval = read_retrieval(
        config.annotation, image_folder=config.image_folder, answers=config.answers
    )
    if retrieval.relevant is None:
        raise InputError(config.annotation, "expected labels to choose weights by, found none")
    on_test = is_test_set(retrieval, config.annotation)
    if on_test and not config.allow_test:
        raise InputError(
            config.annotation, "is a test set: weights are chosen on validation data",
            todo="score the validation split (see docs/ensemble.md), or say --allow_test",
        )  # fmt: skip
    query_ids = [query.query_id for query in retrieval.queries]
    check_members(members)
    fusion = aligned(members, load_members(members, query_ids), query_ids, scaling=config.scaling)
    steps, trials = search(fusion, retrieval.relevant, grid(config.grid_step))
    chosen: dict[str, object] = {"chosen_on": config.annotation, "chosen_on_test": on_test}
    others = []
    for step in steps:
        if step.member in WEIGHT_FLAGS:
            chosen[WEIGHT_FLAGS[step.member]] = step.weight
        else:
            others.append(f"{step.member}:{step.weight:g}")
    if others:
        chosen["member_weights"] = others
    print(
        f"{members[0].name}: R@1 {trials[0].metrics['R@1']:.2f}, mAP {trials[0].metrics['mAP']:.2f}"
    )
    for step in steps:
        gain, mean = step.gain(config.seed), step.after.mean()
        print(
            f"+ {step.member}, keep {step.weight:g}: R@1 {mean['R@1']:.2f}, mAP {mean['mAP']:.2f}; "
            f"gain in R@1 {gain.mean:+.2f} [{gain.low:+.2f}, {gain.high:+.2f}]"
        )
    header = f"# Weights chosen by: python -m ensemble.search, {len(query_ids)} queries\n"
    write_trials(config.trials, trials)
    write_text(config.out, header + yaml.safe_dump(chosen, sort_keys=False))
    print(f"weights: {config.out}   trials: {config.trials}", file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    """Read the command line and search."""
    config, _ = config_from_args(
        SearchConfig,
        argv,
        prog="python -m ensemble.search",
        description="Choose the fusion's weights on labelled validation scores.",
    )
    run(config)


if __name__ == "__main__":
    run_cli(main)
