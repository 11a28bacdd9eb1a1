"""Scoring settings shared by CLIP and BLIP-2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pab.core.config import flag
from pab.core.precision import FASTEST_HELP
from pab.scoring.job import MemberConfig


@dataclass(frozen=True)
class EncoderConfig(MemberConfig):
    """Scoring settings of both members; the default dtype depends on the device, as published."""

    dtype: Literal["auto", "fp32", "bf16", "fp16", "fastest"] = flag(  # type: ignore[assignment]
        "auto", "dtype of the model; auto: fp16 on a CUDA GPU, else fp32 (published); "
        + FASTEST_HELP
    )  # fmt: skip
