"""BEiT-3: weights of each pass, padding, batches, positions, drop path, sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lhp.beit3 import (
    POSITION_OFFSET,
    Beit3Retrieval,
    adapt_state,
    config_of_state,
    model_config,
    resize_position_table,
    start_from_scratch,
)
from lhp.train import compile_blocks
from pab.core.errors import InputError
from pab.training.contrastive import symmetric_infonce

MakeModel = Callable[..., Beit3Retrieval]


@pytest.fixture
def image() -> Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(4, 70, (3, 9), generator=torch.Generator().manual_seed(2))


def test_each_pass_uses_only_its_own_half_of_the_weights(
    debug_model: MakeModel, image: Tensor, ids: Tensor
) -> None:
    model = debug_model().eval()
    mask = torch.zeros_like(ids)
    image_before, text_before = model.encode_image(image), model.encode_text(ids, mask)
    for half in "AB":
        broken = debug_model().eval()
        spoilt = [
            parameter
            for name, parameter in broken.named_parameters()
            if f".{half}." in name
            or name.startswith(("beit3.vision", "vision") if half == "A" else ("beit3.t", "lang"))
        ]
        assert len(spoilt) > 30
        for parameter in spoilt:
            torch.nn.init.constant_(parameter, float("nan"))
        if half == "A":
            assert torch.equal(broken.encode_text(ids, mask), text_before)
            assert broken.encode_image(image).isnan().any()
        else:
            assert torch.equal(broken.encode_image(image), image_before)
            assert broken.encode_text(ids, mask).isnan().any()


def test_vectors_have_length_one_and_differ(
    debug_model: MakeModel, image: Tensor, ids: Tensor
) -> None:
    model = debug_model().eval()
    for vectors in (model.encode_image(image), model.encode_text(ids, torch.zeros_like(ids))):
        assert vectors.shape == (3, 64)
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
        similar = vectors @ vectors.T
        assert similar[~torch.eye(3, dtype=torch.bool)].max() < 0.999


def test_padding_changes_nothing(debug_model: MakeModel, ids: Tensor) -> None:
    model = debug_model().eval()
    alone = model.encode_text(ids, torch.zeros_like(ids))
    wide = torch.full((3, 20), 1)
    wide[:, :9] = ids
    mask = (torch.arange(20) >= 9).long().expand(3, 20).clone()
    torch.testing.assert_close(model.encode_text(wide, mask), alone, atol=1e-6, rtol=0)
    # With a longer caption, padded columns are not removed; their ids must not matter.
    wide[2, 9:] = 5
    mask[2] = 0
    one = model.encode_text(wide, mask)
    wide[0, 9:] = 33
    two = model.encode_text(wide, mask)
    torch.testing.assert_close(one[:2], alone[:2], atol=1e-6, rtol=0)
    assert torch.equal(one, two)
    assert (one[2] - alone[2]).abs().max() > 1e-3


def test_vectors_do_not_depend_on_the_rest_of_the_batch(
    debug_model: MakeModel, image: Tensor, ids: Tensor
) -> None:
    model = debug_model().eval()
    mask = torch.zeros_like(ids)
    mask[1, 5:] = 1
    images = torch.cat([model.encode_image(one[None]) for one in image])
    texts = torch.cat(
        [model.encode_text(one[None], m[None]) for one, m in zip(ids, mask, strict=True)]
    )
    torch.testing.assert_close(model.encode_image(image), images, atol=1e-6, rtol=0)
    torch.testing.assert_close(model.encode_text(ids, mask), texts, atol=1e-6, rtol=0)
    flipped = model.encode_text(ids.flip(0), mask.flip(0)).flip(0)
    torch.testing.assert_close(flipped, texts, atol=1e-6, rtol=0)


def test_word_order_matters(debug_model: MakeModel, ids: Tensor) -> None:
    model = debug_model().eval()
    mask = torch.zeros_like(ids)
    swapped = ids.clone()
    swapped[:, [2, 5]] = ids[:, [5, 2]]
    assert (model.encode_text(ids, mask) - model.encode_text(swapped, mask)).abs().max() > 1e-3


def test_position_table() -> None:
    table = torch.randn(POSITION_OFFSET + 1 + 16, 8)
    assert torch.equal(resize_position_table(table, 16), table)
    larger = resize_position_table(table, 36)
    assert larger.shape == (POSITION_OFFSET + 1 + 36, 8)
    assert torch.equal(larger[:3], table[:3])
    flat = torch.cat([table[:3], torch.full((16, 8), 0.75)])
    torch.testing.assert_close(resize_position_table(flat, 4)[3:], torch.full((4, 8), 0.75))
    # Positions are row-major, so values that rise to the right must do so after resizing.
    ramp = torch.cat([table[:3], torch.arange(4.0).repeat(4)[:, None].expand(16, 8)])
    grid = resize_position_table(ramp, 64)[3:, 0].reshape(8, 8)
    assert bool((grid.diff(dim=1) > 0).all())
    assert bool((grid.diff(dim=0).abs() < 1e-5).all())


def test_checkpoint_of_another_resolution_loads(debug_model: MakeModel) -> None:
    state = debug_model().state_dict()
    config = model_config("beit3_debug_patch16_96", vocab_size=70)
    model = Beit3Retrieval(config)
    model.load_state_dict(adapt_state(state, config, "a.pth"), strict=True)
    assert model.encode_image(torch.zeros(1, 3, 96, 96)).shape == (1, 64)


def test_sizes_of_a_checkpoint(debug_model: MakeModel) -> None:
    config = config_of_state(debug_model().state_dict(), model_config("beit3_debug_patch16_64"))
    assert (config.vocab_size, config.text_positions) == (70, 1024)
    # Sizes of an unrelated state dict are not read; strict loading rejects it later.
    scalars = {
        "beit3.text_embed.weight": torch.tensor(0.0),
        "beit3.encoder.embed_positions.B.weight": torch.tensor(0.0),
    }
    assert config_of_state(scalars, config) == config
    odd = {"beit3.encoder.embed_positions.A.weight": torch.zeros(3 + 15, 64)}
    assert adapt_state(odd, config, "a.pth") == odd


def test_drop_path_rises_with_depth() -> None:
    config = dataclasses.replace(model_config("beit3_mini_patch16_32", vocab_size=9), drop_path=0.3)
    rates = [block.drop_path.p for block in Beit3Retrieval(config).beit3.encoder.layers]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_drop_path_drops_whole_samples_and_rescales_the_others() -> None:
    config = dataclasses.replace(
        model_config("beit3_mini_patch16_32", vocab_size=9), drop_path=0.25
    )
    drop = Beit3Retrieval(config).beit3.encoder.layers[-1].drop_path
    x = torch.ones(20000, 2, 3)
    assert drop.eval()(x) is x
    torch.manual_seed(0)
    out = drop.train()(x)
    per_sample = out.flatten(1)
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert bool((per_sample == per_sample[:, :1]).all()), "a sample is dropped whole or not at all"
    assert abs(float(out.mean()) - 1) < 0.02


def gradients_and_graphs(layers: int, compiled: bool) -> tuple[list[Tensor], int]:
    """Return the gradients of three steps with different caption lengths, and the graph count."""
    torch._dynamo.reset()
    torch.manual_seed(3)
    sizes = model_config("beit3_debug_patch16_64", vocab_size=100)
    sizes = dataclasses.replace(
        sizes, layers=layers, drop_path=0.3, checkpoint_activations=layers > 2
    )
    model = Beit3Retrieval(sizes).train()
    names, graphs = list(model.state_dict()), []

    def backend(module: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        graphs.append(module)
        return module.forward

    if compiled:
        compile_blocks(model, backend)
    assert list(model.state_dict()) == names
    for length in (8, 7, 9):
        text = torch.randint(4, 100, (3, length))
        mask = torch.zeros_like(text)
        mask[0, 5:] = 1
        images = model.encode_image(torch.randn(3, 3, 64, 64))
        symmetric_infonce(images, model.encode_text(text, mask), model.logit_scale).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return gradients, len(graphs)


@pytest.mark.slow
def test_compiled_blocks_equal_eager_ones_and_share_their_graphs() -> None:
    counts = []
    for layers in (2, 4):
        plain, none = gradients_and_graphs(layers, compiled=False)
        own, count = gradients_and_graphs(layers, compiled=True)
        assert none == 0
        assert len(plain) == len(own) > 20
        for one, two in zip(plain, own, strict=True):
            assert torch.equal(one, two)
        counts.append(count)
    assert counts[0] == counts[1] > 0


def test_drop_path_is_off_when_scoring(debug_model: MakeModel, image: Tensor) -> None:
    model = debug_model()
    for block in model.beit3.encoder.layers:
        block.drop_path.p = 0.5
    model.eval()
    assert torch.equal(model.encode_image(image), model.encode_image(image))
    model.train()
    torch.manual_seed(0)
    draws = [model.encode_image(image) for _ in range(5)]
    assert not all(torch.equal(one, draws[0]) for one in draws)


def test_activation_checkpointing_changes_nothing(
    debug_model: MakeModel, image: Tensor, ids: Tensor
) -> None:
    results = []
    for on in (False, True):
        model = debug_model().train()
        model.beit3.encoder.checkpoint_activations = on
        for block in model.beit3.encoder.layers:
            block.drop_path.p = 0.5
        torch.manual_seed(5)
        vectors = model.encode_image(image), model.encode_text(ids, torch.zeros_like(ids))
        loss = symmetric_infonce(*vectors, model.logit_scale)
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append((loss.detach(), gradients))
    assert torch.equal(results[0][0], results[1][0])
    for one, two in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, two, atol=1e-7, rtol=1e-5)


def test_a_start_from_scratch_keeps_tokens_apart(ids: Tensor) -> None:
    def likeness(model: Beit3Retrieval) -> float:  # mean cosine of different tokens of a caption
        encoder = model.beit3.encoder
        x = torch.nn.functional.normalize(encoder(model.beit3.text_embed(ids), "B"), dim=-1)
        apart = ~torch.eye(x.shape[1], dtype=torch.bool)
        return float((x @ x.transpose(1, 2))[:, apart].mean())

    with torch.no_grad():
        torch.manual_seed(0)
        model = Beit3Retrieval(model_config("beit3_mini_patch8_64", vocab_size=70)).eval()
        published = likeness(model)
        start_from_scratch(model)
        assert 1 - published < 0.02  # nearly equal tokens, which start_from_scratch avoids
        assert 1 - likeness(model) > 5 * (1 - published)


def test_every_parameter_but_the_mask_token_learns(
    debug_model: MakeModel, image: Tensor, ids: Tensor
) -> None:
    model = debug_model().train()
    vectors = model.encode_image(image), model.encode_text(ids, torch.zeros_like(ids))
    symmetric_infonce(*vectors, model.logit_scale).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == ["beit3.vision_embed.mask_token"]
    # Softmax ignores a term added to all keys, so gradients of key biases are rounding errors.
    zero = [
        name
        for name, p in model.named_parameters()
        if p.grad is not None and "k_proj" not in name and not bool(p.grad.any())
    ]
    assert zero == []


@pytest.mark.parametrize(
    ("name", "sizes", "millions"),
    [
        ("beit3_large_patch16_384", (1024, 16, 4096, 24), 674.7),
        ("beit3_base_patch16_384", (768, 12, 3072, 12), 222.1),
        ("beit3_large_patch16_384_retrieval", (1024, 16, 4096, 24), 674.7),
    ],
)
def test_published_sizes(name: str, sizes: tuple[int, ...], millions: float) -> None:
    config = model_config(name)
    assert (config.embed_dim, config.heads, config.ffn_dim, config.layers) == sizes
    assert (config.img_size, config.patches, config.vocab_size) == (384, 576, 64010)
    with torch.device("meta"):
        model = Beit3Retrieval(config)
    width, _, ffn, layers = sizes
    half = 4 * width * width + 4 * width + 2 * width  # attention's matrices, biases, inner norm
    half += 2 * width * ffn + width + ffn + 2 * ffn  # feed-forward and its inner norm
    half += 2 * 2 * width  # the two norms before them
    counted = 2 * layers * half + 2 * 2 * width + 2 * width * width + 1
    counted += (64010 + 1024 + 576 + 3) * width + 3 * 16 * 16 * width + 3 * width
    assert sum(p.numel() for p in model.parameters()) == counted
    assert counted / 1e6 == pytest.approx(millions, abs=0.5)


def test_state_names() -> None:
    with torch.device("meta"):
        names = Beit3Retrieval(model_config("beit3_large_patch16_384")).state_dict().keys()
    assert len(names) == 24 * 2 * 20 + 14
    for name in (
        "logit_scale",
        "vision_head.weight",
        "language_head.weight",
        "beit3.text_embed.weight",
        "beit3.vision_embed.mask_token",
        "beit3.vision_embed.cls_token",
        "beit3.vision_embed.proj.weight",
        "beit3.vision_embed.proj.bias",
        "beit3.encoder.embed_positions.A.weight",
        "beit3.encoder.embed_positions.B.weight",
        "beit3.encoder.layers.23.self_attn.k_proj.A.weight",
        "beit3.encoder.layers.0.self_attn.out_proj.B.bias",
        "beit3.encoder.layers.0.self_attn.inner_attn_ln.A.weight",
        "beit3.encoder.layers.0.self_attn_layer_norm.B.weight",
        "beit3.encoder.layers.0.ffn.A.fc1.weight",
        "beit3.encoder.layers.0.ffn.B.ffn_layernorm.bias",
        "beit3.encoder.layers.0.final_layer_norm.A.bias",
        "beit3.encoder.layer_norm.B.weight",
    ):
        assert name in names


@pytest.mark.parametrize(
    "name", ["", "large", "beit3_huge_patch16_384", "beit3_large_patch0_384", "beit3_large_384"]
)
def test_unknown_model_names(name: str) -> None:
    with pytest.raises(InputError, match="known: beit3_large_patch16_384"):
        model_config(name)


@pytest.mark.parametrize("size", [-16, 100])
def test_invalid_image_sizes(size: int) -> None:
    with pytest.raises(InputError, match="patches of 16 px"):
        model_config("beit3_base_patch16_384", input_size=size)
