"""Data loader with any number of worker processes; only the main process handles Ctrl-C."""

from __future__ import annotations

import os
import signal
from typing import Any, Literal

from torch.utils.data import DataLoader

from pab.core.devices import local_processes

MOST_WORKERS = 16  # limit of `auto`; every worker holds two batches in shared memory


def resolve_workers(setting: int | Literal["auto"]) -> int:
    """Return the number of loader processes of ``--num_workers``.

    ``auto`` divides the cores that this process may use by the processes that torchrun has started
    on this machine (``LOCAL_WORLD_SIZE``), and uses 1 to :data:`MOST_WORKERS`.

    Raises:
        InputError: ``LOCAL_WORLD_SIZE`` is not a positive number.
    """
    if setting != "auto":
        return setting
    return min(max(available_cores() // local_processes(), 1), MOST_WORKERS)


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def needed_workers(workers: int, batches: int) -> int:
    """Limit loader processes to the batches; with a single batch, no batch can be loaded ahead."""
    return min(workers, batches) if batches > 1 else 0


class Loader(DataLoader[Any]):
    """PyTorch's DataLoader without the warning about more worker processes than cores.

    Results do not depend on the number of workers. More workers than cores help if reading waits
    for a disk or network.
    """

    def __iter__(self) -> Any:
        """Start the workers with SIGINT blocked; they inherit the signal mask.

        The main process handles Ctrl-C and ends its workers. A signal that arrives during the start
        is delivered afterwards, because Python would ignore an exception raised during a fork.
        """
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def check_worker_number_rationality(self) -> None:
        """Accept any number of worker processes."""
