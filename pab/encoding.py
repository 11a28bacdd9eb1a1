"""Images and captions to unit vectors with any encoder: batches, workers, devices, order.

Shape letters: `G` gallery, `Q` captions, `N` ids of a caption, `D` width of the vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from pab.annotations import GalleryImage
from pab.devices import autocast
from pab.images import ImageTransform, image_loader

Encode = Callable[[Tensor], Tensor]  # a batch on the model's device -> unit vectors [B, D]


@torch.inference_mode()
def image_vectors(
    encode: Encode,
    images: Sequence[GalleryImage],
    transform: ImageTransform,
    *,
    batch_size: int,
    num_workers: int,
    device: torch.device,
    dtype: torch.dtype,
    weights: torch.dtype,
    full_batches: bool = False,
) -> Tensor:
    """Vectors of a gallery; holds one batch of images at a time (and the loader's prefetched ones).

    Args:
        encode: pixels [B, 3, S, S] -> [B, D].
        images: the gallery.
        transform: RGB image -> pixels.
        batch_size: images at a time.
        num_workers: loader processes.
        device: where the model is.
        dtype: number format of matrix products; a model that is held in it needs no autocast.
        weights: number format of the model's weights, in which it takes its pixels.
        full_batches: repeat the last image until the last batch is as large as the others, for an
            encoder compiled for one shape.

    Returns:
        float32 [G, D] on the CPU, in the order of ``images``.
    """
    loader = image_loader(list(images), transform, batch_size, num_workers)
    vectors: Tensor | None = None
    for pixels, positions in loader:
        rows = len(pixels)
        if full_batches and rows < batch_size:
            pixels = torch.cat([pixels, pixels[-1:].expand(batch_size - rows, -1, -1, -1)])
        with autocast(device, dtype):
            found = encode(pixels.to(device, weights))[:rows].float().cpu()
        if vectors is None:
            vectors = torch.empty(len(images), found.shape[1])
        vectors[positions] = found
    assert vectors is not None  # a gallery has images
    return vectors


@torch.inference_mode()
def caption_vectors(
    encode: Callable[[list[int]], Tensor],
    lengths: Sequence[int],
    *,
    token_budget: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Vectors of captions. Captions of like length share a batch, so that little is padding.

    Args:
        encode: positions of captions -> [B, D].
        lengths: ids of each caption.
        token_budget: ids a batch, padding included.
        device: where the model is.
        dtype: as in :func:`image_vectors`.

    Returns:
        float32 [Q, D] on the CPU, in the order of ``lengths``.
    """
    vectors: Tensor | None = None
    for positions in batches_by_length(lengths, token_budget):
        with autocast(device, dtype):
            found = encode(positions).float().cpu()
        if vectors is None:
            vectors = torch.empty(len(lengths), found.shape[1])
        vectors[positions] = found
    assert vectors is not None  # an annotation has queries
    return vectors


def batches_by_length(lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Positions in order of length, cut where rows x longest would pass ``token_budget``."""
    batch: list[int] = []
    for position in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batch and (len(batch) + 1) * lengths[position] > token_budget:
            yield batch
            batch = []
        batch.append(position)
    if batch:
        yield batch
