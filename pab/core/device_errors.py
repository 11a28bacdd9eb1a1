"""Describe memory and other device errors in one line, and check the shared memory."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from pab.core.devices import local_processes
from pab.core.errors import InputError

GB = 1e9
SHARED_MEMORY = Path("/dev/shm")  # workers of PyTorch's loaders pass their batches through it
PREFETCH = 2  # batches that each worker loads ahead, PyTorch's default

# Messages of out-of-memory errors that have no class of their own: CPU (Linux, Windows), MPS and
# cuBLAS.
_OUT_OF_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|out of memory|CUBLAS_STATUS_ALLOC_FAILED", re.I
)
_LOST_WORKER = "workers are out of shared memory"  # PyTorch's guess after a bus error
_MORE_ROOM = f"use --num_workers {{}}, or a larger {SHARED_MEMORY} (Docker: --shm-size)"
_NOT_DETERMINISTIC = re.compile(r"(\S+) does not have a deterministic implementation")
_EXPLAINED = "out of memory while "  # start of the note that `explaining_memory` adds


@contextmanager
def explaining_memory(device: torch.device, work: str, remedy: str) -> Iterator[None]:
    """Explain an out-of-memory error of the block in a note; :func:`one_line` returns it.

    Of nested blocks around an error, only the innermost adds a note, because it is the most
    specific.

    Args:
        device: device of the model.
        work: what the block does, such as ``encoding images``.
        remedy: settings that help.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if _is_out_of_memory(error) and _explanation(error) is None:
            error.add_note(f"{_EXPLAINED}{work}: {_peak(device)}; {remedy}")
        raise


def one_line(error: BaseException) -> str | None:
    """Describe a device error in one line; return None for any other error."""
    if isinstance(error, RuntimeError) and _LOST_WORKER in str(error):
        return f"{SHARED_MEMORY} is full, so a loader process died: {_MORE_ROOM.format(0)}"
    if _is_out_of_memory(error):
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        return _explanation(error) or f"out of memory: {first}"
    found = _NOT_DETERMINISTIC.search(str(error))
    if isinstance(error, RuntimeError) and found:
        return (
            f"--deterministic: {found[1]} has no deterministic algorithm on this device; "
            "run without --deterministic"
        )
    return None


def _explanation(error: BaseException) -> str | None:
    notes = getattr(error, "__notes__", ())
    return next((note for note in notes if note.startswith(_EXPLAINED)), None)


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


def _peak(device: torch.device) -> str:
    """Describe this process's peak memory (MPS: current memory) and the device's memory."""
    kind = "peak"
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        used, total, name = torch.cuda.max_memory_allocated(device), card.total_memory, card.name
    elif device.type == "mps":
        kind, used, name = "in use", torch.mps.driver_allocated_memory(), "the GPU"
        total = torch.mps.recommended_max_memory()
    elif sys.platform == "win32":
        return "the machine's memory is used up"
    else:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, bytes
        used, name = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "this machine"
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{kind} {used / GB:.1f} GB of the {total / GB:.1f} GB of {name}"


def check_shared_memory(num_workers: int, sample_bytes: int, batch_size: int, samples: int) -> None:
    """Check that loaded batches fit in ``/dev/shm``; otherwise, a worker would die (bus error).

    The check assumes the same load for all processes of the machine, and two batches per worker. It
    is skipped without workers, and on systems without ``/dev/shm``.

    Args:
        num_workers: number of loader processes of this process.
        sample_bytes: size of a loaded sample in bytes.
        batch_size: samples per batch.
        samples: number of samples that this process loads.

    Raises:
        InputError: the free space is too small, or ``LOCAL_WORLD_SIZE`` is not a positive integer.
    """
    if num_workers == 0 or not SHARED_MEMORY.is_dir():
        return
    loaders = local_processes()
    wanted = loaders * sample_bytes * min(num_workers * PREFETCH * batch_size, samples)
    free = shutil.disk_usage(SHARED_MEMORY).free
    if wanted > free:
        fits = free // (loaders * sample_bytes * PREFETCH * batch_size)
        raise InputError(
            SHARED_MEMORY,
            f"expected room for {wanted / GB:.2f} GB of loaded batches, found {free / GB:.2f} GB",
            todo=_MORE_ROOM.format(fits),
        )
