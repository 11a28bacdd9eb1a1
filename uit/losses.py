"""UIT's losses as functions of tensors, from the method's paper (arXiv 2511.22470).

Image-text contrast (ITC) and image-text matching (ITM) follow ALBEF (arXiv 2107.07651), and masked
image modelling (MIM) follows SimMIM (arXiv 2111.09886). MLM is masked language modelling.

Shape letters: `B` batch, `D` width of the retrieval vectors, `V` vocabulary, `P` masked positions
per caption, `S` side of the image, `K` mask blocks per side.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

NEGATIVE_FLOOR = 1e-5  # added to the softmax similarities from which negatives are drawn
MIM_EPS = 1e-5  # added to the number of masked pixels, as in SimMIM


def contrastive_loss(
    image: Tensor, text: Tensor, identity: Tensor, temperature: Tensor, label_smoothing: float
) -> Tensor:
    """Compute ITC: cross entropy in both directions; pairs of one identity share the target.

    Args:
        image: unit vectors [B, D].
        text: unit vectors [B, D].
        identity: [B]; pairs with equal numbers match each other.
        temperature: divisor of the similarities.
        label_smoothing: fraction of the target spread over all pairs.
    """
    logits = image @ text.T / temperature
    same = (identity[:, None] == identity[None]).to(logits.dtype)
    target = same / same.sum(dim=1, keepdim=True)
    loss = [
        F.cross_entropy(rows, target, label_smoothing=label_smoothing)
        for rows in (logits, logits.T)
    ]
    return (loss[0] + loss[1]) / 2


def negative_weights(
    image: Tensor, text: Tensor, identity: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute sampling weights of hard negatives: softmax similarities + :data:`NEGATIVE_FLOOR`.

    Pairs of one identity have weight 0; the batch must have at least two identities. Returns two
    matrices [B, B]: in the first, rows are texts and columns are images; in the second, rows are
    images and columns are texts.
    """
    same = identity[:, None] == identity[None]
    similarity = image @ text.T / temperature
    of_text = (similarity.T.softmax(dim=1) + NEGATIVE_FLOOR).masked_fill(same, 0.0)
    of_image = (similarity.softmax(dim=1) + NEGATIVE_FLOOR).masked_fill(same, 0.0)
    return of_text, of_image


def matching_loss(positive: Tensor, negative: Tensor) -> Tensor:
    """Compute ITM: cross entropy of match logits of positive [B, 2] and negative [2 B, 2] pairs."""
    logits = torch.cat([positive, negative])
    match = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    match[: len(positive)] = 1
    return F.cross_entropy(logits, match)


def masked_language_loss(logits: Tensor, labels: Tensor, count: Tensor | None = None) -> Tensor:
    """Compute MLM: mean cross entropy over the masked tokens.

    Args:
        logits: [B, P, V].
        labels: [B, P], -100 where no token is masked.
        count: divisor to use instead of this batch's label count. Pass the mean count over all
            processes, so that averaged losses (and gradients) equal the mean over all labels.

    Returns:
        A scalar; 0 if the batch has no label.
    """
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    count = labels_in(labels) if count is None else count
    return total / torch.where(count > 0, count, 1)


def labels_in(labels: Tensor) -> Tensor:
    """Count the masked tokens; return a scalar."""
    return (labels >= 0).sum()


def masked_image_loss(restored: Tensor, image: Tensor, hidden_blocks: Tensor) -> Tensor:
    """Compute MIM: mean over images of the mean absolute error of masked pixels.

    Args:
        restored: [B, 3, S, S].
        image: [B, 3, S, S], normalized.
        hidden_blocks: [K, K], 1 = masked; the same for all images.
    """
    size = image.shape[-1] // len(hidden_blocks)
    hidden = hidden_blocks.repeat_interleave(size, 0).repeat_interleave(size, 1)  # [S, S]
    distance = (restored - image).abs() * hidden
    return distance.sum() / (hidden.sum() + MIM_EPS) / image.shape[1] / len(image)
