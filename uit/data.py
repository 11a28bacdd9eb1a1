"""Training samples of UIT: an augmented image, a caption in three versions, masks.

Everything that is drawn at random for a sample is drawn here, in the loader: the image's view, the
augmented caption, the hidden word pieces. The one mask of hidden image blocks is drawn a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pab.data.annotations import TrainPair
from pab.data.training_set import TrainingSet
from pab.data.wordpiece import Tokenizer
from pab.training.data import BadSample, TrainingSamples
from uit.augment import TrainingView
from uit.eda import Synonyms, augment
from uit.masking import WordMasking, hide_blocks, hide_words, labels_at
from uit.objective import UitBatch


class UitSample(NamedTuple):
    """One pair as drawn; empty lists where a version is turned off.

    Attributes:
        image: [3, S, S].
        identity: see :meth:`pab.data.training_set.TrainingSet.identity`.
        ids, augmented, hidden: the caption's ids, those of its augmented version, and its ids with
            pieces hidden.
        chosen: positions of the hidden pieces.
        block_seed: where the mask of image blocks may be drawn from.
    """

    image: Tensor
    identity: int
    ids: list[int]
    augmented: list[int]
    hidden: list[int]
    chosen: list[int]
    block_seed: int


@dataclass(frozen=True)
class TextDraws:
    """Random choices for a caption.

    Attributes:
        eda_share: words that the augmented version changes; None turns it off.
        synonyms: see :func:`uit.eda.augment`.
        masking: None turns masked language modelling off.
    """

    eda_share: float | None
    synonyms: Synonyms | None
    masking: WordMasking | None


class UitDataset(TrainingSamples):
    """Pairs of the training set with everything UIT's losses draw.

    Args:
        pairs, indices, seed: see :class:`pab.training.data.TrainingSamples`.
        view: image -> tensor.
        tokenizer: caption -> ids.
        draws: what is drawn for a caption.
    """

    def __init__(
        self,
        pairs: TrainingSet,
        indices: np.ndarray,
        view: TrainingView,
        tokenizer: Tokenizer,
        draws: TextDraws,
        seed: int,
    ) -> None:
        super().__init__(pairs, indices, seed)
        self.view, self.tokenizer, self.draws = view, tokenizer, draws

    def sample(self, index: int, pair: TrainPair, image: Image.Image) -> UitSample:
        """See :class:`pab.training.data.TrainingSamples`."""
        pixels = self.view(image)
        draw = Random(int(torch.randint(2**62, ())))
        ids, draws = self.tokenizer.encode(pair.caption), self.draws
        augmented: list[int] = []
        if draws.eda_share is not None:
            new = augment(pair.caption, draws.eda_share, draws.synonyms, draw)
            augmented = self.tokenizer.encode(new)
        hidden: list[int] = []
        chosen: list[int] = []
        if draws.masking is not None:
            hidden, chosen = hide_words(ids, self.tokenizer, draws.masking, draw)
        identity = self.pairs.identity(index)
        return UitSample(pixels, identity, ids, augmented, hidden, chosen, draw.getrandbits(32))


@dataclass(frozen=True)
class Collate:
    """Samples to a :class:`UitBatch`; or the first bad sample.

    Attributes:
        tokenizer: pads captions to its ``max_length``, for text vectors pool over padding.
        most_hidden: word pieces of a caption that may be hidden.
        blocks: of an image a side; 0 turns masked image modelling off.
        block_ratio: share of blocks that are hidden.
    """

    tokenizer: Tokenizer
    most_hidden: int
    blocks: int
    block_ratio: float

    def __call__(self, samples: list[UitSample | BadSample]) -> UitBatch | BadSample:
        rows: list[UitSample] = []
        for sample in samples:
            if isinstance(sample, BadSample):
                return sample
            rows.append(sample)
        captions = [row.ids for row in rows]
        versions = captions + [row.augmented for row in rows if row.augmented]
        length = self.tokenizer.max_length
        text_ids, text_mask = self.tokenizer.pad_rows(versions, length)
        hidden = [row.hidden for row in rows if row.hidden]
        masked_ids = torch.empty(0, length, dtype=torch.int64)
        if hidden:
            masked_ids, _ = self.tokenizer.pad_rows(hidden, length)
        positions, labels = labels_at(captions, [row.chosen for row in rows], self.most_hidden)
        blocks = torch.empty(0, 0)
        if self.blocks:
            blocks = hide_blocks(self.blocks, self.block_ratio, Random(rows[0].block_seed))
        return UitBatch(
            image=torch.stack([row.image for row in rows]),
            identity=torch.tensor([row.identity for row in rows]),
            text_ids=text_ids,
            text_mask=text_mask,
            masked_ids=masked_ids,
            positions=positions,
            labels=labels,
            hidden_blocks=blocks,
        )
