"""Images and captions to unit vectors with any encoder: batches, workers, devices, order.

Several processes (torchrun) share the work, and all of them get all vectors.

Shape letters: `G` gallery, `Q` captions, `N` ids of a caption, `D` width of the vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from pab.core import processes
from pab.core.devices import autocast
from pab.data.annotations import GalleryImage
from pab.data.images import ImageReader, ImageTransform, image_loader
from pab.scoring.feature_cache import FeatureCache, caption_digest

Encode = Callable[[Tensor], Tensor]  # a batch on the model's device -> unit vectors [B, D]


def loaded(
    images: Sequence[GalleryImage],
    positions: Sequence[int],
    transform: ImageTransform,
    batch_size: int,
    num_workers: int,
    reader: ImageReader | None = None,
) -> Iterator[tuple[Tensor, list[int]]]:
    """Some of a gallery's images: pixels [B, 3, S, S] and their positions, a batch at a time."""
    if not positions:
        return
    some = [images[position] for position in positions]
    for pixels, places in image_loader(some, transform, batch_size, num_workers, reader=reader):
        yield pixels, [positions[place] for place in places]


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
    cache: FeatureCache | None = None,
    reader: ImageReader | None = None,
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
        cache: of this encoder's vectors; only images that are not in it are encoded.
        reader: decodes the files; None reads a benchmark's images.

    Returns:
        float32 [G, D] on the CPU, in the order of ``images``. The row of an image that the reader
        collects as unreadable is zero.
    """
    reader = reader or ImageReader()
    mine = list(processes.share_of(len(images)))
    digests: dict[int, bytes] = {}
    known: list[int] = []
    new = mine
    if cache is not None:
        digests, known, new = cache.of_images(images, mine, num_workers, reader)
    parts = [cache.vectors([digests[i] for i in known])] if cache is not None and known else []
    order = list(known)
    for pixels, places in loaded(images, new, transform, batch_size, num_workers, reader):
        rows = len(pixels)
        if full_batches and rows < batch_size:
            pixels = torch.cat([pixels, pixels[-1:].expand(batch_size - rows, -1, -1, -1)])
        with autocast(device, dtype):
            vectors = encode(pixels.to(device, weights))[:rows].float().cpu()
        if cache is not None:
            cache.keep([digests[place] for place in places], vectors)
        parts.append(vectors)
        order += places
    failed = [i for i in mine if images[i].gallery_id in (reader.unreadable or {})]
    if failed:
        parts.append(torch.zeros(len(failed), parts[0].shape[1] if parts else 0))
        order += failed
    return processes.assemble(order, torch.cat(parts) if parts else None, len(images), device)


@torch.inference_mode()
def caption_vectors(
    encode: Callable[[list[int]], Tensor],
    rows: Sequence[Sequence[int | str]],
    *,
    token_budget: int,
    device: torch.device,
    dtype: torch.dtype,
    cache: FeatureCache | None = None,
) -> Tensor:
    """Vectors of captions. Captions of like length share a batch, so that little is padding.

    Args:
        encode: positions of captions -> [B, D].
        rows: ids (or words) of each caption; what its vector depends on.
        token_budget: ids a batch, padding included.
        device: where the model is.
        dtype: as in :func:`image_vectors`.
        cache: of this encoder's vectors; only captions that are not in it are encoded.

    Returns:
        float32 [Q, D] on the CPU, in the order of ``rows``.
    """
    new = list(processes.share_of(len(rows)))
    digests: dict[int, bytes] = {}
    order: list[int] = []
    parts: list[Tensor] = []
    if cache is not None:
        digests = {position: caption_digest(rows[position]) for position in new}
        order, new = cache.split(digests)
        parts = [cache.vectors([digests[i] for i in order])] if order else []
    for batch in batches_by_length([len(rows[position]) for position in new], token_budget):
        places = [new[position] for position in batch]
        with autocast(device, dtype):
            vectors = encode(places).float().cpu()
        if cache is not None:
            cache.keep([digests[place] for place in places], vectors)
        parts.append(vectors)
        order += places
    return processes.assemble(order, torch.cat(parts) if parts else None, len(rows), device)


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
