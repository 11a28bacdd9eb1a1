"""Progress of long loops on stderr: a bar in a terminal, otherwise a line every 30 seconds.

Short loops print nothing. Only rank 0 writes. Other lines on stderr should go through
:func:`write_line`, which keeps them apart from a bar.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, Self, TypeVar
from weakref import WeakSet

T = TypeVar("T")

BAR_AFTER_S = 1.0  # seconds; a shorter loop shows no bar
BAR_EVERY_S = 0.1  # seconds between updates of a bar
LINE_EVERY_S = 30.0  # seconds between lines in a log; a shorter loop prints none
USUAL_SIZE = (80, 24)  # columns and rows of a terminal

clock = time.monotonic  # seconds; tests replace it
_open: WeakSet[Progress] = WeakSet()
_shown: list[Progress] = []  # loops with a bar on the screen


class Progress:
    """Progress of a loop; use it as a context manager, or call :meth:`close`.

    Args:
        total: units of the whole loop; None if unknown.
        what: label, such as ``encoding images``.
        unit: name of the units, in the plural; ``B`` for bytes, which a log shows in MB.
        done: units that are already complete.
    """

    def __init__(self, total: int | None, what: str, unit: str, done: int = 0) -> None:
        self.total, self.what, self.unit, self.done = total, what, unit, done
        self._estimated = False
        self._first, self._began = done, clock()
        self._figures: dict[str, float] = {}
        self._bar: Any = None
        self._inner = len(_open) > 0  # an inner loop's bar vanishes at its end
        self._in_terminal = sys.stderr.isatty()
        wait = BAR_AFTER_S if self._in_terminal else LINE_EVERY_S
        self._due = self._began + wait if _is_main() else math.inf
        _open.add(self)

    def update(self, count: int = 1, **figures: float) -> None:
        """Advance by ``count`` units; ``figures`` are shown beside them."""
        self.done += count
        self._figures.update(figures)
        now = clock()
        if now >= self._due:
            self._show(now)

    def estimate(self, total: int) -> None:
        """Set an estimated total; log lines mark it with "about"."""
        self.total, self._estimated = total, True

    def close(self) -> None:
        """Finish the display; in a log, a loop of 30 seconds or more prints a last line."""
        if self._bar is not None:
            self._bar.update(self.done - self._bar.n)
            self._bar.close()
            self._bar = None
            _shown.remove(self)
        elif not self._in_terminal and clock() - self._began >= LINE_EVERY_S and self in _open:
            write_line(self._line(clock(), last=True))
        self._due = math.inf
        _open.discard(self)

    def _show(self, now: float) -> None:
        if not self._in_terminal:
            self._due = now + LINE_EVERY_S
            if self.done != self.total:  # otherwise the last line follows
                write_line(self._line(now))
            return
        self._due = now + BAR_EVERY_S
        if self._bar is None:
            self._bar = self._new_bar(now - self._began)
            _shown.append(self)
        figures = {name: f"{value:.4g}" for name, value in self._figures.items()}
        self._bar.set_postfix(figures, refresh=False)
        self._bar.total = self.total
        self._bar.update(self.done - self._bar.n)

    def _new_bar(self, elapsed: float) -> Any:
        """Create the bar of a loop that has already run for ``elapsed`` seconds.

        tqdm could create the bar at the start and hide it for ``delay`` seconds, but a line written
        in that time would leave the hidden bar on the screen.
        """
        from tqdm import tqdm  # here, because it takes longer to import than a small command runs

        class Bar(tqdm):
            monitor_interval = 0  # no monitor thread, because data loaders fork

            @staticmethod
            def format_meter(*numbers: Any, **settings: Any) -> str:
                """Format the bar; a slow rate is ``2.5s/images``, not ``2.5s/ images``."""
                return str(tqdm.format_meter(*numbers, **settings)).replace("s/ ", "s/")

        sizes = {"unit": "B", "unit_scale": True} if self.unit == "B" else {"unit": f" {self.unit}"}
        bar = Bar(
            total=self.total, initial=self._first, desc=self.what, leave=not self._inner,
            file=sys.stderr, dynamic_ncols=True, mininterval=0, miniters=0, delay=elapsed, **sizes,
        )  # fmt: skip
        if (bar.ncols or 0) < 1:  # a terminal that does not report its size
            bar.ncols, bar.nrows, bar.dynamic_ncols = *USUAL_SIZE, None
        bar.start_t -= elapsed
        bar.last_print_t = bar.start_t
        return bar

    def _line(self, now: float, *, last: bool = False) -> str:
        """Format the state as in ``encoding images: 1200/1978, 41 images/s, 19 s left``."""
        unit, scale = ("MB", 1e-6) if self.unit == "B" else (self.unit, 1.0)
        elapsed = now - self._began
        rate = (self.done - self._first) / elapsed if elapsed > 0 else 0.0
        about = "about " if self._estimated else ""
        total = "" if self.total is None else f"/{about}{self.total * scale:.0f}"
        shown = rate * scale
        parts = [
            f"{self.done * scale:.0f}{total}" + f" {unit}" * (not total or self.unit == "B"),
            f"{shown:.0f} {unit}/s" if shown >= 10 else f"{shown:.2g} {unit}/s",
        ]
        if last:
            parts.append(f"{_duration(elapsed)} in all")
        elif self.total is not None and rate > 0:
            parts.append(f"{_duration(max(0, self.total - self.done) / rate)} left")
        parts += [f"{name} {value:.4g}" for name, value in self._figures.items()]
        return f"{self.what}: {', '.join(parts)}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def progress(
    items: Iterable[T],
    what: str,
    unit: str,
    total: int | None = None,
    size: Callable[[T], int] | None = None,
) -> Iterator[T]:
    """Yield the items and show how many are done.

    Args:
        items: items of the loop.
        what: label, such as ``encoding images``.
        unit: name of the units, in the plural; ``B`` for bytes.
        total: units of the whole loop; None uses the number of items, if it is known and ``size``
            is None.
        size: function that returns the units of an item, for batches; None counts each item as one.
    """
    if total is None and size is None and isinstance(items, Sized):
        total = len(items)
    with Progress(total, what, unit) as bar:
        finished = 0
        for item in items:
            bar.update(finished)  # first, so that a bar appears once a slow first item has arrived
            yield item
            finished = 1 if size is None else size(item)
        bar.update(finished)


def write_line(text: str) -> None:
    """Print a line on stderr, above any bar; only rank 0 prints."""
    if not _is_main():
        return
    if _shown:
        from tqdm import tqdm

        tqdm.write(text, file=sys.stderr)
    else:
        print(text, file=sys.stderr, flush=True)


@contextmanager
def closing_bars() -> Iterator[None]:
    """Close all bars after the block, so that an error message starts on a new line."""
    try:
        yield
    finally:
        for shown in reversed(_shown.copy()):
            shown.close()


def _is_main() -> bool:
    """Return true in rank 0; without ``pab.core.processes`` loaded, there is only one process."""
    processes = sys.modules.get("pab.core.processes")
    return processes is None or bool(processes.is_main())


def _duration(seconds: float) -> str:
    """Format as in ``59 s``, ``12:30`` (minutes) or ``3:05:00`` (hours)."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
