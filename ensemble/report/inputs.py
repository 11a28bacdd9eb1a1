"""Read and evaluate the score files of a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pab.core.errors import InputError
from pab.data.records import Retrieval
from pab.evaluate import Evaluation, evaluate
from pab.scores import ScoreFile, align, load_scores, reorder, respell, with_all_images

HASH_DIGITS = 12  # shown digits of a checkpoint's SHA-256
UNLISTED = np.iinfo(np.int64).max  # rank of a right image that the file does not list


@dataclass(frozen=True)
class NamedScores:
    """Score file with its name in the report, and its evaluation if there are labels."""

    name: str
    scores: ScoreFile
    evaluation: Evaluation | None

    @property
    def is_fusion(self) -> bool:
        """Return true for the scores of a fusion."""
        return self.scores.meta.get("model") == "ensemble"

    @property
    def origin(self) -> str:
        """Describe a member's model and checkpoint, or a fusion's rule, weights and decoding."""
        meta = self.scores.meta
        members = meta.get("members")
        if not isinstance(members, list) or not all(isinstance(one, dict) for one in members):
            parts = [meta.get("model"), meta.get("checkpoint"), meta.get("dtype")]
            digest = str(meta.get("checkpoint_sha256", ""))[:HASH_DIGITS]
            parts.append(f"SHA-256 {digest}" if digest else None)
            return ", ".join(str(part) for part in parts if part) or "not recorded"
        rule = meta.get("fusion")
        shown = [f"{one.get('name')} {one.get('weight')}" for one in members]
        if rule == "iterative" and members:  # the first member starts the sum, without a weight
            shown[0] = str(members[0].get("name"))
        text = f"{rule} fusion, weights: {', '.join(shown)}"
        chosen_on, decode = meta.get("chosen_on"), meta.get("decode")
        stages = decode if isinstance(decode, list) else [decode]
        methods = [one.get("method") for one in stages if isinstance(one, dict)]
        decoded = ", ".join(str(method) for method in methods if method not in (None, "none"))
        text += f"; decoding: {decoded}" if decoded else ""
        return text + (f"; weights chosen on {chosen_on}" if chosen_on else "")


def best_ranks(rankings: Sequence[NamedScores]) -> list[tuple[str, np.ndarray]]:
    """Return name and best rank of a right image per query [Q], for each ranking with labels.

    The rank is :data:`UNLISTED` if the file lists only some images of a query, and none of them is
    right.
    """
    found = [(one.name, one.evaluation.metrics.best_rank) for one in rankings if one.evaluation]
    return [(name, np.where(ranks == 0, UNLISTED, ranks)) for name, ranks in found]


def read_inputs(
    named: Sequence[str], retrieval: Retrieval, gallery_ids: Sequence[str]
) -> list[NamedScores]:
    """Read ``NAME=FILE`` score files, align them, and evaluate them if there are labels.

    Args:
        named: values of the flag.
        retrieval: queries, with labels if there are any.
        gallery_ids: ids of the gallery's images.

    Raises:
        InputError: a name is invalid, a file cannot be read, or its queries or images do not match.
    """
    rankings: list[NamedScores] = []
    query_ids = [query.query_id for query in retrieval.queries]
    for text in named:
        name, sign, file = text.partition("=")
        if not (name.strip() and sign and file):
            raise InputError("--score", f"expected NAME=FILE, found {text!r}")
        if name in {one.name for one in rankings}:
            raise InputError("--score", f"expected distinct names, found {name!r} twice")
        scores = respell(load_scores(file), query_ids, gallery_ids, where=file)
        if scores.listed is not None:
            scores = with_all_images(scores, gallery_ids)
        if rankings:
            scores = align(
                scores, rankings[0].scores, where=file, reference_name=f"{rankings[0].name}'s file"
            )
        else:
            scores = reorder(scores, query_ids, where=file)
        found = None if retrieval.relevant is None else evaluate(scores, retrieval, where=file)
        rankings.append(NamedScores(name, scores, found))
    return rankings


def check_steps(steps: Sequence[str], rankings: Sequence[NamedScores]) -> None:
    """Reject fusion steps that cannot be compared.

    Raises:
        InputError: a name is not one of ``--score``, only one is given, or there are no labels.
    """
    known = [one.name for one in rankings]
    unknown = next((name for name in steps if name not in known), None)
    if unknown is not None:
        raise InputError(
            "--steps", f"expected names of --score ({', '.join(known)}), found {unknown!r}"
        )
    if len(steps) == 1:
        raise InputError("--steps", f"expected two names or more, found {steps[0]!r} alone")
    if steps and rankings[0].evaluation is None:
        raise InputError("--steps", "cannot be evaluated without labels", todo="pass --answers")
