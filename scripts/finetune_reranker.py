"""Tune a vision-language reranker: `python scripts/finetune_reranker.py`.

The reranker learns from questions: each has a caption, its right image, and wrong images. The
questions come from `python -m ensemble.mine` (`--pairs`), or from all training pairs with their
twins. The tuned model is written to `OUTPUT_DIR/model`; pass this folder to
`scripts/rerank_infer.py --model`. The recipe is in `pab/encoders/st/tune_reranker.py`.
"""

from __future__ import annotations

from pab.core.errors import run_cli
from pab.encoders.st.tune_reranker import TrainConfig, train
from pab.training.command import training_command


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and train."""
    training_command(TrainConfig, train, argv, prog="python scripts/finetune_reranker.py")


if __name__ == "__main__":
    run_cli(main)
