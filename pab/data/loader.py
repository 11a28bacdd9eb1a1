"""Data loader with any number of worker processes; only the main process handles Ctrl-C."""

from __future__ import annotations

import signal
from typing import Any

from torch.utils.data import DataLoader


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
