"""Counted cost of vision-language models, compared with transformers' own forward pass."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.allocations import RecordAllocations

ROOT = Path(__file__).resolve().parents[1]
SIDE, TOKENS, BATCH = 128, 24, 3


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("vlm_cost")


def small(costs: Any) -> Any:
    """Return the config of a model with 2 vision and 3 text layers, small enough for a CPU."""
    return costs.Sizes(
        text={"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3,
              "num_attention_heads": 8},
        vision={"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4,
                "out_hidden_size": 256, "deepstack_visual_indexes": [0, 1]},
        tied=False,
        parameters=0,
    ).config()  # fmt: skip


@pytest.mark.parametrize("name", ["2B", pytest.param("8B", marks=pytest.mark.slow)])
def test_the_sizes_give_the_published_number_of_parameters(costs: Any, name: str) -> None:
    sizes = costs.MODELS[name]
    found = costs.count(sizes.config(), 1, 64, 8, scores=True)
    assert found.parameters == sizes.parameters
    assert found.weights == pytest.approx(2 * sizes.parameters, rel=1e-4)
    embedder = costs.count(sizes.config(), 1, 0, 8, scores=False)
    head = 0 if sizes.tied else sizes.text["hidden_size"] * sizes.shared["vocab_size"]
    assert embedder.parameters == sizes.parameters - head


@torch.no_grad()
def test_the_cost_equals_that_of_a_real_forward_pass(costs: Any) -> None:
    from transformers import AutoModelForImageTextToText

    config = small(costs)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).eval()
    grid = SIDE // config.vision_config.patch_size
    image = (grid // 2) ** 2
    ids = torch.ones(BATCH, TOKENS + image, dtype=torch.int64)
    ids[:, 5 : 5 + image] = config.image_token_id
    pixels = torch.zeros(BATCH * grid**2, 3 * 2 * 16 * 16, dtype=torch.bfloat16)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    found = RecordAllocations("cpu")
    found.memory.add([*model.parameters(), *model.buffers(), ids, pixels])
    before = found.memory.live
    counted = FlopCounterMode(display=False, custom_mapping={kernel: costs.attention_flops})
    with counted, found:
        model(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels,
            image_grid_thw=torch.tensor([[1, grid, grid]] * BATCH), use_cache=False,
            mm_token_type_ids=(ids == config.image_token_id).int(), logits_to_keep=1,
        )  # fmt: skip
    cost = costs.count(config, BATCH, SIDE, TOKENS, scores=True)
    assert cost.flops * BATCH == counted.get_total_flops()
    assert cost.activations == pytest.approx(found.memory.peak - before, rel=0.1)


def test_the_operations_equal_a_count_by_hand(costs: Any) -> None:
    config, length, width = small(costs), 40, 256
    heads, head, keys, inner, layers = 8, 128, 8, 512, 3
    weights = width * head * (2 * heads + 2 * keys) + 3 * width * inner
    attention = 2 * heads * head * length**2
    expected = layers * 2 * (weights * length + attention)
    assert costs.count(config, 2, 0, length, scores=False).flops == expected
    logits = 2 * width * 151_936
    assert costs.count(config, 2, 0, length, scores=True).flops == expected + logits
