"""Compute the symmetric InfoNCE loss, at once or in chunks with the exact gradient.

Shape letters: `B` pairs of a batch, `b` pairs of a chunk, `K` vectors per image (BLIP-2's query
tokens, otherwise 1), `D` width of the vectors.

Sources: the loss of CLIP (Radford et al. 2021, arXiv 2103.00020); gradient caching of Gao et al.
2021 (arXiv 2101.06983).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from pab.core.devices import set_torch_rng_state, torch_rng_state
from pab.core.processes import all_gather_with_grad
from pab.training.pair_data import PairBatch


def symmetric_infonce(
    image: Tensor, text: Tensor, logit_scale: Tensor, identity: Tensor | None = None
) -> Tensor:
    """Average the image-to-text and text-to-image cross entropies.

    Args:
        image: unit vectors [B, D]; row i matches row i of ``text``.
        text: unit vectors [B, D].
        logit_scale: logarithm of the scale of the similarities, a scalar.
        identity: [B]; rows with equal numbers are not negatives of each other. None: all differ.

    Returns:
        A scalar.
    """
    return cross_entropies(logit_scale.exp() * image @ text.T, identity)


def gathered_infonce(
    image: Tensor, text: Tensor, logit_scale: Tensor, identity: Tensor | None = None
) -> Tensor:
    """Compute :func:`symmetric_infonce` over the batch of all processes.

    Every process computes the whole loss. Averaging the gradients over processes
    (:class:`pab.core.gradients.GradientAverage`) then gives those of a single process.
    """
    images, texts = all_gather_with_grad(image), all_gather_with_grad(text)
    return symmetric_infonce(images, texts, logit_scale, _gathered(identity))


def pooled_infonce(
    image: Tensor, text: Tensor, logit_scale: Tensor, identity: Tensor | None = None
) -> Tensor:
    """Compute :func:`gathered_infonce` for K vectors per image.

    The similarity of an image and a text is the maximum over the image's vectors.

    Args:
        image: unit vectors [B, K, D].
        text: unit vectors [B, D].
        logit_scale: logarithm of the scale of the similarities, a scalar.
        identity: see :func:`symmetric_infonce`.
    """
    if image.shape[1] == 1:
        return gathered_infonce(image[:, 0], text, logit_scale, identity)
    images, texts = all_gather_with_grad(image), all_gather_with_grad(text)
    best = torch.einsum("ikd,td->itk", images, texts).amax(dim=-1)
    return cross_entropies(logit_scale.exp() * best, _gathered(identity))


def _gathered(identity: Tensor | None) -> Tensor | None:
    return None if identity is None else all_gather_with_grad(identity)


def cross_entropies(logits: Tensor, identity: Tensor | None) -> Tensor:
    """Average the cross entropies of the rows and columns of logits [B, B]; row i matches column i.

    Args:
        logits: scaled similarities.
        identity: see :func:`symmetric_infonce`.
    """
    if identity is not None:
        same = identity[:, None] == identity[None]
        logits = logits.masked_fill(same.fill_diagonal_(False), -torch.inf)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


class _Replay:
    """Restore the random state of a chunk's first pass inside the block, to repeat its draws.

    The state before the block is restored afterwards. CUDA generators keep their seed and offset on
    the host, so saving the state does not wait for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = torch_rng_state(device)

    def __enter__(self) -> None:
        self.after = torch_rng_state(self.device)
        set_torch_rng_state(self.before, self.device)

    def __exit__(self, *exc: object) -> None:
        set_torch_rng_state(self.after, self.device)


def cached_backward(
    chunks: Sequence[Callable[[], Tensor]],
    loss_of: Callable[[list[Tensor]], Tensor],
    *,
    device: torch.device,
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
    last_backward: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Tensor:
    """Back-propagate a loss of many vectors with the activations of one chunk in memory.

    First encode all chunks without a graph, and compute the loss and its gradient for each vector.
    Then encode each chunk again with the same random draws, and back-propagate the gradients of its
    vectors. The result is the exact gradient of the full batch.

    Args:
        chunks: functions without arguments; each encodes a chunk, [b, D] or [b, K + 1, D].
        loss_of: maps the vectors of all chunks to a scalar loss. Parameters that it uses (the logit
            scale) also receive gradients.
        device: device of the encoder; its random state is replayed.
        scale: applied to the loss before the backward pass (loss scaling, accumulation).
        last_backward: context of the backward pass of the last chunk, see
            :meth:`pab.core.gradients.GradientAverage.last_backward`.

    Returns:
        The loss, detached and unscaled.
    """
    replays, vectors = [], []
    with torch.no_grad():
        for encode in chunks:
            replays.append(_Replay(device))
            vectors.append(encode())
    leaves = [v.detach().requires_grad_() for v in vectors]
    loss = loss_of(leaves)
    scale(loss).backward()
    for number, (encode, replay, leaf) in enumerate(zip(chunks, replays, leaves, strict=True), 1):
        with replay:
            again = encode()
        with last_backward() if number == len(chunks) else nullcontext():
            again.backward(leaf.grad)
    return loss.detach()


def pair_backward(
    encode: Callable[[PairBatch], Tensor],
    batch: PairBatch,
    logit_scale: Tensor,
    *,
    chunk: int,
    share: int,
    scaler: torch.amp.GradScaler,
    device: torch.device,
    last_backward: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Tensor:
    """Compute the loss of one batch and add its gradient to the parameters' gradients.

    Args:
        encode: maps b pairs to vectors [b, K + 1, D], with the text's vector last.
        batch: pairs of this process; the loss covers the batches of all processes.
        logit_scale: logarithm of the scale of the similarities.
        chunk: pairs encoded at a time, with the exact full-batch gradient; 0 encodes all at once.
        share: number of batches per update; the loss is divided by it.
        scaler: loss scaler.
        device: device of the encoder.
        last_backward: context of the last backward pass of this batch, see
            :meth:`pab.core.gradients.GradientAverage.last_backward`.

    Returns:
        The detached loss, divided by ``share``.
    """

    def scaled(loss: Tensor) -> Tensor:
        return scaler.scale(loss / share)

    def loss_of(parts: list[Tensor]) -> Tensor:
        vectors = torch.cat(parts)
        return pooled_infonce(vectors[:, :-1], vectors[:, -1], logit_scale, batch.identity)

    if chunk:
        parts = [
            PairBatch(*columns) for columns in zip(*(t.split(chunk) for t in batch), strict=True)
        ]
        chunks = [lambda part=part: encode(part) for part in parts]  # type: ignore[misc]
        loss = cached_backward(
            chunks, loss_of, device=device, scale=scaled, last_backward=last_backward
        )
        return loss / share
    loss = loss_of([encode(batch)])
    with last_backward():
        scaled(loss).backward()
    return loss.detach() / share
