"""Checks made before the first step of a run: what it will need at its end.

An output that cannot be written, a missing package or a full disk ends a run here, not after hours.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from pab.errors import InputError
from pab.outputs import check_free_space, check_output_folder
from pab.training_config import TrainingConfig

_MOMENTS = 2  # tensors that AdamW keeps per trained parameter


def check_run_folders(config: TrainingConfig) -> None:
    """Check where a training run writes, and that TensorBoard is installed if it is asked for.

    Raises:
        InputError: naming the flag.
    """
    check_output_folder("--output_dir", config.output_dir)
    if config.log_dir is None:
        return
    check_output_folder("--log_dir", config.log_dir)
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise InputError(
            "--log_dir",
            f"needs TensorBoard, which cannot be imported: {error}",
            todo="pip install tensorboard, or --log_dir none",
        ) from error


def check_room(config: TrainingConfig, model: nn.Module) -> None:
    """Check that the disk of the output folder has room for the run's checkpoints.

    Counted are the training state (weights, AdamW's two moments, the average if one is kept) and
    the best and final weights, and once more the state: a file is written beside its predecessor.
    Checkpoints that are already there count as room, for they are replaced.

    Args:
        config: the run's settings.
        model: the model that is trained.

    Raises:
        InputError: naming the flag, the room needed and found.
    """
    if not config.save_ckpt:
        return
    copies = 1 if config.ema_decay is None else 2
    weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    state = copies * weights + _MOMENTS * trained
    files = 2 if config.val_pairs else 1  # the best and the final weights
    needed = 2 * state + files * weights
    kept = sum(path.stat().st_size for path in Path(config.output_dir).glob("checkpoint-*.pth"))
    check_free_space(
        "--output_dir", config.output_dir, needed - kept, "the checkpoints",
        todo="make room, name a folder on another disk, or write none with --no_save_ckpt",
    )  # fmt: skip
