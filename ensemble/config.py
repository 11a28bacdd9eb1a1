"""Settings of the fusion: members, scaling, fusion rule, and decodings of the fused matrix."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from ensemble.decode import LOGARITHMS, DecodeSettings, Decoding
from ensemble.fuse import RECIPROCAL_RANK_K
from ensemble.members import Member, named_numbers, parse_member, without_weight
from ensemble.reciprocal_rank import MOST_RANK_K
from pab.core.config import data_flag, flag, model_flag
from pab.core.errors import InputError
from pab.core.notices import notice
from pab.data.annotations import read_retrieval
from pab.data.label_config import LabelConfig
from pab.data.records import Retrieval

LARGEST_FACTOR = 1e6  # larger factors exceed the resolution of float32 scores


@dataclass(frozen=True)
class FusionConfig(LabelConfig):
    """Settings shared by `ensemble.run` and `ensemble.search`; each field is a flag.

    The running sum starts with the first given member. `beit3_weight` is the weight kept by the
    running sum when UIT is added, `blip2_weight` when BLIP-2 is added, `clip_weight` when CLIP is.
    """

    finds_weights: ClassVar[bool] = False  # true if the command searches for the weights

    beit3_score: str | None = data_flag(None, "LHP's scores, in any form (docs/scoring.md)")
    uit_score: str | None = data_flag(None, "UIT's scores, in any form")
    blip2_score: str | None = data_flag(None, "BLIP-2's scores, in any form")
    clip_score: str | None = data_flag(None, "CLIP's scores, in any form")
    member: tuple[str, ...] = data_flag(
        (),
        "another member, NAME=FILE:WEIGHT (weight kept by the running sum); repeatable",
    )
    beit3_weight: float = model_flag(0.925, "weight kept by the running sum when UIT is added")
    blip2_weight: float = model_flag(0.9, "weight kept by the running sum when BLIP-2 is added")
    clip_weight: float = model_flag(0.9, "weight kept by the running sum when CLIP is added")
    member_weights: tuple[str, ...] = model_flag(
        (), "NAME:WEIGHT of each member given as NAME=FILE"
    )
    uit_k: int | None = flag(
        None, "expected number of candidates per query in UIT's score file; none: no check", ge=1
    )
    scaling: Literal["minmax", "minmax_query", "zscore", "rank"] = model_flag(
        "minmax", "scaling of each member: over the whole matrix (minmax, published) or per row"
    )
    fusion: Literal["iterative", "sum", "reciprocal_rank"] = model_flag(
        "iterative",
        "add members one by one (published), sum them by --shares, or sum 1/(k + rank)",
    )
    shares: tuple[str, ...] = model_flag(
        (), "--fusion sum: NAME:SHARE of every member (lhp, uit, blip2, clip, ...), summing to 1"
    )
    rank_k: int = flag(RECIPROCAL_RANK_K, "k of --fusion reciprocal_rank", ge=0, le=MOST_RANK_K)
    decode: tuple[Decoding, ...] = model_flag(
        (), "none, querybank (per query), dual_softmax, sinkhorn, margin, assignment (joint); "
        "several are applied in the order given"
    )  # fmt: skip
    decode_factor: float = flag(
        20.0, "scale of scores in querybank, dual_softmax and sinkhorn", gt=0, le=LARGEST_FACTOR
    )
    decode_slack: float | None = flag(
        None, "assignment: price of opting out (keeping the top-1 image); none: no opting out",
        ge=0, le=LARGEST_FACTOR,
    )  # fmt: skip
    decode_top: int | None = flag(None, "assignment: number of images considered per query", ge=1)
    decode_scope: Literal["all", "collisions"] = flag(
        "all", "assignment: over all queries, or only those connected to a duplicate top-1 image"
    )
    decode_tau: float = flag(
        0.5, "margin: a query whose margin is smaller by more than this loses a shared top-1 image",
        ge=0, le=LARGEST_FACTOR,
    )  # fmt: skip
    decode_bank: str | None = flag(
        None, "querybank: score file of other captions on the same gallery, fused in the same way"
    )
    sinkhorn_steps: int = flag(50, "pairs of row and column normalizations in sinkhorn", ge=1)
    rerank: tuple[str, ...] = model_flag(
        (), "reranker's scores, NAME=FILE; they reorder the first images of each query"
    )
    chosen_on: str | None = flag(None, "data on which the weights were chosen (set by the search)")
    chosen_on_test: bool = flag(False, "weights were chosen on a test set (set by the search)")
    queries: str | None = data_flag(
        None, "for members without ids: query ids of the rows, one per line, or query.json"
    )
    gallery: str | None = data_flag(
        None, "for members without ids: image names of the columns, or the gallery's folder"
    )
    annotation: str | None = data_flag(None, "queries, with labels if there are any")
    answers: str | None = data_flag(None, "answer key of a name-masked set, for metrics")
    image_folder: str | None = data_flag(
        None, "root of the annotation's image paths, if it is outside an annotation folder"
    )

    def check(self) -> None:
        """Reject values that are invalid alone or in combination; the error names the flag."""
        if self.shares and self.fusion != "sum":
            raise InputError("--shares", f"cannot be used with --fusion {self.fusion}")
        if self.fusion == "reciprocal_rank" and self.scaling != "minmax":
            notice("--scaling", "has no effect with --fusion reciprocal_rank")
        self._check_decodings()

    def _check_decodings(self) -> None:
        """Reject decodings that contradict one another or other settings."""
        methods = [method for method in self.decode if method != "none"]
        if methods and len(methods) < len(self.decode):
            raise InputError("--decode", f"none cannot be combined with {methods[0]}")
        if self.decode and not methods:
            return  # decoding is off: ignore a config file's decoding settings
        used = " ".join(methods) or "none"
        unset = {
            "decode_slack": ("assignment", None),
            "decode_top": ("assignment", None),
            "decode_scope": ("assignment", "all"),
            "decode_bank": ("querybank", None),
        }
        for name, (method, default) in unset.items():
            if method not in methods and getattr(self, name) != default:
                off = f"pass --{name} {default or 'none'}"
                raise InputError(
                    f"--{name}", f"cannot be used with --decode {used}",
                    todo=f"add {method} to --decode, or, if a config sets it, {off}",
                )  # fmt: skip
        searched = self.finds_weights  # the search also chooses the slack
        if self.decode_top is not None and self.decode_slack is None and not searched:
            raise InputError(
                "--decode_top", "needs --decode_slack",
                todo="set the price of keeping a duplicate top-1 image",
            )  # fmt: skip
        if self.decode_scope == "collisions" and self.decode_top is None:
            raise InputError(
                "--decode_scope", "collisions needs --decode_top and --decode_slack",
                todo="set both, for example to 2 and 1.0",
            )  # fmt: skip
        if "querybank" in methods and self.decode_bank is None:
            raise InputError(
                "--decode_bank", "expected together with --decode querybank",
                todo="score training captions on the same gallery, and fuse them in the same way",
            )  # fmt: skip
        if "dual_softmax" not in methods:
            return
        if self.scaling == "zscore" and self.fusion != "reciprocal_rank":
            raise InputError(
                "--scaling", "zscore yields negative scores, which dual_softmax would order wrongly"
            )
        last = len(methods) - 1 - methods[::-1].index("dual_softmax")
        earlier = LOGARITHMS.intersection(methods[:last])
        if earlier:
            raise InputError(
                "--decode",
                f"dual_softmax cannot follow {sorted(earlier)[0]}, which returns logarithms",
            )

    def check_reranker(self, depth: int, flag_name: str) -> None:
        """Reject several rerankers, and an assignment over more images than a reranker reorders.

        Args:
            depth: smallest number of images per query that the reranker reorders.
            flag_name: flag that sets the depth, for the error.
        """
        if len(self.rerank) > 1:
            raise InputError(
                "--rerank", f"expected one reranker, found {len(self.rerank)}",
                todo="fuse their score files first: ensemble.run --fusion sum --save_score FILE",
            )  # fmt: skip
        top = self.decode_top
        too_deep = top is None or top > depth
        if self.rerank and "assignment" in self.decode and too_deep:
            slack = "" if self.finds_weights else ", and set --decode_slack"
            raise InputError(
                "--decode_top", "an assignment after --rerank sums reranker scores, but images "
                f"after place {depth} of a query have none ({flag_name}); found {top or 'none'}",
                todo=f"set --decode_top to at most {depth}{slack}",
            )  # fmt: skip

    def reranker(self) -> Member | None:
        """Return the reranker's name and file; None without a reranker.

        Raises:
            InputError: not ``NAME=FILE``.
        """
        if not self.rerank:
            return None
        name, sign, path = self.rerank[0].partition("=")
        if not (name and sign and path):
            raise InputError("--rerank", f"expected NAME=FILE, found {self.rerank[0]!r}")
        return Member(name, path, 1.0)

    def retrieval(self) -> Retrieval:
        """Read the annotation, with its labels if it has any."""
        assert self.annotation
        return read_retrieval(
            self.annotation, image_folder=self.image_folder, answers=self.answers, **self.reading()
        )

    def decodings(self) -> list[DecodeSettings]:
        """Return the decodings of the fused matrix, in order of application."""
        return [
            DecodeSettings(
                method, self.decode_factor, self.decode_slack, self.decode_bank,
                self.sinkhorn_steps, self.decode_tau, self.decode_top, self.decode_scope,
            )
            for method in self.decode
            if method != "none"
        ]  # fmt: skip

    def members(self) -> list[Member]:
        """Return the given members in fusion order.

        The first member needs no weight. In a search, and with the rules ``sum`` (which uses
        shares) and ``reciprocal_rank``, no member needs one.

        Raises:
            InputError: members, weights or shares are malformed or do not match.
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
            for number, text in enumerate(self.member):
                first = not found and number == 0
                default = 1.0 if first or self.finds_weights else None
                found.append(parse_member(text, weights, default))
            given = {member.name for member in found}
            flags = {"uit": "beit3_weight", "blip2": "blip2_weight", "clip": "clip_weight"}
            others = {text.partition("=")[0] for text in self.member}
            for name in sorted(weights.keys() & flags.keys() & given - others):
                raise InputError(
                    "--member_weights", f"{name!r} is not a --member", todo=f"set --{flags[name]}"
                )
            unknown = sorted(weights.keys() - given)
            if unknown:
                notice("--member_weights", f"no --member has the name {unknown[0]!r}: ignored")
            return found
        if weights or any(text != without_weight(text) for text in self.member):
            notice("--member", f"weights have no effect with --fusion {self.fusion}")
        found += [parse_member(without_weight(text), default=1.0) for text in self.member]
        if self.fusion == "reciprocal_rank":
            return found
        shares = named_numbers("--shares", self.shares)
        missing = [member.name for member in found if member.name not in shares]
        extra = sorted(shares.keys() - {member.name for member in found})
        if missing or extra:
            raise InputError(
                "--shares",
                f"expected NAME:SHARE for every member, found "
                f"{'none for ' + missing[0] if missing else extra[0] + ', which is not a member'}",
            )
        return [replace(member, weight=shares[member.name]) for member in found]
