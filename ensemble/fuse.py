"""Fuse members: scale their score matrices and add them.

The published rule is iterative: `S <- w S + (1 - w) T`. The running sum `S` starts with the first
member's matrix, and `T` is the next member's matrix. Each matrix is scaled to [0, 1] by its own
bounds. Rows and columns are first aligned by id. Fusion works in blocks of rows, so members
stay on disk. A row in which all scores are equal has no ranking and contributes 0.

Shape letters: `Q` queries, `q` rows and `C` columns of a block, `G` gallery images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ensemble.listed import listed_by_any, listed_images
from ensemble.members import RANKED_LIST, Member, Rule
from ensemble.reciprocal_rank import exact_scores, halves
from ensemble.scaling import Scaling, flat_rows, mean_places, scaled_block
from pab.core.counts import counted
from pab.core.errors import InputError
from pab.core.notices import notice
from pab.core.progress import progress
from pab.core.tensor_files import release_pages
from pab.ranking import rows_in_order, top_k
from pab.scores import ScoreFile, check_same_ids

BLOCK_ELEMENTS = 1 << 19  # scores per block: 2 MiB, so that a block fits in the CPU cache
BLOCKS_KEPT = 32  # number of blocks after which the members' memory pages are released
SPARE_CANDIDATES = 22  # candidates beyond the requested k
STRETCH = 64  # adjacent columns whose maximum `best_candidates` compares first
RECIPROCAL_RANK_K = 60  # Cormack, Clarke and Buettcher, SIGIR 2009


def shares_from_weights(weights: Sequence[float]) -> list[float]:
    """Return each member's share in the fused sum.

    Args:
        weights: weight kept by the running sum when the second, third, ... member is added.

    Returns:
        One share per member; they sum to 1.
    """
    shares = [1.0]
    for weight in weights:
        shares = [share * weight for share in shares] + [1.0 - weight]
    return shares


def kept_weights(shares: Sequence[float]) -> list[float]:
    """Return the weights kept by the running sum; the inverse of :func:`shares_from_weights`."""
    weights, before = [], shares[0]
    for share in shares[1:]:
        total = before + share
        weights.append(before / total if total > 0 else 1.0)
        before = total
    return weights


@dataclass(frozen=True)
class Fusion:
    """Members with aligned queries, fused block by block."""

    members: Sequence[Member]  # in fusion order
    files: Sequence[ScoreFile]  # of the members, with equal gallery ids
    rows: Sequence[Tensor | None]  # per file, in the requested order; None if already in order
    query_ids: list[str]  # in the requested order
    scaling: Scaling = "minmax"
    rule: Rule = "iterative"
    rank_k: int = RECIPROCAL_RANK_K  # k of the reciprocal-rank rule

    @property
    def gallery_ids(self) -> list[str]:
        """Return the ids of the columns."""
        return self.files[0].gallery_ids

    def _own_block(self, number: int, start: int, stop: int) -> Tensor:
        """Return rows of one member's unscaled scores, float32 [q, G]; read-only."""
        scores, order = self.files[number].scores, self.rows[number]
        return scores[start:stop] if order is None else scores[order[start:stop]]

    @cached_property
    def scaled_members(self) -> list[Tensor]:
        """Scale the whole matrix of each member, float32 [Q, G]; read-only."""
        count = len(self.query_ids)
        numbers = progress(range(len(self.members)), "scaling members", "members")
        return [self._scaled(number, self._own_block(number, 0, count), 0) for number in numbers]

    @cached_property
    def flat(self) -> list[Tensor]:
        """Mark the queries with equal scores for all images, per member: bool [Q].

        Such a row has no ranking, so it contributes 0 to every image, whatever the scaling.
        """
        count = len(self.query_ids)
        return [flat_rows(self._own_block(number, 0, count)) for number in range(len(self.files))]

    def _scaled(self, number: int, block: Tensor, start: int) -> Tensor:
        """Scale a block [q, C] of a member's unscaled scores; ``start`` is its first row.

        The block must have all columns, except for ``minmax``.
        """
        bounds, where = self.files[number].bounds, self.members[number].path
        scaled = scaled_block(block, self.scaling, bounds, where)
        flat = self.flat[number][start : start + len(block)]
        return scaled.masked_fill_(flat[:, None], 0.0) if bool(flat.any()) else scaled

    def _parts(self, number: int, block: Tensor, start: int) -> Tensor:
        """Return n for each reciprocal-rank part 2 / n of a member, 0 for no part: int64 [q, G].

        The block holds whole rows of the member's unscaled scores; ``start`` is the first row.
        """
        file, places = self.files[number], mean_places(block)
        if file.meta.get("model") == RANKED_LIST:
            counts = block > 0
        else:
            counts = places < self.listed[number][start : start + len(block), None]
        counts &= ~self.flat[number][start : start + len(block), None]
        return halves(places, self.rank_k) * counts

    @cached_property
    def listed(self) -> list[Tensor]:
        """Count, for each member, the listed images of each query, int64 [Q].

        All other images share one lower score, so they rank after the listed images.
        """
        return [file.listed_counts(self.query_ids) for file in self.files]

    def listed_by(self, number: int) -> Tensor | None:
        """Mark the images that a member lists, bool [Q, G]; None if it lists all images."""
        if self.files[number].listed is None:
            return None
        block = self._own_block(number, 0, len(self.query_ids))
        return listed_images(block, self.listed[number])

    @cached_property
    def listed_by_any(self) -> Tensor | None:
        """Mark the images that any member lists, bool [Q, G]; None if a member lists all images."""
        if any(file.listed is None for file in self.files):
            return None  # without a search for the listed images of the others
        return listed_by_any([self.listed_by(number) for number in range(len(self.files))])

    def block(self, start: int, stop: int) -> Tensor:
        """Compute rows ``start`` to ``stop`` of the fused matrix, float32 [q, G]."""
        blocks = [self._own_block(number, start, stop) for number in range(len(self.files))]
        return self._fused(blocks, start)

    def _fused(self, blocks: Sequence[Tensor], start: int) -> Tensor:
        """Fuse blocks of the members' unscaled scores.

        For valid blocks, see :meth:`_parts` (reciprocal ranks) and :meth:`_scaled` (other rules).
        """
        if self.rule == "reciprocal_rank":
            parts = [self._parts(number, block, start) for number, block in enumerate(blocks)]
            return exact_scores(torch.stack(parts))
        fused = self._scaled(0, blocks[0], start)
        if self.rule == "sum":
            fused = self.members[0].weight * fused
        for number, member in enumerate(self.members[1:], start=1):
            other = self._scaled(number, blocks[number], start)
            if self.rule == "iterative":
                fused.mul_(member.weight).add_(other.mul_(1.0 - member.weight))  # `blend` in place
            else:
                fused += other.mul_(member.weight)
        return fused

    def _spans(self) -> Iterator[tuple[int, int]]:
        """Yield the row range of each block, and release file memory after use."""
        rows = max(1, BLOCK_ELEMENTS // len(self.gallery_ids))
        starts = progress(range(0, len(self.query_ids), rows), "fusing", "blocks of queries")
        for number, start in enumerate(starts, start=1):
            yield start, min(start + rows, len(self.query_ids))
            if number % BLOCKS_KEPT == 0:
                for file in self.files:
                    release_pages(file.scores)

    def best_columns(self, k: int) -> Tensor:
        """Return the k best columns per row, best first, int64 [Q, k]; smaller columns win ties.

        With the published rule and scaling, a weighted sum of the unscaled scores, which reads each
        score once, first selects candidates. The published arithmetic then scores them. A row is
        fused completely if rounding could have excluded a better image.
        """
        is_published = self.rule == "iterative" and self.scaling == "minmax"
        if not is_published or len(self.gallery_ids) == 1:
            return self._best_of_blocks(k)
        shares = shares_from_weights([member.weight for member in self.members[1:]])
        factors, shift, scale = [], 0.0, 0.0
        for share, file, member in zip(shares, self.files, self.members, strict=True):
            low, high = file.bounds
            ends = torch.tensor([[low, high]])
            scaled_block(ends, "minmax", file.bounds, member.path)  # may raise
            factors.append(share / (high - low))
            shift -= factors[-1] * low
            scale += factors[-1] * max(abs(low), abs(high))
        if max(factors) > torch.finfo().max:
            return self._best_of_blocks(k)  # a range below 1e-38: its factor overflows float32
        rounding = (scale + abs(shift) + 1.0) * (len(self.files) + 4) * torch.finfo().eps
        margin = shift + rounding
        return torch.cat([self._best_of(*span, k, factors, margin) for span in self._spans()])

    def _best_of_blocks(self, k: int) -> Tensor:
        """Compute :meth:`best_columns` from the complete fused rows."""
        return torch.cat([top_k(self.block(*span), k) for span in self._spans()])

    def _best_of(
        self, start: int, stop: int, k: int, factors: Sequence[float], margin: float
    ) -> Tensor:
        """Compute :meth:`best_columns` of a block.

        Args:
            start, stop: range of the rows.
            k: number of columns.
            factors: factors of the members' unscaled scores in the sums.
            margin: upper bound of fused score minus sum, including rounding errors.
        """
        blocks = [self._own_block(number, start, stop) for number in range(len(self.files))]
        sums = blocks[0] * factors[0]
        for block, factor in zip(blocks[1:], factors[1:], strict=True):
            sums.add_(block, alpha=factor)
        values, columns = best_candidates(sums, min(k + SPARE_CANDIDATES, sums.shape[1]))
        columns = columns.sort(dim=1).values  # a stable sort then ranks the smaller first
        fused = self._fused([block.gather(1, columns) for block in blocks], start)
        order = fused.argsort(dim=1, descending=True, stable=True)[:, :k]
        best = columns.gather(1, order)
        if columns.shape[1] < sums.shape[1]:
            last = fused.gather(1, order[:, -1:])[:, 0]
            for row in (last <= values[:, -1] + margin).nonzero()[:, 0].tolist():
                best[row] = top_k(self.block(start + row, start + row + 1), k)[0]
        return best

    def matrix(self) -> Tensor:
        """Compute the whole fused matrix, float32 [Q, G]."""
        result = torch.empty(len(self.query_ids), len(self.gallery_ids))
        for start, stop in self._spans():
            result[start:stop] = self.block(start, stop)
        return result


def aligned(
    members: Sequence[Member],
    files: Sequence[ScoreFile],
    query_ids: Sequence[str] | None = None,
    **how: object,
) -> Fusion:
    """Align the members' rows by query id, and create a fusion.

    Args:
        members: members that passed :func:`ensemble.members.check_members`.
        files: their score files.
        query_ids: requested order; None uses the order of the first member.
        how: ``scaling``, ``rule`` and ``rank_k`` of :class:`Fusion`.

    Raises:
        InputError: ids differ from the first member's or from ``query_ids``, or a member has equal
            scores for all images in every query.
    """
    first = files[0]
    wanted = list(first.query_ids if query_ids is None else query_ids)
    rows: list[Tensor | None] = []
    for member, file in zip(members, files, strict=True):
        check_same_ids(file, first, member.path, members[0].path)
        rows.append(row_order(file, wanted, member.path))
    fusion = Fusion(members, files, rows, wanted, **how)  # type: ignore[arg-type]
    for member, flat in zip(members, fusion.flat, strict=True):
        count = int(flat.sum())
        if count == len(wanted):
            raise InputError(
                member.path, "all images have the same score for every query: there is no ranking"
            )
        if count:
            queries = counted(count, "query has", "queries have")
            notice(
                member.path,
                f"{queries} the same score for all images: nothing is added for "
                f"{'it' if count == 1 else 'them'}",
            )
    return fusion


def row_order(file: ScoreFile, query_ids: Sequence[str], path: str) -> Tensor | None:
    """Return the rows of a score file in query order, int64 [Q]; None if already in order.

    Raises:
        InputError: the file has other queries.
    """
    if file.query_ids == list(query_ids):
        return None
    return torch.tensor(rows_in_order(file.query_ids, query_ids, where=path))


def blend(fused: Tensor, member: Tensor, weight: float) -> Tensor:
    """Add a scaled member to the running sum: ``weight`` is the weight of ``fused``, [q, G]."""
    return weight * fused + (1.0 - weight) * member


def best_candidates(block: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Select the best values of long rows, faster than ``torch.topk``.

    Each row is divided into stretches of ``STRETCH`` columns. Only the stretches with the largest
    maxima, and the columns after the last whole stretch, are searched. Short rows are passed to
    ``torch.topk``.

    Args:
        block: scores [q, G].
        count: number of values, at most ``G``.

    Returns:
        Values and columns [q, count], best first; the choice among equal values is unspecified.
    """
    whole = block.shape[1] // STRETCH * STRETCH
    if whole < 2 * count * STRETCH:
        return torch.topk(block, count)
    stretches = block[:, :whole].unflatten(1, (-1, STRETCH))
    chosen = stretches.amax(dim=2).topk(count, sorted=False).indices
    columns = (chosen[:, :, None] * STRETCH + torch.arange(STRETCH)).flatten(1)
    rest = torch.arange(whole, block.shape[1]).expand(len(block), -1)
    columns = torch.cat([columns, rest], dim=1)
    values, places = block.gather(1, columns).topk(count)
    return values, columns.gather(1, places)
