"""Queries on a search index: vectors of texts and images, fusion of members, and results.

A query has a text, an image or both, and may have unwanted texts. For a member that compares one
vector per image by a dot product, the query vector is the weighted sum of the parts' unit vectors,
scaled to unit length. For any other member, such as BLIP-2 with several vectors per image, the
score is the weighted mean of the parts' scores. In both cases, unwanted texts are subtracted.

The scores of several members are scaled per query to 0..1 (min-max over all images of the index, as
in ``minmax_query`` of :mod:`ensemble.scaling`), then added, each times its member's weight.

Shape letters: `Q` queries, `G` images of the index, `D` width of the vectors.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment

from pab.core.errors import InputError
from pab.scoring.encoder import Encoder
from pab.search.ann import Ann
from pab.search.exact import longest_row, search_exact, selected
from pab.search.index import Index
from pab.search.vectors import check_ann_member, has_one_vector, text_vectors

PARTS = ("text", "image", "minus")


@dataclass(frozen=True)
class Query:
    """Text, image, or both to search with.

    Attributes:
        text: description, or None.
        image: an upright RGB image, or None.
        minus: descriptions of unwanted content.
        weights: weight of ``text``, ``image`` and ``minus``; 1 by default.
    """

    text: str | None = None
    image: Image.Image | None = None
    minus: tuple[str, ...] = ()
    weights: Mapping[str, float] = field(default_factory=dict)

    def check(self) -> None:
        """Reject invalid weights, and a query with neither a text nor an image.

        Raises:
            InputError: see above.
        """
        if self.text is None and self.image is None:
            raise InputError("query", "expected a text or an image, found neither")
        for name, weight in self.weights.items():
            if name not in PARTS:
                raise InputError("weights", f"expected one of {', '.join(PARTS)}, found {name!r}")
            _check_weight(name, weight)
        parts = {"text": self.text, "image": self.image}
        if not any(self.weights.get(name, 1.0) for name, part in parts.items() if part is not None):
            raise InputError("weights", "expected a positive weight for the text or the image")


@dataclass(frozen=True)
class Filters:
    """Restrictions on the results of a search.

    Attributes:
        folder: search only names that begin with this folder and a ``/``; empty for all names.
        start_s, end_s: range of time stamps in a video, seconds, both inclusive. Images without a
            time stamp are excluded if either is set.
        least: smallest score of a result.
    """

    folder: str = ""
    start_s: float | None = None
    end_s: float | None = None
    least: float | None = None

    def check(self) -> None:
        """Reject numbers that are not finite, and an empty range.

        Raises:
            InputError: see above.
        """
        numbers = {"start": self.start_s, "end": self.end_s, "least": self.least}
        for name, number in numbers.items():
            if number is not None and not math.isfinite(number):
                raise InputError(name, f"expected a finite number, found {number}")
        if self.start_s is not None and self.end_s is not None and self.start_s > self.end_s:
            problem = f"expected at least the start, {self.start_s}, found {self.end_s}"
            raise InputError("end", problem)

    def rows(self, index: Index) -> np.ndarray | None:
        """Return the rows to search, int64, ascending; None for all rows."""
        if not self.folder and self.start_s is None and self.end_s is None:
            return None
        chosen = np.ones(index.rows, dtype=bool)
        if self.folder:
            prefix = self.folder.rstrip("/") + "/"
            chosen &= np.fromiter((n.startswith(prefix) for n in index.names), bool, index.rows)
        if self.start_s is not None or self.end_s is not None:
            low = -np.inf if self.start_s is None else self.start_s
            high = np.inf if self.end_s is None else self.end_s
            chosen &= (index.times >= low) & (index.times <= high)  # false for NaN
        return np.flatnonzero(chosen)


EVERYTHING = Filters()


@dataclass(frozen=True)
class Hit:
    """Image found by a query.

    Attributes:
        row: row in the index.
        name, path, time_s: see :class:`pab.search.index.Entry`.
        score: score that ranks the image, unless it was re-ranked.
        scores: name of each member -> its similarity.
        rerank_score: score of the reranker; None for images that were not re-ranked.
    """

    row: int
    name: str
    path: Path
    score: float
    scores: Mapping[str, float]
    time_s: float | None = None
    rerank_score: float | None = None

    @property
    def rank_score(self) -> float:
        """Score that ranks the image: the reranker's, if there is one."""
        return self.score if self.rerank_score is None else self.rerank_score


