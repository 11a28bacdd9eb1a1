"""Training samples of a contrastive recipe: one view of the image, one caption's ids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pab.errors import InputError
from pab.images import ImageTransform, load_image
from pab.sampling import SampleKey, sample_seed
from pab.training_data import BadSample
from pab.training_set import TrainingSet


class PairBatch(NamedTuple):
    """A batch of B pairs: images [B, 3, S, S], ids [B, N] and their mask [B, N].

    What the mask marks is the model's own custom: BEiT-3 marks padding, BERT marks tokens.
    """

    image: Tensor
    text_ids: Tensor
    text_mask: Tensor


Sample = tuple[Tensor, list[int]] | BadSample  # image [3, S, S] and its caption's ids


class PairDataset(Dataset[Sample]):
    """Pairs of the training set, each image seen through a random view.

    Args:
        pairs: the whole training set.
        indices: the pairs that are trained on.
        view: image -> tensor.
        encode: caption -> ids.
        seed: a sample's view follows from this seed, the epoch and its index in ``pairs``.
    """

    def __init__(
        self,
        pairs: TrainingSet,
        indices: np.ndarray,
        view: ImageTransform,
        encode: Callable[[str], list[int]],
        seed: int,
    ) -> None:
        self.pairs, self.indices, self.view = pairs, indices, view
        self.encode, self.seed = encode, seed

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: SampleKey) -> Sample:
        position, epoch = key
        index = int(self.indices[position])
        try:
            pair = self.pairs[index]
            image = load_image(self.pairs.image_path(pair))
        except InputError as error:
            return BadSample.of(error)
        with sample_seed(self.seed, epoch, index):
            pixels = self.view(image)
        return pixels, self.encode(pair.caption)


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
