"""Settings of LHP's fine-tuning, with unit and origin of every number.

The defaults are the published recipe (the release's command; the paper trains 3 epochs).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pab.core.config import flag
from pab.training.config import ContrastiveConfig


@dataclass(frozen=True)
class TrainConfig(ContrastiveConfig):
    """Settings of LHP's fine-tuning; each field is a flag of `python -m lhp.train`."""

    # Model
    model: str = flag("beit3_large_patch16_384", "architecture, beit3_SIZE_patchP_RESOLUTION")
    task: Literal["pab", "356"] = flag("pab", "task name; 356 is the release's name for pab")
    input_size: int = flag(384, "side of the square input, pixels")
    drop_path: float = flag(0.16, "stochastic depth rate of the last block")
    checkpoint_activations: bool = flag(False, "recompute blocks in the backward pass")
    finetune: str = flag("", "checkpoint to start from; empty: random weights")
    sentencepiece_model: str = flag("checkpoints/lhp/beit3.spm", "SentencePiece model")
    max_text_length: int = flag(64, "maximum token ids per caption, including both special tokens")

    # Optimization
    batch_size: int = flag(184, "pairs per process and step")
    epochs: int = flag(4, "passes over the data (release 4, paper 3)")
    weight_decay: float = flag(0.05, "AdamW weight decay")

    # Run
    output_dir: str = flag("output/lhp", "folder for checkpoints and the log")

    def check(self) -> None:
        """See :class:`ContrastiveConfig`.

        Raises:
            InputError: naming the flag.
        """
        super().check()
        self.check_least(1, "input_size")
        self.check_least(3, "max_text_length")
        self.check_share("drop_path", below_one=True)
