"""Fine-tune LHP: `python -m lhp.train`. Data, model, loop, in this order.

The recipe is the published one (see `lhp/config.py`); on several GPUs run it under torchrun. A run
that is started again with the same command goes on from its last checkpoint.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lhp.beit3 import Beit3Retrieval, adapt_state, model_config, start_from_scratch
from lhp.config import TrainConfig
from lhp.encode import check_text_length, encode_captions, encode_images
from lhp.tokenizer import Tokenizer, pad_batch
from lhp.views import HybridView
from pab import processes
from pab.checkpoints import load_strict, model_state, read_checkpoint
from pab.config import add_debug_flag, config_from_args, with_debug
from pab.contrastive import pair_backward
from pab.devices import autocast, seed_everything
from pab.errors import InputError, run_cli
from pab.optim import parameter_groups, warmup_cosine
from pab.pair_data import PairBatch, PairCollate, PairDataset
from pab.training import (
    epoch_batches,
    fit,
    new_run,
    open_training_data,
    retrieval_metrics,
    start_processes,
    steps_per_epoch,
    validation_retrieval,
)

DEBUG_CONFIG = "configs/lhp/debug.yaml"


def train(config: TrainConfig, argv: list[str]) -> None:
    """Run the whole recipe.

    Raises:
        InputError: bad settings, data or checkpoint, before anything is written; a training image
            that cannot be read, or a loss that is not finite, when it is met.
    """
    # ---- Data
    device, dtype = start_processes(config)
    tokenizer = Tokenizer(config.sentencepiece_model, config.max_text_length)
    data = open_training_data(config)
    view = HybridView(config.input_size, config.local_prob, config.crop_scale, config.crop_ratio)
    dataset = PairDataset(data.pairs, data.train_rows, view, tokenizer.encode, config.seed)
    batches = epoch_batches(config, len(dataset))
    total_steps = config.epochs * steps_per_epoch(batches, config.update_freq)

    # ---- Model and optimizer
    seed_everything(config.seed)  # the same first weights everywhere ...
    model = build_model(config, tokenizer).to(device)
    # ... and other drop path draws in every process
    seed_everything(config.seed, processes.rank() + 1)
    layers = model.config.layers
    groups = parameter_groups(
        model.named_parameters(),
        weight_decay=config.weight_decay,
        no_decay=model.no_weight_decay,
        layer_of=lambda name: model.layer_of(name, layers),
        n_layers=layers,
        layer_decay=config.layer_decay,
    )
    # A run shorter than its warm-up sees the beginning of it.
    scheduled_steps = max(total_steps, config.warmup_steps)

    run = new_run(
        config,
        command="python -m lhp.train",
        argv=argv,
        device=device,
        dtype=dtype,
        data=data,
        dataset=dataset,
        batches=batches,
        collate=PairCollate(pad_batch),
        model=model,
        groups=groups,
        rates=warmup_cosine(config.lr, config.min_lr, scheduled_steps, config.warmup_steps),
        warmup_steps=config.warmup_steps,
        batches_per_update=config.update_freq,
        facts={"architecture": config.model, "input_size": config.input_size},
    )

    # ---- Loop
    encode = partial(pair_vectors, model, device=device, dtype=dtype)

    def update(feed: Iterator[PairBatch]) -> dict[str, Tensor]:
        loss = torch.zeros((), device=device)
        for _ in range(config.update_freq):
            batch = PairBatch(*(t.to(device, non_blocking=True) for t in next(feed)))
            loss += pair_backward(
                encode,
                batch,
                model.logit_scale,
                chunk=config.grad_cache_chunk,
                share=config.update_freq,
                scaler=run.scaler,
                device=device,
            )
        return {"loss": loss, "logit_scale": model.logit_scale.exp()}

    def validate() -> dict[str, float]:
        retrieval = validation_retrieval(data)
        assert retrieval.gallery is not None
        options: dict[str, Any] = {
            "batch_size": config.batch_size,
            "device": device,
            "dtype": dtype,
        }
        images = encode_images(model, retrieval.gallery, num_workers=config.num_workers, **options)
        captions = [query.caption for query in retrieval.queries]
        texts = encode_captions(model, tokenizer, captions, **options)
        return retrieval_metrics(retrieval, texts @ images.T)

    fit(run, update, validate)


def build_model(config: TrainConfig, tokenizer: Tokenizer) -> Beit3Retrieval:
    """The model with weights for a start from scratch, or with those of ``--finetune``."""
    sizes = model_config(config.model, input_size=config.input_size)
    if "_mini_" in config.model or "_debug_" in config.model:  # from scratch, with own vocabulary
        sizes = dataclasses.replace(
            sizes, vocab_size=tokenizer.vocab_size, text_positions=config.max_text_length + 2
        )
    sizes = dataclasses.replace(
        sizes, drop_path=config.drop_path, checkpoint_activations=config.checkpoint_activations
    )
    check_text_length(config.max_text_length, sizes)
    model = Beit3Retrieval(sizes)
    if not config.finetune:
        start_from_scratch(model)
        return model
    state = adapt_state(model_state(read_checkpoint(config.finetune), config.finetune), sizes)
    load_strict(model, state, config.finetune)
    if tokenizer.vocab_size > sizes.vocab_size:
        raise InputError(
            config.sentencepiece_model,
            f"has {tokenizer.vocab_size} ids, the model's word table only {sizes.vocab_size}",
        )
    return model


def pair_vectors(
    model: Beit3Retrieval, pairs: PairBatch, *, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """A batch's image and text vectors side by side, [B, 2, D]."""
    with autocast(device, dtype):
        image = model.encode_image(pairs.image)
        text = model.encode_text(pairs.text_ids, pairs.text_mask)
    return torch.stack([image, text], dim=1)


def main(argv: list[str] | None = None) -> None:
    """Read the command line and train."""
    argv = list(sys.argv[1:] if argv is None else argv)
    config, _ = config_from_args(
        TrainConfig,
        with_debug(argv, DEBUG_CONFIG),
        prog="python -m lhp.train",
        description="Fine-tune BEiT-3 with the local-global hybrid perspective.",
        extra=partial(add_debug_flag, path=DEBUG_CONFIG),
    )
    try:
        train(config, argv)
    finally:
        processes.close()


if __name__ == "__main__":
    run_cli(main)
