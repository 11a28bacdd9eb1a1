"""Scoring code shared by CLIP and BLIP-2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from pab.core.config import flag
from pab.core.devices import autocast, dtype_of, keep_freed_memory, pick_device
from pab.scoring.job import ScoringConfig


@dataclass(frozen=True)
class EncoderConfig(ScoringConfig):
    """Flags of both scripts; the default number format depends on the device, as published."""

    dtype: Literal["auto", "fp32", "bf16", "fp16"] = flag(  # type: ignore[assignment]
        "auto", "number format of the model; auto: fp16 on a GPU, else fp32 (published)"
    )


def device_and_dtype(config: EncoderConfig) -> tuple[torch.device, torch.dtype, str]:
    """Select the device and the number format, as a dtype and by name.

    On a CPU, the process keeps freed memory from then on.

    Raises:
        InputError: the device does not exist or cannot run the format.
    """
    device = pick_device(config.device)
    name: str = config.dtype
    if name == "auto":
        name = "fp16" if device.type == "cuda" else "fp32"
    dtype = dtype_of(name)
    autocast(device, dtype)  # rejects a format that this device cannot run
    keep_freed_memory(device)
    return device, dtype, name
