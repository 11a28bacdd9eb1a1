"""Decode a fused matrix: use other captions to rank the images of each query.

The decodings assume a one-to-one test set: every query has one image, and every image at most one
query. An image that is top-1 for two queries is then wrong for at least one of them.

============== ====================== ==========================================================
querybank      per query              QB-Norm (Bogolin et al., CVPR 2022, arXiv 2112.12777): images
                                      that attract a bank of other captions are penalized
dual_softmax   joint over all queries Cheng et al. 2021, arXiv 2109.04290
sinkhorn       joint over all queries Cuturi, NeurIPS 2013, arXiv 1306.0895
margin         joint over all queries arbitration of duplicate top-1 (HFUT-LMC, WWW 2025)
assignment     joint over all queries maximum-score matching, with a price for opting out
============== ====================== ==========================================================

A joint decoding uses all queries of the set at once, which some leaderboards forbid. ``per_query``
in the score file's ``meta`` is false after a joint decoding. Choose prices and factors on
validation data.

``margin`` and ``assignment`` change only top-1 images. Their margins and utilities come from a
reranker's scores if available, otherwise from the scores that
:func:`ensemble.chain.stages` describes.

Shape letters: `Q` queries, `G` gallery images, `N` captions of the bank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ensemble.arbitration import PASSES, arbitrate
from ensemble.component_assignment import component_assignment
from ensemble.matching import STAYS_OUT, priced_matching
from ensemble.rerank_prior import Evidence
from pab.core.counts import counted
from pab.core.errors import InputError
from pab.core.progress import progress
from pab.ranking import rows_in_order, top_k
from pab.scores import load_scores, respell

Decoding = Literal["none", "querybank", "dual_softmax", "sinkhorn", "margin", "assignment"]
ROWS_A_BLOCK = 128
JOINT = frozenset(("dual_softmax", "sinkhorn", "margin", "assignment"))
LOGARITHMS = frozenset(("querybank", "dual_softmax", "sinkhorn"))  # methods that return logarithms
CONVERGED = 1e-3  # maximum error of a row or column sum in sinkhorn's plan


@dataclass(frozen=True)
class DecodeSettings:
    """Decoding method and its parameters; `python -m ensemble.run` has a flag for each field."""

    method: Decoding = "none"
    factor: float = 20.0
    slack: float | None = None
    bank: str | None = None
    steps: int = 50
    tau: float = 0.5
    top: int | None = None
    scope: Literal["all", "collisions"] = "all"

    @property
    def joint(self) -> bool:
        """Return true if the decoding considers all queries jointly."""
        return self.method in JOINT

    def facts(self) -> dict[str, Any]:
        """Return the method and the parameters that it uses, for ``meta``."""
        used: dict[Decoding, dict[str, Any]] = {
            "none": {},
            "querybank": {"factor": self.factor, "bank": self.bank},
            "dual_softmax": {"factor": self.factor},
            "sinkhorn": {"factor": self.factor, "steps": self.steps},
            "margin": {"tau": self.tau, "passes": PASSES},
            "assignment": {"slack": self.slack, "top": self.top, "scope": self.scope},
        }
        return {"method": self.method, **used[self.method]}


def decode(
    scores: Tensor,
    query_ids: Sequence[str],
    gallery_ids: Sequence[str],
    settings: DecodeSettings,
    evidence: Evidence | None = None,
) -> Tensor:
    """Apply a decoding; return scores whose order is the decoded ranking, float32 [Q, G].

    Args:
        scores: [Q, G].
        query_ids: ids of the rows.
        gallery_ids: ids of the columns, sorted.
        settings: decoding method and parameters.
        evidence: source of margins and utilities; None uses ``scores``.

    Raises:
        InputError: a bank that cannot be read or has another gallery, an infeasible assignment, or
            an overflow.
    """
    match settings.method:
        case "none":
            return scores
        case "querybank":
            assert settings.bank is not None
            bank = respell(load_scores(settings.bank), [], gallery_ids, where=settings.bank)
            rows_in_order(
                bank.gallery_ids, gallery_ids, where=settings.bank, order_name="the members"
            )
            found = querybank(scores, bank.scores, settings.factor)
        case "dual_softmax":
            found = dual_softmax(scores, settings.factor)
        case "sinkhorn":
            found = sinkhorn(scores, settings.factor, settings.steps)
        case "margin":
            margins = (evidence or Evidence(scores)).margins()
            first = arbitrate(top_k(scores, PASSES + 1), margins, query_ids, settings.tau)
            return with_first_places(scores, first)
        case "assignment" if settings.scope == "all":
            first = assignment(scores, query_ids, settings.slack, settings.top, evidence)
            return with_first_places(scores, first)
        case "assignment":
            assert settings.slack is not None
            columns = top_k(scores, settings.top or scores.shape[1])
            worth = (evidence or Evidence(scores)).of(columns)
            first = component_assignment(columns, worth, query_ids, settings.slack)
            return with_first_places(scores, first)
    if not bool(torch.isfinite(found).all()):
        raise InputError(
            f"--decode {settings.method}",
            f"its scores overflow at --decode_factor {settings.factor:g}",
            todo="use a smaller factor",
        )
    return found


def querybank(scores: Tensor, bank: Tensor, factor: float) -> Tensor:
    """Apply QB-Norm with the dynamic inverted softmax.

    An image that is top-1 for a caption of the bank is a hub. Only queries whose top-1 image is a
    hub change. For each image, the exponential of the query's score is divided by the sum of the
    exponentials of the bank's scores.

    Args:
        scores: [Q, G].
        bank: scores of other captions (such as training captions) by the same models on the same
            images [N, G]. A fused bank is scaled by its own bounds, so both scales are equal only
            if the extremes of the two matrices agree.
        factor: scale of the scores before exponentiation.

    Returns:
        float32 [Q, G], comparable within a row; logarithms in rows whose top-1 image is a hub.
    """
    if bank.shape[1] != scores.shape[1]:
        sizes = f"{bank.shape[1]} and {scores.shape[1]}"
        raise ValueError(f"expected the same images in bank and scores, found {sizes}")
    hubs = torch.zeros(scores.shape[1], dtype=torch.bool)
    hubs[top_k(bank, 1)[:, 0]] = True
    attraction = torch.full((scores.shape[1],), -torch.inf, dtype=torch.float64)  # [G]
    for rows in progress(bank.split(ROWS_A_BLOCK), "reading the bank", "blocks of captions"):
        found = torch.logsumexp(factor * rows.double(), dim=0)
        attraction = torch.logaddexp(attraction, found)
    acts = hubs[top_k(scores, 1)[:, 0]]  # [Q]
    result = scores.clone()
    for part in acts.nonzero()[:, 0].split(ROWS_A_BLOCK):
        result[part] = (factor * scores[part].double() - attraction).float()
    return result


def dual_softmax(scores: Tensor, factor: float) -> Tensor:
    """Multiply each score by the softmax over its column, which normalizes over queries.

    Args:
        scores: [Q, G], not negative.
        factor: scale of the scores in the softmax.

    Returns:
        Logarithms of the products (the products often underflow float32), float32 [Q, G].
    """
    smallest = torch.finfo(scores.dtype).tiny
    logits = factor * scores
    return scores.clamp_min(smallest).log() + logits - torch.logsumexp(logits, dim=0)


def sinkhorn(scores: Tensor, factor: float, steps: int) -> Tensor:
    """Compute an entropic transport plan; each query has mass 1, each image at most max(1, Q / G).

    If images outnumber queries, an extra row receives their remaining mass. Otherwise, each image
    has mass Q / G.

    Args:
        scores: [Q, G].
        factor: scale of the scores; larger values approach a one-to-one assignment.
        steps: number of row and column normalization pairs.

    Returns:
        Logarithms of the plan, float32 [Q, G].
    """
    n_queries, n_gallery = scores.shape
    logits = factor * scores
    shares = math.log(max(1.0, n_queries / n_gallery))  # logarithm of a column's mass
    spare = n_gallery - n_queries
    row = torch.zeros(n_queries, 1)
    column = torch.zeros(1, n_gallery)
    slack = 0.0  # logarithm of the extra row's potential
    for _ in progress(range(steps), "sinkhorn", "steps"):
        row = -torch.logsumexp(logits + column, dim=1, keepdim=True)
        total = torch.logsumexp(logits + row, dim=0, keepdim=True)
        if spare > 0:
            slack = math.log(spare) - float(torch.logsumexp(column, dim=1))
            total = torch.logaddexp(total, torch.full_like(total, slack))
        column = shares - total
    return logits + row + column


def sinkhorn_errors(plan: Tensor) -> tuple[float, float]:
    """Return the errors of a transport plan's row and column sums.

    Args:
        plan: logarithms as returned by :func:`sinkhorn` [Q, G].

    Returns:
        The largest deviation of a row sum from 1, and the largest excess of a column sum over 1. If
        images do not outnumber queries, the second is the largest deviation from Q / G.
    """
    n_queries, n_gallery = plan.shape
    rows = torch.logsumexp(plan, dim=1).exp() - 1.0
    columns = torch.logsumexp(plan, dim=0).exp() - max(1.0, n_queries / n_gallery)
    excess = columns.clamp_min(0.0) if n_gallery > n_queries else columns.abs()
    return float(rows.abs().max()), float(excess.max())


def assignment(
    scores: Tensor,
    query_ids: Sequence[str],
    slack: float | None,
    top: int | None = None,
    evidence: Evidence | None = None,
) -> Tensor:
    """Return the one-to-one assignment with the largest total score.

    Unless ``slack`` is None, a query may opt out and keep its own top-1 image, even if other
    queries have the same image. It then adds the score of its top-1 image minus ``slack`` to the
    total. Therefore, no query loses more than ``slack``. Images may remain unassigned.

    Args:
        scores: [Q, G].
        query_ids: ids of the rows; they break ties, so the order of the rows has no effect.
        slack: price of opting out; None assigns every query.
        top: number of images considered per query; None considers all.
        evidence: scores to sum; None uses ``scores``.

    Returns:
        Column of each query's image, int64 [Q]; a query that opts out has its own top-1 image.

    Raises:
        InputError: there are more queries than images, and ``slack`` is None.
    """
    n_queries, n_gallery = scores.shape
    if slack is None and n_queries > n_gallery:
        raise InputError(
            "--decode", f"cannot assign {counted(n_gallery, 'image')} one-to-one to "
            f"{n_queries} queries",
            todo="set the price of opting out with --decode_slack",
        )  # fmt: skip
    order = sorted(range(n_queries), key=query_ids.__getitem__)
    # Other queries use at most Q - 1 of a query's images, so its Q best images suffice. With
    # evidence, an earlier stage may have put another image first, so one more image is needed.
    width = min(n_gallery, n_queries + (evidence is not None), top or n_gallery)
    columns = top_k(scores, width)  # [Q, width], best first
    values = (evidence or Evidence(scores)).of(columns)[order]
    columns = columns[order]
    given_up = (values[:, :1] - values).numpy()
    matched = priced_matching(columns.numpy(), given_up, n_gallery, slack, limit=slack)
    found = torch.from_numpy(matched)
    found = torch.where(found == STAYS_OUT, columns[:, 0], found)
    result = torch.empty(n_queries, dtype=torch.int64)
    result[order] = found
    return result


def with_first_places(scores: Tensor, columns: Tensor) -> Tensor:
    """Make the given image of each query its top-1 image; return scores, float32 [Q, G].

    The image gets the next float32 above the best score. Other images keep their scores.

    Args:
        scores: [Q, G].
        columns: column of the new top-1 image per query, int64 [Q].
    """
    result = scores.clone()
    best = scores.amax(dim=1)
    ahead = torch.nextafter(best, torch.full_like(best, torch.inf))
    moved = columns != top_k(scores, 1)[:, 0]  # in the other rows, the image is already top-1
    result[moved, columns[moved]] = ahead[moved]
    return result
