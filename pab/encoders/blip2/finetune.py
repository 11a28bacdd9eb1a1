"""Fine-tune BLIP-2 with the contrastive recipe: settings, initial weights, vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerMultiHeadAttention

from pab.core.adapters import own_name
from pab.core.config import flag, model_flag
from pab.core.errors import InputError
from pab.data.images import recipe
from pab.data.wordpiece import VOCABULARY, Tokenizer
from pab.encoders.blip2.encoder import Blip2Encoder
from pab.encoders.blip2.model import (
    MODELS,
    Blip2,
    check_vocabulary,
    load_weights,
    start_from_scratch,
)
from pab.encoders.captions import CaptionIds
from pab.encoders.layer_numbers import no_weight_decay
from pab.encoders.pooling import Pooling
from pab.encoders.tuning import SCRATCH, FinetuneConfig, MakeView, adapted, merged_state
from pab.training.loop import command_line
from pab.training.pair_data import PairBatch
from pab.training.pairs import PairModel
from pab.training.resume import ContentHash, named_files


@dataclass(frozen=True)
class TrainConfig(FinetuneConfig):
    """Settings of BLIP-2's fine-tuning; flags of `python scripts/finetune_blip2.py`."""

    model: Literal["pretrain_vitL", "mini"] = model_flag("pretrain_vitL", "ViT-L, or a small model")
    pretrained: str = model_flag(
        "checkpoints/blip2/blip2_pretrained_vitL.pth", "weight file, or random"
    )
    image_weights: str = model_flag(
        "checkpoints/blip2/clip_vit_L.pth", "weights of the image tower if --pretrained lacks them"
    )
    text_encoder: str = model_flag(
        "checkpoints/uit/bert-base-uncased", "folder with BERT's vocab.txt"
    )
    query_pooling: Literal["first", "max"] = model_flag(
        "first", "query tokens of the image in the loss: only the first, or the best"
    )
    dropout: float = flag(0.1, "dropout of the Q-Former, as in BERT", ge=0, lt=1)
    output_dir: str = flag("output/blip2", "folder of the checkpoints and the log")

    def check(self) -> None:
        """See :class:`FinetuneConfig`.

        Raises:
            InputError: a value is invalid; the message names the flag.
        """
        super().check()
        if self.freeze == "text":
            raise InputError(
                "--freeze", "expected none or image, found text: images use the same Q-Former"
            )


def files_of(config: TrainConfig) -> dict[str, ContentHash]:
    """Map settings to functions that hash their files: weights and vocabulary."""
    scratch = config.pretrained == SCRATCH
    return named_files(
        pretrained="" if scratch else config.pretrained,
        image_weights="" if scratch else config.image_weights,
        text_encoder=Path(config.text_encoder) / VOCABULARY,
    )


def pair_model(
    config: TrainConfig,
    view: MakeView,
    device: torch.device,
    resumed: Mapping[str, str] | None = None,
) -> PairModel:
    """Build the :class:`PairModel` of BLIP-2; see :func:`pab.training.pairs.train_pairs`.

    With ``resumed``, no initial weights are loaded.
    """
    sizes = MODELS[config.model]
    tokenizer = Tokenizer(
        config.text_encoder, max_words=sizes.positions, max_length=sizes.positions
    )
    check_vocabulary(tokenizer, sizes)
    model = Blip2(sizes)
    if config.pretrained == SCRATCH:
        start_from_scratch(model)
    elif resumed is None:
        load_weights(model, config.pretrained, config.image_weights)
    for layer in model.qformer.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = config.dropout
        if isinstance(layer, Blip2QFormerMultiHeadAttention):
            layer.attention_dropout = config.dropout  # a number, not a layer
    model.to(device)
    if config.checkpoint_activations:
        model.visual_encoder.set_grad_checkpointing(True)
        model.qformer.activation_checkpointing_enable()
    tower = [model.visual_encoder, model.ln_vision]
    frozen = tower if config.freeze == "image" else []
    module = adapted(model, config, frozen=frozen, temperature=model.temp)
    transform = recipe("blip2", sizes.image_size).transform()
    scoring = command_line(
        "python scripts/blip2_infer.py", model=config.model, text_encoder=config.text_encoder,
        query_pooling=config.query_pooling,
    )  # fmt: skip
    return PairModel(
        module=module,
        view=view(
            sizes.image_size, config.local_prob, config.crop_scale, config.crop_ratio,
            whole=transform,
        ),
        encode_ids=CaptionIds(tokenizer),
        pad=tokenizer.pad_rows,
        vectors=partial(pair_vectors, model, pooling=config.query_pooling),
        logit_scale=model.logit_scale,
        encoder=lambda compute: Blip2Encoder(
            compute=compute, model=model, tokenizer=tokenizer, transform=transform,
            pooling=config.query_pooling,
        ),
        layers=model.layers,
        layer_of=lambda name: model.layer_of(own_name(name)),
        no_decay=no_weight_decay,
        facts={
            "architecture": config.model,
            "query_pooling": config.query_pooling,
            "lora_rank": config.lora_rank,
        },
        scoring=f"{scoring} --pretrained",
        released=merged_state,
    )  # fmt: skip


def pair_vectors(model: Blip2, pairs: PairBatch, *, pooling: Pooling) -> Tensor:
    """Encode B pairs to K query vectors and a caption vector each, [B, K + 1, E].

    With the pooling ``first``, K is 1.
    """
    images = model.encode_queries(pairs.image)
    device = pairs.image.device
    ids, mask = (t.to(device, non_blocking=True) for t in (pairs.text_ids, pairs.text_mask))
    texts = model.encode_text(ids, mask)
    if pooling == "first":
        images = images[:, :1]
    return torch.cat([images, texts[:, None]], dim=1)
