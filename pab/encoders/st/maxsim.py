"""Late-interaction similarity (MaxSim) of captions and images, in blocks of bounded memory.

The score of a caption and an image is a sum over the caption's vectors. Each vector adds its
largest dot product with a vector of the image (ColBERT, Khattab and Zaharia, 2020). MeanMaxSim
divides this sum by the number of the caption's vectors.

Captions and images have different numbers of vectors. A row of a matrix holds all vectors of one
caption or image, padded to the largest number of vectors. Captions are padded with zeros, which add
nothing to a sum. Images are padded by repeating their first vector, which changes no maximum.

Shape letters: `Q` captions, `G` images, `M` vectors per caption, `N` vectors per image, `D` width
of a vector, `T` vectors of a group of captions, `g` images of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pab.core.progress import progress

# Numbers of vectors in a block of images and in a group of captions: their products take 4 MB in
# fp32. Larger products do not fit in a CPU's caches; smaller ones are less efficient
# (benchmarks/maxsim.py).
IMAGE_VECTORS = CAPTION_VECTORS = 1 << 10
IMAGE_VECTORS_ON_GPU = CAPTION_VECTORS_ON_GPU = 1 << 14  # products of 1 GB


def pad_caption(vectors: Tensor, count: int) -> Tensor:
    """Pad a caption's vectors [M, D] with zeros; return a row [count * D]."""
    row = vectors.new_zeros(count, vectors.shape[1])
    row[: len(vectors)] = vectors
    return row.flatten()


def pad_image(vectors: Tensor, count: int) -> Tensor:
    """Pad an image's vectors [N, D] by repeating the first; return a row [count * D]."""
    return torch.cat([vectors, vectors[:1].expand(count - len(vectors), -1)]).flatten()


def blocks_of(images: Tensor, width: int, device: torch.device) -> list[range]:
    """Split the images into blocks, which processes can share; only the last may be smaller.

    Args:
        images: [G, N * D].
        width: D.
        device: device that computes.
    """
    most = IMAGE_VECTORS if device.type == "cpu" else IMAGE_VECTORS_ON_GPU
    step = max(1, most * width // max(images.shape[1], 1))
    return [range(i, min(i + step, len(images))) for i in range(0, len(images), step)]


def maxsim(
    texts: Tensor,
    images: Tensor,
    width: int,
    *,
    mean: bool = False,
    device: torch.device | None = None,
    blocks: Sequence[range] | None = None,
) -> Tensor:
    """Compute MaxSim of captions and images.

    Products are computed in float32. Memory beyond the arguments and the result does not depend on
    the number of images. It holds the captions, a block of images, and the products of this block
    and a group of captions.

    Args:
        texts: float32 [Q, M * D], padded with zeros.
        images: [G, N * D] of any floating-point type, padded by repeating first vectors. The rows
            may be memory-mapped: a block is read when it is scored.
        width: D.
        mean: compute MeanMaxSim.
        device: device that computes; None uses that of ``images``.
        blocks: images to score, as from :func:`blocks_of`; None scores all.

    Returns:
        float32 [Q, G], or only the columns of the blocks, on the CPU.
    """
    device = device or images.device
    blocks = blocks_of(images, width, device) if blocks is None else blocks
    captions = texts.view(len(texts), -1, width)
    counts = _last(captions.any(dim=-1))
    groups = list(_groups(captions, counts, device))
    total, column = sum(map(len, blocks)), 0
    found = torch.empty(len(texts), total)
    for block in progress(blocks, "comparing captions and images", "images", total, len):
        rows = images[block.start : block.stop].view(len(block), -1, width)
        longest = _last((rows != rows[:, :1]).any(dim=-1)).max()
        vectors = rows[:, : max(int(longest), 1)].to(device).float()  # [g, N, D]
        for places, group in groups:
            products = group.flatten(0, 1) @ vectors.flatten(0, 1).T  # [T, g * N]
            best = products.view(-1, *vectors.shape[:2]).amax(dim=2)  # [T, g]
            scores = best.view(*group.shape[:2], -1).sum(dim=1)
            found[places, column : column + len(block)] = scores.cpu()
        column += len(block)
    return found / counts.clamp(min=1)[:, None] if mean else found


def _last(used: Tensor) -> Tensor:
    """Count the entries of each row up to the last true one; bool [B, N] -> int64 [B]."""
    numbers = torch.arange(1, used.shape[1] + 1, device=used.device)
    return (used * numbers).amax(dim=1)


def _groups(
    captions: Tensor, counts: Tensor, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield captions of similar length on the device.

    Args:
        captions: [Q, M, D].
        counts: int64 [Q], vectors of each caption.
        device: device that computes.

    Yields:
        Positions of q captions, and their vectors [q, m, D], without the padding that all share.
    """
    most = CAPTION_VECTORS if device.type == "cpu" else CAPTION_VECTORS_ON_GPU
    order = torch.argsort(counts, descending=True, stable=True)
    start = 0
    while start < len(order):
        longest = max(int(counts[order[start]]), 1)
        places = order[start : start + max(most // longest, 1)]
        yield places, captions[places, :longest].to(device)
        start += len(places)
