"""Fusion of members: score matrices are brought onto one scale and added.

The published rule is iterative: `S <- w S + (1 - w) T`, with `S` the running sum, which starts with
the first member's matrix, and `T` the next member's. Each is scaled to [0, 1] by its own bounds.
Rows and columns are aligned by id first. Blocks of rows are fused one at a time, so that members
stay on disk. A row whose scores are all equal ranks nothing and contributes 0.

Shape letters: `Q` queries, `q` rows of a block, `G` gallery images.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from ensemble.reciprocal_rank import exact_scores, halves
from ensemble.scaling import Scaling, flat_rows, mean_places, scaled_block
from pab.core.errors import InputError
from pab.core.notices import notice
from pab.core.tensor_files import release_pages
from pab.ranking import rows_in_order, top_k
from pab.scores import ScoreFile

Rule = Literal["iterative", "sum", "reciprocal_rank"]
BLOCK_ELEMENTS = 1 << 19  # scores of a block: 2 MiB, so that a block's steps stay in the cache
BLOCKS_KEPT = 32  # whose pages stay in memory before they are given back
SPARE_CANDIDATES = 22  # beyond the k best that are wanted
STRETCH = 64  # columns whose maximum is taken first
RECIPROCAL_RANK_K = 60  # Cormack, Clarke and Buettcher, SIGIR 2009
SUM_TOLERANCE = 1e-6
RANKED_LIST = "ranked list"  # `model` in the meta of a member that was one: 0 is "not named"


@dataclass(frozen=True)
class Member:
    """One model's score file and its part in the fusion.

    Attributes:
        name: as tables show it.
        path: the score file, or a ranked list (.txt).
        weight: 0 to 1. Iterative: the weight that the running sum keeps when this member is added
            (not used for the first one). Sum: the member's own share.
    """

    name: str
    path: str
    weight: float


def named_numbers(flag: str, texts: Sequence[str]) -> dict[str, float]:
    """Read the ``NAME:NUMBER`` entries of a flag.

    Raises:
        InputError: an entry without a colon or a number, or a name twice.
    """
    found: dict[str, float] = {}
    for text in texts:
        name, colon, number = text.rpartition(":")
        if not colon or not name:
            raise InputError(flag, f"expected NAME:NUMBER, found {text!r}")
        if name in found:
            raise InputError(flag, f"expected every name once, found {name!r} twice")
        try:
            found[name] = float(number)
        except ValueError as error:
            raise InputError(flag, f"expected a number for {name!r}, found {number!r}") from error
    return found


MEMBER = re.compile(r"([^=]+)=(.+?)(?::([^:/\\]+))?")


def without_weight(text: str) -> str:
    """Return a ``--member`` as ``NAME=FILE``; a text of another form stays as it is."""
    match = MEMBER.fullmatch(text)
    return text if match is None else f"{match[1]}={match[2]}"


def parse_member(
    text: str, weights: Mapping[str, float] | None = None, default: float | None = None
) -> Member:
    """Read ``NAME=FILE:WEIGHT``, or ``NAME=FILE`` of a member that has its weight elsewhere.

    Args:
        text: of the flag.
        weights: by name, of members without a weight of their own.
        default: weight of a member that has none; None if it needs one.

    Raises:
        InputError: another form, no weight, or two.
    """
    match = MEMBER.fullmatch(text)
    if match is None:
        raise InputError("--member", f"expected NAME=FILE:WEIGHT, found {text!r}")
    name, path, weight = match.groups()
    weights = weights or {}
    if weight is None:
        found = weights.get(name, default)
        if found is None:
            raise InputError("--member", f"expected NAME=FILE:WEIGHT, found no weight for {name!r}")
        return Member(name, path, found)
    if name in weights:
        raise InputError(
            "--member", f"the weight of {name!r} is given here and by --member_weights"
        )
    return Member(name, path, named_numbers("--member", [f"{name}:{weight}"])[name])


def check_members(members: Sequence[Member], rule: Rule = "iterative") -> None:
    """Refuse members that cannot be fused.

    Raises:
        InputError: no member, a name twice, a weight outside [0, 1], or shares that do not add up.
    """
    if not members:
        raise InputError("ensemble", "expected score files to fuse, found none")
    names = [member.name for member in members]
    for member in members:
        if names.count(member.name) > 1:
            raise InputError("--member", f"expected distinct names, found {member.name!r} twice")
        if not 0.0 <= member.weight <= 1.0:
            raise InputError(
                f"weight of {member.name}", f"must lie in [0, 1], found {member.weight}"
            )
    total = sum(member.weight for member in members)
    if rule == "sum" and abs(total - 1.0) > SUM_TOLERANCE:
        raise InputError("--shares", f"must add up to 1, found {total:g}")


def shares_of(keeps: Sequence[float]) -> list[float]:
    """Return the share of each member in the fused sum.

    Args:
        keeps: weight kept by the running sum when the second, third, ... member is added.

    Returns:
        One share per member, adding up to 1.
    """
    shares = [1.0]
    for keep in keeps:
        shares = [share * keep for share in shares] + [1.0 - keep]
    return shares


def keeps_of(shares: Sequence[float]) -> list[float]:
    """Return the kept weights for given shares, the inverse of :func:`shares_of`."""
    keeps, before = [], shares[0]
    for share in shares[1:]:
        total = before + share
        keeps.append(before / total if total > 0 else 1.0)
        before = total
    return keeps


@dataclass(frozen=True)
class Fusion:
    """Members brought into one order of queries, fused block by block.

    Attributes:
        members: in the order of the fusion.
        files: their score files; galleries are equal.
        rows: for each file, the rows in the wanted order; None where they are in it.
        query_ids: the wanted order.
        scaling, rule: how scores are brought onto one scale and added.
        rank_k: of the reciprocal rank rule.
    """

    members: Sequence[Member]
    files: Sequence[ScoreFile]
    rows: Sequence[Tensor | None]
    query_ids: list[str]
    scaling: Scaling = "minmax"
    rule: Rule = "iterative"
    rank_k: int = RECIPROCAL_RANK_K

    @property
    def gallery_ids(self) -> list[str]:
        """Of the columns."""
        return self.files[0].gallery_ids

    def _own_block(self, number: int, start: int, stop: int) -> Tensor:
        """Rows of one member's own scores, float32 [q, G]; not to be changed."""
        scores, order = self.files[number].scores, self.rows[number]
        return scores[start:stop] if order is None else scores[order[start:stop]]

    def member_block(self, number: int, start: int, stop: int) -> Tensor:
        """Rows of one member on the common scale, float32 [q, G]."""
        return self._scaled(number, self._own_block(number, start, stop), start)

    @cached_property
    def scaled_members(self) -> list[Tensor]:
        """Every member's whole matrix on the common scale, float32 [Q, G]; not to be changed."""
        count = len(self.query_ids)
        return [self.member_block(number, 0, count) for number in range(len(self.members))]

    @cached_property
    def flat(self) -> list[Tensor]:
        """For each member, the queries for which all images have the same score: bool [Q].

        Such a row ranks nothing, so it contributes 0 to every image, whatever the scaling.
        """
        count = len(self.query_ids)
        return [flat_rows(self._own_block(number, 0, count)) for number in range(len(self.files))]

    def _scaled(self, number: int, block: Tensor, start: int) -> Tensor:
        """Return scores of one member on the common scale, float32 [q, C].

        Args:
            number: of the member.
            block: its own scores, rows from ``start``; all columns, or for ``minmax`` any.
            start: the first row.
        """
        bounds, where = self.files[number].bounds, self.members[number].path
        scaled = scaled_block(block, self.scaling, bounds, where)
        flat = self.flat[number][start : start + len(block)]
        return scaled.masked_fill_(flat[:, None], 0.0) if bool(flat.any()) else scaled

    def _parts(self, number: int, block: Tensor, start: int) -> Tensor:
        """Return n of what 2 / n one member gives by reciprocal rank; 0 for nothing: int64 [q, G].

        Args:
            number: of the member.
            block: its own scores, whole rows from ``start``.
            start: the first row.
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
        """For each member, how many images of each query have scores of their own, int64 [Q].

        The others share one score below these, so they stand at later places.
        """
        return [file.listed_counts(self.query_ids) for file in self.files]

    def block(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of the fused matrix, float32 [q, G]."""
        blocks = [self._own_block(number, start, stop) for number in range(len(self.files))]
        return self._fused(blocks, start)

    def _fused(self, blocks: Sequence[Tensor], start: int) -> Tensor:
        """Fuse the members' own scores; see :meth:`_scaled` for what the blocks may be."""
        if self.rule == "reciprocal_rank":
            parts = [self._parts(number, block, start) for number, block in enumerate(blocks)]
            return exact_scores(torch.stack(parts))
        fused = self._scaled(0, blocks[0], start)
        if self.rule == "sum":
            fused = self.members[0].weight * fused
        for number, member in enumerate(self.members[1:], start=1):
            other = self._scaled(number, blocks[number], start)
            if self.rule == "iterative":
                fused = blend_(fused, other, member.weight)
            else:
                fused += other.mul_(member.weight)
        return fused

    def _spans(self) -> Iterator[tuple[int, int]]:
        """Rows of one block after the other; memory of files is given back behind them."""
        rows = max(1, BLOCK_ELEMENTS // len(self.gallery_ids))
        for number, start in enumerate(range(0, len(self.query_ids), rows), start=1):
            yield start, min(start + rows, len(self.query_ids))
            if number % BLOCKS_KEPT == 0:
                for file in self.files:
                    release_pages(file.scores)

    def blocks(self) -> Iterator[Tensor]:
        """The fused matrix from its first row to its last, float32 [q, G] each."""
        for start, stop in self._spans():
            yield self.block(start, stop)

    def best_columns(self, k: int) -> Tensor:
        """The k best columns of every row, best first, ties to the smaller one: int64 [Q, k].

        The published fusion is first taken as one weighted sum of the members' own scores, which
        reads each of them once; the candidates that this leaves are then scored by the published
        arithmetic. A row where rounding could hide a further candidate is fused whole.
        """
        if self.rule != "iterative" or self.scaling != "minmax":
            return torch.cat([top_k(block, k) for block in self.blocks()])
        shares = shares_of([member.weight for member in self.members[1:]])
        factors, shift, scale = [], 0.0, 0.0
        for share, file, member in zip(shares, self.files, self.members, strict=True):
            low, high = file.bounds
            scaled_block(torch.tensor([[low]]), "minmax", file.bounds, member.path)  # may refuse
            factors.append(share / (high - low))
            shift -= factors[-1] * low
            scale += factors[-1] * max(abs(low), abs(high))
        rounding = (scale + abs(shift) + 1.0) * (len(self.files) + 4) * torch.finfo().eps
        margin = shift + rounding
        return torch.cat([self._best_of(*span, k, factors, margin) for span in self._spans()])

    def _best_of(
        self, start: int, stop: int, k: int, factors: Sequence[float], margin: float
    ) -> Tensor:
        """:meth:`best_columns` of a block; ``margin`` brings its sums above any true score."""
        blocks = [self._own_block(number, start, stop) for number in range(len(self.files))]
        sums = blocks[0] * factors[0]
        for block, factor in zip(blocks[1:], factors[1:], strict=True):
            sums.add_(block, alpha=factor)
        values, columns = best_candidates(sums, min(k + SPARE_CANDIDATES, sums.shape[1]))
        columns = columns.sort(dim=1).values  # so that a stable sort gives ties to the smaller
        fused = self._fused([block.gather(1, columns) for block in blocks], start)
        order = fused.argsort(dim=1, descending=True, stable=True)[:, :k]
        best = columns.gather(1, order)
        if columns.shape[1] < sums.shape[1]:
            last = fused.gather(1, order[:, -1:])[:, 0]
            for row in (last <= values[:, -1] + margin).nonzero()[:, 0].tolist():
                best[row] = top_k(self.block(start + row, start + row + 1), k)[0]
        return best

    def matrix(self) -> Tensor:
        """The whole fused matrix, float32 [Q, G]."""
        result = torch.empty(len(self.query_ids), len(self.gallery_ids))
        start = 0
        for block in self.blocks():
            result[start : start + len(block)] = block
            start += len(block)
        return result


def aligned(
    members: Sequence[Member],
    files: Sequence[ScoreFile],
    query_ids: Sequence[str] | None = None,
    **how: object,
) -> Fusion:
    """A fusion of members whose rows may come in any order.

    Args:
        members: checked (:func:`check_members`).
        files: theirs.
        query_ids: wanted order; None is that of the first member.
        how: ``scaling``, ``rule`` and ``rank_k`` of :class:`Fusion`.

    Raises:
        InputError: ids that are not exactly the first member's, naming them, or a member whose
            scores rank nothing for any query.
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
                member.path, "all images have the same score for every query: they rank nothing"
            )
        if count:
            queries = "1 query has" if count == 1 else f"{count} queries have"
            notice(
                member.path,
                f"{queries} the same score for all images: nothing is added for "
                f"{'it' if count == 1 else 'them'}",
            )
    return fusion


def check_same_ids(file: ScoreFile, first: ScoreFile, path: str, first_path: str) -> None:
    """Refuse a score file that does not hold exactly the ids of the first one.

    Raises:
        InputError: naming the file and the ids.
    """
    for kind in ("gallery_ids", "query_ids"):
        if getattr(file, kind) != getattr(first, kind):
            rows_in_order(
                getattr(file, kind),
                getattr(first, kind),
                where=f"{path}, {kind}",
                order_name=first_path,
            )


def row_order(file: ScoreFile, query_ids: Sequence[str], path: str) -> Tensor | None:
    """Return the rows that bring a score file into an order of queries, int64 [Q]; None as it is.

    Raises:
        InputError: other queries than the file's.
    """
    if file.query_ids == list(query_ids):
        return None
    return torch.tensor(rows_in_order(file.query_ids, query_ids, where=path))


def blend_(fused: Tensor, member: Tensor, weight: float) -> Tensor:
    """:func:`blend` in the memory of both, for blocks that nobody else holds."""
    return fused.mul_(weight).add_(member.mul_(1.0 - weight))


def blend(fused: Tensor, member: Tensor, weight: float) -> Tensor:
    """One step of the fusion: what `S` keeps is ``weight``; both scaled, [q, G]."""
    return weight * fused + (1.0 - weight) * member


def best_candidates(block: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``torch.topk`` of long rows: the best stand in the stretches that have the best maxima.

    Args:
        block: scores [q, G].
        count: how many, at most ``G``.

    Returns:
        Values and columns [q, count], best first; which of equal values are among them is open.
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
