"""Fuse score files into a ranked list: `python -m ensemble.run`.

The defaults reproduce the published arithmetic. A reranker and decodings may follow the fusion;
`--ladder` evaluates every stage.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ensemble.chain import ladder_table, stages
from ensemble.config import LARGEST_FACTOR, FusionConfig
from ensemble.fuse import aligned
from ensemble.listed import ranked_file, warn_on_filled_lines
from ensemble.members import (
    Member,
    check_candidates,
    check_gallery,
    check_members,
    inputs_of,
    known_gallery,
    label_names,
    load_members,
)
from ensemble.protocol import ANSWER_NAMES, PROTOCOL_FILES, check_answer, load_protocol
from ensemble.rerank_prior import reranking_of
from pab import __version__
from pab.core.config import config_from_args, data_flag, flag, output_flag
from pab.core.counts import counted
from pab.core.errors import InputError, run_cli
from pab.core.files import sha256_of_file
from pab.core.outputs import check_inputs_are_kept, check_outputs
from pab.data.id_lists import read_query_order
from pab.evaluate import Evaluation, evaluate
from pab.metrics import Metrics, evaluate_scores
from pab.ranking import check_names, order_queries, ranked_names, write_ranked_list
from pab.scores import ScoreFile, save_scores


@dataclass(frozen=True)
class RunConfig(FusionConfig):
    """Settings of one fusion; each field is a flag of `python -m ensemble.run`."""

    output_file: str = output_flag(
        "reproduce.txt", "ranked list to write; a .zip file contains it as answer.txt"
    )
    save_score: str | None = output_flag(
        None, "score file to write, with the scores after the last stage"
    )
    top_k: int = output_flag(10, "names per line of the ranked list", ge=1)
    query_order: str | None = data_flag(None, "file of query ids, one per line, in output order")
    protocol: str | None = data_flag(
        None, "pab, www25, track4 or ucc: sets files, line order and metrics, and checks the answer"
    )
    data_root: str | None = data_flag(None, "root of the protocol's data (default: the protocol's)")
    rerank_depth: int = flag(20, "images per query that the reranker reorders", ge=1)
    rerank_prior: float = flag(
        0.5, "penalty per place in the fused order, in the unit of the reranker's scores",
        ge=0, le=LARGEST_FACTOR,
    )  # fmt: skip
    ladder: bool = output_flag(
        False, "print R@1, mAP@10 and the gain in R@1 after every stage; needs labels"
    )

    def check(self) -> None:
        """Reject values that are invalid alone or in combination; the error names the flag."""
        super().check()
        if self.answers and not (self.annotation or self.protocol):
            raise InputError("--answers", "needs the queries of the answer key",
                             todo="pass --annotation")  # fmt: skip
        if self.protocol is None and self.data_root is not None:
            raise InputError("--data_root", "needs --protocol")
        for name in PROTOCOL_FILES:
            if self.protocol and getattr(self, name) is not None:
                raise InputError(f"--{name}", f"is fixed by --protocol {self.protocol}")
        if self.protocol and self.top_k != ANSWER_NAMES:
            raise InputError("--top_k", f"is fixed by --protocol: {ANSWER_NAMES}")
        if self.ladder and not (self.annotation or self.protocol):
            raise InputError("--ladder", "expected labels", todo="pass --annotation")
        self.check_reranker(self.rerank_depth, "--rerank_depth")


def run(config: RunConfig) -> None:
    """Fuse, rerank, decode, rank and write; print metrics if there are labels.

    Raises:
        InputError: settings, files, members or ids are invalid or do not match, or an output cannot
            be written or would overwrite an input.
    """
    protocol = load_protocol(config.protocol) if config.protocol else None
    if protocol is not None:
        config = replace(config, **protocol.files(config.data_root), protocol=None)
    members, reranker = config.members(), config.reranker()
    check_members(members, config.fusion)
    inputs = [*members, *([reranker] if reranker else [])]
    outputs = {"save_score": config.save_score, "output_file": config.output_file}
    check_outputs(outputs, omit="choose another file")
    check_inputs_are_kept(outputs, inputs_of(config, inputs))
    retrieval = config.retrieval() if config.annotation else None
    labels = retrieval.relevant if retrieval else None
    if config.ladder and labels is None:
        raise InputError("--ladder", "expected labels, found none", todo="pass --answers FILE")
    wanted = read_query_order(config.query_order) if config.query_order else None
    asked = [query.query_id for query in retrieval.queries] if retrieval else None
    images = known_gallery(retrieval, config.image_folder)
    files = load_members(
        inputs, wanted or asked, images, queries=config.queries, gallery=config.gallery,
        label_names=label_names(retrieval),
    )  # fmt: skip
    fused = files[: len(members)]
    check_candidates(members, fused, config.uit_k)
    fusion = aligned(
        members, fused, asked, scaling=config.scaling, rule=config.fusion, rank_k=config.rank_k
    )
    reranking = None
    if reranker is not None:
        depth, prior = config.rerank_depth, config.rerank_prior
        reranking = reranking_of(reranker, files[-1], fusion, depth, prior)
    order = order_queries(fusion.query_ids, wanted, where=config.query_order or "--query_order")
    check_gallery(members, fused, images, "the protocol's gallery" if protocol else "the gallery")
    result: ScoreFile | None = None  # whole matrix; None if the best columns are enough
    evaluation: Evaluation | None = None
    rungs: list[tuple[str, Metrics]] = []
    ids, listed = (fusion.query_ids, fusion.gallery_ids), fusion.listed_by_any
    has_stages = bool(config.decodings() or reranking)
    if has_stages or config.save_score or labels is not None or listed is not None:
        facts: list[dict[str, Any]] = []
        for stage in stages(fusion.matrix(), *ids, reranking, config.decodings(), listed):
            facts += [stage.facts] if stage.facts else []
            result = ranked_file(stage.scores, *ids, stage.listed)
            if config.ladder and labels is not None:
                found = evaluate_scores(result, labels, where=members[0].path)
                rungs.append((stage.name, found))
        assert result is not None
        if config.save_score:  # otherwise, skip `meta_of`, which hashes every input file
            meta = meta_of(config, members, reranker, files, facts)
            if retrieval is not None and labels is not None:
                meta["relevance"] = retrieval.relevance
            result = replace(result, meta={**meta, **result.meta})
        warn_on_filled_lines(result, config.top_k, config.output_file)
        names = ranked_names(result.scores, fusion.gallery_ids, config.top_k)
        if retrieval is not None and labels is not None:
            evaluation = evaluate(result, retrieval, where=members[0].path)
    else:
        columns = fusion.best_columns(config.top_k)
        names = [[fusion.gallery_ids[i] for i in row] for row in columns.tolist()]
    lines = dict(zip(fusion.query_ids, names, strict=True))
    answer = [lines[query_id] for query_id in order]
    # Check everything before writing anything.
    check_names(config.output_file, answer)
    if protocol is not None:
        check_answer(answer, len(order), fusion.gallery_ids, config.output_file)
    if config.save_score and result is not None:
        save_scores(config.save_score, result)
    write_ranked_list(config.output_file, answer)
    kind = "per query" if per_query(config, files) else "joint over all queries"
    queries = counted(len(order), "query", "queries")
    print(f"{described(config, members)} ({kind}): {queries} -> {config.output_file}",
          file=sys.stderr)  # fmt: skip
    if evaluation is not None:
        print(evaluation.table(only=protocol.metrics if protocol else None))
    if rungs:
        print(f"\n{ladder_table(rungs)}")


def per_query(config: FusionConfig, files: Sequence[ScoreFile]) -> bool:
    """Return true if every query was ranked independently, here and in the input files."""
    made = all(file.meta.get("per_query", True) for file in files)
    return made and not any(settings.joint for settings in config.decodings())


def meta_of(
    config: RunConfig,
    members: Sequence[Member],
    reranker: Member | None,
    files: Sequence[ScoreFile],
    decoded: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Build ``meta`` of the saved score file.

    Args:
        config: settings of the run.
        members, reranker: fused members, and the reranker or None.
        files: score files of the members and the reranker.
        decoded: facts of each decoding.
    """
    on_test = any(file.meta.get("chosen_on_test", False) for file in files)

    def origin(member: Member, **settings: float) -> dict[str, Any]:
        in_memory = not Path(member.path).is_file()
        digest = {} if in_memory else {"sha256": sha256_of_file(member.path)}
        return {"name": member.name, "file": member.path, **settings, **digest}

    use = {"depth": config.rerank_depth, "prior": config.rerank_prior}
    one = decoded[0] if decoded else {"method": "none"}
    return {
        "model": "ensemble",
        "members": [origin(member, weight=member.weight) for member in members],
        "fusion": config.fusion,
        "scaling": config.scaling,
        **({} if reranker is None else {"rerank": {**origin(reranker), **use}}),
        "decode": one if len(decoded) < 2 else list(decoded),
        "per_query": per_query(config, files),
        "chosen_on": config.chosen_on,
        "chosen_on_test": config.chosen_on_test or on_test,
        "project_version": __version__,
    }


def described(config: RunConfig, members: Sequence[Member]) -> str:
    """Describe the fusion and its stages in one line."""
    if config.fusion == "iterative":
        steps = " -> ".join(
            member.name if i == 0 else f"{member.name} (weight {member.weight:g})"
            for i, member in enumerate(members)
        )
    elif config.fusion == "sum":
        steps = " + ".join(f"{member.weight:g} {member.name}" for member in members)
    else:
        steps = f"reciprocal ranks of {', '.join(member.name for member in members)}"
    reranker = config.reranker()
    if reranker is not None:
        steps += f", first {config.rerank_depth} reranked by {reranker.name}"
    methods = [settings.method for settings in config.decodings()]
    return f"{steps}, decoded by {', then '.join(methods)}" if methods else steps


def main(argv: list[str] | None = None) -> None:
    """Read the command line and fuse."""
    config, _ = config_from_args(RunConfig, argv, prog="python -m ensemble.run")
    run(config)


if __name__ == "__main__":
    run_cli(main)
