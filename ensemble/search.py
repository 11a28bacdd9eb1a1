"""Choose weights, reranking and decodings on validation scores: `python -m ensemble.search`.

`--method steps` is Algorithm 2 of the paper (arXiv 2511.22470). The members are added one by one.
Each weight is the best of a grid in [0, 1] by R@1, with mAP as the tie-breaker, and earlier weights
stay fixed. `--order greedy` also chooses the next member. `--method simplex` tries all combinations
of shares. Both methods write weights of the published fusion rule. The parameters of `--rerank`
and `--decode` are then chosen stage by stage (`stage_search`). The cross-validated estimate
includes all choices. Test annotations are rejected unless `--allow_test` is set, because choices
made on a test set make its results meaningless.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import yaml

from ensemble.chain import ladder_table
from ensemble.config import LARGEST_FACTOR, FusionConfig
from ensemble.fuse import Fusion, aligned
from ensemble.members import (
    RANKED_LIST,
    Member,
    candidates_of,
    check_candidates,
    check_gallery,
    check_members,
    inputs_of,
    known_gallery,
    label_names,
    load_members,
    without_weight,
)
from ensemble.refusals import refuse_test_set
from ensemble.rerank_prior import reranking_of
from ensemble.stage_search import (
    DEPTHS,
    RERANKER_UNITS,
    Choice,
    Stages,
    number_of,
    usual_values,
)
from ensemble.trials import DIGITS, Found, Judge, Simplex, by_steps, grid, write_trials
from pab.core.config import config_from_args, data_flag, flag, output_flag
from pab.core.counts import counted
from pab.core.errors import InputError, run_cli
from pab.core.files import write_text
from pab.core.notices import notice
from pab.core.outputs import check_inputs_are_kept, check_outputs
from pab.core.progress import progress
from pab.metrics import Metrics
from pab.scores import ScoreFile

WEIGHT_FLAGS = {"uit": "beit3_weight", "blip2": "blip2_weight", "clip": "clip_weight"}
SCORE_FLAGS = {
    "lhp": "beit3_score",
    "uit": "uit_score",
    "blip2": "blip2_score",
    "clip": "clip_score",
}


@dataclass(frozen=True)
class SearchConfig(FusionConfig):
    """Settings of the search; each field is a flag of `python -m ensemble.search`."""

    finds_weights: ClassVar[bool] = True  # so that no member needs a weight
    flag_group: ClassVar = "optimization"

    annotation: str = data_flag("", "labelled annotation of the validation split")
    method: Literal["steps", "simplex"] = flag(
        "steps", "one weight after another (Algorithm 2), or all combinations of shares"
    )
    order: Literal["given", "greedy"] = flag("given", "steps: order in which members are added")
    grid_step: float = flag(
        0.0125, "step of the weight grid in [0, 1]; with simplex, use about 0.05", gt=0, le=1
    )
    folds: int = flag(5, "folds of a cross-validated estimate of the result; 0 disables it")
    prior_grid: tuple[float, ...] = flag(
        (), "--rerank: priors to try, in the unit of the reranker's scores (default: 0 to 10)"
    )
    depth_grid: tuple[int, ...] = flag(
        (), "--rerank: depths to try, in images per query (default: 5 10 20 50)"
    )
    decode_grid: tuple[float, ...] = flag(
        (), "with one decoding: slacks, factors or taus to try (default: built-in lists)"
    )
    tau_grid: tuple[float, ...] = flag(
        (), "--decode margin: taus to try, in the unit of reranker scores (default: 0 to 10) or, "
        "without --rerank, of the scores before it (default: 0 to 0.2, for fused scores)",
    )  # fmt: skip
    slack_grid: tuple[float, ...] = flag(
        (), "--decode assignment: slacks to try, in the unit of --tau_grid (default: as for "
        "--tau_grid and, without --rerank, also no opting out)",
    )  # fmt: skip
    factor_grid: tuple[float, ...] = flag(
        (), "other decodings: factors to try, without a unit (default: 5 to 200)"
    )
    trials: str = output_flag("output/ensemble/trials.csv", "file for all trials")
    out: str = output_flag(
        "output/ensemble/weights.yaml", "file for the weights (for ensemble.run --config)"
    )
    allow_test: bool = data_flag(False, "accept a test set; the weights file records this")
    seed: int = flag(0, "seed of the bootstrap and of the folds", ge=0)

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
        if self.decode_slack is not None:
            raise InputError("--decode_slack", "is chosen by the search; set --decode_grid")
        self._check_grids()
        self.check_reranker(min(self.depths()), "--depth_grid")
        if self.method == "simplex" and self.order != "given":
            raise InputError("--order", "has no effect with --method simplex")
        if self.chosen_on or self.chosen_on_test:
            name = "chosen_on" if self.chosen_on else "chosen_on_test"
            raise InputError(f"--{name}", "is an output of the search, not a setting")

    def _check_grids(self) -> None:
        """Reject grids of stages that are not searched, and values out of range."""
        methods = [settings.method for settings in self.decodings()]
        users: dict[str, list[str]] = {"tau": [], "slack": [], "factor": []}
        for method in methods:
            users[number_of(method)].append(method)
        for number, using in users.items():
            if len(using) > 1:
                raise InputError(
                    "--decode", f"{' and '.join(using)} share --decode_{number}, so the search "
                    "cannot choose both",
                    todo="search with one, and pass the others to ensemble.run",
                )  # fmt: skip
            if getattr(self, f"{number}_grid") and (not using or self.decode_grid):
                others = "contradicts --decode_grid" if using else f"no --decode uses a {number}"
                raise InputError(f"--{number}_grid", others)
        if self.decode_grid and len(methods) != 1:
            raise InputError(
                "--decode_grid", f"needs --decode with one decoding, found {len(methods)}",
                todo="set --tau_grid, --slack_grid and --factor_grid for several",
            )  # fmt: skip
        if not self.rerank and (self.prior_grid or self.depth_grid):
            name = "prior_grid" if self.prior_grid else "depth_grid"
            raise InputError(f"--{name}", "needs --rerank")
        for name in ("prior_grid", "decode_grid", "tau_grid", "slack_grid", "factor_grid"):
            factor = name == "factor_grid" or (
                name == "decode_grid" and methods and number_of(methods[0]) == "factor"
            )
            least = math.nextafter(0, 1) if factor else 0
            for value in getattr(self, name):
                if not least <= value <= LARGEST_FACTOR:
                    stage = f" for {methods[0]}" if name == "decode_grid" else ""
                    raise InputError(f"--{name}", f"cannot be {value:g}{stage}")
        if min(self.depths()) < 1:
            raise InputError("--depth_grid", f"must be at least 1, found {min(self.depths())}")

    def depths(self) -> tuple[int, ...]:
        """Return the reranking depths to try."""
        return self.depth_grid or DEPTHS


def searcher(config: SearchConfig, fusion: Fusion, judge: Judge) -> Callable[[Judge], Found]:
    """Return a function that finds the best weights for the counted queries of a judge."""
    if config.method == "simplex":
        tried = Simplex.tried(fusion, judge, config.grid_step)
        return lambda judge: tried.best(judge).fused_again(fusion, judge)
    weights, greedy = grid(config.grid_step), config.order == "greedy"
    return lambda judge: by_steps(fusion, judge, weights, greedy=greedy).fused_again(fusion, judge)


def held_out(
    config: SearchConfig, search: Callable[[Judge], Found], stages: Stages, judge: Judge
) -> list[tuple[str, Metrics]]:
    """Evaluate every fold with the weights and stages chosen on the other folds.

    Returns:
        Name and metrics of the fused scores and of every stage, for all queries.
    """
    count = len(judge.query_ids)
    fold_of = np.random.default_rng(config.seed).permutation(count) % config.folds
    rungs: dict[str, Metrics] = {}
    for fold in progress(range(config.folds), "cross-validating", "folds"):
        inside = fold_of == fold
        other_folds = replace(judge, counted=~inside)
        found = search(other_folds)
        choices = stages.choose(found.scores, other_folds)
        for name, metrics in [("fused", found.metrics), *((c.stage, c.metrics) for c in choices)]:
            kept = rungs.setdefault(name, deepcopy(metrics))
            for metric, values in kept.values.items():
                values[inside] = metrics.values[metric][inside]
            kept.best_rank[inside] = metrics.best_rank[inside]
    return list(rungs.items())


def estimate(config: SearchConfig, inside: Metrics, rungs: Sequence[tuple[str, Metrics]]) -> str:
    """Format the cross-validated result, and how far the search's own R@1 exceeds it."""
    mean, seeming = rungs[-1][1].mean(), inside.mean()["R@1"]
    what = "weights" if len(rungs) == 1 else "weights and stages"
    line = (
        f"{what} chosen on the other folds ({config.folds}): R@1 {mean['R@1']:.2f}, mAP "
        f"{mean['mAP']:.2f}; the search overfits by {seeming - mean['R@1']:+.2f} points of R@1"
    )
    return line if len(rungs) == 1 else f"{line}\n{ladder_table(rungs, config.seed)}"


