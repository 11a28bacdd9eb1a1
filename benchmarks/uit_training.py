"""UIT's training speed: `python benchmarks/uit_training.py`.

Measures samples per second of one full-size training step (synthetic images and captions) at batch
8 in bf16, as in `uit.train`. The baseline runs separate passes in eager float32: each caption
version, the true pairs, and each kind of negative pairs, with all layers on all tokens, padded to
56 ids. Also prints both losses in float32, which must agree within 1e-3.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from random import Random

import torch
from machine import describe, product_rate
from torch import Tensor

from pab.core.devices import DTYPES, autocast, cpu_has_bf16, keep_freed_memory
from pab.training.optim import clip_and_step, make_adamw, parameter_groups, set_lr
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

CPU = torch.device("cpu")
LENGTH, SHORTEST, LONGEST = 56, 27, 50
WEIGHTS = LossWeights(eda=0.8, mlm=1.0, mim=0.1356 * 84, label_smoothing=0.2)


def make_batch(size: int) -> UitBatch:
    """Random images, ids with realistic lengths, masks as in the loader."""
    draw = Random(0)
    lengths = [draw.randint(SHORTEST, LONGEST) for _ in range(2 * size)]
    ids = torch.zeros(2 * size, LENGTH, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(1000, 30000, (length,))
        mask[row, :length] = 1
    rows = [ids[i, : lengths[i]].tolist() for i in range(size)]
    chosen = [sorted(draw.sample(range(1, lengths[i] - 1), 10)) for i in range(size)]
    positions, labels = labels_at(rows, chosen, 10)
    masked = ids[:size].scatter(1, positions, 103)
    image = torch.randn(size, 3, 224, 224)
    blocks = hide_blocks(7, 0.5, draw)
    return UitBatch(image, torch.arange(size), ids, mask, masked, positions, labels, blocks)


def hardest(allowed: Tensor) -> Tensor:
    """Deterministic choice of negatives, equal for both variants."""
    return allowed.argmax(dim=1)


def plain_losses(model: Uit, batch: UitBatch) -> dict[str, Tensor]:
    """Compute the same losses in separate passes."""
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


def make_model() -> Uit:
    """Full-size model without randomness in a pass, so that both variants give equal losses."""
    torch.manual_seed(0)
    base = MODELS["uit_base"]
    swin, bert = replace(base.swin, drop_path=0.0), replace(base.bert, dropout=0.0)
    return Uit(replace(base, swin=swin, bert=bert, proj_dropout=0.0)).train()


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    print(describe())
    model, batch = make_model(), make_batch(args.batch_size)
    groups = parameter_groups(
        model.named_parameters(), weight_decay=0.01, no_decay=model.no_weight_decay,
        lr_scale_of=model.rate_scale,
    )  # fmt: skip
    optimizer = make_adamw(groups, (0.9, 0.98), 1e-8)
    set_lr(optimizer, 0.0)  # fixed weights, so that all variants see the same
    with torch.no_grad():
        one, two = plain_losses(model, batch), uit_losses(model, batch, WEIGHTS, hardest)
    for name, value in one.items():
        apart = abs(float(two[name]) - float(value))
        print(f"  {name}: plain {float(value):.5f}, shared passes {float(two[name]):.5f} "
              f"(difference {apart:.1e})")  # fmt: skip
    rates: dict[str, float] = {}
    for way, kind in (("plain fp32", "fp32"), ("shared fp32", "fp32"), ("shared bf16", "bf16")):
        if kind == "bf16" and not cpu_has_bf16():
            print("  bf16: this processor has no bf16 units")
            continue
        if way == "shared fp32":  # as `uit.train` starts
            keep_freed_memory(CPU)
        times = []
        for _ in range(args.steps + 1):  # the first step is a warm-up
            start = time.perf_counter()
            with autocast(CPU, DTYPES[kind]):
                if way.startswith("plain"):
                    loss = plain_losses(model, batch)["loss"]
                else:
                    loss = uit_losses(model, batch, WEIGHTS, hardest)["loss"]
            loss.backward()
            clip_and_step(optimizer, loss=loss)
            optimizer.zero_grad(set_to_none=True)
            times.append(time.perf_counter() - start)
        rates[way] = args.batch_size / min(times[1:])
        ceiling = product_rate(DTYPES[kind]) / 1e9
        print(
            f"  {way}: {rates[way]:.3f} samples/s, {rates[way] / rates['plain fp32']:.2f}x the "
            f"plain order (matrix products at {ceiling:.0f} GFLOP/s)"
        )


if __name__ == "__main__":
    main()
