"""Compute the peak memory of a training step of a recipe on a GPU, with fake tensors.

A step runs the recipe's forward pass under autocast, loss and backward pass, and AdamW. The state
of the optimizer exists before the step, as in every step but the first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice, product
from pathlib import Path
from string import ascii_lowercase
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import lhp.config
import pab.encoders.blip2.finetune
import pab.encoders.clip.finetune
import uit.config
from lhp.tokenizer import Tokenizer as SentencePiece
from lhp.train import pair_model as lhp_model
from lhp.views import HybridView
from pab.core.config import config_from_args
from pab.core.devices import autocast, dtype_of, make_scaler
from pab.data.images import in_two_parts
from pab.data.pixels import normalizer
from pab.data.wordpiece import SPECIAL, VOCABULARY, Tokenizer
from pab.encoders.blip2.encoder import CAPTION_IDS
from pab.training.config import ContrastiveConfig, TrainingConfig
from pab.training.contrastive import pair_backward
from pab.training.optim import clip_and_step, make_adamw, parameter_groups
from pab.training.pair_data import PairBatch
from pab.training.pairs import PairModel
from tests.fake_cuda import CUDA, fake_cuda
from uit.augment import Augmentation, TrainingView
from uit.data import finisher
from uit.objective import LossWeights, UitBatch, uit_losses
from uit.train import build_model

ROOT = Path(__file__).resolve().parents[1]
BERT_PIECES = 30522  # size of bert-base-uncased's vocabulary
GIB = 2**30  # bytes
CLIP_END = 76  # position of the end token in the longest caption
Config = Any  # settings of a recipe


class Step(NamedTuple):
    """A model, its parameter groups, and the function that computes the gradients of a batch.

    Attributes:
        backward: adds the gradients of the loss, and returns the loss.
    """

    module: nn.Module
    groups: list[dict[str, Any]]
    backward: Callable[[], Tensor]


def lhp_step(config: lhp.config.TrainConfig, folder: Path) -> Step:
    """Build LHP's step; each caption has the maximum length."""
    del folder
    tokenizer = SentencePiece(ROOT / "checkpoints/mini/lhp.spm", config.max_text_length)
    model = lhp_model(config, tokenizer, CUDA, {})
    return pair_step(config, model, config.input_size, config.max_text_length)


def clip_step(config: pab.encoders.clip.finetune.TrainConfig, folder: Path) -> Step:
    """Build CLIP's step; captions have the model's context length."""
    del folder
    config = dataclasses.replace(config, pretrained="random")  # memory does not depend on weights
    model = pab.encoders.clip.finetune.pair_model(config, HybridView, CUDA)
    inner = model.module.get_submodule("visual")
    side = int(inner.image_size[0])  # type: ignore[index]
    return pair_step(config, model, side, len(model.encode_ids("a caption")))


def blip2_step(config: pab.encoders.blip2.finetune.TrainConfig, folder: Path) -> Step:
    """Build BLIP-2's step; captions have `CAPTION_IDS` ids, the expected maximum."""
    config = dataclasses.replace(config, text_encoder=str(vocabulary(config.text_encoder, folder)))
    model = pab.encoders.blip2.finetune.pair_model(config, HybridView, CUDA, {})
    sizes = pab.encoders.blip2.finetune.MODELS[config.model]
    return pair_step(config, model, sizes.image_size, CAPTION_IDS)


def pair_step(config: ContrastiveConfig, model: PairModel, side: int, ids: int) -> Step:
    """Build a step of :func:`pab.training.pairs.train_pairs` with images of ``side`` pixels."""
    groups = model.parameter_groups(config)
    size, dtype = config.batch_size, dtype_of(config.dtype)
    scaler = make_scaler(CUDA, dtype)
    pixels = torch.empty(size, 3, side, side, dtype=torch.uint8)
    loaded = PairBatch(pixels, *model.pad([[1] * ids] * size), torch.arange(size))
    normalize = normalizer(in_two_parts(model.view).normalization, CUDA)

    def vectors(pairs: PairBatch) -> Tensor:
        with autocast(CUDA, dtype):
            return model.vectors(pairs)

    def backward() -> Tensor:
        batch = loaded.on(CUDA)
        batch = batch._replace(image=normalize(batch.image))
        return pair_backward(
            vectors, batch, model.logit_scale(), chunk=config.grad_cache_chunk, share=1,
            scaler=scaler, device=CUDA,
        )  # fmt: skip

    return Step(model.module, groups, backward)


