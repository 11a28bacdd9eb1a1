"""Pixels of images: uint8 in the loader's processes, scaled and normalized on the device.

uint8 pixels take a quarter of the shared memory and of the transfers to the device. They also save
arithmetic in the loader's processes, which often limit the speed of a GPU. The operations and their
order are those of torchvision, so the float32 values are bit-identical on a CPU.

Shape letters: `B` batch, `H` and `W` height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor

CPU = torch.device("cpu")
Colour = tuple[float, float, float]  # of R, G and B


def planes(image: Image.Image) -> Tensor:
    """Convert an RGB image to uint8 [3, H, W]."""
    data = bytearray().join(image.tobytes("raw", band) for band in "RGB")
    return torch.frombuffer(data, dtype=torch.uint8).view(3, image.height, image.width)


@dataclass(frozen=True)
class Normalization:
    """Scale uint8 pixels to 0 to 1, subtract a mean and divide by a standard deviation.

    Attributes:
        mean: subtracted from R, G and B.
        std: divisor after the subtraction.
        divides: scale by a division, as torchvision's ``ToTensor`` does. Otherwise scale by a
            multiplication, as its ``ToDtype`` does. The results differ in the last bit.
    """

    mean: Colour
    std: Colour
    divides: bool = False

    def on(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """Return a function from uint8 [..., 3, H, W] on a device to float32 of the same shape.

        Pixels of a floating-point type are returned unchanged, because they are normalized already.
        The constants are copied to the device once, so the function waits for no copy.
        """
        mean, std = (torch.tensor(c, device=device).view(3, 1, 1) for c in (self.mean, self.std))
        divides = self.divides

        def normalize(pixels: Tensor) -> Tensor:
            if pixels.is_floating_point():
                return pixels
            scaled = pixels.to(torch.float32)
            scaled = scaled.div_(255) if divides else scaled.mul_(1 / 255)
            return scaled.sub_(mean).div_(std)

        return normalize


@runtime_checkable
class TwoParts(Protocol):
    """Image transform in two parts; a call applies both: RGB image -> float32 [3, H, W].

    Attributes:
        normalization: from uint8 pixels to float32, for a batch on the device; None if the pixels
            are normalized already.
    """

    @property
    def normalization(self) -> Normalization | None: ...

    def pixels(self, image: Image.Image) -> Tensor:
        """Convert an RGB image to the pixels [3, H, W] that ``normalization`` expects."""

    def __call__(self, image: Image.Image) -> Tensor:
        """Convert an RGB image to normalized pixels, float32 [3, H, W]."""


@dataclass(frozen=True)
class Preprocessing:
    """Image transform made of two functions; see :class:`TwoParts`."""

    pixels: Callable[[Image.Image], Tensor]
    normalization: Normalization | None

    def __call__(self, image: Image.Image) -> Tensor:
        """See :class:`TwoParts`."""
        return normalizer(self.normalization, CPU)(self.pixels(image))


def normalizer(
    normalization: Normalization | None, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """Return the function that normalizes pixels on a device; for None, the identity function."""
    return normalization.on(device) if normalization else lambda pixels: pixels
