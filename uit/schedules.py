"""UIT's learning-rate schedules: each maps a step to a multiplier of the peak learning rate.

Source: the method's release (`step` as released, `cosine` as in the paper).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

Schedule = Literal["step", "linear", "cosine"]
WARMUP_STEPS = 500  # of `step` and `linear`
DROPS = ((7, 0.2), (4, 0.5))  # `step`: (multiple of the warm-up, factor from there on)
COSINE_WARMUP_SHARE = 0.02  # fraction of all steps
COSINE_END = 0.1  # multiplier at the end of the run


def multiplier(
    kind: Schedule, total_steps: int, warmup_steps: int = WARMUP_STEPS
) -> Callable[[int], float]:
    """Return the multiplier as a function of the step, 0 to ``total_steps`` - 1.

    Args:
        kind: ``linear`` rises in the warm-up and decays to 0. ``step`` multiplies ``linear`` by 0.5
            from 4 times the warm-up, and by 0.2 from 7 times. ``cosine`` warms up in 2 % of the
            steps and ends at 0.1.
        total_steps: number of updates of the whole run.
        warmup_steps: warm-up of ``linear`` and ``step``, at most ``total_steps``.
    """

    def linear(step: int) -> float:
        if step < warmup_steps:
            return step / max(1, warmup_steps)
        return max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))

    def stepped(step: int) -> float:
        factor = next((f for times, f in DROPS if step >= times * warmup_steps), 1.0)
        return linear(step) * factor

    def cosine(step: int) -> float:
        warmup = int(COSINE_WARMUP_SHARE * total_steps)
        if step < warmup:
            return step / warmup
        progress = (step - warmup) / max(1, total_steps - warmup)
        return COSINE_END + (1 - COSINE_END) * 0.5 * (1 + math.cos(math.pi * progress))

    return {"step": stepped, "linear": linear, "cosine": cosine}[kind]
