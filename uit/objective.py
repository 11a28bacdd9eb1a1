"""UIT's training objective: ITC + ITM + MLM + MIM of one batch.

The same numbers as the plain order of passes, in fewer of them: captions, their augmented versions
and their masked versions pass the text tower together, and every pair the cross encoder reads (true
pairs, negatives, augmented ones, masked ones) passes it together, with an image's keys and values
computed once.

Shape letters: `B` batch, `N` text ids, `P` hidden pieces a caption, `S` side of the image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pab.core.devices import full_precision
from pab.core.processes import all_gather_with_grad, broadcast, reduce_mean
from uit.losses import (
    contrastive_loss,
    labels_in,
    masked_image_loss,
    masked_language_loss,
    matching_loss,
    negative_weights,
)
from uit.model import Uit
from uit.swin import with_mean


class UitBatch(NamedTuple):
    """A batch of B pairs.

    Attributes:
        image: [B, 3, S, S].
        identity: [B]; pairs of one number are right for each other.
        text_ids, text_mask: [V B, N] for V versions of the caption one below the other: as it is,
            and, where EDA is on, augmented. Padded to the recipe's length; mask 1 = a token.
        masked_ids: [B, N], the first version with pieces hidden; no rows where MLM is off.
        positions, labels: [B, P], of the hidden pieces (label -100: none).
        hidden_blocks: [P, P], 1 = hidden, for MIM; empty where it is off.
    """

    image: Tensor
    identity: Tensor
    text_ids: Tensor
    text_mask: Tensor
    masked_ids: Tensor
    positions: Tensor
    labels: Tensor
    hidden_blocks: Tensor


@dataclass(frozen=True)
class LossWeights:
    """Weights of the losses in the total.

    Attributes:
        eda: ITC and ITM of the augmented caption.
        mlm: masked language modelling.
        mim: masked image modelling, a mean over images.
        label_smoothing: of ITC's targets.
    """

    eda: float
    mlm: float
    mim: float
    label_smoothing: float


# Similarity-based weights [B, B], 0 where not allowed -> one column a row, int64 [B].
Draw = Callable[[Tensor], Tensor]


def draw_negatives(weights: Tensor) -> Tensor:
    """One column a row, in proportion to the weights (rows with any weight above 0).

    Weights that are no numbers, of a model that has diverged, count alike: multinomial would end
    the process before its loss, no number either, is seen and told.
    """
    return torch.multinomial(torch.where(weights.isfinite(), weights, 1.0), 1).squeeze(1)


def draw_any(weights: Tensor) -> Tensor:
    """One column a row, all with a weight above 0 alike: easy negatives for a new model."""
    return draw_negatives(torch.where(weights > 0, 1.0, weights))


def uit_losses(
    model: Uit, batch: UitBatch, weights: LossWeights, draw: Draw = draw_negatives
) -> dict[str, Tensor]:
    """The losses of a batch.

    Args:
        model: in training mode its dropout and batch statistics are in the result.
        batch: of this process; ITC compares with the batches of all processes, MLM is the mean over
            the hidden pieces of all, MIM hides the main process's blocks, negatives are drawn from
            this one, as in the release.
        weights: of the total. A loss whose weight is 0 is not computed.
        draw: picks negatives; for each version of the caption it is called for texts' negative
            images and then for images' negative texts.

    Returns:
        ``loss`` (the total), ``itc``, ``itm``, and ``mlm``, ``mim`` where they are on.

    Raises:
        InputError: the whole batch is of one identity.
    """
    size, bert = len(batch.image), model.text_encoder
    hidden_blocks = broadcast(batch.hidden_blocks)  # as if the batches were one: the first's

    # ---- Towers: images as they are and with blocks hidden, captions in all versions
    patches = model.vision_encoder.patch_embed(batch.image)
    if weights.mim:
        patches = torch.cat([patches, model.hide(patches, hidden_blocks)])
    tokens = model.vision_encoder.encode(patches)  # [B or 2 B, M, C]
    image = with_mean(tokens[:size])
    image_vector, memory = model.image_vector(image), bert.image_memory(image)
    text_ids, text_mask = batch.text_ids, batch.text_mask
    if weights.mlm:
        text_ids = torch.cat([text_ids, batch.masked_ids])
        text_mask = torch.cat([text_mask, text_mask[:size]])
    text = bert.encode_text(text_ids, text_mask)  # [V B or (V + 1) B, N, D]

    # ---- ITC, and the pairs that ITM compares: text rows and images
    every_image = all_gather_with_grad(image_vector)
    every_identity = all_gather_with_grad(batch.identity)
    share = [1.0, weights.eda][: len(batch.text_ids) // size]
    own = torch.arange(size, device=image.device)
    itc = torch.zeros((), device=image.device)
    rows, images = [], []
    for version, weight in enumerate(share):
        start = version * size
        # Each version by itself: batch norm takes its statistics from B captions, as published.
        text_vector = model.text_vector(text[start : start + size])
        with full_precision(image.device):
            itc = itc + weight * contrastive_loss(
                every_image, all_gather_with_grad(text_vector), every_identity, model.temp,
                weights.label_smoothing,
            )  # fmt: skip
            of_text, of_image = negative_weights(
                image_vector.detach(), text_vector.detach(), batch.identity, model.temp.detach()
            )
        rows += [start + own, start + own]
        images += [own, draw(of_text)]
        rows += [start + draw(of_image)]
        images += [own]

    # ---- The cross encoder, on those and on the captions with hidden pieces
    compared = 3 * size * len(share)
    if weights.mlm:
        rows, images = [*rows, len(share) * size + own], [*images, own]
    pairs = bert.fuse_pairs(text, text_mask, memory, torch.cat(rows), torch.cat(images))
    first = torch.zeros(compared, 1, dtype=torch.int64, device=image.device)
    logits = model.match_logits(bert.fused_at(pairs.part(slice(compared)), first)[:, 0]).float()
    itm = torch.zeros((), device=image.device)
    for weight, part in zip(share, logits.split(3 * size), strict=True):
        itm = itm + weight * matching_loss(part[:size], part[size:])
    losses = {"itc": itc, "itm": itm}
    total = itc + itm
    if weights.mlm:
        fused = bert.fused_at(pairs.part(slice(compared, None)), batch.positions)
        losses["mlm"] = masked_language_loss(
            bert.word_logits(fused).float(),
            batch.labels,
            reduce_mean(labels_in(batch.labels).float()),
        )
        total = total + weights.mlm * losses["mlm"]
    if weights.mim:
        restored = model.restore(tokens[size:]).float()
        losses["mim"] = masked_image_loss(restored, batch.image, hidden_blocks)
        total = total + weights.mim * losses["mim"]
    return {"loss": total, **losses}
