"""Check before the first step of a run that its outputs can be written."""

from __future__ import annotations

import math
from pathlib import Path

from torch import nn

from pab.core.errors import InputError
from pab.core.outputs import check_free_space, check_output_folder
from pab.training.config import TrainingConfig

_MOMENTS = 2  # tensors per trained parameter in AdamW's state


def check_run_folders(config: TrainingConfig) -> None:
    """Check that the output folders are writable, and that TensorBoard is installed if needed.

    Raises:
        InputError: a folder or TensorBoard cannot be used; the message names the flag.
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
            todo="run pip install tensorboard, or use --log_dir none",
        ) from error


def check_room(config: TrainingConfig, model: nn.Module) -> None:
    """Check that the output folder's disk has space for the run's checkpoints.

    The check covers the last and the previous training state (weights, the two moments of AdamW,
    the average if enabled). It also covers the weights of the kept epochs, the final weights and,
    with validation, those of the best epoch. Existing checkpoints count as free space, because the
    run replaces them. Files that an earlier run was writing when it was killed are removed first.

    Args:
        config: settings of the run.
        model: network to train.

    Raises:
        InputError: too little space; the message names the flag and the needed and free space.
    """
    if not config.save_ckpt:
        return
    for pattern in (".checkpoint-*.tmp", ".checkpoint-*.copy"):
        for path in Path(config.output_dir).glob(pattern):
            path.unlink(missing_ok=True)
    copies = 1 if config.ema_decay is None else 2
    weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    state = copies * weights + _MOMENTS * trained
    epochs = math.ceil(config.epochs / config.save_ckpt_freq)
    if config.keep_checkpoints is not None:
        epochs = min(epochs, config.keep_checkpoints + 1)  # the oldest is removed after a save
    files = epochs + (2 if config.val_pairs else 1)  # plus the best and the final weights
    needed = 2 * state + files * weights
    found = [path.stat() for path in Path(config.output_dir).glob("checkpoint-*.pth")]
    kept = sum({file.st_ino: file.st_size for file in found}.values())  # count hard links once
    check_free_space(
        "--output_dir", config.output_dir, needed - kept, "the checkpoints",
        todo="free disk space, set a folder on another disk, keep fewer with --keep_checkpoints or "
        "--save_ckpt_freq, or disable them with --no_save_ckpt",
    )  # fmt: skip
