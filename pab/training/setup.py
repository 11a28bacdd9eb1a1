"""Set up a training run: processes, data, checkpoint to resume from, equal initial weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from pab.core import processes
from pab.core.counts import counted
from pab.core.devices import keep_freed_memory, pick_device, seed_everything
from pab.core.errors import InputError
from pab.core.precision import choose_dtype
from pab.data.loader import resolve_workers
from pab.scoring.encoding import Compute
from pab.training.agreement import check_equal_settings, same_resume_point
from pab.training.config import TrainingConfig
from pab.training.data import TrainingData, epoch_batches, open_training_data
from pab.training.resume import ContentHash, ResumePoint, RunIdentity, find_resume_point, identify
from pab.training.sampling import EpochBatches

Start = TypeVar("Start")


@dataclass(frozen=True)
class Setup:
    """Checked inputs of a run, except the model; created by :func:`set_up`.

    Attributes:
        command: command line of the run.
        identity: identity of the run, compared with that of a saved run.
        resume: checkpoint to resume from; None for a new run.
    """

    config: TrainingConfig
    command: str
    device: torch.device
    dtype: torch.dtype
    data: TrainingData
    batches: EpochBatches
    identity: RunIdentity
    resume: ResumePoint | None

    @property
    def compute(self) -> Compute:
        """Settings for encoding the validation pairs; the weights in training are float32."""
        batch, workers = self.config.batch_size, resolve_workers(self.config.num_workers)
        return Compute(
            self.device, self.dtype, torch.float32, batch, workers,
            tf32=self.config.tf32, deterministic=self.config.deterministic,
        )  # fmt: skip


def set_up(
    config: TrainingConfig, command: str, files: Mapping[str, ContentHash], update_freq: int = 1
) -> Setup:
    """Join torchrun's processes, check and open the data, and find the checkpoint to resume from.

    Args:
        config: settings of the run.
        command: command line of the run.
        files: setting -> function that hashes its files (initial weights, tokenizer).
        update_freq: batches per update.

    Raises:
        InputError: settings, device, data or checkpoint cannot be used or differ between processes,
            or the processes cannot join.
    """
    device = pick_device(config.device)
    processes.init_processes(device)
    dtype = choose_dtype(config.dtype, device)
    keep_freed_memory(device)
    check_equal_settings(config, files)
    data = open_training_data(config)
    batches = epoch_batches(config, len(data.train_rows))
    steps_per_epoch(batches, update_freq)  # rejects too large a batch before files are hashed
    identity = identify(config, data.pairs, files)
    resume = same_resume_point(config, find_resume_point(config, identity))
    return Setup(config, command, device, dtype, data, batches, identity, resume)


def same_start(seed: int, build: Callable[[], Start]) -> Start:
    """Call ``build`` with the same seed in every process, so that all start with equal weights.

    Later draws (dropout, drop path) differ between processes.

    Raises:
        InputError: ``build`` raised it in some process; every process raises it.
    """
    seed_everything(seed)
    made = processes.on_all(build)
    seed_everything(seed, processes.rank() + 1)
    return made


def steps_per_epoch(batches: EpochBatches, update_freq: int = 1) -> int:
    """Compute the number of updates per epoch, with ``update_freq`` batches per update.

    Raises:
        InputError: the data is too small for one update.
    """
    steps = batches.batches_per_epoch // update_freq
    if steps == 0:
        raise InputError(
            "--batch_size",
            f"{batches.batch_size} x {counted(batches.world_size, 'process', 'processes')} x "
            f"update_freq {update_freq} is more than the number of training pairs, {batches.n}",
        )
    return steps
