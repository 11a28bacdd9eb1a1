"""Fuse score files into a ranked list: `python -m ensemble.run`, with the published arithmetic."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ensemble.config import FusionConfig
from ensemble.decode import decode
from ensemble.fuse import Member, aligned, check_members
from ensemble.members import known_gallery, load_members
from ensemble.protocol import ANSWER_NAMES, check_answer, load_protocol
from ensemble.uit_candidates import check_candidates
from pab import __version__
from pab.annotations import Retrieval, read_query_order, read_retrieval
from pab.config import config_from_args, flag
from pab.errors import InputError, run_cli
from pab.evaluate import Evaluation, evaluate
from pab.files import sha256_of_file
from pab.ranking import (
    check_names,
    order_queries,
    ranked_names,
    rows_in_order,
    write_ranked_list,
)
from pab.scores import ScoreFile, save_scores


@dataclass(frozen=True)
class RunConfig(FusionConfig):
    """What to fuse and what to write; each field is a flag of `python -m ensemble.run`."""

    output_file: str = flag("reproduce.txt", "ranked list to write")
    save_score: str | None = flag(None, "score file of the fused matrix to write")
    top_k: int = flag(10, "names a line of the ranked list")
    annotation: str | None = flag(None, "labelled annotation, or query.json with --answers")
    answers: str | None = flag(None, "key of a name-masked set; prints metrics")
    image_folder: str | None = flag(
        None, "root of the annotation's image paths, where it lies in no annotation folder"
    )
    query_order: str | None = flag(None, "file of query ids, one a line: order of the output lines")
    protocol: str | None = flag(
        None, "pab, www25, track4 or ucc: fixes files, order and metrics, and checks the answer"
    )
    data_root: str | None = flag(None, "where the protocol's data lie (default: its own place)")

    def check(self) -> None:
        """Refuse values that make no sense alone or together.

        Raises:
            InputError: naming the flag.
        """
        super().check()
        if self.top_k < 1:
            raise InputError("--top_k", f"must be at least 1, found {self.top_k}")
        if self.answers and not (self.annotation or self.protocol):
            raise InputError("--answers", "expected the queries it is the key of",
                             todo="give --annotation")  # fmt: skip
        if self.save_score and Path(self.save_score) == Path(self.output_file):
            raise InputError("--save_score", f"{self.save_score} is given as --output_file too")
        if self.protocol is None and self.data_root is not None:
            raise InputError("--data_root", "goes with --protocol")
        fixed = ("annotation", "image_folder", "query_order") if self.protocol else ()
        for name in fixed:
            if getattr(self, name) is not None:
                raise InputError(f"--{name}", f"is fixed by --protocol {self.protocol}")
        if self.protocol and self.top_k != ANSWER_NAMES:
            raise InputError("--top_k", f"is fixed by --protocol: {ANSWER_NAMES}")


def run(config: RunConfig) -> None:
    """Fuse, decode, rank, write; print metrics where there are labels.

    Raises:
        InputError: members or ids that do not fit together; nothing is written.
    """
    protocol = load_protocol(config.protocol) if config.protocol else None
    if protocol is not None:
        config = replace(config, **protocol.files(config.data_root), protocol=None)
    members = config.members()
    check_members(members, config.fusion)
    retrieval: Retrieval | None = None
    if config.annotation:
        retrieval = read_retrieval(
            config.annotation, image_folder=config.image_folder, answers=config.answers
        )
    wanted = read_query_order(config.query_order) if config.query_order else None
    asked = [query.query_id for query in retrieval.queries] if retrieval else None
    files = load_members(members, wanted or asked, known_gallery(retrieval, config.image_folder))
    check_candidates(members, files, config.uit_k)
    fusion = aligned(
        members, files, asked, scaling=config.scaling, rule=config.fusion, rank_k=config.rank_k
    )
    order = order_queries(fusion.query_ids, wanted, where=config.query_order or "--query_order")
    if protocol is not None and retrieval is not None:
        gallery = sorted(known_gallery(retrieval, config.image_folder) or [])
        rows_in_order(
            fusion.gallery_ids, gallery, where=members[0].path, order_name="the protocol's gallery"
        )
    whole: ScoreFile | None = None  # where something needs more than a few rows at a time
    evaluation: Evaluation | None = None
    if config.decode != "none" or config.save_score or (retrieval and retrieval.relevant):
        scores = decode(fusion.matrix(), fusion.query_ids, fusion.gallery_ids, config.decoding())
        meta = meta_of(config, members, files) if config.save_score else {}  # hashes every file
        whole = ScoreFile(scores, fusion.query_ids, fusion.gallery_ids, meta)
        names = ranked_names(scores, fusion.gallery_ids, config.top_k)
        if retrieval is not None and retrieval.relevant is not None:
            evaluation = evaluate(whole, retrieval, where=members[0].path)
    else:
        columns = fusion.best_columns(config.top_k)
        names = [[fusion.gallery_ids[i] for i in row] for row in columns.tolist()]
    lines = dict(zip(fusion.query_ids, names, strict=True))
    answer = [lines[query_id] for query_id in order]
    # Everything is checked before anything is written.
    check_names(config.output_file, answer)
    if protocol is not None:
        check_answer(answer, len(order), fusion.gallery_ids, config.output_file)
    if config.save_score and whole is not None:
        save_scores(config.save_score, whole)
    write_ranked_list(config.output_file, answer)
    kind = "per query" if per_query(config, files) else "joint over all queries"
    print(f"{described(config, members)} ({kind}): {len(order)} queries -> {config.output_file}",
          file=sys.stderr)  # fmt: skip
    if evaluation is not None:
        print(evaluation.table(only=protocol.metrics if protocol else None))


def per_query(config: FusionConfig, files: Sequence[ScoreFile]) -> bool:
    """Whether no query's ranking looked at another query, here or in what made the members."""
    made = all(file.meta.get("per_query", True) for file in files)
    return made and not config.decoding().joint


def meta_of(
    config: FusionConfig, members: Sequence[Member], files: Sequence[ScoreFile]
) -> dict[str, Any]:
    """What a fused score file says of itself."""
    on_test = any(file.meta.get("chosen_on_test", False) for file in files)
    return {
        "model": "ensemble",
        "members": [
            {"name": m.name, "file": m.path, "weight": m.weight, "sha256": sha256_of_file(m.path)}
            for m in members
        ],
        "fusion": config.fusion,
        "scaling": config.scaling,
        "decode": config.decoding().facts(),
        "per_query": per_query(config, files),
        "chosen_on": config.chosen_on,
        "chosen_on_test": config.chosen_on_test or on_test,
        "project_version": __version__,
    }


def described(config: FusionConfig, members: Sequence[Member]) -> str:
    """The fusion in one line."""
    if config.fusion == "iterative":
        steps = " -> ".join(
            member.name if i == 0 else f"{member.name} (keep {member.weight:g})"
            for i, member in enumerate(members)
        )
    elif config.fusion == "sum":
        steps = " + ".join(f"{member.weight:g} {member.name}" for member in members)
    else:
        steps = f"reciprocal ranks of {', '.join(member.name for member in members)}"
    return steps if config.decode == "none" else f"{steps}, decoded by {config.decode}"


def main(argv: list[str] | None = None) -> None:
    """Read the command line and fuse."""
    config, _ = config_from_args(
        RunConfig,
        argv,
        prog="python -m ensemble.run",
        description="Fuse score files, one member after the other, into a ranked list.",
    )
    run(config)


if __name__ == "__main__":
    run_cli(main)
