"""UIT against the stored reference vectors, through the production loader and losses."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pab.checkpoints import load_strict, model_state, read_checkpoint
from pab.optim import parameter_groups
from tests.conftest import GOLDEN, needs_golden
from uit.bert import BertConfig, ImageMemory
from uit.losses import (
    contrastive_loss,
    masked_image_loss,
    masked_language_loss,
    matching_loss,
)
from uit.model import Uit, UitConfig, adapt_state
from uit.schedules import multiplier
from uit.swin import SwinConfig

pytestmark = needs_golden
EDA_WEIGHT, MIM_WEIGHT = 0.8, 0.1356  # METHOD


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    return json.loads((GOLDEN / "uit_tiny.json").read_text())


@pytest.fixture(scope="module")
def vectors() -> dict[str, Tensor]:
    return load_file(GOLDEN / "uit_tiny.safetensors")


def load(facts: dict[str, Any]) -> Uit:
    config, path = facts["config"], GOLDEN / "uit_tiny.pth"
    bert = config["bert"]
    model = Uit(
        UitConfig(
            swin=SwinConfig(
                image_size=config["image_size"],
                patch_size=config["patch_size"],
                embed_dim=config["swin"]["embed_dim"],
                depths=tuple(config["swin"]["depths"]),
                heads=tuple(config["swin"]["num_heads"]),
                window=config["window_size"],
                drop_path=config["drop_path"],
            ),
            bert=BertConfig(
                vocab_size=bert["vocab_size"],
                width=bert["hidden_size"],
                layers=bert["num_hidden_layers"],
                fusion_layer=bert["fusion_layer"],
                heads=bert["num_attention_heads"],
                ffn_dim=bert["intermediate_size"],
                positions=bert["max_position_embeddings"],
                types=bert["type_vocab_size"],
                image_width=bert["encoder_width"],
                dropout=bert["hidden_dropout_prob"],
                norm_eps=bert["layer_norm_eps"],
            ),
            embed_dim=config["embed_dim"],
            temperature=config["temperature"],
            proj_dropout=config["itc_dropout"],
        )
    )
    state = adapt_state(model_state(read_checkpoint(path), path), path)
    report = load_strict(model, state, path)
    assert not report.missing
    assert not report.unexpected
    return model


@torch.no_grad()
def test_vectors(facts: dict[str, Any], vectors: dict[str, Tensor]) -> None:
    model = load(facts).eval()
    bert, mask = model.text_encoder, vectors["text_atts"]
    image = model.vision_encoder(vectors["image"])
    text = bert.encode_text(vectors["text_ids"], mask)
    memory = bert.image_memory(image)
    logits = [
        model.match_logits(bert.fuse(one.expand_as(text), seen.expand_as(mask), memory)[:, 0])
        for one, seen in zip(text[:, None], mask[:, None], strict=True)
    ]
    for found, name in (
        (image, "image_embeds"),
        (text, "text_embeds"),
        (model.image_vector(image), "image_feat"),
        (model.text_vector(text), "text_feat"),
        (torch.stack(logits), "itm_logits_t2i"),
    ):
        torch.testing.assert_close(found, vectors[name], atol=1e-4, rtol=0)


def losses(model: Uit, v: dict[str, Tensor], label_smoothing: float) -> dict[str, Tensor]:
    """The four losses and their total, in training mode, with the stored negatives and masks."""
    bert = model.text_encoder
    image = model.vision_encoder(v["image"])
    image_vector, memory = model.image_vector(image), bert.image_memory(image)

    def match(text: Tensor, mask: Tensor, of: ImageMemory) -> Tensor:
        return model.match_logits(bert.fuse(text, mask, of)[:, 0])

    itc = itm = torch.zeros(())
    for suffix, weight in (("", 1.0), ("_eda", EDA_WEIGHT)):
        mask = v["text_atts" + suffix]
        text = bert.encode_text(v["text_ids" + suffix], mask)
        itc = itc + weight * contrastive_loss(
            image_vector, model.text_vector(text), v["identity"], model.temp, label_smoothing
        )
        images, texts = v["itm_negative_image_idx" + suffix], v["itm_negative_text_idx" + suffix]
        others = [(keys[images], values[images]) for keys, values in memory]
        negative = [match(text, mask, others), match(text[texts], mask[texts], memory)]
        itm = itm + weight * matching_loss(match(text, mask, memory), torch.cat(negative))
    hidden_text = bert.encode_text(v["text_ids_masked"], v["text_atts"])
    fused = bert.fuse(hidden_text, v["text_atts"], memory)
    at = v["masked_pos"][..., None].expand(-1, -1, fused.shape[-1])
    mlm = masked_language_loss(bert.word_logits(fused.gather(1, at)), v["masked_labels"])
    blocks = v["mim_block_mask"].float()
    size = v["image"].shape[-1] // len(blocks)
    hidden = blocks.repeat_interleave(size, 0).repeat_interleave(size, 1)
    restored = model.restore(v["image"], blocks)
    mim = masked_image_loss(restored, v["image"], hidden) * len(restored)  # summed as released
    total = itc + itm + mlm + MIM_WEIGHT * mim
    return {"itc": itc, "itm": itm, "mlm": mlm, "mim_batch_sum": mim, "total": total}


def test_losses_and_gradients(facts: dict[str, Any], vectors: dict[str, Tensor]) -> None:
    model = load(facts).train()
    found = losses(model, vectors, facts["config"]["label_smooth"])
    for name, loss in found.items():
        assert loss.item() == pytest.approx(float(vectors[f"loss_{name}"]), rel=1e-4), name
    found["total"].backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == facts["no_grad"] == []
    for name, parameter in model.named_parameters():
        norm, expected = float(parameter.grad.norm()), facts["grad_norms"][name]  # type: ignore[union-attr]
        assert norm == pytest.approx(expected, rel=1e-3, abs=1e-6), name


def test_optimizer_groups(facts: dict[str, Any]) -> None:
    expected = facts["optimizer_groups"]
    groups = parameter_groups(
        load(facts).named_parameters(),
        weight_decay=expected["weight_decay"],
        no_decay=Uit.no_weight_decay,
        lr_scale_of=Uit.rate_scale,
    )
    found = {
        name: {"lr": expected["lr"] * group["lr_scale"], "weight_decay": group["weight_decay"]}
        for group in groups
        for name in group["names"]
    }
    assert found == expected["params"]


@pytest.mark.parametrize("kind", ["step", "linear", "cosine"])
def test_schedules(facts: dict[str, Any], kind: Any) -> None:
    expected = facts["schedules"][kind]
    at = multiplier(kind, expected["total_steps"], expected["warmup_steps"])
    for step, value in expected["multiplier_at"].items():
        assert at(int(step)) == pytest.approx(value, rel=1e-12, abs=0), step
