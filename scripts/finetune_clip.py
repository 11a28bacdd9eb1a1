"""Fine-tune CLIP on PAB: `python scripts/finetune_clip.py`.

The command tunes any OpenCLIP model (`--model`, `--pretrained`) with LHP's views and recipe
(`pab/training/pairs.py`). For a large tower, use `--lora_rank 16`; to freeze a tower, use
`--freeze image` or `--freeze text`.
"""

from __future__ import annotations

from functools import partial

from lhp.views import HybridView
from pab.core.errors import run_cli
from pab.encoders.clip.finetune import TrainConfig, files_of, pair_model
from pab.training.command import training_command
from pab.training.pairs import train_pairs


def train(config: TrainConfig, command: str) -> None:
    """Run the contrastive recipe with LHP's views."""
    train_pairs(config, command, files_of(config), partial(pair_model, config, HybridView))


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and train."""
    training_command(TrainConfig, train, argv, prog="python scripts/finetune_clip.py")


if __name__ == "__main__":
    run_cli(main)
