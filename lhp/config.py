"""Settings of LHP's fine-tuning and scoring: every number of the recipe, with its unit and origin.

The defaults are the published recipe (the command of the release; the paper trains 3 epochs).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pab.config import flag
from pab.errors import InputError
from pab.training_config import TrainingConfig


@dataclass(frozen=True)
class TrainConfig(TrainingConfig):
    """Fine-tuning of LHP; each field is a flag of `python -m lhp.train`."""

    # Model
    model: str = flag("beit3_large_patch16_384", "architecture, beit3_SIZE_patchP_RESOLUTION")
    task: Literal["pab", "356"] = flag("pab", "the task; 356 is the released code's name for pab")
    input_size: int = flag(384, "side of the square input, pixels")
    drop_path: float = flag(0.16, "stochastic depth of the last block")
    checkpoint_activations: bool = flag(False, "recompute blocks in the backward pass")
    finetune: str = flag("", "checkpoint to start from; empty starts from random weights")
    sentencepiece_model: str = flag("checkpoints/lhp/beit3.spm", "SentencePiece model")
    max_text_length: int = flag(64, "token ids of a caption at most, both ends included")

    # Views
    local_prob: float = flag(0.5, "share of images seen as a local crop: 0 global, 1 local only")
    crop_scale: tuple[float, float] = flag((0.5, 1.0), "area of the local crop, least and most")
    crop_ratio: tuple[float, float] = flag((3 / 4, 4 / 3), "aspect of the local crop, likewise")

    # Optimization
    batch_size: int = flag(184, "pairs a process and step")
    update_freq: int = flag(1, "batches whose gradients are accumulated for one update")
    grad_cache_chunk: int = flag(
        0, "encode the batch in chunks of N with the exact gradient of the whole; 0 is off"
    )
    epochs: int = flag(4, "passes over the data (release 4, paper 3)")
    min_lr: float = flag(1e-6, "learning rate at the end")
    warmup_steps: int = flag(440, "steps of linear warm-up")
    weight_decay: float = flag(0.05, "AdamW weight decay")
    layer_decay: float = flag(0.85, "factor on the rate from each layer to the one below")

    # Run
    output_dir: str = flag("output/lhp", "where checkpoints and the log go")

    def check(self) -> None:
        """See :class:`TrainingConfig`.

        Raises:
            InputError: naming the flag.
        """
        super().check()
        self.check_least(1, "update_freq", "input_size")
        self.check_least(0, "grad_cache_chunk", "warmup_steps", "min_lr")
        self.check_share("local_prob")
        self.check_share("drop_path", below_one=True)
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise InputError("--crop_scale", f"must rise within (0, 1], found {self.crop_scale}")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise InputError("--crop_ratio", f"must rise above 0, found {self.crop_ratio}")
        if not 0 < self.layer_decay <= 1:
            raise InputError("--layer_decay", f"must lie in (0, 1], found {self.layer_decay}")
        if self.min_lr > self.lr:
            raise InputError("--lr", f"must be above min_lr ({self.min_lr}), found {self.lr}")
        self.check_least(3, "max_text_length")
        if self.grad_cache_chunk >= self.batch_size > 1 and self.grad_cache_chunk:
            raise InputError(
                "--grad_cache_chunk",
                f"{self.grad_cache_chunk} is not smaller than --batch_size {self.batch_size}",
            )
        if self.grad_cache_chunk and self.update_freq > 1:
            raise InputError(
                "--grad_cache_chunk",
                "does not go with --update_freq above 1",
                todo="raise --batch_size instead: chunks make its memory independent of it",
            )
