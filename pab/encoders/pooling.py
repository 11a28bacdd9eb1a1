"""BLIP-2's similarity of a caption and an image, which has a vector for each query token.

Shape letters: `Q` captions, `G` images, `K` query tokens, `E` width of the vectors.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Pooling = Literal["first", "max"]


def pooled_similarity(images: Tensor, texts: Tensor, pooling: Pooling) -> Tensor:
    """Captions' vectors [Q, E] against images' [G, K, E] -> cosine similarities [Q, G].

    Args:
        pooling: ``first`` compares with query token 0 alone, as published by the method's authors;
            ``max`` takes the best of the K, BLIP-2's own rule.
    """
    if pooling == "first":
        return texts @ images[:, 0].T
    best = texts @ images[:, 0].T
    for k in range(1, images.shape[1]):  # one query token at a time: [Q, G, K] would not fit
        torch.maximum(best, texts @ images[:, k].T, out=best)
    return best


def similarity_of_rows(texts: Tensor, images: Tensor, *, pooling: Pooling) -> Tensor:
    """:func:`pooled_similarity` [Q, G] of images' vectors that stand side by side, [G, K * E]."""
    return pooled_similarity(images.view(len(images), -1, texts.shape[1]), texts, pooling)
