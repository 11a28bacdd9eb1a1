"""Divide queries into parts, and join the score files of the parts."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from pab.core.counts import counted
from pab.core.errors import InputError
from pab.formats.score_file import ScoreFile

PART, PART_OF = "part", "part_of"  # entries of meta: "I/N", and the number of queries of all parts
# Entries of meta that may differ between parts: the number of the part, and entries that may be
# paths. Checkpoints are compared by hash.
LOCAL = (PART, "checkpoint", "candidates", "model")
NAMES_SHOWN = 5


@dataclass(frozen=True)
class Part:
    """Part ``number`` (from 1) of ``count`` parts of the queries."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str, where: str | Path = "--part") -> Part:
        """Parse ``I/N``.

        Raises:
            InputError: the text has another form, or I is not between 1 and N; the message names
                ``where``.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise InputError(where, f"expected I/N with I from 1 to N, such as 3/8, found {text!r}")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def rows(self, queries: int) -> range:
        """Return the consecutive rows of this part; sizes of parts differ by one at most.

        Raises:
            InputError: there are fewer queries than parts.
        """
        if queries < self.count:
            raise InputError("--part", f"expected at most one part per query ({queries}), "
                             f"found {self.count}")  # fmt: skip
        return range((self.number - 1) * queries // self.count, self.number * queries // self.count)


def merge_parts(files: Mapping[Path, ScoreFile]) -> ScoreFile:
    """Join the parts of a score file; the rows have the order of a run without parts.

    Args:
        files: path -> part, in any order.

    Raises:
        InputError: a file is not a part, a part is missing or given twice, or a query is missing or
            repeated. The files differ in the number of parts, images, model, settings or data.
    """
    parts = {path: _part_of(path, file) for path, file in files.items()}
    paths = sorted(parts, key=lambda path: parts[path].number)
    first, count = paths[0], parts[paths[0]].count
    for path in paths:
        _check_equal(path, files[path], first, files[first])
        if parts[path].count != count:
            raise InputError(
                path, f"is part {parts[path]}, but {first} is part {parts[first]}",
                todo="merge the parts of a single division",
            )  # fmt: skip
    numbers = Counter(part.number for part in parts.values())
    if missing := [number for number in range(1, count + 1) if number not in numbers]:
        listed = ", ".join(f"{number}/{count}" for number in missing[:NAMES_SHOWN])
        raise InputError(
            "merge", f"expected {count} parts, found {len(files)}; missing: {listed}",
            todo="score the missing parts with --part",
        )  # fmt: skip
    for before, path in itertools.pairwise(paths):
        if parts[before] == parts[path]:
            raise InputError(path, f"is part {parts[path]}, as is {before}", todo="leave one out")
    ids = [query_id for path in paths for query_id in files[path].query_ids]
    double = [query_id for query_id, number in Counter(ids).items() if number > 1]
    total = files[first].meta.get(PART_OF)
    if double or len(ids) != total:
        found = f"query {double[0]!r} twice" if double else str(len(ids))
        raise InputError("merge", f"expected {total} different queries in all parts, found {found}")
    meta = {key: value for key, value in files[first].meta.items() if key not in (PART, PART_OF)}
    scores = torch.cat([files[path].scores for path in paths])
    return ScoreFile(scores, ids, list(files[first].gallery_ids), meta)


def _part_of(path: Path, file: ScoreFile) -> Part:
    """Read from a file's ``meta`` which part the file is."""
    text = file.meta.get(PART)
    if not isinstance(text, str):
        raise InputError(
            path, "expected a part of a score file, found no part in its meta",
            todo="make parts with --part I/N",
        )  # fmt: skip
    return Part.parse(text, path)


def _check_equal(path: Path, file: ScoreFile, first: Path, reference: ScoreFile) -> None:
    """Reject a part whose gallery, model, settings or data differ from those of the first part."""
    if file.gallery_ids != reference.gallery_ids:
        odd = sorted(set(file.gallery_ids) ^ set(reference.gallery_ids))[0]
        wanted = counted(len(reference.gallery_ids), "image")
        found = counted(len(file.gallery_ids), "image")
        raise InputError(
            path, f"expected the gallery of {first} ({wanted}), found {found}",
            item=f"image {odd!r}", todo="score all parts with the same gallery",
        )  # fmt: skip
    for key in sorted({*file.meta, *reference.meta} - set(LOCAL)):
        mine, other = file.meta.get(key), reference.meta.get(key)
        if mine != other:
            raise InputError(
                path, f"expected {other!r} as in {first}, found {mine!r}", item=f"meta, {key!r}",
                todo="score all parts with the same model, settings and data",
            )  # fmt: skip
