"""Local-global hybrid perspective: random choice of a training image's view.

For each image, a number is drawn from a normal distribution with mean 0.5 and standard deviation
1/6. Above a threshold, the local view (a random resized crop) is used, otherwise the global view
(the whole image). At the published threshold of 0.5, both views are equally likely.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from pab.data.images import ImageRecipe, ImageTransform, in_two_parts, recipe
from pab.data.pixels import CPU, normalizer

VIEW_DRAW = NormalDist(mu=0.5, sigma=1 / 6)  # distribution of the number that selects the view


def local_threshold(local_prob: float) -> float:
    """Return the draw above which the view is local (0.5 -> 0.5, 0 -> inf, 1 -> -inf)."""
    if local_prob <= 0:
        return math.inf
    if local_prob >= 1:
        return -math.inf
    return VIEW_DRAW.inv_cdf(1 - local_prob)


class HybridView:
    """Random view of a training image, normalized for BEiT-3 or by another model's preprocessing.

    Draws use torch's global generator; seed the generator to repeat a view. The view is a transform
    in two parts (:class:`pab.data.pixels.TwoParts`).

    Args:
        size: side of the output, pixels.
        local_prob: probability of the local view.
        crop_scale: area of the local crop as a fraction of the image, minimum and maximum.
        crop_ratio: width over height of the local crop, minimum and maximum.
        whole: preprocessing that produces the global view (for CLIP, a centre crop). It is also
            applied to the local crop of size x size pixels, and must not crop it further. None uses
            BEiT-3's preprocessing.
    """

    def __init__(
        self,
        size: int,
        local_prob: float,
        crop_scale: tuple[float, float],
        crop_ratio: tuple[float, float],
        whole: ImageRecipe | ImageTransform | None = None,
    ) -> None:
        self.threshold = local_threshold(local_prob)
        self.whole = in_two_parts(whole or recipe("beit3", size))
        self.normalization = self.whole.normalization
        self.crop = v2.RandomResizedCrop(
            size, scale=crop_scale, ratio=crop_ratio, interpolation=v2.InterpolationMode.BICUBIC
        )

    def pixels(self, image: Image.Image) -> Tensor:
        """Convert an RGB image to a random view [3, size, size], uint8.

        If ``whole`` cannot be split into two parts, the view is normalized already and is float32.
        """
        draw = VIEW_DRAW.mean + VIEW_DRAW.stdev * float(torch.randn(()))
        # The crop already has the final size, so the preprocessing does not resize it.
        return self.whole.pixels(self.crop(image) if draw > self.threshold else image)

    def __call__(self, image: Image.Image) -> Tensor:
        """Convert an RGB image to a random view, normalized, float32 [3, size, size]."""
        return normalizer(self.normalization, CPU)(self.pixels(image))
