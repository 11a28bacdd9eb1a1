"""Data loader whose worker processes are the user's choice and leave Ctrl-C to the main process."""

from __future__ import annotations

import signal
from typing import Any

from torch.utils.data import DataLoader


class Loader(DataLoader[Any]):
    """torch's loader without its warning about more worker processes than cores.

    Results do not depend on the number of workers, and more workers than cores help if reading
    waits for a disk or network.
    """

    def __iter__(self) -> Any:
        """Start the workers with SIGINT blocked, which they inherit.

        The main process handles Ctrl-C and ends its workers. A signal that arrives during the start
        is delivered after it: Python would swallow an exception that is raised while it forks.
        """
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def check_worker_number_rationality(self) -> None:
        """Accept any number of worker processes."""
