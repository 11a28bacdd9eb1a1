"""Fine-tune LHP: `python -m lhp.train`.

This module implements the published recipe. The settings are in `lhp/config.py`, the training steps
in `pab/training/pairs.py`. For several GPUs, start the command with torchrun. The same command,
started again, resumes from the last checkpoint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from lhp.beit3 import (
    OTHER_HEADS,
    RETRIEVAL_HEADS,
    Beit3Retrieval,
    Block,
    adapt_state,
    model_config,
    start_from_scratch,
)
from lhp.config import TrainConfig
from lhp.encode import LhpEncoder, check_compiler, check_text_length
from lhp.tokenizer import Tokenizer, pad_batch
from lhp.views import HybridView
from pab.core.checkpoints import load_strict, model_state, read_checkpoint
from pab.core.errors import InputError, run_cli
from pab.training.command import training_command
from pab.training.loop import command_line
from pab.training.pair_data import PairBatch
from pab.training.pairs import PairModel, train_pairs
from pab.training.resume import named_files

DEBUG_CONFIG = "configs/lhp/debug.yaml"


def train(config: TrainConfig, command: str) -> None:
    """Fine-tune LHP with the shared recipe (:func:`pab.training.pairs.train_pairs`).

    Raises:
        InputError: the settings, the data or a checkpoint is invalid, a file cannot be read or
            written, or too many consecutive steps are skipped.
    """
    tokenizer = Tokenizer(config.sentencepiece_model, config.max_text_length)
    files = named_files(finetune=config.finetune, sentencepiece_model=config.sentencepiece_model)
    train_pairs(config, command, files, partial(pair_model, config, tokenizer))


def pair_model(
    config: TrainConfig,
    tokenizer: Tokenizer,
    device: torch.device,
    resumed: Mapping[str, str] | None,
) -> PairModel:
    """Build the :class:`PairModel` of LHP; load no initial weights if the run is resumed."""
    if config.compile:
        check_compiler(device)
    model = build_model(config, tokenizer, start=resumed is None).to(device)
    if config.compile:
        compile_blocks(model)
    layers = model.config.layers
    scoring = command_line(
        "python -m lhp.infer", model=config.model, input_size=config.input_size,
        tokenizer=config.sentencepiece_model, max_text_length=config.max_text_length,
    )  # fmt: skip
    return PairModel(
        module=model,
        view=HybridView(config.input_size, config.local_prob, config.crop_scale, config.crop_ratio),
        encode_ids=tokenizer.encode,
        pad=pad_batch,
        vectors=partial(pair_vectors, model),
        logit_scale=lambda: model.logit_scale,
        encoder=lambda compute: LhpEncoder(compute=compute, model=model, tokenizer=tokenizer),
        layers=layers,
        layer_of=lambda name: model.layer_of(name, layers),
        no_decay=model.no_weight_decay,
        facts={"architecture": config.model, "input_size": config.input_size},
        scoring=f"{scoring} --checkpoint",
    )


def build_model(config: TrainConfig, tokenizer: Tokenizer, *, start: bool = True) -> Beit3Retrieval:
    """Create the model with random initial weights, or with those of ``--finetune``.

    Retrieval heads that the ``--finetune`` checkpoint lacks are initialized; heads of other tasks
    are ignored. With ``start=False``, weights are arbitrary: a resumed checkpoint replaces them.

    Raises:
        InputError: the architecture is unknown, the checkpoint is unreadable, or sizes, vocabulary
            or tensors do not fit.
    """
    sizes = model_config(config.model, input_size=config.input_size)
    if "_mini_" in config.model or "_debug_" in config.model:  # from scratch, with a new vocabulary
        sizes = dataclasses.replace(
            sizes, vocab_size=tokenizer.vocab_size, text_positions=config.max_text_length + 2
        )
    sizes = dataclasses.replace(
        sizes, drop_path=config.drop_path, checkpoint_activations=config.checkpoint_activations
    )
    check_text_length(config.max_text_length, sizes)
    if tokenizer.vocab_size > sizes.vocab_size:
        raise InputError(
            config.sentencepiece_model,
            f"has {tokenizer.vocab_size} ids, the model embeds only {sizes.vocab_size}",
        )
    model = Beit3Retrieval(sizes)
    if not start:
        return model
    if not config.finetune:
        start_from_scratch(model)
        return model
    path = config.finetune
    state = model_state(read_checkpoint(path), path, model.state_dict().keys())
    report = load_strict(
        model, adapt_state(state, sizes, path), path,
        allow_missing=RETRIEVAL_HEADS, allow_unexpected=OTHER_HEADS,
    )  # fmt: skip
    report.warn(path)
    return model


def compile_blocks(
    model: Beit3Retrieval, backend: str | Callable[..., object] = "inductor"
) -> None:
    """Compile both branches of every block, in place; all blocks share the compiled code.

    Drop path is not compiled: its rate differs between blocks, so each block would need its own
    compilation. The state dict is unchanged. Compilation happens in the first steps.
    """
    # One graph per modality, mask, output length and gradient mode; torch's limit is 8.
    torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)
    for block in model.beit3.encoder.layers:
        assert isinstance(block, Block)
        block.attend = torch.compile(block.attend, backend=backend)  # type: ignore[method-assign]
        block.feed_forward = torch.compile(  # type: ignore[method-assign]
            block.feed_forward, backend=backend
        )


def pair_vectors(model: Beit3Retrieval, pairs: PairBatch) -> Tensor:
    """Encode B pairs to image and text vectors of width D, stacked as [B, 2, D]."""
    image = model.encode_image(pairs.image)
    text = model.encode_text(pairs.text_ids, pairs.text_mask)
    return torch.stack([image, text], dim=1)


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and train."""
    training_command(
        TrainConfig,
        train,
        argv,
        prog="python -m lhp.train",
        debug_config=DEBUG_CONFIG,
    )


if __name__ == "__main__":
    run_cli(main)
