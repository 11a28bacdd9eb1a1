"""Draw the masks of UIT's masked losses: word pieces of a caption (MLM), image blocks (MIM).

Source: the method's paper (arXiv 2511.22470). MLM masks whole words as in BERT, and short runs of
words as in X-VLM (arXiv 2111.08276). MIM follows SimMIM (arXiv 2111.09886). Unlike in the release,
only word pieces are masked, never special tokens or padding, and words that would exceed the limit
are skipped.

Shape letters: `B` batch, `K` mask blocks per side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from pab.data.wordpiece import Tokenizer

NO_LABEL = -100  # label that cross entropy ignores
REPLACED, RANDOM = 0.8, 0.5  # fraction of [MASK]; fraction of random pieces among the rest


@dataclass(frozen=True)
class WordMasking:
    """Settings of masking word pieces in a caption.

    Attributes:
        share: maximum fraction of the caption's pieces to mask; one piece is always allowed.
        most: maximum number of masked pieces per caption.
        ngram_share: probability of choosing a run of words instead of one word.
        ngram_words: maximum words per run, at least 2.
    """

    share: float = 0.25
    most: int = 10
    ngram_share: float = 0.2
    ngram_words: int = 3


def hide_words(
    ids: list[int], tokenizer: Tokenizer, masking: WordMasking, draw: Random
) -> tuple[list[int], list[int]]:
    """Mask whole words of a caption.

    Args:
        ids: ids of a caption, with both special tokens.
        tokenizer: identifies the pieces that continue a word.
        masking: settings of the masking.
        draw: random generator.

    Returns:
        The masked ids, and the chosen positions in ascending order. On average, 80 % of the chosen
        pieces become ``[MASK]``, 10 % become a random piece, and 10 % are unchanged. No piece is
        chosen if every word has more pieces than may be masked.
    """
    pieces = len(ids) - 2
    cap = min(masking.most, max(1, round(masking.share * pieces)))
    words = _words(ids, tokenizer)
    order = list(range(len(words)))
    draw.shuffle(order)
    chosen: set[int] = set()
    for first in order:
        if len(chosen) == cap:
            break
        run = 1
        if draw.random() < masking.ngram_share:
            run = draw.randint(2, masking.ngram_words)
        for word in words[first : first + run]:
            if len(chosen.union(word)) > cap:
                break
            chosen.update(word)
    hidden = list(ids)
    for position in sorted(chosen):
        if draw.random() < REPLACED:
            hidden[position] = tokenizer.mask
        elif draw.random() < RANDOM:
            hidden[position] = int(draw.choice(tokenizer.ordinary))
    return hidden, sorted(chosen)


def _words(ids: list[int], tokenizer: Tokenizer) -> list[range]:
    """Return the positions of each word's pieces, without special tokens."""
    starts = [i for i in range(1, len(ids) - 1) if not tokenizer.continues[ids[i]]]
    if len(ids) > 2 and (not starts or starts[0] != 1):
        starts.insert(0, 1)
    return [range(a, b) for a, b in zip(starts, [*starts[1:], len(ids) - 1], strict=True)]


def labels_at(ids: list[list[int]], chosen: list[list[int]], most: int) -> tuple[Tensor, Tensor]:
    """Collect positions and labels of a batch's masked pieces, padded to ``most`` per caption.

    Returns:
        positions int64 [B, most], padded with 0, and labels (original ids) int64 [B, most], padded
        with :data:`NO_LABEL`.
    """
    positions = torch.zeros(len(ids), most, dtype=torch.int64)
    labels = torch.full((len(ids), most), NO_LABEL, dtype=torch.int64)
    for i, (row, at) in enumerate(zip(ids, chosen, strict=True)):
        positions[i, : len(at)] = torch.tensor(at, dtype=torch.int64)
        labels[i, : len(at)] = torch.tensor([row[p] for p in at], dtype=torch.int64)
    return positions, labels


def hide_blocks(blocks: int, ratio: float, draw: Random) -> Tensor:
    """Draw one mask for all images of a batch, float32 [K, K], 1 = masked.

    Args:
        blocks: K, blocks per side.
        ratio: fraction of blocks to mask, rounded up.
        draw: random generator.
    """
    count = math.ceil(ratio * blocks**2)
    mask = torch.zeros(blocks**2)
    mask[draw.sample(range(blocks**2), count)] = 1.0
    return mask.view(blocks, blocks)
