"""Merge loaded batches into full ones before they are encoded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from pab.data.image_loader import ImageBatch, P


def refilled(batches: Iterable[ImageBatch[P]], size: int) -> Iterator[ImageBatch[P]]:
    """Merge batches that lack cached or unreadable images; only the last batch may be smaller.

    Args:
        batches: loaded batches of at most ``size`` images.
        size: images per merged batch.
    """
    waiting: list[ImageBatch[P]] = []
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


def _merged(batches: list[ImageBatch[P]]) -> ImageBatch[P]:
    """Concatenate the images to encode."""
    if len(batches) == 1:
        return batches[0]
    positions = [position for batch in batches for position in batch.positions]
    keys = [key for batch in batches for key in batch.keys]
    return ImageBatch(_joined([batch.pixels for batch in batches]), positions, keys, {}, {})


def _joined(parts: list[Any]) -> Any:
    """Concatenate the contents of batches; the result is page-locked if the parts are."""
    if not isinstance(parts[0], Tensor):
        return [image for part in parts for image in part]
    pixels = torch.cat(parts)
    return pixels.pin_memory() if parts[0].is_pinned() else pixels