def uit_step(config: uit.config.TrainConfig, folder: Path) -> Step:
    """Build UIT's step with all four losses."""
    words = vocabulary(config.text_encoder, folder)
    tokenizer = Tokenizer(words, config.max_words, config.max_text_length)
    model = build_model(config, tokenizer, start=False).to(CUDA)
    groups = parameter_groups(
        model.named_parameters(),
        weight_decay=config.weight_decay,
        no_decay=model.no_weight_decay,
        lr_scale_of=model.rate_scale,
    )
    size, length, side = config.batch_size, config.max_text_length, config.input_size
    blocks = side // config.mim_block
    of_ids = partial(torch.ones, dtype=torch.int64)
    loaded = UitBatch(
        image=torch.empty(size, 3, side, side, dtype=torch.uint8),
        identity=torch.arange(size),
        text_ids=of_ids(2 * size, length),
        text_mask=of_ids(2 * size, length),
        masked_ids=of_ids(size, length),
        positions=of_ids(size, config.mlm_most),
        labels=of_ids(size, config.mlm_most),
        hidden_blocks=torch.ones(blocks, blocks),
        longest=length,
        erased=of_ids(size, 4),
    )
    weights = LossWeights(
        config.eda_weight, config.mlm_weight, config.mim_weight, config.label_smoothing
    )
    scaler = make_scaler(CUDA, dtype_of(config.dtype))
    augmentation = Augmentation(config.flip_prob, config.augment_level, config.erasing_prob)
    finish = finisher(TrainingView(side, augmentation), CUDA)

    def backward() -> Tensor:
        batch = finish(loaded.to(CUDA))
        with autocast(CUDA, dtype_of(config.dtype)):
            loss = uit_losses(model, batch, weights)["loss"]
        scaler.scale(loss).backward()
        return loss.detach()

    return Step(model, groups, backward)


def vocabulary(folder: str, replacement: Path) -> Path:
    """Return the folder of BERT's vocabulary; if it is missing, write one of the same size."""
    if (ROOT / folder / VOCABULARY).is_file():
        return ROOT / folder
    words = map("".join, product(ascii_lowercase, repeat=4))
    pieces = [*SPECIAL, *islice(words, BERT_PIECES - len(SPECIAL))]
    (replacement / VOCABULARY).write_text("\n".join(pieces) + "\n", encoding="utf-8")
    return replacement


class Recipe(NamedTuple):
    """Settings of a recipe, and the function that builds its step."""

    settings: type[TrainingConfig]
    step: Callable[[Config, Path], Step]


RECIPES = {
    "lhp": Recipe(lhp.config.TrainConfig, lhp_step),
    "uit": Recipe(uit.config.TrainConfig, uit_step),
    "clip": Recipe(pab.encoders.clip.finetune.TrainConfig, clip_step),
    "blip2": Recipe(pab.encoders.blip2.finetune.TrainConfig, blip2_step),
}  # by folder under configs/


def recipe_step(recipe: str, flags: Iterable[str], folder: Path) -> tuple[Config, Step]:
    """Build the settings and the step of a recipe on the fake device.

    Args:
        recipe: path of the config under ``configs``, without its suffix, such as ``lhp/finetune``.
        flags: flags that override the config.
        folder: folder for temporary files.
    """
    settings, build = RECIPES[recipe.partition("/")[0]]
    argv = ["--config", str(ROOT / f"configs/{recipe}.yaml"), *flags]
    config: Config = config_from_args(settings, argv, prog=recipe)[0]
    step = build(config, folder)
    step.module.train()
    return config, step


def peak_memory(recipe: str, flags: Iterable[str], folder: Path) -> int:
    """Compute the peak memory of a step, in bytes; see :func:`recipe_step`."""
    with pytest.MonkeyPatch.context() as patch, fake_cuda(patch) as trace:
        trace.truth = False  # not all captions have the same length, nor all pairs one identity
        config, step = recipe_step(recipe, flags, folder)
        trace.number = getattr(config, "max_text_length", CLIP_END)  # the longest caption
        take_step(config, step)
        return trace.memory.peak


def take_step(config: Config, step: Step) -> None:
    """Create the optimizer's state, then compute the gradients and update the weights."""
    optimizer = make_adamw(step.groups, config.opt_betas, config.opt_eps)
    for group in step.groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    update(optimizer, torch.zeros((), device=CUDA), config.clip_grad)
    optimizer.zero_grad(set_to_none=True)
    update(optimizer, step.backward(), config.clip_grad)


def update(
    optimizer: torch.optim.Optimizer,
    loss: Tensor,
    max_norm: float | None,
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    """Take the optimizer's step after a backward pass; see :func:`clip_and_step`."""
    outcome = clip_and_step(optimizer, figures=loss, max_norm=max_norm, scaler=scaler)
    assert outcome.problem == ""
