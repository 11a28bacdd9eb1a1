"""Settings of LHP's fine-tuning.

The numeric defaults are those of the released command (4 epochs; the paper trains for 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pab.core.config import advanced_flag, flag, model_flag, speed_flag
from pab.training.config import ContrastiveConfig


@dataclass(frozen=True)
class TrainConfig(ContrastiveConfig):
    """Settings of LHP's fine-tuning; each field is a flag of `python -m lhp.train`."""

    # Model
    model: str = model_flag("beit3_large_patch16_384", "architecture, beit3_SIZE_patchP_RESOLUTION")
    task: Literal["pab", "356"] = advanced_flag(
        "pab", "task name; 356 is the release's name for pab"
    )
    input_size: int = model_flag(384, "side of the square input, pixels", ge=1)
    drop_path: float = flag(0.16, "stochastic depth rate of the last block", ge=0, lt=1)
    checkpoint_activations: bool = speed_flag(
        False, "recompute blocks in the backward pass, to save memory"
    )
    compile: bool = speed_flag(
        False, "compile the blocks with torch.compile; slows the first steps"
    )
    finetune: str = model_flag("", "checkpoint to start from; empty: random weights")
    sentencepiece_model: str = model_flag("checkpoints/lhp/beit3.spm", "SentencePiece model")
    max_text_length: int = model_flag(
        64, "maximum token ids per caption, including both special tokens", ge=3
    )

    # Optimization
    batch_size: int = flag(184, "pairs per process and batch")
    epochs: int = flag(4, "passes over the data (release 4, paper 3)")
    weight_decay: float = flag(0.05, "AdamW weight decay")

    # Run
    output_dir: str = flag("output/lhp", "folder of the checkpoints and the log")
