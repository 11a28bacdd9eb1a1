"""Merge loaded batches to full ones, before they are encoded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from pab.data.image_loader import ImageBatch


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
