"""Training samples of a contrastive recipe: a view of an image and the ids of its caption."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from pab.core.errors import InputError
from pab.data.images import ImageTransform
from pab.data.records import TrainPair
from pab.data.training_set import TrainingSet
from pab.training.data import TrainingSamples


class PairBatch(NamedTuple):
    """Batch of B pairs, with captions of N ids and images of S pixels per side.

    Ids and mask stay on the CPU until the text tower moves them, because the host reads the lengths
    of the captions.

    Attributes:
        image: [B, 3, S, S]; normalized, or uint8 for a view that is normalized on the device.
        text_ids: [B, N].
        text_mask: [B, N]; 1 marks padding for LHP and tokens for BLIP-2; all ones for CLIP.
        identity: [B]; pairs with equal numbers are not negatives of each other.
    """

    image: Tensor
    text_ids: Tensor
    text_mask: Tensor
    identity: Tensor

    def on(self, device: torch.device) -> PairBatch:
        """Copy images and identities to a device; the host does not wait."""
        return self._replace(
            image=self.image.to(device, non_blocking=True),
            identity=self.identity.to(device, non_blocking=True),
        )


# Image [3, S, S], ids of the caption, identity of the pair; or the error of a bad pair.
Sample = tuple[Tensor, list[int], int] | InputError


class PairDataset(TrainingSamples):
    """Dataset of training pairs with a random view of each image; an item is a :data:`Sample`.

    Args:
        pairs, indices, seed: see :class:`pab.training.data.TrainingSamples`.
        view: maps an image to a tensor [3, S, S].
        encode: maps a caption to ids.
    """

    def __init__(
        self,
        pairs: TrainingSet,
        indices: np.ndarray,
        view: ImageTransform,
        encode: Callable[[str], list[int]],
        seed: int,
    ) -> None:
        super().__init__(pairs, indices, seed)
        self.view, self.encode = view, encode

    def sample(self, index: int, pair: TrainPair, image: Image.Image) -> Sample:
        """See :class:`pab.training.data.TrainingSamples`."""
        return self.view(image), self.encode(pair.caption), self.pairs.identity(index)


@dataclass(frozen=True)
class PairCollate:
    """Stack images and pad captions; return the first error, if any.

    Attributes:
        pad: pads B rows of ids to equal length; returns the ids [B, N] and their mask [B, N].
    """

    pad: Callable[[list[list[int]]], tuple[Tensor, Tensor]]

    def __call__(self, samples: list[Sample]) -> PairBatch | InputError:
        images, captions, identities = [], [], []
        for sample in samples:
            if isinstance(sample, InputError):
                return sample
            images.append(sample[0])
            captions.append(sample[1])
            identities.append(sample[2])
        # In a worker, default_collate writes the images directly into shared memory.
        return PairBatch(default_collate(images), *self.pad(captions), torch.tensor(identities))
