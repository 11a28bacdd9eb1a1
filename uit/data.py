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
from torch import Tensor
from torch.utils.data import Dataset

from pab.errors import InputError
from pab.images import load_image
from pab.sampling import SampleKey, sample_seed
from pab.training_data import BadSample
from pab.training_set import TrainingSet
from pab.wordpiece import Tokenizer
from uit.augment import TrainingView
from uit.eda import Synonyms, augment
from uit.masking import WordMasking, hide_blocks, hide_words, labels_at
from uit.objective import UitBatch


class UitSample(NamedTuple):
    """One pair as drawn; empty lists where a version is turned off.

    Attributes:
        image: [3, S, S].
        pair: number of the pair in the training set; its identity, for every pair has its own.
        ids, augmented, hidden: the caption's ids, those of its augmented version, and its ids with
            pieces hidden.
        chosen: positions of the hidden pieces.
        block_seed: where the mask of image blocks may be drawn from.
    """

    image: Tensor
    pair: int
    ids: list[int]
    augmented: list[int]
    hidden: list[int]
    chosen: list[int]
    block_seed: int


@dataclass(frozen=True)
class TextDraws:
    """What is drawn for a caption.

    Attributes:
        eda_share: words that the augmented version changes; None turns it off.
        synonyms: see :func:`uit.eda.augment`.
        masking: None turns masked language modelling off.
    """

    eda_share: float | None
    synonyms: Synonyms | None
    masking: WordMasking | None


class UitDataset(Dataset["UitSample | BadSample"]):
    """Pairs of the training set with everything UIT's losses draw.

    Args:
        pairs: the whole training set.
        indices: the pairs that are trained on.
        view: image -> tensor.
        tokenizer: caption -> ids.
        draws: what is drawn for a caption.
        seed: a sample's draws follow from this seed, the epoch and its index in ``pairs``.
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
        self.pairs, self.indices, self.view = pairs, indices, view
        self.tokenizer, self.draws, self.seed = tokenizer, draws, seed

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: SampleKey) -> UitSample | BadSample:
        position, epoch = key
        index = int(self.indices[position])
        try:
            pair = self.pairs[index]
            image = load_image(self.pairs.image_path(pair))
        except InputError as error:
            return BadSample.of(error)
        with sample_seed(self.seed, epoch, index):
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
        return UitSample(pixels, index, ids, augmented, hidden, chosen, draw.getrandbits(32))


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
            identity=torch.tensor([row.pair for row in rows]),
            text_ids=text_ids,
            text_mask=text_mask,
            masked_ids=masked_ids,
            positions=positions,
            labels=labels,
            hidden_blocks=blocks,
        )
