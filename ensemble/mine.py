"""Mine a reranker's training questions from the errors of a ranking: `python -m ensemble.mine`.

A question is a caption with its right image and wrong ones. There are two kinds:

* `failure`: a wrong image ranks first, and the right image is among those that are reranked.
* `regression`: the right image ranks first, so a reranker must not put a wrong one before it.

Wrong images are the twin, then the best-ranked others. Images that may be right as well are left
out: images with the same caption, and near-duplicates of the right image other than the twin
(checked only with image vectors). Test sets are refused unless `--allow_test` is set.

Shape letters: `Q` queries, `G` gallery images, `D` width of image vectors.
"""

from __future__ import annotations

import json
import math
import posixpath
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ensemble import image_vectors
from ensemble.members import Member, load_members, scored_counts
from ensemble.refusals import refuse_test_set
from pab.core.config import config_from_args, data_flag, flag, model_flag, output_flag
from pab.core.counts import counted
from pab.core.errors import InputError, run_cli
from pab.core.files import write_text
from pab.core.notices import notice
from pab.core.outputs import check_inputs_are_kept, check_outputs
from pab.core.progress import progress
from pab.data.annotations import read_retrieval
from pab.data.label_config import LabelConfig
from pab.data.records import LabelledImage, Query, Retrieval
from pab.ranking import top_k
from pab.scores import ScoreFile, align


@dataclass(frozen=True)
class MineConfig(LabelConfig):
    """Settings of mining; each field is a flag of `python -m ensemble.mine`."""

    flag_group: ClassVar = "optimization"

    score: str = data_flag("", "fused scores of the annotation's queries and images, in any form")
    annotation: str = data_flag("", "labelled training or validation pairs, with image paths")
    image_folder: str | None = data_flag(
        None, "root of the annotation's image paths, if it is outside an annotation folder"
    )
    features: str | None = data_flag(
        None, "image vectors [G, D] instead of --encoder (.npy, .npz, .pt), by default in the "
        "order of the sorted image ids",
    )  # fmt: skip
    feature_ids: str | None = data_flag(
        None, "image ids of the rows of --features, one per line, or the images' folder"
    )
    allow_test: bool = data_flag(False, "accept a test set")
    encoder: str | None = model_flag(
        None, "member whose image vectors identify near-duplicates, such as clip"
    )
    encoder_config: str | None = model_flag(None, "YAML file of settings of --encoder")
    checkpoint: str | None = model_flag(None, "checkpoint of --encoder")
    negatives: int = flag(4, "maximum number of wrong images per question", ge=1)
    depth: int = flag(
        50, "images per query that a reranker reorders: the right image must be among them", ge=1
    )
    regressions: float | None = flag(
        None, "maximum regressions per failure; those with the smallest margins are kept; "
        "none: keep all", ge=0,
    )  # fmt: skip
    duplicates_above: float = flag(
        0.95, "cosine with the right image above which a wrong image is a near-duplicate",
        ge=-1, le=1,
    )  # fmt: skip
    out: str = output_flag("output/ensemble/mined.jsonl", "file for the questions, JSON lines")

    def check(self) -> None:
        """Reject values that are invalid alone or in combination; the error names the flag."""
        for name, what in (("score", "scores"), ("annotation", "labelled pairs")):
            if not getattr(self, name):
                raise InputError(f"--{name}", f"expected a file of {what}, found none")
        if self.encoder and self.features:
            raise InputError("--features", "contradicts --encoder", todo="pass one of them")
        needs = {"feature_ids": "features", "encoder_config": "encoder", "checkpoint": "encoder"}
        for name, other in needs.items():
            if getattr(self, name) is not None and getattr(self, other) is None:
                raise InputError(f"--{name}", f"needs --{other}")


@dataclass(frozen=True)
class Question:
    """Line of the output; image paths are relative to the data root."""

    caption: str
    query_id: str
    image: str  # the right image
    wrong: list[str]  # hardest first
    kind: Literal["failure", "regression"]
    source: str  # the annotation


