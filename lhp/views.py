"""Local-global hybrid perspective: choice of the image view in a training step.

Each image gets a draw from N(0.5, sd 1/6). Above a threshold, it is seen in the local view (a
random resized crop), otherwise in the global view (the whole image). The published threshold of 0.5
makes both equally likely.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from pab.data.images import ImageTransform, recipe

VIEW_DRAW = NormalDist(mu=0.5, sigma=1 / 6)  # distribution whose draw selects the view


def local_threshold(local_prob: float) -> float:
    """Draw value above which the view is local: 0.5 at 0.5, infinite at 0, -infinite at 1."""
    if local_prob <= 0:
        return math.inf
    if local_prob >= 1:
        return -math.inf
    return VIEW_DRAW.inv_cdf(1 - local_prob)


class HybridView:
    """Random view of a training image, normalised for BEiT-3 or by another model's recipe.

    Draws use torch's global generator; seed it to repeat a view.

    Args:
        size: side of the result, pixels.
        local_prob: probability of the local view.
        crop_scale: area of the local crop as a fraction of the image, minimum and maximum.
        crop_ratio: width over height of the local crop, minimum and maximum.
        whole: preprocessing of the model, which gives the global view (CLIP's crops the centre); it
            must not crop an image of ``size`` pixels. None uses BEiT-3's.
    """

    def __init__(
        self,
        size: int,
        local_prob: float,
        crop_scale: tuple[float, float],
        crop_ratio: tuple[float, float],
        whole: ImageTransform | None = None,
    ) -> None:
        self.threshold = local_threshold(local_prob)
        self.whole = whole or recipe("beit3", size).transform()
        self.crop = v2.RandomResizedCrop(
            size, scale=crop_scale, ratio=crop_ratio, interpolation=v2.InterpolationMode.BICUBIC
        )

    def __call__(self, image: Image.Image) -> Tensor:
        """RGB image -> float32 [3, size, size]."""
        draw = VIEW_DRAW.mean + VIEW_DRAW.stdev * float(torch.randn(()))
        # The crop already has the final size, so the whole-image recipe only normalises it.
        return self.whole(self.crop(image) if draw > self.threshold else image)
