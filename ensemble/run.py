"""Fuse score files into a ranked list: `python -m ensemble.run`, with the published arithmetic."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from ensemble.config import FusionConfig
from ensemble.fuse import fuse, load_members
from pab import __version__
from pab.annotations import Retrieval, read_query_order, read_retrieval
from pab.config import config_from_args, flag
from pab.errors import InputError, run_cli
from pab.evaluate import evaluate
from pab.files import sha256_of_file
from pab.ranking import order_queries, ranked_names, write_ranked_list
from pab.scores import ScoreFile, reorder, save_scores


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

    def check(self) -> None:
        """Refuse values that make no sense alone or together.

        Raises:
            InputError: naming the flag.
        """
        if self.top_k < 1:
            raise InputError("--top_k", f"must be at least 1, found {self.top_k}")
        if self.answers and not self.annotation:
            raise InputError("--answers", "expected the queries it is the key of",
                             todo="give --annotation")  # fmt: skip
        if self.save_score and Path(self.save_score) == Path(self.output_file):
            raise InputError("--save_score", f"{self.save_score} is given as --output_file too")


def run(config: RunConfig) -> None:
    """Fuse, rank, write; print metrics where there are labels.

    Raises:
        InputError: members or ids that do not fit together; nothing is written.
    """
    members = config.members()
    files = load_members(members)
    retrieval: Retrieval | None = None
    query_ids = files[0].query_ids
    if config.annotation:
        retrieval = read_retrieval(
            config.annotation, image_folder=config.image_folder, answers=config.answers
        )
        query_ids = [query.query_id for query in retrieval.queries]
    files = [reorder(f, query_ids, where=m.path) for f, m in zip(files, members, strict=True)]
    wanted = read_query_order(config.query_order) if config.query_order else None
    order = order_queries(query_ids, wanted, where=config.query_order or "--query_order")
    meta = {
        "model": "ensemble",
        "members": [
            {"name": m.name, "file": m.path, "weight": m.weight, "sha256": sha256_of_file(m.path)}
            for m in members
        ],
        "per_query": True,
        "chosen_on": config.chosen_on,
        "chosen_on_test": config.chosen_on_test,
        "project_version": __version__,
    }
    fused = ScoreFile(fuse(files, members), query_ids, files[0].gallery_ids, meta)
    lines = dict(
        zip(query_ids, ranked_names(fused.scores, fused.gallery_ids, config.top_k), strict=True)
    )
    if config.save_score:
        save_scores(config.save_score, fused)
    write_ranked_list(config.output_file, [lines[query_id] for query_id in order])
    steps = " -> ".join(
        member.name if i == 0 else f"{member.name} (keep {member.weight:g})"
        for i, member in enumerate(members)
    )
    print(f"{steps}: {len(query_ids)} queries -> {config.output_file}", file=sys.stderr)
    if retrieval is not None and retrieval.relevant is not None:
        print(evaluate(fused, retrieval).table())


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
