"""Compute UIT's training objective: ITC + ITM + MLM + MIM of one batch.

Up to rounding and the draws of dropout, the losses equal those of separate passes. Captions,
augmented captions and masked captions share one pass of the text tower. All pairs (true,
negative, augmented, masked) share one pass of the cross encoder up to its last layer, with keys and
values computed once per image.

Shape letters: `B` batch, `N` text ids, `V` caption versions, `P` masked pieces per caption, `S`
side of the image, `K` mask blocks per side, `M` image tokens, `C` `D` image and text width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

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
        image: [B, 3, S, S]; uint8 from the loader, normalized for the losses.
        identity: [B]; pairs with equal numbers match each other.
        text_ids, text_mask: [V B, N], original captions and, if EDA is on, augmented ones, stacked
            and padded to the tokenizer's maximum length; mask 1 = token.
        masked_ids: [B, N], masked originals; empty if MLM is off.
        positions, labels: [B, P], positions and labels of the masked pieces (label -100: padding).
        hidden_blocks: [K, K], 1 = masked, for MIM; empty if MIM is off.
        longest: number of ids of the longest caption; a plain number, so that no step has to read
            it from the device.
        erased: [B, 4], rectangles to erase from the normalized images; None once they are erased.
    """

    image: Tensor
    identity: Tensor
    text_ids: Tensor
    text_mask: Tensor
    masked_ids: Tensor
    positions: Tensor
    labels: Tensor
    hidden_blocks: Tensor
    longest: int
    erased: Tensor | None = None

    def to(self, device: torch.device) -> UitBatch:
        """Copy the tensors to a device; copies from pinned memory do not block."""
        parts: dict[str, Any] = {
            name: part.to(device, non_blocking=True)
            for name, part in self._asdict().items()
            if isinstance(part, Tensor)
        }
        return self._replace(**parts)


@dataclass(frozen=True)
class LossWeights:
    """Weights of the losses in the total, and ITC's label smoothing.

    Attributes:
        eda: weight of ITC and ITM on the augmented caption.
        mlm: weight of masked language modelling.
        mim: weight of masked image modelling, a mean over images.
        label_smoothing: label smoothing of ITC's targets.
    """

    eda: float
    mlm: float
    mim: float
    label_smoothing: float


# Similarity-based weights [B, B], 0 where not allowed -> one column per row, int64 [B].
Draw = Callable[[Tensor], Tensor]


def draw_negatives(weights: Tensor) -> Tensor:
    """Draw one column per row, in proportion to the weights; each row needs a positive weight.

    The largest quotient of weight and exponential noise is in column j with a probability
    proportional to weight j. `torch.multinomial` draws from the same distribution, but its checks
    of the weights read from the device. NaN and infinite weights of a diverged model count as 1.
    """
    finite = torch.where(weights.isfinite(), weights, 1.0)
    return (finite / torch.empty_like(finite).exponential_()).argmax(dim=1)


def draw_any(weights: Tensor) -> Tensor:
    """Draw one column per row uniformly among positive weights."""
    return draw_negatives(torch.where(weights > 0, 1.0, weights))


def uit_losses(
    model: Uit, batch: UitBatch, weights: LossWeights, draw: Draw = draw_negatives
) -> dict[str, Tensor]:
    """Compute the losses of a batch.

    Args:
        model: in training mode, dropout and batch statistics affect the result.
        batch: batch of this process. ITC compares across all processes, MLM averages over the
            masked pieces of all processes, and MIM uses rank 0's mask. As in the release, ITM draws
            its negatives only from this process's batch.
        weights: weights of the losses in the total. With weight 0, MLM and MIM are not computed.
        draw: draws negatives; called twice per caption version, first for a negative image per text
            and then for a negative text per image.

    Returns:
        ``loss`` (the total), ``itc``, ``itm``, and ``mlm``, ``mim`` if enabled.
    """
    size, bert = len(batch.image), model.text_encoder
    hidden_blocks = broadcast(batch.hidden_blocks)  # rank 0's mask, as if all batches were one

    # ---- Towers: original and masked images, captions in all versions
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

    # ---- ITC, and the pairs for ITM: text rows and images
    every_image = all_gather_with_grad(image_vector)
    every_identity = all_gather_with_grad(batch.identity)
    version_weights = [1.0, weights.eda][: len(batch.text_ids) // size]
    own = torch.arange(size, device=image.device)
    itc = torch.zeros((), device=image.device)
    rows, images = [], []
    for version, weight in enumerate(version_weights):
        start = version * size
        # Separate passes, because batch norm uses the statistics of B captions, as published.
        text_vector = model.text_vector(text[start : start + size])
        with full_precision(image.device):
            itc = itc + weight * contrastive_loss(
                every_image, all_gather_with_grad(text_vector), every_identity, model.temp,
                weights.label_smoothing,
            )  # fmt: skip
            of_text, of_image = negative_weights(
                image_vector.detach(), text_vector.detach(), batch.identity, model.temp.detach()
            )
        images += [own, draw(of_text), own]
        rows += [start + own, start + own, start + draw(of_image)]

    # ---- Cross encoder, on the ITM pairs and the masked captions
    compared = 3 * size * len(version_weights)
    if weights.mlm:
        rows, images = [*rows, len(version_weights) * size + own], [*images, own]
    text, text_mask = text[:, : batch.longest], text_mask[:, : batch.longest]  # [..., longest, D]
    pairs = bert.fuse_pairs(text, text_mask, memory, torch.cat(rows), torch.cat(images))
    first = torch.zeros(compared, 1, dtype=torch.int64, device=image.device)
    logits = model.match_logits(bert.fused_at(pairs.part(slice(compared)), first)[:, 0]).float()
    itm = torch.zeros((), device=image.device)
    for weight, part in zip(version_weights, logits.split(3 * size), strict=True):
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