class Miner:
    """Choose wrong images, and count what is left out.

    Args:
        config: settings.
        retrieval: labelled queries and images.
        gallery_ids: ids of the columns of the scores.
        vectors: unit vectors of the images, float32 [G, D]; None skips near-duplicates.
    """

    def __init__(
        self,
        config: MineConfig,
        retrieval: Retrieval,
        gallery_ids: Sequence[str],
        vectors: Tensor | None,
    ) -> None:
        self.config, self.vectors = config, vectors
        self.images = {image.image_id: image for image in retrieval.images}
        self.columns = [self.images[one] for one in gallery_ids]
        self.column_of = {one: column for column, one in enumerate(gallery_ids)}
        assert retrieval.relevant is not None
        self.relevant = retrieval.relevant
        self.counts: Counter[str] = Counter()
        self.twins: set[tuple[str, str]] = set()  # right image and twin, for the count

    def question(
        self, query: Query, ranking: Sequence[int], scores: Tensor
    ) -> tuple[float, Question] | None:
        """Return the margin of a query's right image, and the question; None without a question.

        The margin is the right image's score minus the largest score of the chosen wrong images;
        it is infinite if none of them has a score.

        Args:
            query: the query.
            ranking: columns of the images that a reranker reorders, best first.
            scores: of all images [G].
        """
        right = self.relevant[query.query_id]
        place = next(
            (n for n, column in enumerate(ranking) if self.columns[column].image_id in right), None
        )
        kind: Literal["failure", "regression"] = "regression" if place == 0 else "failure"
        self.counts[kind] += 1
        if place is None:
            self.counts["beyond"] += 1
            return None
        assert query.image_id is not None
        own = self.images[query.image_id]
        wrong = self._wrong(query.caption, own, ranking, right)
        if not wrong:
            self.counts[f"{kind} without"] += 1
            return None
        # A twin outside the gallery has no score.
        ids = [one for one in wrong.values() if one is not None]
        best = max((float(scores[self.column_of[one]]) for one in ids), default=-math.inf)
        margin = float(scores[self.column_of[own.image_id]]) - best
        source = self.config.annotation
        return margin, Question(query.caption, query.query_id, own.image, list(wrong), kind, source)

    def _wrong(
        self, caption: str, own: LabelledImage, ranking: Sequence[int], right: frozenset[str]
    ) -> dict[str, str | None]:
        """Return paths and ids of wrong images: the twin, then others in ranked order.

        The id of a twin outside the gallery is None.
        """
        found = self._twin(caption, own)
        taken = {posixpath.normpath(path) for path in (own.image, *found)}
        for column in ranking:
            if len(found) == self.config.negatives:
                break
            other = self.columns[column]
            path = posixpath.normpath(other.image)
            if other.image_id in right or path in taken:
                continue
            if caption in other.captions:
                self.counts["same caption"] += 1
            elif self._is_near(column, self.column_of[own.image_id]):
                self.counts["near-duplicates"] += 1
            else:
                found[other.image] = other.image_id
                taken.add(path)
        return found

    def _twin(self, caption: str, own: LabelledImage) -> dict[str, str | None]:
        """Return path and id of the twin; empty if there is none, or if it may also be right.

        The twin is known to be wrong, so it may be a near-duplicate.
        """
        known = None if own.twin_id is None else self.images.get(own.twin_id)
        if known is not None:
            path, captions = known.image, known.captions
        elif own.hard_i is not None:
            path, captions = posixpath.normpath(f"train/{own.hard_i}"), (own.hard_c or "",)
        else:
            return {}
        if caption in captions or posixpath.normpath(path) == posixpath.normpath(own.image):
            self.counts["twins alike"] += 1
            return {}
        self.twins.add((own.image, path))
        return {path: None if known is None else known.image_id}

    def _is_near(self, column: int, right: int) -> bool:
        if self.vectors is None:
            return False
        cosine = float(self.vectors[column] @ self.vectors[right])
        return cosine > self.config.duplicates_above


