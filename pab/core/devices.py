"""Device-dependent code: device choice, dtypes, attention, memory, random generators."""

from __future__ import annotations

import ctypes
import os
import platform
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pab.core.errors import InputError

Key = TypeVar("Key")

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # parameters of glibc's mallopt
# True if the CPU multiplies bfloat16 in matrix tiles (Intel's AMX). This is a constant, because
# torch.compile would warn about a cached function.
HAS_TILES = bool(torch.cpu.get_capabilities().get("amx_bf16"))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """Select a device by name; ``auto`` prefers CUDA, then MPS, then the CPU.

    Under torchrun, CUDA means this process's GPU (``LOCAL_RANK``).

    Raises:
        InputError: unknown name, the machine has no such device, or ``LOCAL_RANK`` is not a number.
    """
    if name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else name
    if name == "cpu":
        return torch.device("cpu")
    if name == "cuda":
        local_rank = local_rank_of_torchrun()
        if local_rank >= torch.cuda.device_count() or not torch.cuda.is_available():
            raise InputError(
                "--device", f"expected CUDA GPU {local_rank}, found {torch.cuda.device_count()} "
                "usable GPUs", todo="use --device cpu, or start fewer processes",
            )  # fmt: skip
        return torch.device("cuda", local_rank)
    if name == "mps" and torch.backends.mps.is_available():
        return torch.device("mps")
    if name == "mps":
        raise InputError("--device", "expected Apple's MPS, found none", todo="use --device cpu")
    raise InputError("--device", f"expected auto, cuda, mps or cpu, found '{name}'")


def local_rank_of_torchrun() -> int:
    """Read ``LOCAL_RANK``, this process's number on its machine; 0 if it is not set.

    Raises:
        InputError: it is not a number.
    """
    found = os.environ.get("LOCAL_RANK", "0")
    if not found.isdecimal():
        raise InputError("LOCAL_RANK", f"expected a number, found {found!r}")
    return int(found)


def local_processes() -> int:
    """Read ``LOCAL_WORLD_SIZE``, torchrun's number of processes on this machine; 1 if not set.

    Raises:
        InputError: it is not a positive integer.
    """
    found = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if not found.isdecimal() or int(found) < 1:
        raise InputError("LOCAL_WORLD_SIZE", f"expected a number of processes, found {found!r}")
    return int(found)


def dtype_of(name: str) -> torch.dtype:
    """Return the torch dtype of ``fp32``, ``bf16`` or ``fp16``; reject any other name."""
    if name not in DTYPES:
        raise InputError("--dtype", f"expected {', '.join(DTYPES)}, found '{name}'")
    return DTYPES[name]


def autocast(
    device: torch.device, dtype: torch.dtype, weights: torch.dtype = torch.float32
) -> AbstractContextManager[None]:
    """Run matrix products in the block in ``dtype``.

    Nothing changes if ``dtype`` is float32 or equals ``weights``. In the second case, autocast
    would only make CUDA compute each LayerNorm in float32, which is slower (docs/log.md).

    Args:
        device: device of the model.
        dtype: dtype of matrix products.
        weights: dtype of the model's weights.

    Raises:
        InputError: float16 on a CPU, where it has no fast kernels and overflows silently.
    """
    if dtype == torch.float16 and device.type == "cpu":
        raise InputError("--dtype", "fp16 is not supported on a CPU", todo="use bf16 or fp32")
    if dtype in (torch.float32, weights):
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Disable :func:`autocast` in the block, for example for similarities and losses."""
    return torch.autocast(device.type, enabled=False)


def in_autocast_format(x: Tensor) -> Tensor:
    """Cast ``x`` to the autocast dtype on a CPU under :func:`autocast`; otherwise return ``x``.

    This is intended for a residual stream: norms and sums keep the dtype of their input. With a
    float32 stream, each matrix product first casts its input. For the mini UIT, these casts
    take a quarter of a training step on a CPU (docs/log.md).
    """
    if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        return x.to(torch.get_autocast_dtype("cpu"))
    return x


def make_scaler(device: torch.device, dtype: torch.dtype) -> torch.amp.GradScaler:
    """Create a loss scaler; it is active for float16 only, where small gradients underflow."""
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Compute scaled dot-product attention in the fastest dtype of the device.

    `B` batch, `H` heads, `N` queries, `M` keys, `C` head width.

    On a CPU, torch's bfloat16 attention is slower than float32, most of all in its backward pass
    (docs/log.md), so it runs in float32. On CPUs with matrix tiles, bfloat16 is faster for scoring,
    and for masks that need a gradient.

    Args:
        q: [B, H, N, C].
        k: [B, H, M, C].
        v: [B, H, M, C].
        mask: broadcast to [B, H, N, M]: bool, true for visible keys, or float, added to the logits;
            None masks nothing.
        dropout: dropout probability of attention weights; pass 0 outside training.

    Returns:
        [B, H, N, C] with the dtype of ``v``.
    """
    keeps_dtype = q.device.type != "cpu" or v.dtype == torch.float32
    if keeps_dtype or (HAS_TILES and not torch.is_grad_enabled()):
        if mask is not None and mask.is_floating_point():
            mask = mask.to(v.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    if mask is not None and mask.requires_grad and not dropout and HAS_TILES:
        # torch's fused kernels do not accept a mask with gradients. Two matrix products in tiles
        # are faster than torch's fallback.
        weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + mask).softmax(dim=-1)
        return weights.to(v.dtype) @ v
    if mask is not None and mask.is_floating_point():
        mask = mask.float()
    with full_precision(q.device):
        out = F.scaled_dot_product_attention(
            q.float(), k.float(), v.float(), attn_mask=mask, dropout_p=dropout
        )
    return out.to(v.dtype)