class _Parts(NamedTuple):
    """P encoded parts of a query: weights [P], negative for unwanted texts; vectors [P, D]."""

    weights: np.ndarray
    vectors: np.ndarray


class _Found(NamedTuple):
    """M rows found for one query, not always sorted: rows, scores, and members' similarities."""

    rows: np.ndarray  # int64 [M]
    scores: np.ndarray  # float32 [M]
    of_members: dict[str, np.ndarray]  # float32 [M] each


class Searcher:
    """Search an index.

    Args:
        index: the index.
        encoders: name of each member to search with -> its encoder.
        weights: name of a member -> its weight in the fusion, 1 by default.
        ann: approximate index, used if its member is the only one and no folder or time filter is
            set; None compares all rows.
        models: lock to hold while encoding; None creates one. Pass the lock that the process's
            other models use, because numeric settings apply to the whole process.

    Raises:
        InputError: a weight is negative or not finite, or names no member; all weights are 0; or
            :func:`has_one_vector` is false for the member of ``ann``.
    """

    def __init__(
        self, index: Index, encoders: Mapping[str, Encoder],
        weights: Mapping[str, float] | None = None, ann: Ann | None = None,
        models: threading.Lock | None = None,
    ) -> None:  # fmt: skip
        self.index, self.encoders, self.ann = index, dict(encoders), ann
        if ann is not None:
            encoder = self.encoders.get(ann.record.member)
            if encoder is not None:
                check_ann_member(ann.record.member, encoder)
        self._longest: dict[str, float] = {}  # upper bound of the norms of a member's rows
        given = dict(weights or {})
        for name, weight in given.items():
            if name not in self.encoders:
                known = ", ".join(self.encoders)
                raise InputError("weights", f"expected one of the members {known}, found {name!r}")
            _check_weight(name, weight)
        self.weights = {name: float(given.get(name, 1.0)) for name in self.encoders}
        if not any(self.weights.values()):
            raise InputError("weights", "expected a member with a positive weight")
        # Tokenizers and numeric settings are not thread-safe.
        self._encoding = models or threading.Lock()

    def search(
        self,
        queries: Sequence[Query],
        top_k: int = 20,
        filters: Filters = EVERYTHING,
        *,
        one_to_one: bool = False,
    ) -> list[list[Hit]]:
        """Find the best images for each query; images with equal scores are sorted by name.

        Args:
            queries: the queries.
            top_k: images per query, at least 1.
            filters: restrictions on the results.
            one_to_one: assign the first places jointly, see :func:`assigned`. The other images keep
                their order.

        Raises:
            InputError: an argument is invalid or not supported by a member, or a score is not
                finite.
        """
        if top_k < 1:
            raise InputError("top_k", f"must be at least 1, found {top_k}")
        filters.check()
        for query in queries:
            query.check()
        with self._encoding:
            parts = {name: self._encode(name, queries) for name in self.encoders}
        k = max(top_k, len(queries)) if one_to_one else top_k
        found = self._best(parts, k, filters)
        self._check_finite(found, queries)
        hits = [self._hits(one, filters) for one in found]
        if one_to_one:
            hits = assigned(hits)
        return [one[:top_k] for one in hits]

    def similar(self, row: int, top_k: int = 20, filters: Filters = EVERYTHING) -> list[Hit]:
        """Find the images most similar to a row's image, by members with one vector per image.

        Raises:
            InputError: ``top_k`` or a filter is invalid, or no member has one vector per image.
        """
        if top_k < 1:
            raise InputError("top_k", f"must be at least 1, found {top_k}")
        filters.check()
        parts = {}
        for name in self._with_one_vector():
            vector = self.index.vector(name, row)[None]
            parts[name] = [_Parts(np.ones(1, np.float32), vector)]
        hits = self._hits(self._best(parts, top_k + 1, filters)[0], filters)
        return [hit for hit in hits if hit.row != row][:top_k]

    # ------------------------------------------------------------------------------------ encoding

    def _with_one_vector(self) -> list[str]:
        names = [name for name, encoder in self.encoders.items() if has_one_vector(encoder)]
        if not names:
            raise InputError(
                "image query", "needs a member with one vector per image, found "
                f"{', '.join(self.encoders)}", todo="index the images with another member too",
            )  # fmt: skip
        return names

    def _encode(self, name: str, queries: Sequence[Query]) -> list[_Parts]:
        """Encode the parts of all queries with a member."""
        encoder = self.encoders[name]
        texts = [t for q in queries for t in ((q.text,) if q.text is not None else ()) + q.minus]
        images = [query.image for query in queries if query.image is not None]
        if images and not has_one_vector(encoder):
            raise InputError(
                "image query", f"member {name} has several vectors per image",
                todo="search with the other members only",
            )  # fmt: skip
        of_texts = iter(text_vectors(encoder, texts).numpy() if texts else ())
        of_images = iter(encoder.encode_images(images).numpy() if images else ())
        found = []
        for query in queries:
            weight = {part: float(query.weights.get(part, 1.0)) for part in PARTS}
            rows: list[tuple[float, np.ndarray]] = []
            if query.text is not None:
                rows.append((weight["text"], next(of_texts)))
            rows += [(-weight["minus"], next(of_texts)) for _ in query.minus]
            if query.image is not None:
                rows.append((weight["image"], next(of_images)))
            weights = np.array([one for one, _ in rows], dtype=np.float32)
            found.append(_Parts(weights, np.stack([vector for _, vector in rows])))
        return found

    # ------------------------------------------------------------------------------------- scoring

    def _best(self, parts: Mapping[str, list[_Parts]], k: int, filters: Filters) -> list[_Found]:
        """Find the k best rows per query; an exact search adds all rows that tie with the last."""
        rows = filters.rows(self.index)
        (first, *others) = parts
        if not others and has_one_vector(self.encoders[first]):
            vectors = [combined(one) for one in parts[first]]
            # Vectors that are not finite are reported after an exact search.
            finite = all(np.isfinite(vector).all() for vector in vectors)
            ann = self.ann if finite and rows is None else None
            if ann is not None and ann.record.member == first:
                return [_of_one(first, *ann.search(vector, k)) for vector in vectors]
            return self._best_exact(first, vectors, k, rows)
        queries = [dict(zip(parts, one, strict=True)) for one in zip(*parts.values(), strict=True)]
        return [self._best_fused(query, k, rows) for query in queries]

    def _best_exact(
        self, member: str, vectors: Sequence[np.ndarray], k: int, rows: np.ndarray | None
    ) -> list[_Found]:
        """Search one member exactly; request more rows while the k-th score equals the last."""
        if member not in self._longest:
            self._longest[member] = longest_row(self.index.blocks(member))
        found, wanted = list[_Found | None]([None] * len(vectors)), k + 1
        while missing := [number for number, one in enumerate(found) if one is None]:
            blocks = self.index.blocks(member)
            if rows is not None:
                blocks = selected(blocks, rows)
            wanting = np.stack([vectors[number] for number in missing])
            results = search_exact(blocks, wanting, wanted, self._longest[member])
            for number, scores, places in zip(missing, *results, strict=True):
                if len(scores) < wanted or scores[k - 1] != scores[-1]:
                    # NaN is kept, to be reported.
                    kept = slice(None) if len(scores) <= k else ~(scores < scores[k - 1])
                    numbers = places if rows is None else rows[places]
                    found[number] = _of_one(member, scores[kept], numbers[kept])
            wanted *= 4
        return [one for one in found if one is not None]

    def _best_fused(self, parts: Mapping[str, _Parts], k: int, rows: np.ndarray | None) -> _Found:
        """Score all rows for one query, fuse the members, and find the k best rows."""
        of_members = {name: self._all_scores(name, one) for name, one in parts.items()}
        if len(of_members) > 1:
            scores = np.zeros(self.index.rows, dtype=np.float32)
            for name, one in of_members.items():
                spread = one.max(initial=-np.inf) - one.min(initial=np.inf)
                low = one.min(initial=np.inf)
                scores += self.weights[name] * ((one - low) / (spread if spread > 0 else 1.0))
        else:
            (scores,) = of_members.values()
        places = np.arange(self.index.rows) if rows is None else rows
        best = _largest(scores[places], k)
        chosen = places[best]
        return _Found(chosen, scores[chosen], {n: one[chosen] for n, one in of_members.items()})

    def _all_scores(self, name: str, parts: _Parts) -> np.ndarray:
        """Compute one member's scores of all rows, float32 [G]."""
        encoder, found = self.encoders[name], [np.empty(0, dtype=np.float32)]
        cosine = has_one_vector(encoder)
        texts = torch.from_numpy(combined(parts)[None] if cosine else parts.vectors)
        for _, block in self.index.blocks(name):
            images = torch.from_numpy(np.asarray(block).astype(np.float32))
            scores = encoder.similarity(texts, images).numpy()
            if not cosine:
                scores = (parts.weights @ scores / np.abs(parts.weights).sum())[None]
            found.append(scores[0])
        return np.concatenate(found)

    def _check_finite(self, found: Sequence[_Found], queries: Sequence[Query]) -> None:
        for query, one in zip(queries, found, strict=True):
            for name, scores in one.of_members.items():
                if not np.isfinite(scores).all():
                    raise InputError(
                        self.encoders[name].origin.checkpoint or name,
                        "the model's scores are not finite", item=f"query {query.text!r}",
                        todo="check the checkpoint, or index with --dtype fp32",
                    )  # fmt: skip

    def _hits(self, found: _Found, filters: Filters) -> list[Hit]:
        """Convert rows to results, sorted by score, then by name."""
        hits = []
        for place, row in enumerate(found.rows.tolist()):
            score, entry = float(found.scores[place]), self.index.entry(row)
            if filters.least is not None and score < filters.least:
                continue
            scores = {name: float(one[place]) for name, one in found.of_members.items()}
            hits.append(Hit(row, entry.name, entry.path, score, scores, entry.time_s))
        return sorted(hits, key=lambda hit: (-hit.score, hit.name))


