"""Settings and helpers shared by the tuning of embedders and rerankers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.transforms import RandomResizedCrop

from pab.core.config import flag, speed_flag
from pab.core.device_errors import check_shared_memory
from pab.core.errors import InputError, first_line
from pab.data.loader import Loader
from pab.encoders.st.pictures import REJECTIONS
from pab.training.config import TrainingConfig, check_crops_and_rates


@dataclass(frozen=True)
class VlmTuneConfig(TrainingConfig):
    """Settings shared by the recipes for vision-language models."""

    # Data
    crop_prob: float = flag(0.0, "probability of a random crop of an image", ge=0, le=1)
    crop_scale: tuple[float, float] = flag((0.75, 1.0), "area of the crop, min and max")
    crop_ratio: tuple[float, float] = flag((3 / 4, 4 / 3), "aspect ratio of the crop, min and max")

    # Optimization
    min_lr: float = flag(0.0, "final learning rate", ge=0)
    warmup_steps: int = flag(100, "steps of linear warm-up", ge=0)
    checkpoint_activations: bool = speed_flag(False, "recompute blocks in the backward pass")

    def check(self) -> None:
        """See :class:`pab.training.config.TrainingConfig`.

        Raises:
            InputError: a value is invalid; the message names the flag.
        """
        super().check()
        check_crops_and_rates(self.crop_scale, self.crop_ratio, self.min_lr, self.lr)

    def random_crop(self) -> RandomCrop:
        """Return the random crop of training images."""
        return RandomCrop(self.crop_prob, self.crop_scale, self.crop_ratio)

    def tuned_folder(self) -> Path:
        """Return the folder of the tuned model; the end of the run replaces an earlier model.

        Raises:
            InputError: a file has the folder's name.
        """
        folder = Path(self.output_dir) / "model"
        if folder.exists() and not folder.is_dir():
            raise InputError("--output_dir", f"{folder} exists and is not a folder")
        return folder


@dataclass(frozen=True)
class RandomCrop:
    """Crop an image at random, without resizing: the model's processor resizes it.

    Attributes:
        probability: probability that an image is cropped.
        scale: area of the crop, min and max, relative to the image.
        ratio: aspect ratio of the crop, min and max.
    """

    probability: float
    scale: tuple[float, float]
    ratio: tuple[float, float]

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the image or a crop of it; draws from torch's generator."""
        if float(torch.rand(())) >= self.probability:
            return image
        top, left, height, width = RandomResizedCrop.get_params(
            image, list(self.scale), list(self.ratio)
        )
        return image.crop((left, top, left + width, top + height))


def image_at_fault(
    error: Exception, samples: Iterable[tuple[Path, Image.Image]],
    attempt: Callable[[Image.Image], object],
) -> InputError:  # fmt: skip
    """Find the image that a processor rejects, such as an image of extreme shape.

    Args:
        error: error of the batch; raised again if no single image causes an error.
        samples: files and images of the batch.
        attempt: function that processes an image.
    """
    for path, image in samples:
        try:
            attempt(image)
        except REJECTIONS as own:
            return InputError(path, f"the model's processor rejects the image: {first_line(own)}")
    raise error


def check_batches_fit(loader: Loader, sample: Mapping[str, Any], batch_size: int) -> None:
    """Check that the loader's batches fit in shared memory.

    Args:
        loader: loader of the training samples.
        sample: model inputs of one sample.
        batch_size: samples per batch.

    Raises:
        InputError: see :func:`pab.core.device_errors.check_shared_memory`.
    """
    size = sum(value.nbytes for value in sample.values() if isinstance(value, Tensor))
    check_shared_memory(loader.num_workers, size, batch_size, len(loader.dataset))  # type: ignore[arg-type]


def plain_attention(device: torch.device) -> AbstractContextManager[None]:
    """Compute attention on a CPU by plain matrix products, inside the ``with`` block.

    The backward pass of torch's fused attention is slower on a CPU (docs/log.md).
    """
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
