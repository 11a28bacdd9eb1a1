"""Settings shared by all fine-tuning recipes: data, optimization, run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pab.core.config import advanced_flag, data_flag, flag, output_flag, speed_flag
from pab.core.errors import InputError
from pab.core.precision import DETERMINISTIC_HELP, FASTEST_HELP, TF32_HELP
from pab.data.label_config import TableConfig


@dataclass(frozen=True)
class TrainingConfig(TableConfig):
    """Base class of every recipe's settings; recipes override the defaults."""

    flag_group: ClassVar = "optimization"

    # Data
    data_path: str = data_flag(
        "data/PAB", "root of the PAB data, or a table or folder of captioned images"
    )
    train_shards: tuple[str, ...] | None = data_flag(
        None,
        "training shards: patterns under data_path, or numbers such as 3 or 0..7 (default: all)",
    )
    cache_dir: str | None = data_flag(
        None, "folder of the annotation index (default: .cache in the data root)"
    )
    skip_bad_lines: bool = data_flag(
        False, "skip bad lines and list them in output_dir/skipped.txt"
    )
    val_pairs: int = data_flag(
        0, "minimum number of validation pairs, held out as whole videos; 0 trains on all", ge=0
    )
    val_seed: int = data_flag(0, "seed for choosing the validation videos", ge=0)
    num_workers: int | Literal["auto"] = speed_flag(
        "auto", "loader processes; 0 loads in the training process, auto uses the cores", ge=0
    )
    twin_batches_from: int | None = flag(
        None,
        "first epoch (from 0) with hard negatives from the same video; none: never (published)",
    )

    # Optimization
    batch_size: int = flag(64, "pairs per process and batch", ge=1)
    epochs: int = flag(1, "passes over the data", ge=1)
    lr: float = flag(1e-5, "peak learning rate", gt=0)
    weight_decay: float = flag(0.0, "AdamW weight decay", ge=0)
    opt_betas: tuple[float, float] = flag((0.9, 0.999), "AdamW betas")
    opt_eps: float = flag(1e-8, "AdamW eps", ge=0)
    clip_grad: float | None = flag(
        None, "maximum gradient norm; none: no clipping (published)", gt=0
    )
    ema_decay: float | None = flag(
        None, "decay of the weight average (EMA); none: no average", gt=0, lt=1
    )
    dtype: Literal["fp32", "bf16", "fp16", "fastest"] = speed_flag(
        "bf16", f"dtype of mixed precision; fp16 also scales the loss; {FASTEST_HELP}"
    )
    tf32: bool = speed_flag(False, TF32_HELP)
    deterministic: bool = advanced_flag(False, DETERMINISTIC_HELP)

    # Run
    device: Literal["auto", "cuda", "mps", "cpu"] = speed_flag(
        "auto", "auto: CUDA, else MPS, else CPU"
    )
    seed: int = flag(16, "random seed of the run; for the validation split, see --val_seed", ge=0)
    output_dir: str = output_flag("output", "folder of the checkpoints and the log")
    log_dir: str | None = output_flag(None, "folder for TensorBoard files; none: no TensorBoard")
    save_ckpt: bool = output_flag(True, "write checkpoints")
    save_ckpt_freq: int = output_flag(
        1, "epochs between checkpoints (weights and training state)", ge=1
    )
    keep_checkpoints: int | None = output_flag(
        None, "number of newest checkpoint-N.pth files to keep; none: all", ge=1
    )
    save_every_steps: int = output_flag(
        0, "also save the training state every N updates; 0: off", ge=0
    )
    auto_resume: bool = advanced_flag(True, "resume from the last checkpoint in output_dir, if any")
    resume_from: Literal["last", "newest_good"] = advanced_flag(
        "last",
        "newest_good: if checkpoint-last.pth is damaged, use the newest undamaged checkpoint",
    )
    max_skipped_steps: int = advanced_flag(
        20,
        "stop after N consecutive steps whose loss or gradient is not finite (fp16: at least 20)",
        ge=1,
    )
    max_steps: int = advanced_flag(0, "stop (resumable) after N updates; 0 runs to the end", ge=0)

    def check(self) -> None:
        """Reject values that are invalid alone or in combination.

        Raises:
            InputError: a value is invalid; the message names the flag.
        """
        self.columns()
        if not all(0 <= beta < 1 for beta in self.opt_betas):
            raise InputError("--opt_betas", f"must lie in [0, 1), found {self.opt_betas}")
        if self.resume_from != "last" and not self.auto_resume:
            raise InputError("--resume_from", "contradicts --no_auto_resume", todo="set only one")


def check_crops_and_rates(
    scale: tuple[float, float], ratio: tuple[float, float], min_lr: float, lr: float
) -> None:
    """Reject invalid values of flags that several recipes have.

    Args:
        scale: ``--crop_scale``.
        ratio: ``--crop_ratio``.
        min_lr: ``--min_lr``.
        lr: ``--lr``.

    Raises:
        InputError: a value is invalid; the message names the flag.
    """
    if not 0 < scale[0] <= scale[1] <= 1:
        raise InputError("--crop_scale", f"needs 0 < min <= max <= 1, found {scale}")
    if not 0 < ratio[0] <= ratio[1]:
        raise InputError("--crop_ratio", f"needs 0 < min <= max, found {ratio}")
    if min_lr > lr:
        raise InputError("--lr", f"expected at least min_lr ({min_lr}), found {lr}")


@dataclass(frozen=True)
class ContrastiveConfig(TrainingConfig):
    """Settings of recipes with local-global views and InfoNCE."""

    # Views
    local_prob: float = flag(
        0.5, "probability of the local crop: 0 global only, 1 local only", ge=0, le=1
    )
    crop_scale: tuple[float, float] = flag(
        (0.5, 1.0), "area of the local crop as a fraction of the image, min and max"
    )
    crop_ratio: tuple[float, float] = flag((3 / 4, 4 / 3), "aspect ratio of the crop, min and max")

    # Optimization
    update_freq: int = flag(1, "batches whose gradients are accumulated per update", ge=1)
    grad_cache_chunk: int = speed_flag(
        0, "encode the batch in chunks of N with the exact full-batch gradient; 0: off", ge=0
    )
    min_lr: float = flag(1e-6, "final learning rate", ge=0)
    warmup_steps: int = flag(440, "steps of linear warm-up", ge=0)
    layer_decay: float = flag(
        0.85, "learning-rate factor from each layer to the one below", gt=0, le=1
    )

    def check(self) -> None:
        """See :class:`TrainingConfig`.

        Raises:
            InputError: a value is invalid; the message names the flag.
        """
        super().check()
        check_crops_and_rates(self.crop_scale, self.crop_ratio, self.min_lr, self.lr)
        if self.grad_cache_chunk >= self.batch_size > 1 and self.grad_cache_chunk:
            raise InputError(
                "--grad_cache_chunk",
                f"{self.grad_cache_chunk} is not smaller than --batch_size {self.batch_size}",
            )
        if self.grad_cache_chunk and self.update_freq > 1:
            raise InputError(
                "--grad_cache_chunk",
                "cannot be combined with --update_freq above 1",
                todo="increase --batch_size instead; with chunks, memory hardly grows",
            )
