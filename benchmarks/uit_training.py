"""Measure UIT's training speed: `python benchmarks/uit_training.py`.

Measures samples per second of one full-size training step (synthetic images and captions) at batch
8, with the shared passes of `uit.train` in float32 and bf16. The baseline runs separate passes in
eager float32, for each caption version, for the true pairs, and for each kind of negative pairs. It
runs all layers on all tokens, and pads captions to 56 ids. Also prints the losses of both variants
in float32, which should agree within 1e-3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from random import Random

import torch
from machine import describe, flag_parser
from models import BERT_LENGTH, BERT_WORDS, CPU, number_formats, samples_per_second
from torch import Tensor

from pab.core.devices import autocast, keep_freed_memory
from uit.bert import ImageMemory
from uit.losses import (
    contrastive_loss,
    masked_image_loss,
    masked_language_loss,
    matching_loss,
    negative_weights,
)
from uit.masking import hide_blocks, labels_at
from uit.model import MODELS, Uit
from uit.objective import LossWeights, UitBatch, uit_losses

SHORTEST, LONGEST = 27, 50  # ids per caption
WEIGHTS = LossWeights(eda=0.8, mlm=1.0, mim=0.1356 * 84, label_smoothing=0.2)


def make_batch(size: int) -> UitBatch:
    """Create random images, ids with realistic lengths, and masks as in the loader."""
    draw = Random(0)
    lengths = [draw.randint(SHORTEST, LONGEST) for _ in range(2 * size)]
    captions = [torch.randint(*BERT_WORDS, (length,)) for length in lengths]
    ids = torch.zeros(2 * size, BERT_LENGTH, dtype=torch.int64)
    for row, caption in zip(ids, captions, strict=True):
        row[: len(caption)] = caption
    mask = (ids != 0).long()
    rows = [caption.tolist() for caption in captions[:size]]
    chosen = [sorted(draw.sample(range(1, len(row) - 1), 10)) for row in rows]
    positions, labels = labels_at(rows, chosen, 10)
    masked = ids[:size].scatter(1, positions, 103)
    image = torch.randn(size, 3, 224, 224)
    blocks = hide_blocks(7, 0.5, draw)
    return UitBatch(
        image, torch.arange(size), ids, mask, masked, positions, labels, blocks, max(lengths)
    )


def hardest(allowed: Tensor) -> Tensor:
    """Choose negatives deterministically, so that both variants use the same."""
    return allowed.argmax(dim=1)


def plain_losses(model: Uit, batch: UitBatch) -> dict[str, Tensor]:
    """Compute the losses of `uit.objective.uit_losses` in separate passes."""
    bert, size = model.text_encoder, len(batch.image)
    image = model.vision_encoder(batch.image)
    image_vector = model.image_vector(image)

    def match(text: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
        memory: ImageMemory = bert.image_memory(tokens)
        return model.match_logits(bert.fuse(text, mask, memory)[:, 0])

    itc = itm = torch.zeros(())
    for version, weight in enumerate((1.0, WEIGHTS.eda)):
        rows = slice(version * size, (version + 1) * size)
        mask = batch.text_mask[rows]
        text = bert.encode_text(batch.text_ids[rows], mask)
        vector = model.text_vector(text)
        itc = itc + weight * contrastive_loss(
            image_vector, vector, batch.identity, model.temp, WEIGHTS.label_smoothing
        )
        with torch.no_grad():
            of_text, of_image = negative_weights(image_vector, vector, batch.identity, model.temp)
            images, texts = hardest(of_text), hardest(of_image)
        negative = [match(text, mask, image[images]), match(text[texts], mask[texts], image)]
        itm = itm + weight * matching_loss(match(text, mask, image), torch.cat(negative))
    mask = batch.text_mask[:size]
    fused = bert.fuse(bert.encode_text(batch.masked_ids, mask), mask, bert.image_memory(image))
    at = batch.positions[..., None].expand(-1, -1, fused.shape[-1])
    mlm = masked_language_loss(bert.word_logits(fused.gather(1, at)), batch.labels)
    tower = model.vision_encoder
    tokens = tower.encode(model.hide(tower.patch_embed(batch.image), batch.hidden_blocks))
    mim = masked_image_loss(model.restore(tokens), batch.image, batch.hidden_blocks)
    total = itc + itm + WEIGHTS.mlm * mlm + WEIGHTS.mim * mim
    return {"loss": total, "itc": itc, "itm": itm, "mlm": mlm, "mim": mim}


def backward(losses: Callable[[], dict[str, Tensor]], dtype: torch.dtype) -> Tensor:
    """Accumulate one batch's gradient; return the loss."""
    with autocast(CPU, dtype):
        loss = losses()["loss"]
    loss.backward()
    return loss


def make_model() -> Uit:
    """Create a full-size model without dropout, so that both variants have equal losses."""
    torch.manual_seed(0)
    base = MODELS["uit_base"]
    swin, bert = replace(base.swin, drop_path=0.0), replace(base.bert, dropout=0.0)
    return Uit(replace(base, swin=swin, bert=bert, proj_dropout=0.0)).train()


def main() -> None:
    args = flag_parser(__doc__, batch_size=8, steps=3).parse_args()
    print(describe())
    model, batch = make_model(), make_batch(args.batch_size)
    with torch.no_grad():
        one, two = plain_losses(model, batch), uit_losses(model, batch, WEIGHTS, hardest)
    for name, value in one.items():
        apart = abs(float(two[name]) - float(value))
        print(f"  {name}: plain {float(value):.5f}, shared passes {float(two[name]):.5f} "
              f"(difference {apart:.1e})")  # fmt: skip
    losses = {
        "plain": partial(plain_losses, model, batch),
        "shared": partial(uit_losses, model, batch, WEIGHTS, hardest),
    }
    of_plain = 0.0
    for way, kind in (("plain", "fp32"), ("shared", "fp32"), ("shared", "bf16")):
        if way == "shared":  # as in `uit.train`
            keep_freed_memory(CPU)
        for _, dtype, products in number_formats(kind):
            step = partial(backward, losses[way], dtype)
            rate = samples_per_second(step, model, args.batch_size, args.steps)
            of_plain = of_plain or rate
            print(
                f"  {way} {kind}: {rate:.3f} samples/s, {rate / of_plain:.2f}x the "
                f"baseline (matrix products at {products:.0f} GFLOP/s)"
            )


if __name__ == "__main__":
    main()