def stages_of(
    config: SearchConfig, fusion: Fusion, reranker: Member | None, file: ScoreFile
) -> Stages:
    """Return the stages whose parameters are chosen, with the values to try.

    Args:
        config: settings of the search.
        fusion: the members.
        reranker: the reranker, or None.
        file: scores of the reranker; unused if ``reranker`` is None.
    """
    depths, priors = config.depths(), config.prior_grid or RERANKER_UNITS
    reranking = None
    if reranker is not None:
        reranking = reranking_of(reranker, file, fusion, depths[0], priors[0])
    decodings = []
    for settings in config.decodings():
        given = getattr(config, f"{number_of(settings.method)}_grid") or config.decode_grid
        usual = usual_values(settings.method, after_reranker=reranker is not None)
        decodings.append((settings, given or usual))
    ids, listed = (fusion.query_ids, fusion.gallery_ids), fusion.listed_by_any
    return Stages(*ids, reranking, depths, priors, decodings, listed)


def chosen_stages(config: SearchConfig, choices: Sequence[Choice]) -> dict[str, Any]:
    """Return the reranker, decodings and chosen parameters as settings of `ensemble.run`."""
    methods = [settings.method for settings in config.decodings()]
    chosen: dict[str, Any] = {"rerank": config.rerank[0]} if config.rerank else {}
    if methods:
        chosen["decode"] = methods[0] if len(methods) == 1 else methods
    for choice in choices:
        chosen |= choice.settings
    if "sinkhorn" in methods:
        chosen["sinkhorn_steps"] = config.sinkhorn_steps
    if "querybank" in methods:
        chosen["decode_bank"] = config.decode_bank
    if config.decode_top is not None and "assignment" in methods:
        chosen |= {"decode_top": config.decode_top, "decode_scope": config.decode_scope}
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
            others.append(f"{member.name}:{weight:{DIGITS}}")
    if others:
        chosen["member_weights"] = others
    return chosen


