"""Settings of the fusion: which score files, which weights, what to write."""

from __future__ import annotations

from dataclasses import dataclass

from ensemble.fuse import Member, parse_member
from pab.config import flag


@dataclass(frozen=True)
class FusionConfig:
    """Members in the published order; each field is a flag of `python -m ensemble.run`.

    `S` starts with the first member given. `beit3_weight` is what `S` keeps when UIT comes in,
    `blip2_weight` when BLIP-2 does, `clip_weight` when CLIP does.
    """

    beit3_score: str | None = flag(None, "LHP's score file")
    uit_score: str | None = flag(None, "UIT's score file")
    blip2_score: str | None = flag(None, "BLIP-2's score file")
    clip_score: str | None = flag(None, "CLIP's score file")
    member: tuple[str, ...] = flag((), "another member, NAME=FILE:WEIGHT; may be repeated")
    beit3_weight: float = flag(0.925, "what the fused scores keep when UIT comes in")
    blip2_weight: float = flag(0.9, "what they keep when BLIP-2 comes in")
    clip_weight: float = flag(0.9, "what they keep when CLIP comes in")
    member_weights: tuple[str, ...] = flag((), "NAME:WEIGHT of members given as NAME=FILE")
    chosen_on: str | None = flag(None, "where the weights were chosen (written by the search)")
    chosen_on_test: bool = flag(False, "they were chosen on a test set (written by the search)")

    def members(self) -> list[Member]:
        """The members that are given, in the order of the fusion.

        Raises:
            InputError: a ``--member`` of another form.
        """
        published = (
            ("lhp", self.beit3_score, 1.0),
            ("uit", self.uit_score, self.beit3_weight),
            ("blip2", self.blip2_score, self.blip2_weight),
            ("clip", self.clip_score, self.clip_weight),
        )
        found = [Member(name, path, weight) for name, path, weight in published if path]
        return found + [parse_member(text, self.member_weights) for text in self.member]
