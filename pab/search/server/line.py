"""Queue with a fixed number of threads and a bounded number of waiting requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class BusyError(Exception):
    """All threads are busy, and the queue is full."""


class Line:
    """Run blocking functions for requests, first come, first served.

    Args:
        parallel: number of functions that may run at a time.
        waiting: number of requests that may wait; further requests fail at once.
    """

    def __init__(self, parallel: int, waiting: int) -> None:
        self._most, self._inside = parallel + waiting, 0
        self._threads = ThreadPoolExecutor(parallel, thread_name_prefix="search")

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function in a thread and return its result.

        A request that is cancelled while it waits leaves the queue. A function that is already
        running is not stopped.

        Raises:
            BusyError: the queue is full.
        """
        if self._inside >= self._most:
            raise BusyError
        self._inside += 1
        work = self._threads.submit(function, *args, **kwargs)
        loop = asyncio.get_running_loop()

        def done(_: object) -> None:
            if not loop.is_closed():  # the server may have stopped meanwhile
                loop.call_soon_threadsafe(self._leave)

        work.add_done_callback(done)
        return await asyncio.wrap_future(work)

    def close(self) -> None:
        """Cancel the waiting functions; the threads end when their current functions return."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _leave(self) -> None:
        self._inside -= 1