def given(config: SearchConfig, *names: str) -> dict[str, Any]:
    """Return the named settings that are set."""
    return {name: getattr(config, name) for name in names if getattr(config, name)}


def run(config: SearchConfig) -> None:
    """Choose the weights and stages, print each choice, and write the settings and all trials.

    Raises:
        InputError: settings or files are invalid or do not match, the annotation is unsuitable, or
            an output cannot be written or would overwrite an input.
    """
    members, reranker = config.members(), config.reranker()
    if len(members) < 2 and not (members and (reranker or config.decodings())):
        raise InputError(
            "ensemble", f"expected at least two members, found {len(members)}",
            todo="pass another score file, or add --rerank or --decode to a single member",
        )  # fmt: skip
    inputs = [*members, *([reranker] if reranker else [])]
    outputs = {"trials": config.trials, "out": config.out}
    check_outputs(outputs, omit="choose another file")
    check_inputs_are_kept(outputs, inputs_of(config, inputs))
    retrieval = config.retrieval()
    if retrieval.relevant is None:
        raise InputError(config.annotation, "expected labels, found none")
    on_test = refuse_test_set(
        retrieval, config.annotation, config.answers, config.image_folder,
        why="weights are chosen on validation data", todo="score the validation split",
        allowed=config.allow_test,
    )  # fmt: skip
    query_ids = [query.query_id for query in retrieval.queries]
    check_members(members)
    gallery = known_gallery(retrieval, config.image_folder)
    files = load_members(
        inputs, query_ids, gallery, queries=config.queries, gallery=config.gallery,
        label_names=label_names(retrieval),
    )  # fmt: skip
    scored, files = files[-1], files[: len(members)]
    check_candidates(members, files, config.uit_k)
    fusion = aligned(members, files, query_ids, scaling=config.scaling)
    if gallery is not None:  # validation scores may also have distractors
        check_gallery(members, files, sorted({*gallery, *fusion.gallery_ids}))
    judge = Judge(fusion.query_ids, fusion.gallery_ids, retrieval.relevant, members[0].path)
    search = searcher(config, fusion, judge)
    stages = stages_of(config, fusion, reranker, scored)
    found = search(judge)
    print(found.described(judge, config.seed))
    chosen: dict[str, Any] = {"chosen_on": config.annotation, "chosen_on_test": on_test}
    shares = ", ".join(f"{m.name} {s:.4g}" for m, s in zip(members, found.shares, strict=True))
    print(f"shares of the sum: {shares}")
    chosen["scaling"] = config.scaling
    chosen |= chosen_members(config, members, found.weights)
    if any(file.meta.get("model") == RANKED_LIST for file in files):
        # A ranked list may have no query ids; the annotation gives the order of its lines.
        chosen |= given(config, "annotation", "answers", "image_folder")
    candidates = config.uit_k or candidates_of(members, files)
    if candidates is not None:
        chosen["uit_k"] = candidates
    choices, metrics = stages.choose(found.scores, judge), found.metrics
    for choice in choices:
        gain = judge.difference(metrics, choice.metrics, config.seed)
        made = choice.stage if choice.stage.startswith("reranked") else f"decoded by {choice.stage}"
        print(f"{made}, {choice.numbers}: {judge.figures(choice.metrics)}; gain {gain}")
        metrics = choice.metrics
    stages.warn(choices, found.scores)
    limited = replace(config, folds=min(config.folds, len(query_ids)))
    if limited.folds < config.folds:
        what = "no cross-validation" if limited.folds < 2 else counted(limited.folds, "fold")
        notice("--folds", f"{counted(len(query_ids), 'query', 'queries')}: {what}")
    if limited.folds > 1:
        print(estimate(limited, metrics, held_out(limited, search, stages, judge)))
    chosen |= chosen_stages(config, choices)
    header = f"# Weights chosen by: python -m ensemble.search, {len(query_ids)} queries\n"
    trials = [*found.trials, *(trial for choice in choices for trial in choice.trials)]
    write_trials(config.trials, trials)
    write_text(config.out, header + yaml.safe_dump(chosen, sort_keys=False))
    print(f"weights: {config.out}   trials: {config.trials}", file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    """Read the command line and search."""
    config, _ = config_from_args(SearchConfig, argv, prog="python -m ensemble.search")
    run(config)


if __name__ == "__main__":
    run_cli(main)
