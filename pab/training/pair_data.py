"""Training samples of a contrastive recipe: one image view and one caption's ids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pab.data.images import ImageTransform
from pab.data.records import TrainPair
from pab.data.training_set import TrainingSet
from pab.training.data import BadSample, TrainingSamples


class PairBatch(NamedTuple):
    """A batch of B pairs.

    Attributes:
        image: [B, 3, S, S].
        text_ids: [B, N].
        text_mask: [B, N]; marks padding for BEiT-3, tokens for BERT.
        identity: [B]; pairs with equal numbers are not negatives of each other.
    """

    image: Tensor
    text_ids: Tensor
    text_mask: Tensor
    identity: Tensor


# Image [3, S, S], its caption's ids, its identity.
Sample = tuple[Tensor, list[int], int] | BadSample


class PairDataset(TrainingSamples):
    """Training pairs with a random view of each image; samples are :data:`Sample`.

    Args:
        pairs, indices, seed: see :class:`pab.training.data.TrainingSamples`.
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
        """See :class:`pab.training.data.TrainingSamples`."""
        return self.view(image), self.encode(pair.caption), self.pairs.identity(index)


@dataclass(frozen=True)
class PairCollate:
    """Stack images and pad captions; return the first bad sample if there is one.

    Attributes:
        pad: rows of ids -> ids [B, N] and their mask [B, N].
    """

    pad: Callable[[list[list[int]]], tuple[Tensor, Tensor]]

    def __call__(self, samples: list[Sample]) -> PairBatch | BadSample:
        images, captions, identities = [], [], []
        for sample in samples:
            if isinstance(sample, BadSample):
                return sample
            images.append(sample[0])
            captions.append(sample[1])
            identities.append(sample[2])
        return PairBatch(torch.stack(images), *self.pad(captions), torch.tensor(identities))
