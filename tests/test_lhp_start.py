"""BEiT-3 checkpoints for LHP's training and scoring: missing heads, heads of other tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lhp.beit3 import Beit3Retrieval
from lhp.config import TrainConfig
from lhp.encode import load_model
from lhp.tokenizer import Tokenizer
from lhp.train import build_model
from pab.core.errors import InputError
from tests.conftest import MODEL

Make = Callable[..., Beit3Retrieval]
HEADS = {"language_head.weight", "vision_head.weight", "logit_scale"}
# Heads of BEiT-3 checkpoints released for VQA, NLVR2, classification and captioning.
VQA = {"pooler.norm.weight": (64,), "pooler.dense.weight": (64, 64), "head.0.weight": (128, 64)}
NLVR2 = {"head.norm1.weight": (256,), "head.dense1.weight": (64, 256)}
CLASSES = {"fc_norm.weight": (64,), "head.weight": (1000, 64), "head.bias": (1000,)}
CAPTIONS = {"mlm_head.weight": (64010, 64), "mlm_head.bias": (64010,)}


@pytest.fixture
def model(debug_model: Make, tokenizer: Tokenizer) -> Beit3Retrieval:
    return debug_model(vocab_size=tokenizer.vocab_size, text_positions=tokenizer.max_length + 2)


@pytest.fixture
def config(tokenizer_file: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        model=MODEL, input_size=64, sentencepiece_model=str(tokenizer_file), drop_path=0.0,
        finetune=str(tmp_path / "start.pth"),
    )  # fmt: skip


def trunk(model: Beit3Retrieval) -> dict[str, Tensor]:
    return {n: t for n, t in model.state_dict().items() if n.startswith("beit3.")}


def test_missing_retrieval_heads_are_initialized_as_in_a_new_model(
    model: Beit3Retrieval, config: TrainConfig, tokenizer: Tokenizer,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    torch.save({"model": trunk(model)}, config.finetune)
    torch.manual_seed(5)
    started = build_model(config, tokenizer)
    torch.manual_seed(5)
    fresh = Beit3Retrieval(started.config)
    found, before = started.state_dict(), fresh.state_dict()
    for name, tensor in found.items():
        expected = before[name] if name in HEADS else model.state_dict()[name]
        assert torch.equal(tensor, expected), name
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"note: {config.finetune}: newly initialized: 3 tensors (language_head.weight, "
        "logit_scale, vision_head.weight)"
    )


@pytest.mark.parametrize("head", [VQA, NLVR2, CLASSES, CAPTIONS])
def test_heads_of_other_tasks_are_named_and_left_out(
    head: dict[str, tuple[int, ...]], model: Beit3Retrieval, config: TrainConfig,
    tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    more = {name: torch.zeros(shape) for name, shape in head.items()}
    torch.save({"model": {**trunk(model), **more}}, config.finetune)
    started = build_model(config, tokenizer)
    assert torch.equal(started.beit3.text_embed.weight, model.beit3.text_embed.weight)
    initialized, left = capsys.readouterr().err.splitlines()
    assert "newly initialized: 3 tensors" in initialized
    assert f"left out: {len(head)} tensors (" in left
    assert next(iter(head)).rpartition(".")[0] in left


def test_extra_and_missing_trunk_tensors_are_refused(
    model: Beit3Retrieval, config: TrainConfig, tokenizer: Tokenizer
) -> None:
    state = model.state_dict()
    torch.save({"model": {**state, "beit3.encoder.layers.9.x": torch.ones(1)}}, config.finetune)
    with pytest.raises(InputError, match=r"1 unexpected: beit3\.encoder\.layers\.9\.x"):
        build_model(config, tokenizer)
    del state["beit3.encoder.layer_norm.A.weight"]
    torch.save({"model": state}, config.finetune)
    with pytest.raises(InputError, match=r"1 missing: beit3\.encoder\.layer_norm\.A\.weight"):
        build_model(config, tokenizer)


def test_scoring_needs_the_retrieval_heads_and_ignores_others(
    model: Beit3Retrieval, config: TrainConfig, tokenizer: Tokenizer,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    torch.save({"model": trunk(model)}, config.finetune)
    with pytest.raises(InputError, match=r"3 missing: .*language_head"):
        load_model(MODEL, None, config.finetune, tokenizer)
    extra = {name: torch.zeros(shape) for name, shape in VQA.items()}
    torch.save({"model": {**model.state_dict(), **extra}}, config.finetune)
    found = load_model(MODEL, None, config.finetune, tokenizer)
    assert torch.equal(found.vision_head.weight, model.vision_head.weight)
    assert "left out: 3 tensors (head.0, pooler.dense, pooler.norm)" in capsys.readouterr().err


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module.", "model.", "model.module."])
def test_wrapped_half_precision_at_another_resolution(
    prefix: str, model: Beit3Retrieval, config: TrainConfig, tokenizer: Tokenizer,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    state = {prefix + name: tensor.half() for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state}, config.finetune)
    larger = dataclasses.replace(config, input_size=96)
    found = load_model(MODEL, 96, config.finetune, tokenizer)
    assert found.config.img_size == 96
    assert found.vision_head.weight.dtype == torch.float32
    line = "image positions are resized from 4 x 4 patches to 6 x 6"
    assert line in capsys.readouterr().err
    started = build_model(larger, tokenizer)
    for name, tensor in started.state_dict().items():
        assert torch.equal(tensor, found.state_dict()[name]), name
