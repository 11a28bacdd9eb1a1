"""Number formats and reproducibility: dtype choice, TF32, deterministic algorithms."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch.nn import functional as F

from pab.core import processes
from pab.core.devices import DTYPES, autocast, dtype_of
from pab.core.errors import InputError
from pab.core.notices import notice

FASTEST = "fastest"  # value of --dtype that chooses by device; see `choose_dtype`
FASTEST_HELP = (
    "fastest: on a CPU, fp32 or bf16, whichever a measurement finds faster; on a CUDA GPU, bf16 "
    "(older cards: fp16)"
)
TF32_HELP = "compute fp32 products in TF32 on a CUDA GPU: faster, with 10 bits of mantissa"
DETERMINISTIC_HELP = "use only deterministic algorithms: bit-identical results on a GPU, but slower"
TENSOR_CORES = (8, 0)  # compute capability from which CUDA GPUs multiply bf16 and TF32 (Ampere)
# Shape of the matrix product that is timed on a CPU: rows (about the tokens of one image at
# 384 px), input width (as in LHP large), output width.
PRODUCT = (512, 1024, 1024)
SECONDS_PER_DTYPE = 0.1  # time for repetitions; the fastest one counts
# bf16 is chosen only if its rate is higher by this factor: rates vary between runs, and a choice
# that changes also changes the results.
BF16_GAIN = 1.1


# ------------------------------------------------------------------------------------------ dtype


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of a ``--dtype`` value, after checking that the device supports it.

    ``fastest`` is bf16 on CUDA GPUs with bf16 units, and fp16 on older ones. On a CPU, it is fp32
    or bf16, whichever multiplies matrices faster (bf16 only if it is more than 10 % faster); rank 0
    measures both for all processes. It is fp32 on other devices. A notice reports the choice. If
    bf16 is requested on a device where it is slow, a notice says so.

    Args:
        name: ``fp32``, ``bf16``, ``fp16`` or ``fastest``.
        device: device of the model.

    Raises:
        InputError: unknown name, or float16 on a CPU.
    """
    if name == FASTEST:
        name, reason = processes.broadcast_object(_fastest(device))
        notice("--dtype fastest", f"{name} ({reason})")
        return dtype_of(name)
    dtype = dtype_of(name)
    if device.type == "cpu":
        autocast(device, dtype)  # rejects float16
    if dtype == torch.bfloat16:
        _warn_if_slow(device)
    return dtype


def _fastest(device: torch.device) -> tuple[str, str]:
    """Return the name of the fastest dtype and the reason; only rank 0 measures."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        name = "bf16" if capability >= TENSOR_CORES else "fp16"
        return name, f"a GPU of compute capability {_version(capability)}"
    if device.type != "cpu":
        return "fp32", f"not measured on {device.type}"
    if not processes.is_main():
        return "", ""
    rates = product_rates()
    name = "bf16" if rates["bf16"] > BF16_GAIN * rates["fp32"] else "fp32"
    return name, f"products on this CPU: {_listed(rates)}"


def _warn_if_slow(device: torch.device) -> None:
    """Print a notice if a CUDA GPU has no bf16 units, or a CPU is slower in bf16 than in fp32."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < TENSOR_CORES:
            notice(
                "--dtype bf16",
                f"slow on this GPU: compute capability {_version(capability)} has no bf16 units "
                f"(from {_version(TENSOR_CORES)}); --dtype fp16 is faster",
            )
    elif device.type == "cpu" and processes.is_main():
        rates = product_rates()
        if rates["bf16"] < rates["fp32"]:
            notice(
                "--dtype bf16",
                f"slower than fp32 on this CPU ({_listed(rates)}); --dtype fp32 is faster",
            )


@cache
def product_rates() -> dict[str, float]:
    """Measure a matrix product on this CPU in fp32 and bf16, in GFLOP/s, for about 0.2 s."""
    return {name: _product_rate(DTYPES[name]) for name in ("fp32", "bf16")}


@torch.inference_mode()
def _product_rate(dtype: torch.dtype) -> float:
    rows, inputs, outputs = PRODUCT
    x = torch.full((rows, inputs), 0.5, dtype=dtype)  # no draws: random generators stay unchanged
    weight = torch.full((outputs, inputs), 0.5, dtype=dtype)
    best, end = float("inf"), time.perf_counter() + SECONDS_PER_DTYPE
    for repetition in range(1000):
        start = time.perf_counter()
        F.linear(x, weight)
        now = time.perf_counter()
        best = min(best, now - start)
        if now >= end and repetition > 0:  # the first call also prepares the kernel
            break
    return 2 * rows * inputs * outputs / best / 1e9


def _listed(rates: dict[str, float]) -> str:
    return ", ".join(f"{name} {rate:.0f} GFLOP/s" for name, rate in rates.items())


def _version(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


# ------------------------------------------------------------------------- TF32 and determinism


def check_numerics(device: torch.device, *, tf32: bool, deterministic: bool) -> None:
    """Check that the device supports TF32, and prepare cuBLAS for deterministic algorithms.

    Each is done only if requested. cuBLAS reads ``CUBLAS_WORKSPACE_CONFIG`` when CUDA starts; an
    unset variable gets NVIDIA's value for reproducible results.

    Raises:
        InputError: TF32 is requested on a device without it.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if tf32 and device.type != "cuda":
        raise InputError("--tf32", f"expected a CUDA GPU, found {device.type}", todo="leave it out")
    if tf32 and torch.cuda.get_device_capability(device) < TENSOR_CORES:
        found = _version(torch.cuda.get_device_capability(device))
        raise InputError(
            "--tf32", f"expected compute capability {_version(TENSOR_CORES)}, found {found}",
            todo="leave it out",
        )  # fmt: skip


@contextmanager
def numerics(device: torch.device, *, tf32: bool, deterministic: bool) -> Iterator[None]:
    """Set TF32 and deterministic algorithms for the block.

    Both are settings of the whole process; the earlier settings are restored after the block.
    PyTorch's default is TF32 for convolutions, but not for matrix products.

    Args:
        device: device of the model.
        tf32: compute float32 products and convolutions in TF32 on a CUDA GPU (10 bits of mantissa).
        deterministic: use only deterministic algorithms; an operation without one raises
            RuntimeError. False keeps the setting of the process.
    """
    with ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(_float32_products("tf32" if tf32 else "ieee"))
        if deterministic:
            stack.enter_context(_deterministic_algorithms())
        yield


@contextmanager
def _float32_products(precision: str) -> Iterator[None]:
    """Set the precision of float32 products and convolutions on CUDA: ``ieee`` or ``tf32``."""
    # The setting of cuDNN as a whole has no effect on its parts, which have defaults of their own.
    cudnn: Any = torch.backends.cudnn
    parts = torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn
    before = [part.fp32_precision for part in parts]
    try:
        for part in parts:
            part.fp32_precision = precision
        yield
    finally:
        for part, old in zip(parts, before, strict=True):
            part.fp32_precision = old


@contextmanager
def _deterministic_algorithms() -> Iterator[None]:
    """Use only deterministic algorithms; cuDNN does not choose its algorithms by timing."""
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    try:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
        torch.backends.cudnn.benchmark = benchmark
