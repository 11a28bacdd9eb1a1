"""Mark the images that members list, and rank all other images below them.

Runs and ranked lists contain only some images per query. An image counts as listed for a query if
any member lists it, or if a reranker scored and reordered it. The other images only fill the lines
of a ranked list; they count as not found.

Shape letters: `Q` queries, `G` gallery images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pab.core.counts import counted
from pab.core.notices import notice
from pab.ranking import top_k
from pab.scores import ScoreFile, one_less


def listed_images(scores: Tensor, counts: Tensor) -> Tensor:
    """Mark the best images of each query, bool [Q, G].

    Args:
        scores: [Q, G].
        counts: number of listed images per query, int64 [Q].
    """
    if int(counts.min()) >= scores.shape[1]:
        return torch.ones_like(scores, dtype=torch.bool)
    columns = top_k(scores, int(counts.max()))
    is_listed = torch.arange(columns.shape[1]) < counts[:, None]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, columns, is_listed)


def listed_by_any(masks: Sequence[Tensor | None]) -> Tensor | None:
    """Join the masks of several members, bool [Q, G]; None if a member lists all images."""
    found = [mask for mask in masks if mask is not None]
    return torch.stack(found).any(dim=0) if len(found) == len(masks) else None


def ranked_file(
    scores: Tensor, query_ids: Sequence[str], gallery_ids: Sequence[str], listed: Tensor | None
) -> ScoreFile:
    """Build a score file whose unlisted images rank below the listed ones.

    Args:
        scores: [Q, G].
        query_ids: ids of the rows.
        gallery_ids: ids of the columns, sorted.
        listed: mask of the listed images, bool [Q, G]; None if all images are listed.
    """
    if listed is None:
        return ScoreFile(scores, list(query_ids), list(gallery_ids))
    least = scores.masked_fill(~listed, torch.inf).amin(dim=1, keepdim=True)
    counts = dict(zip(query_ids, listed.sum(dim=1).tolist(), strict=True))
    scores = torch.where(listed, scores, torch.minimum(scores, one_less(least)))
    return ScoreFile(scores, list(query_ids), list(gallery_ids), {"listed": counts})


def warn_on_filled_lines(file: ScoreFile, top_k: int, where: str) -> None:
    """Print a notice if a ranked list of ``top_k`` names contains images that are not listed."""
    places = min(top_k, len(file.gallery_ids))
    short = int((file.listed_counts() < places).sum())
    if short:
        notice(
            where,
            f"{counted(short, 'query lists', 'queries list')} fewer than {places} images: "
            f"{'its line is' if short == 1 else 'their lines are'} filled with images that no "
            "member lists",
        )
