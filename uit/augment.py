"""UIT's training view: resizing, flip, up to two operations, normalization, random erasing.

The loader's processes draw a view and return uint8 pixels and the rectangle to erase. The device
normalizes the pixels and then erases the rectangle.

Source: the release. The ten operations are part of RandAugment (Cubuk et al., arXiv 1909.13719), as
in the vision-language models that UIT builds on. Erasing follows Zhong et al. (arXiv 1708.04896).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from pab.data.images import recipe
from pab.data.pixels import CPU, normalizer

LEVELS = 10
OPERATIONS_A_VIEW = 2
OPERATION_PROB = 0.5  # probability of applying each drawn operation
OUTSIDE = 128  # grey fill for pixels outside the image
# Values at the highest level:
ROTATE = 30.0  # degrees
SHEAR = 0.3  # pixels per pixel, from the upper left corner
TRANSLATE = 10  # pixels
ENHANCE = 1.8  # brightness and sharpness: the factor is this value times level / LEVELS, plus 0.1
# Erased rectangle, with the values of Zhong et al.:
ERASED_AREA = (0.02, 0.4)  # fraction of the image
ERASED_RATIO = (0.3, 1 / 0.3)  # height over width

Rectangle = tuple[int, int, int, int]  # top, left, height, width, in pixels
NOTHING: Rectangle = (0, 0, 0, 0)  # a rectangle that erases nothing


@dataclass(frozen=True)
class Augmentation:
    """Settings of :class:`TrainingView`.

    Attributes:
        flip_prob: probability of flipping the image horizontally.
        level: strength of the operations, 0 to :data:`LEVELS`; None disables them.
        erasing_prob: probability of erasing a rectangle.
    """

    flip_prob: float = 0.5
    level: int | None = 7
    erasing_prob: float = 0.6


@cache
def operations(level: int) -> dict[str, Callable[[Image.Image, float], Image.Image]]:
    """Return the ten operations by name; their arguments are an image and a sign, +1 or -1."""
    strength = level / LEVELS
    factor = ENHANCE * strength + 0.1
    shear = math.degrees(math.atan(SHEAR * strength))
    offset = round(TRANSLATE * strength)

    def move(
        image: Image.Image, x: int = 0, y: int = 0, shear_x: float = 0.0, shear_y: float = 0.0
    ) -> Image.Image:
        return F.affine(
            image, angle=0.0, translate=[x, y], scale=1.0, shear=[shear_x, shear_y],
            interpolation=v2.InterpolationMode.BILINEAR, fill=[OUTSIDE] * 3, center=[0.0, 0.0],
        )  # fmt: skip

    def rotate(image: Image.Image, sign: float) -> Image.Image:
        angle, bilinear = sign * ROTATE * strength, v2.InterpolationMode.BILINEAR
        return F.rotate(image, angle, interpolation=bilinear, fill=[OUTSIDE] * 3)

    return {
        "identity": lambda image, sign: image,
        "auto_contrast": lambda image, sign: F.autocontrast(image),
        "equalize": lambda image, sign: F.equalize(image),
        "brightness": lambda image, sign: F.adjust_brightness(image, factor),
        "sharpness": lambda image, sign: F.adjust_sharpness(image, factor),
        "shear_x": lambda image, sign: move(image, shear_x=sign * shear),
        "shear_y": lambda image, sign: move(image, shear_y=sign * shear),
        "translate_x": lambda image, sign: move(image, x=int(sign * offset)),
        "translate_y": lambda image, sign: move(image, y=int(sign * offset)),
        "rotate": rotate,
    }


class TrainingView:
    """Augment and normalize a training image for UIT.

    All draws use torch's global generator; seed the generator to repeat a view.

    Args:
        size: side of the output, pixels.
        augmentation: probabilities and strength of the random changes.
    """

    def __init__(self, size: int, augmentation: Augmentation) -> None:
        bicubic = v2.InterpolationMode.BICUBIC
        self.resize = v2.Resize((size, size), interpolation=bicubic)
        self.flip = v2.RandomHorizontalFlip(augmentation.flip_prob)
        self.level = augmentation.level
        preprocessing = recipe("uit", size).transform()  # images already have this size
        self.as_tensor, self.normalization = preprocessing.pixels, preprocessing.normalization
        self.erasing = v2.RandomErasing(augmentation.erasing_prob, ERASED_AREA, ERASED_RATIO)

    def draw(self, image: Image.Image) -> tuple[Tensor, Rectangle]:
        """Draw a view of an RGB image, uint8 [3, size, size], and a rectangle (may be empty)."""
        image = self.flip(self.resize(image))
        if self.level is not None:
            every = list(operations(self.level).values())
            for i in torch.randint(len(every), (OPERATIONS_A_VIEW,)).tolist():
                apply, sign = torch.rand(2).tolist()
                if apply < OPERATION_PROB:
                    image = every[i](image, 1.0 if sign < 0.5 else -1.0)
        pixels = self.as_tensor(image)
        if torch.rand(1) >= self.erasing.p:
            return pixels, NOTHING
        found = self.erasing.make_params([pixels])
        if found["v"] is None:  # no rectangle of the drawn shapes fits
            return pixels, NOTHING
        return pixels, (found["i"], found["j"], found["h"], found["w"])

    def __call__(self, image: Image.Image) -> Tensor:
        """Convert an RGB image to a random view, normalized, float32 [3, size, size]."""
        pixels, rectangle = self.draw(image)
        images = normalizer(self.normalization, CPU)(pixels[None])
        return erase(images, torch.tensor([rectangle]))[0]


def erase(images: Tensor, rectangles: Tensor) -> Tensor:
    """Set a rectangle of each image to 0 (after normalization, the mean), in place.

    Args:
        images: floating-point images [B, 3, S, S].
        rectangles: int64 [B, 4], as :data:`Rectangle`.
    """
    place = torch.arange(images.shape[-1], device=images.device)
    top, left, height, width = rectangles[:, :, None].unbind(1)  # each [B, 1]
    rows = (place >= top) & (place < top + height)  # [B, S]
    columns = (place >= left) & (place < left + width)  # [B, S]
    return images.masked_fill_((rows[:, :, None] & columns[:, None])[:, None], 0.0)
