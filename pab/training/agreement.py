"""Check that all processes start from the same settings and the same checkpoint.

Each process reads the files of its machine. Without these checks, machines that share no folder, or
that were started with different commands, would train different runs together without an error.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from pab.core import processes
from pab.core.checkpoints import load_training_state, read_checkpoint
from pab.core.config import as_plain
from pab.core.files import sha256_of_lines
from pab.training.config import TrainingConfig
from pab.training.resume import (
    EPOCH,
    RESUME_KEY,
    ContentHash,
    ResumePoint,
    check_whole,
    resumable_files,
)

# Settings that may differ between machines; training pairs and checkpoints are compared by content.
_MACHINE_SETTINGS = frozenset(("data_path", "cache_dir", "output_dir", "log_dir", "num_workers"))


def check_equal_settings(config: TrainingConfig, files: Mapping[str, ContentHash]) -> None:
    """Check that all processes were started with the same settings.

    Paths and the number of workers may differ.

    Args:
        config: settings of this process.
        files: settings that name files, which :func:`pab.training.resume.identify` compares.

    Raises:
        InputError: a setting differs; raised in every process, with the first such setting, its
            values, the processes and the hosts.
    """
    values = {
        f"--{name}": "a file" if name in files else str(value)
        for name, value in as_plain(config).items()
        if name not in _MACHINE_SETTINGS
    }
    processes.check_equal(values, todo="start the same command on every machine")


def same_resume_point(config: TrainingConfig, point: ResumePoint | None) -> ResumePoint | None:
    """Check that every process finds the checkpoint of rank 0 in its own ``--output_dir``.

    For a new run, no process may find a checkpoint.

    Args:
        config: settings of this process.
        point: checkpoint that rank 0 has found; None for a new run.

    Returns:
        The checkpoint, with the path in this process's ``--output_dir``; None for a new run.

    Raises:
        InputError: files differ, are missing or are damaged; raised in every process.
    """
    if point is not None:
        point = replace(point, path=Path(config.output_dir) / point.path.name)
    path = next(iter(resumable_files(config)), None) if point is None else point.path
    processes.check_equal(
        {"--output_dir": processes.on_all(partial(_described, path))},
        todo="use an --output_dir that all machines share, or copy the checkpoints to each",
    )
    return point


def _described(path: Path | None) -> str:
    """Describe a checkpoint by its name, step and content hash."""
    if path is None or not path.is_file():
        return "no checkpoint"
    if processes.first_on_machine() and not processes.is_main():  # rank 0 has checked its file
        check_whole(path)
    if EPOCH.fullmatch(path.name) is None:
        step = load_training_state(path, mmap=True).step
    else:
        step = json.loads(read_checkpoint(path)["metadata"][RESUME_KEY])["step"]
    with zipfile.ZipFile(path) as archive:  # lists the checksums of all tensors
        parts = [f"{part.CRC} {part.file_size}" for part in archive.infolist()]
    return f"{path.name} of step {step} ({sha256_of_lines(parts)[:12]})"
