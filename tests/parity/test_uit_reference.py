"""UIT against the stored reference vectors, through the production loader and losses."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pab.core.checkpoints import load_strict, model_state, read_checkpoint
from pab.training.optim import parameter_groups
from tests.conftest import GOLDEN, needs_golden
from uit.bert import BertConfig
from uit.model import Uit, UitConfig, adapt_state
from uit.objective import LossWeights, UitBatch, uit_losses
from uit.schedules import multiplier
from uit.swin import SwinConfig

pytestmark = needs_golden
EDA_WEIGHT, MIM_WEIGHT = 0.8, 0.1356  # as released


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


def batch_of(v: dict[str, Tensor]) -> UitBatch:
    return UitBatch(
        image=v["image"],
        identity=v["identity"],
        text_ids=torch.cat([v["text_ids"], v["text_ids_eda"]]),
        text_mask=torch.cat([v["text_atts"], v["text_atts_eda"]]),
        masked_ids=v["text_ids_masked"],
        positions=v["masked_pos"],
        labels=v["masked_labels"],
        hidden_blocks=v["mim_block_mask"].float(),
        longest=max(int(v[name].sum(dim=1).max()) for name in ("text_atts", "text_atts_eda")),
    )


def test_losses_and_gradients(facts: dict[str, Any], vectors: dict[str, Tensor]) -> None:
    model = load(facts).train()
    size = len(vectors["image"])
    stored = iter(
        vectors[f"itm_negative_{kind}_idx{suffix}"]
        for suffix in ("", "_eda")
        for kind in ("image", "text")
    )
    weights = LossWeights(
        eda=EDA_WEIGHT,
        mlm=1.0,
        mim=MIM_WEIGHT * size,  # the release sums over the batch
        label_smoothing=facts["config"]["label_smooth"],
    )

    def hardest(allowed: Tensor) -> Tensor:
        negative = next(stored)
        assert torch.equal(negative, allowed.argmax(dim=1))
        return negative

    found = uit_losses(model, batch_of(vectors), weights, hardest)
    found["mim_batch_sum"] = found.pop("mim") * size
    found["total"] = found.pop("loss")
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
