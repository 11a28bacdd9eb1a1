"""Training samples of UIT: an augmented image, three versions of the caption, and masks.

The loader draws the image view, the augmented caption and the masked word pieces of each sample,
and one mask of image blocks per batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from pab.core.errors import InputError
from pab.data.pixels import normalizer
from pab.data.records import TrainPair
from pab.data.training_set import TrainingSet
from pab.data.wordpiece import Tokenizer
from pab.training.data import TrainingSamples
from uit.augment import Rectangle, TrainingView, erase
from uit.eda import Synonyms, augment
from uit.masking import WordMasking, hide_blocks, hide_words, labels_at
from uit.objective import UitBatch


class UitSample(NamedTuple):
    """Augmented training pair; lists of disabled caption versions are empty.

    Attributes:
        image: uint8 [3, S, S], S pixels per side.
        erased: rectangle to erase from the normalized image.
        identity: see :meth:`pab.data.training_set.TrainingSet.identity`.
        ids, augmented, hidden: token ids of the caption, its augmented and its masked version.
        chosen: positions of the masked word pieces.
        block_seed: seed for the mask of image blocks.
    """

    image: Tensor
    erased: Rectangle
    identity: int
    ids: list[int]
    augmented: list[int]
    hidden: list[int]
    chosen: list[int]
    block_seed: int


@dataclass(frozen=True)
class TextDraws:
    """Settings of the random choices for a caption.

    Attributes:
        eda_share: ``share`` of :func:`uit.eda.augment`; None disables the augmented version.
        synonyms: see :func:`uit.eda.augment`.
        masking: settings of masked language modelling; None disables it.
    """

    eda_share: float | None
    synonyms: Synonyms | None
    masking: WordMasking | None


class UitDataset(TrainingSamples):
    """Training pairs with random views, augmented captions and masked captions.

    Args:
        pairs, indices, seed: see :class:`pab.training.data.TrainingSamples`.
        view: augments an image and converts it to a tensor.
        tokenizer: converts a caption to token ids.
        draws: settings of the random choices for a caption.
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
        pixels, erased = self.view.draw(image)
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
        seed = draw.getrandbits(32)
        return UitSample(pixels, erased, identity, ids, augmented, hidden, chosen, seed)


@dataclass(frozen=True)
class Collate:
    """Collate samples into a :class:`UitBatch`; return the first error, if any.

    A batch of one identity is an error, because it has no negative pair.

    Attributes:
        tokenizer: pads captions to its ``max_length``, because text vectors pool over padding.
        most_hidden: maximum number of masked word pieces per caption.
        blocks: image blocks per side; 0 disables masked image modelling.
        block_ratio: fraction of blocks to mask.
    """

    tokenizer: Tokenizer
    most_hidden: int
    blocks: int
    block_ratio: float

    def __call__(self, samples: list[UitSample | InputError]) -> UitBatch | InputError:
        rows: list[UitSample] = []
        for sample in samples:
            if isinstance(sample, InputError):
                return sample
            rows.append(sample)
        identity = [row.identity for row in rows]
        if len(set(identity)) == 1:  # checked here, because a step must not read from the device
            return InputError(
                "batch",
                f"all {len(rows)} pairs have identity {identity[0]}: no negative pair exists",
                todo="use a larger batch",
            )
        captions = [row.ids for row in rows]
        versions = captions + [row.augmented for row in rows if row.augmented]
        length = self.tokenizer.max_length
        text_ids, text_mask = self.tokenizer.pad_rows(versions, length)
        hidden = [row.hidden for row in rows if row.hidden]
        masked_ids, _ = self.tokenizer.pad_rows(hidden, length)
        positions, labels = labels_at(captions, [row.chosen for row in rows], self.most_hidden)
        blocks = torch.empty(0, 0)
        if self.blocks:
            blocks = hide_blocks(self.blocks, self.block_ratio, Random(rows[0].block_seed))
        return UitBatch(
            image=default_collate([row.image for row in rows]),  # in shared memory in a worker
            identity=torch.tensor(identity),
            text_ids=text_ids,
            text_mask=text_mask,
            masked_ids=masked_ids,
            positions=positions,
            labels=labels,
            hidden_blocks=blocks,
            longest=max(map(len, versions)),
            erased=torch.tensor([row.erased for row in rows]),
        )


def finisher(view: TrainingView, device: torch.device) -> Callable[[UitBatch], UitBatch]:
    """Return a function that normalizes a loaded batch's images and erases their rectangles."""
    normalize = normalizer(view.normalization, device)

    def finish(batch: UitBatch) -> UitBatch:
        assert batch.erased is not None, "only batches of the loader have rectangles"
        return batch._replace(image=erase(normalize(batch.image), batch.erased), erased=None)

    return finish
