"""Helpers shared by the benchmarks: command lines, times, memory, matrix-product rate.

Functions import torch when they need it, because some benchmarks measure the memory of a process
without torch.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")
PRODUCT_SIDE = 4096
PRODUCTS = 5
SECONDS_BETWEEN_LOOKS = 0.01  # interval between two memory samples


def flag_parser(doc: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """Create a parser with one flag per keyword argument: a default, or (default, help text).

    The default determines the flag: False creates a switch, a list a flag with one or more values,
    None an optional path, and a type a required value. Any other default sets the value's type.
    """
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False)
    for name, value in defaults.items():
        default, text = value if isinstance(value, tuple) else (value, None)
        first = default[0] if isinstance(default, list) else default
        how: dict[str, Any] = {"type": Path if first is None else type(first), "default": default}
        if default is False:
            how = {"action": "store_true"}
        elif isinstance(default, type):
            how = {"type": default, "required": True}
        elif isinstance(default, list):
            how["nargs"] = "+"
        parser.add_argument(f"--{name}", help=text, **how)
    return parser


def best_seconds(run: Callable[[], object], repeats: int, warm_up: int = 1) -> float:
    """Return the seconds of the fastest run, the one that other processes disturbed least."""
    for _ in range(warm_up):
        run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def in_fresh_process(work: Callable[..., Result], *args: Any) -> Result:
    """Run a function in a new process, so that only its memory is measured; return its result."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *args).result()


def memory_mib(key: str, pid: int | str = "self", table: str = "status") -> float:
    """Read a figure of ``/proc/PID/TABLE``, MiB; return 0 if the process or figure is missing."""
    try:
        text = Path(f"/proc/{pid}/{table}").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    found = [line.split()[1] for line in text.splitlines() if line.startswith(f"{key}:")]
    return int(found[0]) / 1024 if found else 0.0


def peak_mib() -> float:
    """Return the peak resident memory of this process, MiB (`getrusage` includes the parent's)."""
    return memory_mib("VmHWM")


def anonymous_mib() -> float:
    """Return the anonymous memory of this process, MiB, without file pages, which are evictable."""
    return memory_mib("RssAnon")


class AnonymousPeak(threading.Thread):
    """Context manager that samples the peak of anonymous memory (``most``, MiB)."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.ended = 0.0, threading.Event()

    def run(self) -> None:
        while not self.ended.wait(SECONDS_BETWEEN_LOOKS):
            self.most = max(self.most, anonymous_mib())

    def __enter__(self) -> AnonymousPeak:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.join()


def product_rate(dtype: torch.dtype) -> float:
    """Return operations per second of a 4096 x 4096 x 4096 matrix product, best of five."""
    import torch

    a = torch.randn(PRODUCT_SIDE, PRODUCT_SIDE).to(dtype)
    b = torch.randn(PRODUCT_SIDE, PRODUCT_SIDE).to(dtype)
    with torch.inference_mode():
        return 2 * PRODUCT_SIDE**3 / best_seconds(lambda: a @ b, PRODUCTS)


def describe() -> str:
    """Describe CPU, threads and torch version, for the head of a benchmark's output."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"
