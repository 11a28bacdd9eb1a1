"""UIT's towers, heads, losses and schedules at a small size, without the reference vectors."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from pab.core.errors import InputError
from uit.bert import Bert, BertConfig
from uit.losses import (
    NEGATIVE_FLOOR,
    contrastive_loss,
    masked_image_loss,
    matching_loss,
    negative_weights,
)
from uit.model import Uit, UitConfig, adapt_state
from uit.schedules import multiplier
from uit.swin import Swin, SwinConfig, from_windows, shifted_window_mask, to_windows

SWIN = SwinConfig(
    image_size=32, patch_size=4, embed_dim=8, depths=(2, 2), heads=(1, 2), window=4, drop_path=0.0
)
BERT = BertConfig(
    vocab_size=50, width=16, layers=4, fusion_layer=2, heads=2, ffn_dim=24, positions=12,
    image_width=SWIN.width, dropout=0.0,
)  # fmt: skip


def make(seed: int = 0) -> Uit:
    torch.manual_seed(seed)
    model = Uit(UitConfig(SWIN, BERT, embed_dim=10, proj_dropout=0.0))
    for parameter in model.parameters():  # larger than initially, so that outputs differ
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture
def image() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 50, (3, 9), generator=torch.Generator().manual_seed(2))


def test_windows_round_trip() -> None:
    x = torch.randn(2, 8, 8, 3)
    windows = to_windows(x, 4)
    assert windows.shape == (8, 16, 3)
    assert torch.equal(windows[1, 5], x[0, 1, 5])  # second window of the first row of windows
    assert torch.equal(from_windows(windows, 4, 8), x)


def test_shifted_windows_see_only_true_neighbours() -> None:
    side, window, shift = 8, 4, 2
    place = torch.arange(side * side).view(1, side, side, 1)
    rolled = to_windows(torch.roll(place, (-shift, -shift), dims=(1, 2)), window).squeeze(-1)
    mask = shifted_window_mask(side, window, shift)
    for m, tokens in enumerate(rolled.tolist()):
        for i, a in enumerate(tokens):
            for j, b in enumerate(tokens):
                near = abs(a // side - b // side) < window and abs(a % side - b % side) < window
                assert (mask[m, i, j] == 0) == near


def test_the_mean_token_comes_first(image: Tensor) -> None:
    tokens = make().vision_encoder(image)
    assert tokens.shape == (3, 1 + 16, SWIN.width)
    torch.testing.assert_close(tokens[:, 0], tokens[:, 1:].mean(dim=1))


@pytest.mark.parametrize("size", [36, 40, 56])
def test_sizes_that_the_windows_do_not_divide_are_refused(size: int) -> None:
    with pytest.raises(InputError, match="--input_size"):
        Swin(dataclasses.replace(SWIN, image_size=size))


def test_fused_text_depends_on_its_own_image(image: Tensor, ids: Tensor) -> None:
    bert = make().text_encoder
    mask = torch.ones_like(ids)
    text = bert.encode_text(ids, mask)
    tokens = make().vision_encoder(image)
    first = bert.fuse(text, mask, bert.image_memory(tokens))
    second = bert.fuse(text, mask, bert.image_memory(tokens.flip(0)))
    assert not torch.allclose(first[0], second[0], atol=1e-3)
    torch.testing.assert_close(first[1], second[1])  # flip(0) keeps the middle image


def test_padding_does_not_change_the_tokens(ids: Tensor) -> None:
    bert: Bert = make().text_encoder
    mask = torch.ones_like(ids)
    mask[:, 6:] = 0
    short = bert.encode_text(ids[:, :6], mask[:, :6])
    torch.testing.assert_close(bert.encode_text(ids, mask)[:, :6], short, atol=1e-5, rtol=1e-5)


def restored(model: Uit, image: Tensor, hidden: Tensor) -> Tensor:
    tower = model.vision_encoder
    return model.restore(tower.encode(model.hide(tower.patch_embed(image), hidden)))


def test_hidden_blocks_do_not_affect_the_output(image: Tensor) -> None:
    model = make()
    hidden = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    changed = image.clone()
    changed[:, :, :16, :16] += 1.0  # inside the hidden block
    torch.testing.assert_close(restored(model, changed, hidden), restored(model, image, hidden))
    changed[:, :, 20, 20] += 1.0
    assert not torch.allclose(restored(model, changed, hidden), restored(model, image, hidden))


def test_masked_image_loss_counts_hidden_pixels_only() -> None:
    image, found = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 5.0)
    found[:, :, :2] = 0.25
    hidden = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    assert float(masked_image_loss(found, image, hidden)) == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize("fusion_layer", [1, 2, 3])
def test_shared_work_equals_separate_pairs(image: Tensor, ids: Tensor, fusion_layer: int) -> None:
    torch.manual_seed(3)
    bert = Bert(dataclasses.replace(BERT, fusion_layer=fusion_layer)).eval()
    mask = torch.ones_like(ids)
    mask[:, 7:] = 0  # padding in all texts
    mask[1, 4:] = 0
    text = bert.encode_text(ids, mask)
    memory = bert.image_memory(make().vision_encoder(image))
    rows, images = torch.tensor([0, 1, 1, 2, 0]), torch.tensor([2, 0, 1, 1, 0])
    paired = [(keys[images], values[images]) for keys, values in memory]
    plain = bert.fuse(text[rows], mask[rows], paired)
    at = torch.tensor([[0, 2], [0, 3], [1, 0], [0, 6], [5, 0]])
    found = bert.fused_at(bert.fuse_pairs(text, mask, memory, rows, images), at)
    expected = torch.stack([plain[i, at[i]] for i in range(5)])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_pairs_of_one_identity_share_contrastive_targets() -> None:
    vectors = torch.eye(3)
    identity, other = torch.tensor([7, 7, 9]), torch.tensor([7, 8, 9])
    temperature = torch.tensor(1.0)
    logits = vectors.log_softmax(dim=1)
    shared = -(logits[0, :2].sum() + logits[1, :2].sum()) / 2 / 3 - logits[2, 2] / 3
    found = contrastive_loss(vectors, vectors, identity, temperature, 0.0)
    torch.testing.assert_close(found, shared)
    assert found > contrastive_loss(vectors, vectors, other, temperature, 0.0)


def test_no_negative_shares_an_identity() -> None:
    torch.manual_seed(0)
    image, text = torch.randn(2, 6, 4).unbind(0)
    identity = torch.tensor([0, 0, 1, 2, 2, 2])
    of_text, of_image = negative_weights(image, text, identity, torch.tensor(0.07))
    same = identity[:, None] == identity[None]
    for weights in (of_text, of_image):
        assert bool((weights[same] == 0).all())
        assert bool((weights[~same] >= NEGATIVE_FLOOR).all())
    similar = (image @ text.T / 0.07).softmax(dim=1) + NEGATIVE_FLOOR
    torch.testing.assert_close(of_image[~same], similar[~same])


def test_matching_loss_knows_which_pairs_match() -> None:
    right, wrong = torch.tensor([[-9.0, 9.0]] * 2), torch.tensor([[9.0, -9.0]] * 4)
    assert float(matching_loss(right, wrong)) < 1e-6
    assert float(matching_loss(wrong[:2], right.repeat(2, 1))) > 10


def test_different_copies_of_a_tensor_are_refused() -> None:
    state = make().state_dict()
    words = state["text_encoder.bert.embeddings.word_embeddings.weight"]
    name = "text_encoder.cls.predictions.decoder.weight"
    assert adapt_state({**state, name: words.clone()}, "a.pth").keys() == state.keys()
    with pytest.raises(InputError, match=r"decoder\.weight differs"):
        adapt_state({**state, name: words + 1}, "a.pth")


@pytest.mark.parametrize("kind", ["step", "linear", "cosine"])
def test_schedules_rise_then_fall(kind: str) -> None:
    at = multiplier(kind, 1000, 50)  # type: ignore[arg-type]
    values = [at(step) for step in range(1000)]
    top = values.index(max(values))
    assert values[0] == 0
    assert max(values) == pytest.approx(1.0)
    assert values[: top + 1] == sorted(values[: top + 1])
    assert values[top:] == sorted(values[top:], reverse=True)
