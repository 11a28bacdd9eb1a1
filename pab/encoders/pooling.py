"""Similarity of BLIP-2: a caption has one vector, an image one per query token.

Shape letters: `Q` captions, `G` images, `K` query tokens, `E` width of the vectors.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Pooling = Literal["first", "max"]


def pooled_similarity(images: Tensor, texts: Tensor, pooling: Pooling) -> Tensor:
    """Compute cosine similarities [Q, G] of caption vectors [Q, E] and image vectors [G, K, E].

    Args:
        pooling: ``first`` uses only query token 0, as in the published scores; ``max`` uses the
            highest similarity of the K tokens, as in BLIP-2.
    """
    if pooling == "first":
        return texts @ images[:, 0].T
    best = texts @ images[:, 0].T
    for k in range(1, images.shape[1]):  # one token at a time: [Q, G, K] takes too much memory
        torch.maximum(best, texts @ images[:, k].T, out=best)
    return best


def similarity_of_rows(texts: Tensor, images: Tensor, *, pooling: Pooling) -> Tensor:
    """Apply :func:`pooled_similarity` to concatenated image vectors [G, K * E]."""
    return pooled_similarity(images.view(len(images), -1, texts.shape[1]), texts, pooling)
