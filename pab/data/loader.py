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

    def __init__(self, dataset: Any, **options: Any) -> None:
        super().__init__(dataset, worker_init_fn=ignore_interrupt, **options)

    def check_worker_number_rationality(self) -> None:
        """Accept any number of worker processes."""


def ignore_interrupt(worker: int) -> None:
    """Ignore Ctrl-C in a worker process; the main process handles it and ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
