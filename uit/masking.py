"""Masks of UIT's two masked losses: word pieces of a caption (MLM), image blocks (MIM).

Source: the method's paper (arXiv 2511.22470). MLM as in BERT with whole words and, as in X-VLM
(arXiv 2111.08276), short runs of words; MIM as in SimMIM (arXiv 2111.09886).

Deliberate difference from the release: only real word pieces are hidden, never an end or
padding, and a word that would pass the cap is left out whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from pab.data.wordpiece import Tokenizer

NO_LABEL = -100  # what cross entropy leaves out
REPLACED, RANDOM = 0.8, 0.5  # share of [MASK]; of the rest, share of random pieces


@dataclass(frozen=True)
class WordMasking:
    """Number of word pieces to mask in a caption.

    Attributes:
        share: of the real pieces.
        most: pieces of one caption at most.
        ngram_share: how often a run of words is taken instead of one word.
        ngram_words: words of a run at most; 2 at least.
    """

    share: float = 0.25
    most: int = 10
    ngram_share: float = 0.2
    ngram_words: int = 3


def hide_words(
    ids: list[int], tokenizer: Tokenizer, masking: WordMasking, draw: Random
) -> tuple[list[int], list[int]]:
    """Hide whole words of one caption.

    Args:
        ids: of a caption, with its two ends.
        tokenizer: knows which pieces continue a word.
        masking: how many are hidden.
        draw: the source of chance.

    Returns:
        The ids with 80 % of the chosen pieces replaced by ``[MASK]``, 10 % by a random piece and
        10 % left, and the chosen positions in order. There are none where every word has more
        pieces than may be hidden.
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
    """Positions of the pieces of each word, ends left out."""
    starts = [i for i in range(1, len(ids) - 1) if not tokenizer.continues[ids[i]]]
    if len(ids) > 2 and (not starts or starts[0] != 1):
        starts.insert(0, 1)
    return [range(a, b) for a, b in zip(starts, [*starts[1:], len(ids) - 1], strict=True)]


def labels_at(ids: list[list[int]], chosen: list[list[int]], most: int) -> tuple[Tensor, Tensor]:
    """Positions and labels of the hidden pieces of a batch, padded to ``most`` a caption.

    Returns:
        positions int64 [B, most], 0 where a caption has fewer, and labels int64 [B, most], the
        pieces' own ids, :data:`NO_LABEL` there.
    """
    positions = torch.zeros(len(ids), most, dtype=torch.int64)
    labels = torch.full((len(ids), most), NO_LABEL, dtype=torch.int64)
    for i, (row, at) in enumerate(zip(ids, chosen, strict=True)):
        positions[i, : len(at)] = torch.tensor(at, dtype=torch.int64)
        labels[i, : len(at)] = torch.tensor([row[p] for p in at], dtype=torch.int64)
    return positions, labels


def hide_blocks(blocks: int, ratio: float, draw: Random) -> Tensor:
    """One mask for the images of a batch, float32 [P, P], 1 = hidden.

    Args:
        blocks: P, blocks a side.
        ratio: share of blocks to hide, rounded up.
        draw: the source of chance.
    """
    count = math.ceil(ratio * blocks**2)
    mask = torch.zeros(blocks**2)
    mask[draw.sample(range(blocks**2), count)] = 1.0
    return mask.view(blocks, blocks)
