"""Tune a late-interaction embedder on PAB: `python scripts/finetune_embedder.py`.

`--model` is the folder or hub id of a `MultiVectorEncoder` of sentence-transformers. The tuned
model is written to `OUTPUT_DIR/model`, in the same format. The recipe is in
`pab/encoders/st/tune_embedder.py`.
"""

from __future__ import annotations

from pab.core.errors import run_cli
from pab.encoders.st.tune_embedder import TrainConfig, train
from pab.training.command import training_command


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and train."""
    training_command(TrainConfig, train, argv, prog="python scripts/finetune_embedder.py")


if __name__ == "__main__":
    run_cli(main)