def recomputed(saving: bool, block: Callable[..., Tensor], *args: object) -> Tensor:
    """Apply a block; if ``saving``, store only its inputs and recompute it in the backward pass."""
    if saving and torch.is_grad_enabled():
        out: Tensor = checkpoint(block, *args, use_reentrant=False)
        return out
    return block(*args)


def keep_freed_memory(device: torch.device) -> None:
    """Keep freed memory in this process instead of returning it to the system (glibc only).

    A CPU batch frees hundreds of megabytes of activations, and the next batch allocates them again.
    The system clears returned pages each time, which takes a fifth of a training step
    (docs/log.md). For other devices, nothing happens. The process keeps the memory until
    :func:`return_freed_memory` is called.
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)


def return_freed_memory() -> None:
    """Return freed memory to the system, even after :func:`keep_freed_memory`.

    This is useful after a peak that will not recur. Without glibc, nothing happens.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed the generators of Python, NumPy and torch (all devices) with ``seed + rank``."""
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)


def rng_state(device: torch.device) -> dict[str, Any]:
    """Return the state of all random generators: Python, NumPy, torch and the device."""
    legacy: Any = np.random.get_state(legacy=True)
    kind, words, *rest = legacy
    numpy = [kind, words.tolist(), *rest]
    return {"python": random.getstate(), "numpy": numpy, **torch_rng_state(device)}


def set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Restore the generators from :func:`rng_state`.

    If the run resumes on another kind of device, that device's generator keeps its seed.
    """
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, numpy_words, *rest = state["numpy"]
    np.random.set_state((kind, np.array(numpy_words, dtype=np.uint32), *rest))
    set_torch_rng_state(state, device)


def torch_rng_state(device: torch.device) -> dict[str, Tensor]:
    """Return the state of torch's generators: the CPU's, and the device's if it has its own."""
    state = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_torch_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Restore torch's generators from :func:`torch_rng_state`; ignore other devices' states."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    elif device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])


def free_memory(device: torch.device) -> int | None:
    """Return a CUDA GPU's free bytes, including torch's unused cache; None for other devices."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def read_late(results: Iterable[tuple[Key, Tensor]]) -> Iterator[tuple[Key, Tensor]]:
    """Copy tensors to the CPU; wait for a GPU's tensor only after the next one is queued.

    The GPU computes the next tensor during the wait.

    Args:
        results: pairs of any key and a tensor on any device.

    Yields:
        The same pairs, with the tensor on the CPU.
    """
    waiting: deque[tuple[Key, Tensor, torch.cuda.Event]] = deque()
    for key, result in results:
        if result.device.type != "cuda":
            yield key, result.cpu()
            continue
        host = result.to("cpu", non_blocking=True)  # PyTorch page-locks the target
        copied = torch.cuda.Event()
        copied.record()
        waiting.append((key, host, copied))
        if len(waiting) > 1:
            yield _awaited(*waiting.popleft())
    for last in waiting:
        yield _awaited(*last)


def _awaited(key: Key, host: Tensor, copied: torch.cuda.Event) -> tuple[Key, Tensor]:
    """Wait until a copy is complete, and return it with its key."""
    copied.synchronize()
    return key, host


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work; required before reading a clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def cpu_has_bf16() -> bool:
    """Return true if the CPU multiplies bfloat16 in hardware (AVX512-BF16, AMX, Arm's BF16)."""
    capabilities = torch.cpu.get_capabilities()
    return any(bool(has) for name, has in capabilities.items() if name.endswith("bf16"))
