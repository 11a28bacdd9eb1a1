"""Helpers shared by the benchmarks: the machine's matrix-product rate and a best-of-n timer."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

PRODUCT_SIDE = 4096
PRODUCTS = 5


def best_seconds(run: Callable[[], object], repeats: int, warm_up: int = 1) -> float:
    """Shortest of several runs, seconds; on a shared machine, slower runs measure other load."""
    for _ in range(warm_up):
        run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def product_rate(dtype: torch.dtype) -> float:
    """Operations per second of a 4096 x 4096 x 4096 matrix product, best of five."""
    a = torch.randn(PRODUCT_SIDE, PRODUCT_SIDE).to(dtype)
    b = torch.randn(PRODUCT_SIDE, PRODUCT_SIDE).to(dtype)
    with torch.inference_mode():
        return 2 * PRODUCT_SIDE**3 / best_seconds(lambda: a @ b, PRODUCTS)


def describe() -> str:
    """Describe CPU, threads and torch version, for the head of a benchmark's output."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"
