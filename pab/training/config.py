"""Settings shared by all fine-tuning recipes: data, optimization, run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pab.core.config import Bounded, flag
from pab.core.errors import InputError
from pab.data.label_config import TableConfig


@dataclass(frozen=True)
class TrainingConfig(TableConfig, Bounded):
    """Base class of every recipe's settings; recipes override the defaults."""

    # Data
    data_path: str = flag("data/PAB", "root of the PAB data, or a table or folder of captions")
    train_shards: tuple[str, ...] | None = flag(
        None,
        "training shards: patterns under data_path, or numbers such as 3 or 0..7 (default: all)",
    )
    cache_dir: str | None = flag(None, "folder of the annotation index (default: data_path)")
    skip_bad_lines: bool = flag(False, "skip bad lines and list them in skipped.txt of output_dir")
    val_pairs: int = flag(0, "pairs held out for validation, in whole videos; 0 trains on all")
    val_seed: int = flag(0, "seed for choosing the validation videos")
    num_workers: int = flag(4, "loader processes; 0 loads in the training process")
    twin_batches_from: int | None = flag(
        None, "first epoch that batches twins together as hard negatives; none: never (published)"
    )

    # Optimization
    batch_size: int = flag(64, "pairs per process and step")
    epochs: int = flag(1, "passes over the data")
    lr: float = flag(1e-5, "peak learning rate")
    weight_decay: float = flag(0.0, "AdamW weight decay")
    opt_betas: tuple[float, float] = flag((0.9, 0.999), "AdamW betas")
    opt_eps: float = flag(1e-8, "AdamW eps")
    clip_grad: float | None = flag(None, "maximum gradient norm; none: no clipping (published)")
    ema_decay: float | None = flag(None, "decay of the weight average (EMA); none: no average")
    dtype: Literal["fp32", "bf16", "fp16"] = flag("bf16", "mixed precision; fp16 scales the loss")

    # Run
    device: Literal["auto", "cuda", "mps", "cpu"] = flag("auto", "auto: CUDA, else MPS, else CPU")
    seed: int = flag(16, "random seed of weights, sample order, views and all other draws")
    output_dir: str = flag("output", "folder for checkpoints and the log")
    log_dir: str | None = flag(None, "folder for TensorBoard files; none: no TensorBoard")
    save_ckpt: bool = flag(True, "write checkpoints")
    save_ckpt_freq: int = flag(1, "epochs between checkpoints (weights and training state)")
    keep_checkpoints: int | None = flag(
        None, "number of newest checkpoint-N.pth files to keep; none keeps all"
    )
    save_every_steps: int = flag(0, "also save the training state every N updates; 0: off")
    auto_resume: bool = flag(True, "resume from the last checkpoint in output_dir, if any")
    resume_from: Literal["last", "newest_good"] = flag(
        "last", "newest_good: if checkpoint-last.pth is damaged, resume from the one before it"
    )
    max_skipped_steps: int = flag(
        20, "stop after N consecutive steps skipped because loss or gradient was not finite"
    )
    max_steps: int = flag(0, "stop (resumable) after N updates; 0 runs to the end")

    def check(self) -> None:
        """Reject values that are invalid alone or in combination.

        Raises:
            InputError: naming the flag.
        """
        self.check_least(1, "batch_size", "epochs", "save_ckpt_freq", "max_skipped_steps")
        self.check_least(
            0, "val_pairs", "num_workers", "weight_decay", "save_every_steps", "max_steps", "seed",
            "val_seed",
        )  # fmt: skip
        self.columns()
        if not self.lr > 0:
            raise InputError("--lr", f"must be above 0, found {self.lr}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise InputError("--ema_decay", f"must lie in (0, 1), found {self.ema_decay}")
        if self.keep_checkpoints is not None:
            self.check_least(1, "keep_checkpoints")
        if self.resume_from != "last" and not self.auto_resume:
            raise InputError("--resume_from", "contradicts --no_auto_resume", todo="give one")
        if self.clip_grad is not None and self.clip_grad <= 0:
            raise InputError("--clip_grad", f"must be above 0, found {self.clip_grad}")


@dataclass(frozen=True)
class ContrastiveConfig(TrainingConfig):
    """Settings of recipes with local-global views and InfoNCE; the defaults are LHP's."""

    # Views
    local_prob: float = flag(0.5, "probability of the local crop: 0 global only, 1 local only")
    crop_scale: tuple[float, float] = flag((0.5, 1.0), "area of the local crop, min and max")
    crop_ratio: tuple[float, float] = flag((3 / 4, 4 / 3), "its aspect ratio, min and max")

    # Optimization
    update_freq: int = flag(1, "batches of accumulated gradients per update")
    grad_cache_chunk: int = flag(
        0, "encode the batch in chunks of N with the exact full-batch gradient; 0: off"
    )
    min_lr: float = flag(1e-6, "final learning rate")
    warmup_steps: int = flag(440, "steps of linear warm-up")
    layer_decay: float = flag(0.85, "learning-rate factor from each layer to the one below")

    def check(self) -> None:
        """See :class:`TrainingConfig`.

        Raises:
            InputError: naming the flag.
        """
        super().check()
        self.check_least(1, "update_freq")
        self.check_least(0, "grad_cache_chunk", "warmup_steps", "min_lr")
        self.check_share("local_prob")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise InputError("--crop_scale", f"must rise within (0, 1], found {self.crop_scale}")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise InputError("--crop_ratio", f"must rise above 0, found {self.crop_ratio}")
        if not 0 < self.layer_decay <= 1:
            raise InputError("--layer_decay", f"must lie in (0, 1], found {self.layer_decay}")
        if self.min_lr > self.lr:
            raise InputError("--lr", f"must be above min_lr ({self.min_lr}), found {self.lr}")
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
