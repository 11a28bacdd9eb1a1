"""Settings of the fusion: which members, how they are scaled and added, how the sum is decoded."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from ensemble.decode import DecodeSettings
from ensemble.fuse import (
    RECIPROCAL_RANK_K,
    Member,
    named_numbers,
    parse_member,
    without_weight,
)
from pab.config import flag
from pab.errors import InputError


@dataclass(frozen=True)
class FusionConfig:
    """Members in the published order; each field is a flag of `python -m ensemble.run`.

    `S` starts with the first member given. `beit3_weight` is what `S` keeps when UIT comes in,
    `blip2_weight` when BLIP-2 does, `clip_weight` when CLIP does.
    """

    beit3_score: str | None = flag(None, "LHP's score file, or its ranked list (.txt)")
    uit_score: str | None = flag(None, "UIT's score file, or its ranked list")
    blip2_score: str | None = flag(None, "BLIP-2's score file, or its ranked list")
    clip_score: str | None = flag(None, "CLIP's score file, or its ranked list")
    member: tuple[str, ...] = flag((), "another member, NAME=FILE:WEIGHT; may be repeated")
    beit3_weight: float = flag(0.925, "what the fused scores keep when UIT comes in")
    blip2_weight: float = flag(0.9, "what they keep when BLIP-2 comes in")
    clip_weight: float = flag(0.9, "what they keep when CLIP comes in")
    member_weights: tuple[str, ...] = flag((), "NAME:WEIGHT of members given as NAME=FILE")
    uit_k: int | None = flag(
        None, "candidates per query that UIT's scores must be made with; none: not compared"
    )
    scaling: Literal["minmax", "minmax_query", "zscore", "rank"] = flag(
        "minmax", "scale of members: by the matrix's bounds (published), or row by row"
    )
    fusion: Literal["iterative", "sum", "reciprocal_rank"] = flag(
        "iterative",
        "one member after the other (published), one sum by --shares, or sum of 1/(k+r)",
    )
    shares: tuple[str, ...] = flag(
        (), "--fusion sum: NAME:SHARE of every member (lhp, uit, blip2, clip, ...), adding up to 1"
    )
    rank_k: int = flag(RECIPROCAL_RANK_K, "k of --fusion reciprocal_rank")
    decode: Literal["none", "querybank", "dual_softmax", "sinkhorn", "assignment"] = flag(
        "none", "none and querybank rank each query alone; the others all queries jointly"
    )
    decode_factor: float = flag(20.0, "factor on scores in querybank, dual_softmax and sinkhorn")
    decode_slack: float | None = flag(
        None, "assignment: price of keeping one's own first choice; none: every query takes part"
    )
    decode_bank: str | None = flag(
        None, "querybank: score file of other captions on the gallery, fused as these are"
    )
    sinkhorn_steps: int = flag(50, "pairs of normalisations of sinkhorn")
    chosen_on: str | None = flag(None, "where the weights were chosen (written by the search)")
    chosen_on_test: bool = flag(False, "they were chosen on a test set (written by the search)")

    def check(self) -> None:
        """Refuse values that make no sense alone or together.

        Raises:
            InputError: naming the flag.
        """
        if self.uit_k is not None and self.uit_k < 1:
            raise InputError("--uit_k", f"must be at least 1, found {self.uit_k}")
        if self.rank_k < 0:
            raise InputError("--rank_k", f"must not be negative, found {self.rank_k}")
        if self.shares and self.fusion != "sum":
            raise InputError("--shares", f"does not go with --fusion {self.fusion}")
        if not self.decode_factor > 0:
            raise InputError("--decode_factor", f"must be above 0, found {self.decode_factor}")
        if self.decode_slack is not None and not 0 <= self.decode_slack < math.inf:
            raise InputError("--decode_slack", f"must be 0 or more, found {self.decode_slack}")
        if self.decode_slack is not None and self.decode != "assignment":
            raise InputError("--decode_slack", f"does not go with --decode {self.decode}")
        if self.decode == "dual_softmax" and self.scaling == "zscore":
            raise InputError(
                "--scaling", "zscore has negative scores, which dual_softmax would turn round"
            )
        if self.sinkhorn_steps < 1:
            raise InputError("--sinkhorn_steps", f"must be at least 1, found {self.sinkhorn_steps}")
        if (self.decode == "querybank") != (self.decode_bank is not None):
            raise InputError(
                "--decode_bank",
                "goes with --decode querybank, and that with it",
                todo="score training captions on the same gallery, and fuse them as these are",
            )

    def decoding(self) -> DecodeSettings:
        """How the fused matrix is decoded."""
        return DecodeSettings(
            self.decode, self.decode_factor, self.decode_slack, self.decode_bank,
            self.sinkhorn_steps,
        )  # fmt: skip

    def members(self) -> list[Member]:
        """The members that are given, in the order of the fusion.

        Raises:
            InputError: a ``--member`` of another form, or a share that is missing.
        """
        published = (
            ("lhp", self.beit3_score, 1.0),
            ("uit", self.uit_score, self.beit3_weight),
            ("blip2", self.blip2_score, self.blip2_weight),
            ("clip", self.clip_score, self.clip_weight),
        )
        found = [Member(name, path, weight) for name, path, weight in published if path]
        weights = named_numbers("--member_weights", self.member_weights)
        if self.fusion == "iterative":
            return found + [parse_member(text, weights) for text in self.member]
        # Weights of the published rule mean nothing in the others: none need be given.
        for text in self.member:
            weights.setdefault(text.partition("=")[0], 1.0)
        found += [parse_member(without_weight(text), weights) for text in self.member]
        if self.fusion == "reciprocal_rank":
            return found
        shares = named_numbers("--shares", self.shares)
        missing = [member.name for member in found if member.name not in shares]
        extra = sorted(shares.keys() - {member.name for member in found})
        if missing or extra:
            raise InputError(
                "--shares",
                f"expected NAME:SHARE of every member, found "
                f"{'none of ' + missing[0] if missing else 'one of no member, ' + extra[0]}",
            )
        return [replace(member, weight=shares[member.name]) for member in found]
