"""The published fusion: one score matrix after the other, each scaled to [0, 1] by its own range.

`S <- w S + (1 - w) T`, with `S` the scaled matrix of the first member and `T` that of the next.
Everything is aligned by id before anything is added.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pab.errors import InputError
from pab.scores import ScoreFile, align, load_scores

ROWS_A_BLOCK = 256  # rows of a memory-mapped matrix read at a time


@dataclass(frozen=True)
class Member:
    """One model's score file and its part in the fusion.

    Attributes:
        name: how tables call it.
        path: the score file.
        weight: what `S` keeps when this member comes in, 0 to 1; of no use for the first member.
    """

    name: str
    path: str
    weight: float


def parse_member(text: str, weights: Sequence[str] = ()) -> Member:
    """``NAME=FILE:WEIGHT``, or ``NAME=FILE`` where ``weights`` (``NAME:WEIGHT``) has the name.

    Raises:
        InputError: another form, or no weight.
    """
    match = re.fullmatch(r"([^=]+)=(.+?)(?::([^:/\\]+))?", text)
    if match is None:
        raise InputError("--member", f"expected NAME=FILE:WEIGHT, found {text!r}")
    name, path, weight = match.groups()
    if weight is None:
        known = dict(one.rsplit(":", 1) for one in weights if ":" in one)
        if name not in known:
            raise InputError("--member", f"expected NAME=FILE:WEIGHT, found no weight for {name!r}")
        weight = known[name]
    try:
        value = float(weight)
    except ValueError as error:
        raise InputError(
            "--member", f"expected a number as the weight of {name!r}, found {weight!r}"
        ) from error
    return Member(name, path, value)


def load_members(members: Sequence[Member]) -> list[ScoreFile]:
    """The members' score files, rows and columns in the order of the first.

    Raises:
        InputError: no member, a name twice, a weight outside [0, 1], a file that is none, or ids
            that are not exactly the first one's.
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
    files = [load_scores(member.path) for member in members]
    first = Path(members[0].path)
    return files[:1] + [
        align(file, files[0], where=member.path, reference_name=str(first))
        for file, member in zip(files[1:], members[1:], strict=True)
    ]


def scaled(scores: Tensor, where: str) -> Tensor:
    """A matrix [Q, G] scaled to [0, 1] by its own least and largest entry, float32.

    Raises:
        InputError: all entries are equal.
    """
    result = torch.empty(scores.shape, dtype=torch.float32)
    low, high = float(scores.min()), float(scores.max())
    if low == high:
        raise InputError(where, f"all its scores are {low:g}: they rank nothing")
    for start in range(0, len(scores), ROWS_A_BLOCK):
        rows = slice(start, start + ROWS_A_BLOCK)
        result[rows] = (scores[rows] - low) / (high - low)
    return result


def blend(fused: Tensor, member: Tensor, weight: float) -> Tensor:
    """One step of the fusion: what `S` keeps is ``weight``; both scaled, [Q, G]."""
    return weight * fused + (1.0 - weight) * member


def fuse(files: Sequence[ScoreFile], members: Sequence[Member]) -> Tensor:
    """The fused matrix of aligned score files, float32 [Q, G].

    Raises:
        InputError: a member's scores are all equal.
    """
    fused = scaled(files[0].scores, members[0].path)
    for file, member in zip(files[1:], members[1:], strict=True):
        fused = blend(fused, scaled(file.scores, member.path), member.weight)
    return fused
