"""Fine-tune BLIP-2's first stage on PAB: `python scripts/finetune_blip2.py`.

By default, the command tunes LAVIS's `pretrain_vitL`, with LHP's views and recipe
(`pab/training/pairs.py`). `--freeze image` freezes the image tower, as in the BLIP-2 paper.
`--lora_rank 16` trains LoRA adapters.
"""

from __future__ import annotations

from functools import partial

from lhp.views import HybridView
from pab.core.errors import run_cli
from pab.encoders.blip2.finetune import TrainConfig, files_of, pair_model
from pab.training.command import training_command
from pab.training.pairs import train_pairs


def train(config: TrainConfig, command: str) -> None:
    """Run the contrastive recipe with LHP's views."""
    train_pairs(config, command, files_of(config), partial(pair_model, config, HybridView))


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and train."""
    training_command(TrainConfig, train, argv, prog="python scripts/finetune_blip2.py")


if __name__ == "__main__":
    run_cli(main)
