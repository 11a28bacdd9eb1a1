"""BEiT-3 against the stored reference vectors, through the production loader and losses."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lhp.beit3 import Beit3Config, Beit3Retrieval, adapt_state
from lhp.tokenizer import Tokenizer
from pab.core.checkpoints import load_strict, model_state, read_checkpoint
from pab.training.contrastive import cached_backward, gathered_infonce
from pab.training.optim import parameter_groups, warmup_cosine
from tests.conftest import GOLDEN, SHARED, needs_golden

pytestmark = needs_golden


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    return json.loads((GOLDEN / "beit3_tiny.json").read_text())


@pytest.fixture(scope="module")
def vectors() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "beit3_tiny.safetensors")


def load(facts: dict[str, Any], **changes: Any) -> Beit3Retrieval:
    path = GOLDEN / "beit3_tiny.pth"
    config = dataclasses.replace(Beit3Config(**facts["config"]), **changes)
    model = Beit3Retrieval(config)
    state = model_state(read_checkpoint(path), path)
    report = load_strict(model, adapt_state(state, config, path), path)
    assert not report.missing
    assert not report.unexpected
    return model


def test_vectors_and_loss(facts: dict[str, Any], vectors: dict[str, torch.Tensor]) -> None:
    model = load(facts)
    image = model.encode_image(vectors["image"])
    text = model.encode_text(vectors["text_ids"], vectors["padding_mask"])
    torch.testing.assert_close(image, vectors["vision_cls"], atol=1e-5, rtol=0)
    torch.testing.assert_close(text, vectors["language_cls"], atol=1e-5, rtol=0)
    loss = gathered_infonce(image, text, model.logit_scale)
    assert abs(float(loss) - float(vectors["loss"])) < 1e-5


@pytest.mark.parametrize("way", ["plain", "checkpointed", "cached"])
def test_gradients(facts: dict[str, Any], vectors: dict[str, torch.Tensor], way: str) -> None:
    model = load(facts, checkpoint_activations=way == "checkpointed").train()

    def encode(rows: slice) -> torch.Tensor:
        image = model.encode_image(vectors["image"][rows])
        text = model.encode_text(vectors["text_ids"][rows], vectors["padding_mask"][rows])
        return torch.stack([image, text], dim=1)

    def loss_of(parts: list[torch.Tensor]) -> torch.Tensor:
        return gathered_infonce(*torch.cat(parts).unbind(dim=1), model.logit_scale)

    if way == "cached":
        chunks = [lambda r=slice(i, i + 2): encode(r) for i in range(0, 5, 2)]  # type: ignore[misc]
        cached_backward(chunks, loss_of, device=torch.device("cpu"))
    else:
        loss_of([encode(slice(None))]).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == facts["no_grad"]
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            norm, expected = float(parameter.grad.norm()), facts["grad_norms"][name]
            assert norm == pytest.approx(expected, rel=1e-4, abs=1e-6), name


def test_another_resolution(facts: dict[str, Any], vectors: dict[str, torch.Tensor]) -> None:
    model = load(facts, img_size=96)
    table = model.beit3.encoder.embed_positions.A.weight
    torch.testing.assert_close(table.detach(), vectors["pos_embed_96"], atol=1e-5, rtol=0)
    image = model.encode_image(vectors["image_96"])
    torch.testing.assert_close(image, vectors["vision_cls_96"], atol=1e-5, rtol=0)


def test_optimizer_groups(facts: dict[str, Any]) -> None:
    model = load(facts)
    expected = facts["optimizer_groups"]
    layers = model.config.layers
    groups = parameter_groups(
        model.named_parameters(),
        weight_decay=expected["weight_decay"],
        no_decay=model.no_weight_decay,
        layer_of=lambda name: model.layer_of(name, layers),
        n_layers=layers,
        layer_decay=expected["layer_decay"],
    )
    found = {
        name: {"lr_scale": group["lr_scale"], "weight_decay": group["weight_decay"]}
        for group in groups
        for name in group["names"]
    }
    assert found.keys() == expected["params"].keys()
    for name, values in expected["params"].items():
        assert found[name] == pytest.approx(values, rel=1e-12, abs=0), name


def test_learning_rate(facts: dict[str, Any]) -> None:
    s = facts["lr_schedule"]
    total = s["epochs"] * s["steps_per_epoch"]
    rates = warmup_cosine(s["lr"], s["min_lr"], total, s["warmup_steps"], s["start_warmup_lr"])
    for step, rate in s["values_at"].items():
        assert rates[int(step)] == pytest.approx(rate, rel=1e-12, abs=0), step


def test_token_ids() -> None:
    tokenizer = Tokenizer(SHARED / "tokenizers" / "beit3.spm")
    for entry in json.loads((GOLDEN / "tokens.json").read_text()):
        ids, mask = tokenizer.batch([entry["caption"]], pad_to=64)
        assert ids[0].tolist() == entry["beit3_ids"], entry["caption"]
        assert int((mask == 0).sum()) == entry["beit3_length"], entry["caption"]
