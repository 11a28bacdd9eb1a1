"""Training samples of a contrastive recipe: one view of the image, one caption's ids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pab.annotations import TrainPair
from pab.images import ImageTransform
from pab.training_data import BadSample, TrainingSamples
from pab.training_set import TrainingSet


class PairBatch(NamedTuple):
    """A batch of B pairs: images [B, 3, S, S], ids [B, N] and their mask [B, N].

    What the mask marks is the model's own custom: BEiT-3 marks padding, BERT marks tokens.
    """

    image: Tensor
    text_ids: Tensor
    text_mask: Tensor


Sample = tuple[Tensor, list[int]] | BadSample  # image [3, S, S] and its caption's ids


class PairDataset(TrainingSamples):
    """Pairs of the training set, each image seen through a random view: :data:`Sample`.

    Args:
        pairs, indices, seed: see :class:`pab.training_data.TrainingSamples`.
        view: image -> tensor.
        encode: caption -> ids.
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
        """See :class:`pab.training_data.TrainingSamples`."""
        return self.view(image), self.encode(pair.caption)


@dataclass(frozen=True)
class PairCollate:
    """Stacks images and pads captions; or gives the first bad sample.

    Attributes:
        pad: rows of ids -> ids [B, N] and their mask [B, N].
    """

    pad: Callable[[list[list[int]]], tuple[Tensor, Tensor]]

    def __call__(self, samples: list[Sample]) -> PairBatch | BadSample:
        images, captions = [], []
        for sample in samples:
            if isinstance(sample, BadSample):
                return sample
            images.append(sample[0])
            captions.append(sample[1])
        return PairBatch(torch.stack(images), *self.pad(captions))