def mined(
    config: MineConfig, retrieval: Retrieval, file: ScoreFile, vectors: Tensor | None
) -> tuple[list[Question], Counter[str]]:
    """Mine all queries, in order; return the questions, and counts for :func:`report`.

    Args:
        config: settings.
        retrieval: labelled queries and images.
        file: their scores [Q, G], rows in the order of the queries.
        vectors: unit vectors of the images [G, D], or None.
    """
    miner = Miner(config, retrieval, file.gallery_ids, vectors)
    best = top_k(file.scores, config.depth)
    reach = scored_counts(file, file.query_ids).clamp_max(best.shape[1]).tolist()
    questions: list[tuple[float, Question]] = []
    for row, query in enumerate(progress(retrieval.queries, "mining", "queries")):
        ranking = best[row, : reach[row]].tolist()
        found = miner.question(query, ranking, file.scores[row])
        if found is not None:
            questions.append(found)
    kept = [one for _, one in questions]
    if config.regressions is not None:
        failures = sum(one.kind == "failure" for one in kept)
        margins = sorted(
            (margin, number) for number, (margin, one) in enumerate(questions)
            if one.kind == "regression"
        )  # fmt: skip
        most = math.ceil(config.regressions * failures)
        left_out = {number for _, number in margins[most:]}
        miner.counts["safe"] = len(left_out)
        kept = [one for number, one in enumerate(kept) if number not in left_out]
    miner.counts["wrong"] = sum(len(one.wrong) for one in kept)
    miner.counts["twins"] = sum((one.image, one.wrong[0]) in miner.twins for one in kept)
    return kept, miner.counts


def report(config: MineConfig, questions: Sequence[Question], counts: Counter[str]) -> str:
    """Describe in lines of text what was mined and what was left out."""
    lines = [f"{counted(len(questions), 'question')} -> {config.out}"]
    for kind, why in (("failure", "beyond"), ("regression", "safe")):
        kept = sum(one.kind == kind for one in questions)
        reasons = {
            "beyond": f"{counts['beyond']} with the right image beyond the first {config.depth}",
            "safe": f"{counts['safe']} with larger margins (--regressions)",
        }
        without = f"{counts[f'{kind} without']} without a wrong image"
        lines.append(f"{kind}s: {kept} of {counts[kind]}; left out: {reasons[why]}, {without}")
    near = counted(counts["near-duplicates"], "near-duplicate")
    near += f" (cosine above {config.duplicates_above:g})"
    if config.encoder is None and config.features is None:
        near = "near-duplicates not checked (--encoder or --features)"
    lines.append(
        f"wrong images: {counts['wrong']} (twins: {counts['twins']}); left out: "
        f"{counts['same caption'] + counts['twins alike']} with the same caption, {near}"
    )
    return "\n".join(lines)


def run(config: MineConfig) -> None:
    """Mine, write the questions, and print counts.

    Raises:
        InputError: an input is invalid or unsuitable, an output cannot be written, or there is
            nothing to mine. In these cases, nothing is written.
    """
    check_outputs({"out": config.out}, omit="choose another file")
    names = ("score", "annotation", "features", "feature_ids")
    check_inputs_are_kept({"out": config.out}, {name: getattr(config, name) for name in names})
    retrieval = read_retrieval(
        config.annotation, image_folder=config.image_folder, **config.reading()
    )
    if not retrieval.images or retrieval.gallery is None:
        raise InputError(
            config.annotation, "expected labelled images with their paths, found only captions",
            todo="pass training pairs or val_pairs.json",
        )  # fmt: skip
    if refuse_test_set(
        retrieval, config.annotation, config.image_folder,
        why="a reranker must be trained on other data", todo="score training pairs",
        allowed=config.allow_test,
    ):  # fmt: skip
        notice("--allow_test", "results of the tuned reranker on this test set are meaningless")
    query_ids = [query.query_id for query in retrieval.queries]
    gallery_ids = [image.gallery_id for image in retrieval.gallery]
    members = [Member("scores", config.score, 1.0)]
    (file,) = load_members(members, query_ids, gallery_ids, id_flags=False)
    ids = ScoreFile(torch.empty(0, 0), query_ids, gallery_ids)
    file = align(file, ids, where=config.score, reference_name="the annotation")
    vectors = None
    if config.features is not None:
        vectors = image_vectors.stored(config.features, gallery_ids, config.feature_ids)
    elif config.encoder is not None:
        vectors = image_vectors.encoded(
            config.encoder, retrieval.gallery, config.encoder_config, config.checkpoint
        )
    questions, counts = mined(config, retrieval, file, vectors)
    if not questions:
        raise InputError(
            config.score, f"nothing to mine: {report(config, questions, counts)}",
            todo="increase --depth or --regressions",
        )  # fmt: skip
    lines = (json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in questions)
    write_text(config.out, "".join(lines))
    print(report(config, questions, counts))


def main(argv: list[str] | None = None) -> None:
    """Read the command line and mine."""
    config, _ = config_from_args(MineConfig, argv, prog="python -m ensemble.mine")
    run(config)


if __name__ == "__main__":
    run_cli(main)
