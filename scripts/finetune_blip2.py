"""Fine-tune BLIP-2's first stage on PAB: `python scripts/finetune_blip2.py`.

Tunes LAVIS's `pretrain_vitL` with LHP's views and recipe (`pab/training/pairs.py`). `--freeze
image` is BLIP-2's own setting; `--lora_rank 16` trains only low-rank updates.
"""

from __future__ import annotations

from functools import partial

from lhp.views import HybridView
from pab.core.errors import run_cli
from pab.encoders.blip2.finetune import TrainConfig, train
from pab.training.command import training_command


def main(argv: list[str] | None = None) -> None:
    """Read the command line and train."""
    training_command(
        TrainConfig,
        partial(train, view=HybridView),
        argv,
        prog="python scripts/finetune_blip2.py",
        description="Fine-tune BLIP-2 with the local-global hybrid perspective.",
    )


if __name__ == "__main__":
    run_cli(main)
