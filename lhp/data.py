"""Training samples of LHP: one view of the image, one caption's ids."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lhp.tokenizer import Tokenizer, pad_batch
from lhp.views import HybridView
from pab.errors import InputError
from pab.images import load_image
from pab.sampling import SampleKey, sample_seed
from pab.training import BadSample
from pab.training_set import TrainingSet


class PairBatch(NamedTuple):
    """A batch of B pairs: images [B, 3, S, S], ids [B, N] and padding mask [B, N] (1 = padding)."""

    image: Tensor
    text_ids: Tensor
    padding_mask: Tensor


Sample = tuple[Tensor, list[int]] | BadSample  # image [3, S, S] and its caption's ids


class PairDataset(Dataset[Sample]):
    """Pairs of the training set, seen through the hybrid perspective.

    Args:
        pairs: the whole training set.
        indices: the pairs that are trained on.
        view: image -> tensor.
        tokenizer: caption -> ids.
        seed: a sample's view follows from this seed, the epoch and its index in ``pairs``.
    """

    def __init__(
        self,
        pairs: TrainingSet,
        indices: np.ndarray,
        view: HybridView,
        tokenizer: Tokenizer,
        seed: int,
    ) -> None:
        self.pairs, self.indices, self.view = pairs, indices, view
        self.tokenizer, self.seed = tokenizer, seed

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
        return pixels, self.tokenizer.encode(pair.caption)


def collate(samples: list[Sample]) -> PairBatch | BadSample:
    """Stack images, pad captions to the longest of the batch; or the first bad sample."""
    images, captions = [], []
    for sample in samples:
        if isinstance(sample, BadSample):
            return sample
        images.append(sample[0])
        captions.append(sample[1])
    ids, mask = pad_batch(captions)
    return PairBatch(torch.stack(images), ids, mask)
