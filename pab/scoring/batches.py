"""Batches on their way to the device and back: no gaps, and no waiting for results.

Shape letters: `B` images of a batch, `D` width of the vectors.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from pab.data.image_loader import ImageBatch

Key = TypeVar("Key")


def refilled(batches: Iterable[ImageBatch], size: int) -> Iterator[ImageBatch]:
    """Merge batches with gaps, left by images with cached vectors, to full batches."""
    waiting: list[ImageBatch] = []
    for batch in batches:
        if batch.positions:
            waiting.append(batch)
        if sum(len(one.positions) for one in waiting) >= size:
            merged = _merged(waiting)
            yield merged.part(slice(size))
            rest = merged.part(slice(size, None))
            waiting = [rest] if rest.positions else []
    if waiting:
        yield _merged(waiting)


def _merged(batches: list[ImageBatch]) -> ImageBatch:
    """Concatenate the images to encode; keep them page-locked."""
    if len(batches) == 1:
        return batches[0]
    pixels = torch.cat([batch.pixels for batch in batches])
    if batches[0].pixels.is_pinned():
        pixels = pixels.pin_memory()
    positions = [position for batch in batches for position in batch.positions]
    keys = [key for batch in batches for key in batch.keys]
    return ImageBatch(pixels, positions, keys, {}, {})


def read_late(batches: Iterable[tuple[Key, Tensor]]) -> Iterator[tuple[Key, Tensor]]:
    """Copy the vectors of batches to the CPU, without waiting for a CUDA device.

    With CUDA, a batch is read when the next one is queued, so that the device never idles.

    Args:
        batches: anything that identifies a batch, and its vectors, on any device.

    Yields:
        The same, with the vectors on the CPU.
    """
    waiting: deque[tuple[Key, Tensor, torch.cuda.Event]] = deque()
    for key, vectors in batches:
        if vectors.device.type != "cuda":
            yield key, vectors.cpu()
            continue
        host = vectors.to("cpu", non_blocking=True)  # page-locked, as the copy does not block
        copied = torch.cuda.Event()
        copied.record()
        waiting.append((key, host, copied))
        if len(waiting) > 1:
            yield _copied(*waiting.popleft())
    for one in waiting:
        yield _copied(*one)


def _copied(key: Key, host: Tensor, copied: torch.cuda.Event) -> tuple[Key, Tensor]:
    copied.synchronize()
    return key, host
