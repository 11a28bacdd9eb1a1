"""Encode images and captions to unit vectors with any encoder, in batches and worker processes.

With several processes (torchrun), each encodes a part and all get all vectors.

Shape letters: `G` gallery, `Q` captions, `N` ids of a caption, `D` width of the vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pab.core import processes
from pab.core.devices import autocast
from pab.core.progress import progress
from pab.data.images import ImageReader, ImageRecipe, ImageTransform, image_loader
from pab.data.records import GalleryImage
from pab.scoring.encoder import AnyImage, as_images
from pab.scoring.feature_cache import FeatureCache, caption_digest

if TYPE_CHECKING:
    from pab.data.images import Loadable

Encode = Callable[[Tensor], Tensor]  # a batch on the model's device -> unit vectors [B, D]


def loaded(
    images: Sequence[Loadable],
    positions: Sequence[int],
    transform: ImageRecipe | ImageTransform,
    batch_size: int,
    num_workers: int,
    reader: ImageReader | None = None,
) -> Iterator[tuple[Tensor, list[int]]]:
    """Load some of the images in batches: pixels [B, 3, S, S] and their positions."""
    if not positions:
        return
    some = [images[position] for position in positions]
    for pixels, places in image_loader(some, transform, batch_size, num_workers, reader=reader):
        yield pixels, [positions[place] for place in places]


@torch.inference_mode()
def image_vectors(
    encode: Encode,
    images: Sequence[AnyImage],
    transform: ImageRecipe | ImageTransform,
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
    """Encode images; only one batch of files (plus prefetched ones) is in memory.

    Args:
        encode: pixels [B, 3, S, S] -> [B, D].
        images: see :meth:`pab.scoring.encoder.Encoder.encode_images`.
        transform: a recipe, or RGB image -> pixels; preprocessed tensors are taken as they are.
        batch_size: images per batch.
        num_workers: loader processes.
        device: device of the model.
        dtype: number format of matrix products; a model stored in it needs no autocast.
        weights: number format of the model's weights and of its pixels.
        full_batches: fill the last batch by repeating the last image, for an encoder compiled for
            one shape.
        cache: cache of this encoder's vectors; only images that it lacks are encoded. Not used if
            an image is not a file.
        reader: decodes the files; None uses the benchmark reader.

    Returns:
        float32 [G, D] on the CPU, in the order of ``images``. Images that the reader reports as
            unreadable have zero rows.
    """
    reader = reader or ImageReader()
    pictures = as_images(images)
    files = [picture for picture in pictures if isinstance(picture, GalleryImage)]
    if len(files) < len(pictures):
        cache = None
    mine = list(processes.share_of(len(pictures)))
    digests: dict[int, bytes] = {}
    known: list[int] = []
    new = mine
    if cache is not None:
        digests, known, new = cache.of_images(files, mine, num_workers, reader)
    parts = [cache.vectors([digests[i] for i in known])] if cache is not None and known else []
    order = list(known)
    batches = loaded(pictures, new, transform, batch_size, num_workers, reader)
    for pixels, places in progress(
        batches, "encoding images", "images", len(new), lambda batch: len(batch[1])
    ):
        rows = len(pixels)
        if full_batches and rows < batch_size:
            pixels = torch.cat([pixels, pixels[-1:].expand(batch_size - rows, -1, -1, -1)])
        with autocast(device, dtype):
            vectors = encode(pixels.to(device, weights))[:rows].float().cpu()
        if cache is not None:
            cache.keep([digests[place] for place in places], vectors)
        parts.append(vectors)
        order += places
    unreadable = reader.unreadable or {}
    failed = [i for i in mine if getattr(pictures[i], "gallery_id", None) in unreadable]
    if failed:
        parts.append(torch.zeros(len(failed), parts[0].shape[1] if parts else 0))
        order += failed
    return processes.assemble(order, torch.cat(parts) if parts else None, len(pictures), device)


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
    """Encode captions; captions of similar length share a batch, so that padding is minimal.

    Args:
        encode: positions of captions -> [B, D].
        rows: ids (or words) of each caption, which determine its vector.
        token_budget: ids per batch, padding included.
        device: device of the model.
        dtype: as in :func:`image_vectors`.
        cache: cache of this encoder's vectors; only captions that it lacks are encoded.

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
    batches = batches_by_length([len(rows[position]) for position in new], token_budget)
    for batch in progress(batches, "encoding captions", "captions", len(new), len):
        places = [new[position] for position in batch]
        with autocast(device, dtype):
            vectors = encode(places).float().cpu()
        if cache is not None:
            cache.keep([digests[place] for place in places], vectors)
        parts.append(vectors)
        order += places
    return processes.assemble(order, torch.cat(parts) if parts else None, len(rows), device)


def batches_by_length(lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Yield positions sorted by length, in batches with rows x longest within ``token_budget``."""
    batch: list[int] = []
    for position in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batch and (len(batch) + 1) * lengths[position] > token_budget:
            yield batch
            batch = []
        batch.append(position)
    if batch:
        yield batch