def _check_weight(name: str, weight: float) -> None:
    if not (math.isfinite(weight) and weight >= 0):
        problem = f"expected a number of at least 0, found {weight}"
        raise InputError("weights", problem, item=name)


def _of_one(member: str, scores: np.ndarray, rows: np.ndarray) -> _Found:
    """Return the rows that one member found; its similarities are the scores."""
    return _Found(rows, scores, {member: scores})


def combined(parts: _Parts) -> np.ndarray:
    """Combine the parts of a query into one vector, float32 [D].

    A single part keeps its vector; a combination is scaled to unit length.

    Raises:
        InputError: the parts cancel out.
    """
    if len(parts.weights) == 1:
        return parts.vectors[0]
    total = (parts.weights[:, None].astype(np.float64) * parts.vectors).sum(axis=0)
    length = float(np.linalg.norm(total))
    if length == 0:
        raise InputError("query", "its parts cancel out", todo="change the texts or the weights")
    return (total / length).astype(np.float32)


def assigned(hits: Sequence[list[Hit]]) -> list[list[Hit]]:
    """Choose the first image of each query so that no two queries have the same one.

    The chosen images have the largest sum of scores. If each query has at least as many results as
    there are queries, images outside the results cannot improve this sum. If the results do not
    allow distinct first images, some queries keep their order, and may share their first image.

    Args:
        hits: results per query, best first.
    """
    columns = {row: place for place, row in enumerate({hit.row: None for q in hits for hit in q})}
    if not columns:
        return [list(one) for one in hits]
    spread = max((q[0].rank_score - q[-1].rank_score for q in hits if q), default=0.0)
    lowest = min((q[-1].rank_score for q in hits if q), default=0.0)
    absent = lowest - (spread + 1.0) * (len(hits) + 1)  # never better than a listed image
    scores = np.full((len(hits), len(columns)), absent)
    for number, one in enumerate(hits):
        for hit in one:
            scores[number, columns[hit.row]] = hit.rank_score
    chosen = dict(zip(*map(np.ndarray.tolist, linear_sum_assignment(-scores)), strict=True))
    found = []
    for number, one in enumerate(hits):
        first = [hit for hit in one if columns[hit.row] == chosen.get(number)]
        found.append(first + [hit for hit in one if hit not in first])
    return found


def _largest(scores: np.ndarray, k: int) -> np.ndarray:
    """Return the places of the k largest scores and of all that tie with the last; not sorted."""
    if len(scores) <= k:
        return np.arange(len(scores))
    return np.flatnonzero(~(scores < np.partition(scores, -k)[-k]))  # keeps NaN, to be reported
