"""Settings of LHP's fine-tuning and scoring: every number of the recipe, with its unit and origin.

The defaults are the published recipe (the command of the release; the paper trains 3 epochs).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pab.config import flag
from pab.errors import InputError


@dataclass(frozen=True)
class TrainConfig:
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

    # Data
    data_path: str = flag("data/PAB", "root of the PAB data")
    train_shards: str = flag("annotation/train/pair_*.json", "pattern of shards under data_path")
    cache_dir: str | None = flag(None, "where the annotation index is kept (default: in data_path)")
    val_pairs: int = flag(0, "pairs held out for validation, whole videos; 0 trains on all")
    val_seed: int = flag(0, "seed of the choice of validation videos")
    num_workers: int = flag(4, "loader processes; 0 loads in the training process")

    twin_batches_from: int | None = flag(
        None, "first epoch whose batches keep twins together as hard negatives; none is published"
    )

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
    lr: float = flag(1e-5, "peak learning rate")
    min_lr: float = flag(1e-6, "learning rate at the end")
    warmup_steps: int = flag(440, "steps of linear warm-up")
    weight_decay: float = flag(0.05, "AdamW weight decay")
    layer_decay: float = flag(0.85, "factor on the rate from each layer to the one below")
    opt_betas: tuple[float, float] = flag((0.9, 0.999), "AdamW betas")
    opt_eps: float = flag(1e-8, "AdamW eps")
    clip_grad: float | None = flag(None, "largest gradient norm; none is not clipped (published)")
    ema_decay: float | None = flag(None, "decay of an average of the weights; none keeps none")
    dtype: Literal["fp32", "bf16", "fp16"] = flag("bf16", "mixed precision; fp16 scales the loss")

    # Run
    device: Literal["auto", "cuda", "mps", "cpu"] = flag("auto", "auto: CUDA, else MPS, else CPU")
    seed: int = flag(16, "seed of weights, order, views and drop path")
    output_dir: str = flag("output/lhp", "where checkpoints and the log go")
    log_dir: str | None = flag(None, "where TensorBoard's files go; none writes none")
    save_ckpt: bool = flag(True, "write checkpoints")
    save_ckpt_freq: int = flag(1, "epochs between checkpoints")
    save_every_steps: int = flag(0, "also write the resumable checkpoint every N updates; 0 is off")
    auto_resume: bool = flag(True, "go on from output_dir's last checkpoint, if there is one")
    max_steps: int = flag(0, "stop (resumable) when N updates are done; 0 runs to the end")

    def check(self) -> None:
        """Refuse values that make no sense alone or together.

        Raises:
            InputError: naming the flag.
        """
        for name in ("batch_size", "update_freq", "epochs", "save_ckpt_freq", "input_size"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name}", f"must be at least 1, found {getattr(self, name)}")
        for name in (
            "val_pairs", "num_workers", "grad_cache_chunk", "warmup_steps", "weight_decay",
            "save_every_steps", "max_steps", "min_lr", "seed", "val_seed",
        ):  # fmt: skip
            if getattr(self, name) < 0:
                raise InputError(f"--{name}", f"must not be negative, found {getattr(self, name)}")
        if not 0 <= self.local_prob <= 1:
            raise InputError("--local_prob", f"must lie in [0, 1], found {self.local_prob}")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise InputError("--crop_scale", f"must rise within (0, 1], found {self.crop_scale}")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise InputError("--crop_ratio", f"must rise above 0, found {self.crop_ratio}")
        if not 0 <= self.drop_path < 1:
            raise InputError("--drop_path", f"must lie in [0, 1), found {self.drop_path}")
        if not 0 < self.layer_decay <= 1:
            raise InputError("--layer_decay", f"must lie in (0, 1], found {self.layer_decay}")
        if not self.lr > 0 or self.min_lr > self.lr:
            raise InputError("--lr", f"must be above 0 and min_lr ({self.min_lr}), found {self.lr}")
        if self.max_text_length < 3:
            raise InputError(
                "--max_text_length", f"must be 3 or more, found {self.max_text_length}"
            )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise InputError("--ema_decay", f"must lie in (0, 1), found {self.ema_decay}")
        if self.clip_grad is not None and self.clip_grad <= 0:
            raise InputError("--clip_grad", f"must be above 0, found {self.clip_grad}")
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
