"""Choose the fusion's weights on labelled validation scores: `python -m ensemble.search`.

`--method steps` is Algorithm 2 of the paper (arXiv 2511.22470). The members are added one by one.
Each weight is the best of a grid in [0, 1] by R@1, with mAP as the tie-breaker, and earlier weights
stay fixed. `--order greedy` also chooses the next member. `--method simplex` tries all combinations
of shares. Both methods write weights of the published fusion rule. Test annotations are rejected,
because weights chosen on a test set make its results meaningless.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import yaml

from ensemble.chain import decoded
from ensemble.config import LARGEST_FACTOR, FusionConfig
from ensemble.fuse import Fusion, aligned, kept_weights
from ensemble.members import (
    RANKED_LIST,
    Member,
    candidates_of,
    check_candidates,
    check_members,
    inputs_of,
    known_gallery,
    load_members,
    without_weight,
)
from ensemble.trials import Found, Judge, Simplex, by_steps, grid, write_trials
from pab.core.config import config_from_args, data_flag, flag, output_flag
from pab.core.errors import InputError, run_cli
from pab.core.files import write_text
from pab.core.outputs import check_inputs_are_kept, check_outputs
from pab.core.progress import progress
from pab.data.records import Retrieval
from pab.metrics import Metrics

WEIGHT_FLAGS = {"uit": "beit3_weight", "blip2": "blip2_weight", "clip": "clip_weight"}
SCORE_FLAGS = {
    "lhp": "beit3_score",
    "uit": "uit_score",
    "blip2": "blip2_score",
    "clip": "clip_score",
}
MASKED_SET = "name-masked_test-set"  # this and the next two names are from PAB's layout
TEST_ANNOTATIONS = ("annotation", "test")
TEST_IMAGES = frozenset(("test", "ucc", MASKED_SET))
TAUS = (0.0, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
SLACKS = (0.0, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, math.inf)  # inf: no query opts out
FACTORS = (5.0, 10.0, 20.0, 50.0, 100.0, 200.0)
NUMBERS = {"assignment": ("slack", SLACKS), "margin": ("tau", TAUS)}  # otherwise the factor


@dataclass(frozen=True)
class SearchConfig(FusionConfig):
    """Settings of the weight search; each field is a flag of `python -m ensemble.search`."""

    finds_weights: ClassVar[bool] = True  # so that no member needs a weight
    flag_group: ClassVar = "optimization"

    annotation: str = data_flag("", "labelled annotation of the validation split")
    method: Literal["steps", "simplex"] = flag(
        "steps", "one weight after another (Algorithm 2), or all combinations of shares"
    )
    order: Literal["given", "greedy"] = flag("given", "steps: order in which members are added")
    grid_step: float = flag(
        0.0125, "step of the weight grid in [0, 1] (simplex: about 0.05)", gt=0, le=1
    )
    folds: int = flag(5, "folds of a cross-validated estimate of the result; 0 disables it")
    decode_grid: tuple[float, ...] = flag(
        (), "with --decode: slacks, factors or taus to try (default: built-in lists)"
    )
    trials: str = output_flag("output/ensemble/trials.csv", "file for all trials")
    out: str = output_flag(
        "output/ensemble/weights.yaml", "file for the weights (for ensemble.run --config)"
    )
    allow_test: bool = data_flag(False, "accept a test set; the weights file records this")
    seed: int = flag(0, "seed of the bootstrap and the folds")

    def check(self) -> None:
        """Reject values that are invalid alone or in combination; the error names the flag."""
        super().check()
        if not self.annotation:
            raise InputError("--annotation", "expected a labelled validation split, found none")
        if self.folds < 0 or self.folds == 1:
            raise InputError("--folds", f"must be 0 or at least 2, found {self.folds}")
        if self.fusion != "iterative":
            raise InputError(
                "--fusion", "the search writes weights of the published, iterative fusion",
                todo="remove it: --method simplex searches the shares of one sum",
            )  # fmt: skip
        if len(self.decode) > 1:
            raise InputError(
                "--decode", f"expected one decoding to search, found {len(self.decode)}",
                todo="search with one, and pass the others to ensemble.run",
            )  # fmt: skip
        if self.decode_grid and not self.decodings():
            raise InputError("--decode_grid", "needs --decode")
        if self.decode_slack is not None:
            raise InputError("--decode_slack", "is chosen by the search; set --decode_grid")
        for value in self.decode_grid:
            least = 0 if self.decode[0] in ("assignment", "margin") else math.nextafter(0, 1)
            if not least <= value <= LARGEST_FACTOR:
                raise InputError("--decode_grid", f"cannot be {value:g} for {self.decode[0]}")
        if self.method == "simplex" and self.order != "given":
            raise InputError("--order", "has no effect with --method simplex")
        if self.chosen_on or self.chosen_on_test:
            raise InputError("--chosen_on", "is an output of the search, not a setting")


def searcher(config: SearchConfig, fusion: Fusion, judge: Judge) -> Callable[[Judge], Found]:
    """Return a function that finds the best weights for the counted queries of a judge."""
    if config.method == "simplex":
        return Simplex.tried(fusion, judge, config.grid_step).best
    weights = grid(config.grid_step)
    return lambda judge: by_steps(fusion, judge, weights, greedy=config.order == "greedy")


def held_out(
    config: SearchConfig, search: Callable[[Judge], Found], judge: Judge
) -> dict[str, float]:
    """Compute cross-validated R@1 and mAP, percent: weights are chosen on the other folds."""
    count = len(judge.query_ids)
    fold_of = np.random.default_rng(config.seed).permutation(count) % config.folds
    values = {name: np.zeros(count) for name in ("R@1", "mAP")}
    for fold in progress(range(config.folds), "cross-validating", "folds"):
        inside = fold_of == fold
        found = search(replace(judge, counted=~inside))
        for name, kept in values.items():
            kept[inside] = found.metrics.values[name][inside]
    return {name: float(kept.mean()) for name, kept in values.items()}


def is_test_set(retrieval: Retrieval, *files: str | Path | None) -> bool:
    """Return true if the queries belong to a test set of PAB, according to the paths of the files.

    Args:
        retrieval: queries, with the images of their gallery.
        files: annotation, answer key, image folder.
    """
    given = [Path(file) for file in files if file]
    for path in (*map(Path.absolute, given), *map(Path.resolve, given)):  # as given, and resolved
        if MASKED_SET in path.parts[-3:] or path.parts[-3:-1] == TEST_ANNOTATIONS:
            return True
    images = (image.path.absolute() for image in retrieval.gallery or [])
    return any(TEST_IMAGES & set(path.parts[-4:]) for path in images)


def choose_decoding(
    config: SearchConfig, found: Found, fusion: Fusion, judge: Judge
) -> dict[str, Any]:
    """Choose and print the best parameter of the decoding; return settings of `ensemble.run`."""
    (wanted,) = config.decodings()
    number, usual = NUMBERS.get(wanted.method, ("factor", FACTORS))
    best: tuple[tuple[float, float], float, Metrics] | None = None
    for value in progress(config.decode_grid or usual, "trying decodings", "values"):
        if wanted.top is not None and math.isinf(value):
            continue  # infeasible: not every query can have one of its first images
        change: dict[str, Any] = {number: None if math.isinf(value) else value}
        settings = replace(wanted, **change)
        scores, _ = decoded(found.scores, fusion.query_ids, fusion.gallery_ids, settings)
        metrics = judge(scores)
        if best is None or judge.key(metrics) > best[0]:
            best = judge.key(metrics), value, metrics
    assert best is not None
    _, value, metrics = best
    gain, name = judge.difference(found.metrics, metrics, config.seed), f"decode_{number}"
    print(f"decoded by {wanted.method}, {name} {value:g}: {judge.figures(metrics)}; gain {gain}")
    chosen: dict[str, Any] = {"decode": wanted.method, name: None if math.isinf(value) else value}
    if wanted.method == "sinkhorn":
        chosen["sinkhorn_steps"] = config.sinkhorn_steps
    if wanted.method == "querybank":
        chosen["decode_bank"] = config.decode_bank
    if wanted.top is not None:
        chosen |= {"decode_top": wanted.top, "decode_scope": wanted.scope}
    return chosen


def chosen_members(
    config: SearchConfig, members: Sequence[Member], weights: Sequence[float]
) -> dict[str, Any]:
    """Return the members' files and weights as settings of `ensemble.run`.

    Args:
        config: settings of the search.
        members: members in fusion order.
        weights: weight kept by the running sum when each member after the first is added.
    """
    chosen = given(config, *SCORE_FLAGS.values(), "queries", "gallery")
    if config.member:
        chosen["member"] = [without_weight(text) for text in config.member]
    by_flag = {name for name, score in SCORE_FLAGS.items() if score in chosen}
    others = []
    for member, weight in zip(members[1:], weights, strict=True):
        if member.name in by_flag:
            chosen[WEIGHT_FLAGS[member.name]] = weight
        else:  # passed by --member, even if named like a published member
            others.append(f"{member.name}:{weight:.9g}")
    if others:
        chosen["member_weights"] = others
    return chosen


def given(config: SearchConfig, *names: str) -> dict[str, Any]:
    """Return the named settings that are set."""
    return {name: getattr(config, name) for name in names if getattr(config, name)}


def run(config: SearchConfig) -> None:
    """Search for the weights, print the steps, and write weights and trials.

    Raises:
        InputError: a test set without ``--allow_test``, no labels, fewer than two members, or ids
            that do not match.
    """
    members = config.members()
    if len(members) < 2:
        raise InputError("ensemble", f"expected at least two members, found {len(members)}")
    outputs = {"trials": config.trials, "out": config.out}
    check_outputs(outputs, omit="choose another file")
    check_inputs_are_kept(outputs, inputs_of(config, members))
    retrieval = config.retrieval()
    if retrieval.relevant is None:
        raise InputError(config.annotation, "expected labels, found none")
    on_test = is_test_set(retrieval, config.annotation, config.answers, config.image_folder)
    if on_test and not config.allow_test:
        raise InputError(
            config.annotation, "is a test set: weights are chosen on validation data",
            todo="score the validation split (see docs/ensemble.md), or pass --allow_test",
        )  # fmt: skip
    query_ids = [query.query_id for query in retrieval.queries]
    check_members(members)
    gallery = known_gallery(retrieval, config.image_folder)
    files = load_members(
        members, query_ids, gallery, queries=config.queries, gallery=config.gallery
    )
    check_candidates(members, files, config.uit_k)
    fusion = aligned(members, files, query_ids, scaling=config.scaling)
    judge = Judge(fusion.query_ids, fusion.gallery_ids, retrieval.relevant, members[0].path)
    search = searcher(config, fusion, judge)
    found = search(judge)
    print(found.described(judge, config.seed))
    if config.folds:
        estimate = held_out(config, search, judge)
        inside = found.metrics.mean()
        print(
            f"weights chosen on the other folds ({config.folds}): R@1 {estimate['R@1']:.2f}, mAP "
            f"{estimate['mAP']:.2f}; the search overfits by {inside['R@1'] - estimate['R@1']:+.2f} "
            "points of R@1"
        )
    chosen: dict[str, Any] = {"chosen_on": config.annotation, "chosen_on_test": on_test}
    in_order = config.method == "steps" and config.order == "given"
    weights = [step.weight for step in found.steps] if in_order else kept_weights(found.shares)
    shares = ", ".join(f"{m.name} {s:.4g}" for m, s in zip(members, found.shares, strict=True))
    print(f"shares of the sum: {shares}")
    chosen["scaling"] = config.scaling
    chosen |= chosen_members(config, members, weights)
    if any(file.meta.get("model") == RANKED_LIST for file in files):
        chosen |= given(config, "annotation", "answers", "image_folder")  # for the line order
    candidates = config.uit_k or candidates_of(members, files)
    if candidates is not None:
        chosen["uit_k"] = candidates
    if config.decodings():
        chosen |= choose_decoding(config, found, fusion, judge)
    header = f"# Weights chosen by: python -m ensemble.search, {len(query_ids)} queries\n"
    write_trials(config.trials, found.trials)
    write_text(config.out, header + yaml.safe_dump(chosen, sort_keys=False))
    print(f"weights: {config.out}   trials: {config.trials}", file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    """Read the command line and search."""
    config, _ = config_from_args(SearchConfig, argv, prog="python -m ensemble.search")
    run(config)


if __name__ == "__main__":
    run_cli(main)
