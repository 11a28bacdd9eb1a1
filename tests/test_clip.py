"""CLIP through OpenCLIP: tokens, weight formats, activation, preprocessing, bad input."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from conftest import GOLDEN, needs_golden
from open_clip.factory import _MODEL_CONFIGS, add_model_config
from PIL import Image
from torch import Tensor, nn

from pab.core.checkpoints import save_weights
from pab.core.errors import InputError
from pab.encoders.clip import blocks as clip_blocks
from pab.encoders.clip import model as clip
from pab.encoders.clip import weights as clip_weights
from pab.encoders.clip.identity import ARCHITECTURE

NAME = "tiny-clip-quickgelu"
SIZES: dict[str, Any] = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32},
    "text_cfg": {
        "context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2,
    },
}  # fmt: skip
CAPTIONS = ["a man falls", "a woman in a red coat walks her dog past a long row of parked cars"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """A small random model, registered in OpenCLIP with and without QuickGELU."""
    folder = tmp_path_factory.mktemp("configs")
    for name, quick in ((NAME, True), (NAME.removesuffix("-quickgelu"), False)):
        (folder / f"{name}.json").write_text(json.dumps({**SIZES, "quick_gelu": quick}))
        add_model_config(folder / f"{name}.json")
    torch.manual_seed(0)
    return with_large_weights(open_clip.create_model(NAME, load_weights=False))


def with_large_weights(model: nn.Module) -> nn.Module:
    """Draw weights larger than OpenCLIP's initial ones, so that all parts affect the output."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


class Archive(nn.Module):
    """Stand-in for OpenAI's archive: tensors under the published names, and three integers."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in state.items():
            owner: nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_buffer(last, tensor)
        for name in clip_weights.OPENAI_FACTS:
            self.register_buffer(name, torch.tensor(32))

    def forward(self, x: Tensor) -> Tensor:
        return x


def save(model: nn.Module, kind: str, folder: Path) -> Path:
    state, path = model.state_dict(), folder / f"{kind}.pt"
    if kind == "archive":
        torch.jit.script(Archive(state)).save(path)
    elif kind == "openclip":
        named = {f"module.{name}": tensor for name, tensor in state.items()}
        torch.save({"epoch": 3, "name": "run", "state_dict": named}, path)
    elif kind == "safetensors":
        path = folder / "weights.safetensors"
        save_weights(path, state, {ARCHITECTURE: NAME})
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("kind", ["plain", "archive", "openclip", "safetensors"])
def test_every_format_gives_the_same_vectors(tiny: nn.Module, kind: str, tmp_path: Path) -> None:
    encoder = clip.load_clip(NAME, str(save(tiny, kind, tmp_path)))
    ids, pixels = encoder.tokenize(CAPTIONS), torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        texts = tiny.encode_text(open_clip.tokenize(CAPTIONS), normalize=True)  # type: ignore[operator]
        images = tiny.encode_image(pixels, normalize=True)  # type: ignore[operator]
        torch.testing.assert_close(encoder.encode_text(ids), texts, rtol=0, atol=1e-6)
        torch.testing.assert_close(encoder.encode_image(pixels), images, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("visual", "text", "pruned"),
    [
        ({}, {}, True),
        ({"pool_type": "avg"}, {"no_causal_mask": True, "pool_type": "last"}, False),
        ({"attentional_pool": True, "attn_pooler_heads": 2}, {"embed_cls": True}, False),
        ({"output_tokens": True}, {"output_tokens": True, "embed_cls": True}, False),
        ({"block_type": "custom", "qk_norm": True}, {}, False),
        ({"ls_init_value": 0.5}, {"ls_init_value": 0.5}, True),
    ],
)
def test_fused_blocks_give_the_output_of_openclip(
    visual: dict[str, Any], text: dict[str, Any], pruned: bool
) -> None:
    sizes = {**SIZES, "vision_cfg": {**SIZES["vision_cfg"], **visual}}
    sizes["text_cfg"] = {**SIZES["text_cfg"], **text}
    kind = open_clip.CustomTextCLIP if text else open_clip.CLIP
    torch.manual_seed(1)
    theirs = with_large_weights(kind(**sizes))
    ours = kind(**sizes).eval()
    clip_blocks.use_fused_blocks(ours)
    clip_blocks.read_class_token_only(ours)
    assert isinstance(ours.visual.transformer.resblocks[-1], clip_blocks.ClassTokenBlock) == pruned
    ours.load_state_dict(theirs.state_dict())
    pixels, ids = torch.randn(3, 3, 32, 32), torch.randint(1, 49000, (3, 77))
    ids[0, 9], ids[1, 3], ids[2, 70] = 49407, 49407, 49407
    ids[0, 10:], ids[1, 4:], ids[2, 71:] = 0, 0, 0
    for inputs, name in ((pixels, "encode_image"), (ids, "encode_text")):
        found, expected = getattr(ours, name)(inputs), getattr(theirs, name)(inputs)
        if isinstance(expected, tuple):
            found, expected = found[0], expected[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        with torch.inference_mode():  # where QuickGELU works in place
            scored = getattr(ours, name)(inputs)
        scored = scored[0] if isinstance(scored, tuple) else scored
        torch.testing.assert_close(scored, expected, rtol=1e-4, atol=1e-4)
        gradients = []
        for model, out in ((ours, found), (theirs, expected)):
            out.square().mean().backward()
            gradients.append({n: p.grad for n, p in model.named_parameters()})
        for parameter, gradient in gradients[1].items():
            torch.testing.assert_close(gradients[0][parameter], gradient, rtol=1e-3, atol=1e-4)


def test_lengths_end_with_the_end_token(tiny: nn.Module, tmp_path: Path) -> None:
    encoder = clip.load_clip(NAME, str(save(tiny, "plain", tmp_path)))
    ids = encoder.tokenize([*CAPTIONS, "word " * 200])
    assert ids.shape == (3, 77)
    assert encoder.lengths(ids)[0] == 5  # start token, three words, end token
    assert encoder.lengths(ids)[2] == 77  # truncated, but with the end token
    alone = encoder.encode_text(ids[:1])
    torch.testing.assert_close(alone, encoder.encode_text(ids)[:1], rtol=0, atol=1e-6)


def test_preprocessing_is_that_of_openclip(tiny: nn.Module, tmp_path: Path) -> None:
    encoder = clip.load_clip(NAME, str(save(tiny, "plain", tmp_path)))
    _, _, theirs = open_clip.create_model_and_transforms(NAME)
    image = Image.effect_mandelbrot((90, 50), (-2, -1, 1, 1), 50).convert("RGB")
    assert torch.equal(encoder.transform(image), theirs(image))


def test_the_activation_makes_a_difference_and_is_kept(tiny: nn.Module, tmp_path: Path) -> None:
    other = NAME.removesuffix("-quickgelu")
    plain = str(save(tiny, "plain", tmp_path))
    # A plain state dict does not name its activation, so both models load it.
    quick, exact = clip.load_clip(NAME, plain), clip.load_clip(other, plain)
    ids = quick.tokenize(CAPTIONS)
    assert (quick.encode_text(ids) - exact.encode_text(ids)).abs().max() > 1e-3
    with pytest.raises(InputError, match=f"use --model {NAME}"):
        clip.load_clip(other, str(save(tiny, "archive", tmp_path)))
    with pytest.raises(InputError, match=f"was saved from {NAME}, not {other}"):
        clip.load_clip(other, str(save(tiny, "safetensors", tmp_path)))


@pytest.mark.parametrize(
    ("name", "pretrained", "expected"),
    [
        ("ViT-L-14-337-quickgelu", "openai", "nearest names are .*ViT-L-14-336-quickgelu"),
        ("ViT-L-14-336", "openai", "use --model ViT-L-14-336-quickgelu"),
        ("ViT-L-14-336-quickgelu", "laion", "the tags are openai"),
        ("ViT-B-32", "none.pt", "the tags are .*laion2b_s34b_b79k"),
    ],
)
def test_names_and_tags(name: str, pretrained: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        clip.load_clip(name, pretrained)


def test_a_file_uses_the_preprocessing_of_the_models_tags(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    assert clip_weights.way_of_the_tags("ViT-B-16-SigLIP", path)["resize_mode"] == "squash"
    assert clip_weights.way_of_the_tags("ViT-B-16-SigLIP", path)["mean"][0] == 0.5
    assert clip_weights.way_of_the_tags("ViT-L-14-336-quickgelu", path)["mean"][0] < 0.49
    with pytest.raises(InputError, match=r"tags of ViT-L-14; set --preprocess_as .*laion2b"):
        clip_weights.way_of_the_tags("ViT-L-14", path)
    with pytest.raises(InputError, match=r"'nobody' is not a tag of ViT-L-14"):
        clip_weights.tag_of("ViT-L-14", "nobody", "--preprocess_as")


def test_the_preprocessing_recorded_in_a_file_is_used(tiny: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    way = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
    facts = {ARCHITECTURE: NAME, clip_weights.PREPROCESSING: json.dumps(way)}
    save_weights(path, tiny.state_dict(), facts)
    encoder = clip.load_clip(NAME, str(path))
    image = Image.new("RGB", (90, 50), (255, 0, 255))
    assert encoder.transform(image)[:, 0, 0].tolist() == [1.0, -1.0, 1.0]
    assert json.loads(encoder.preprocessing)["resize_mode"] == "squash"
    again = clip.load_clip(NAME, str(save(tiny, "plain", tmp_path)))
    assert json.loads(again.preprocessing)["resize_mode"] == "shortest"


def test_a_tokenizer_is_pickled_by_name() -> None:
    tokenize = clip.Tokenize("ViT-B-32")
    again = pickle.loads(pickle.dumps(tokenize))  # noqa: S301, pickled here
    assert torch.equal(again(CAPTIONS), tokenize(CAPTIONS))
    assert len(pickle.dumps(tokenize)) < 200


def test_weights_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> str:
        raise RuntimeError("Failed to download file: no route\nsecond line")

    monkeypatch.setattr(open_clip, "download_pretrained", unreachable)
    with pytest.raises(InputError) as caught:
        clip.load_clip("ViT-L-14-336-quickgelu", "openai")
    message = str(caught.value)
    assert "no route" in message
    assert "second line" not in message
    assert "set --pretrained to the file" in message


def test_weights_of_another_model(tiny: nn.Module, tmp_path: Path) -> None:
    state = tiny.state_dict()
    del state["ln_final.weight"]
    torch.save(state, tmp_path / "short.pt")
    with pytest.raises(InputError, match=r"1 missing: ln_final\.weight"):
        clip.load_clip(NAME, str(tmp_path / "short.pt"))
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(InputError, match=r"text\.pt"):
        clip.load_clip(NAME, str(tmp_path / "text.pt"))


@needs_golden
def test_ids_of_the_reference() -> None:
    tokenize = clip.Tokenize("ViT-L-14-336-quickgelu")
    entries = json.loads((GOLDEN / "tokens.json").read_text())
    assert len(entries) > 10
    for entry in entries:
        assert tokenize([entry["caption"]])[0].tolist() == entry["clip_ids"]


@pytest.mark.parametrize(
    ("tokenizer", "heads", "expected"),
    [
        ("{}", 2, "the tokenizer of .* cannot be loaded: .*recreate the"),
        ('{"version": "1.', 2, "the tokenizer of .* cannot be loaded: .*recreate the"),
        (None, 3, "cannot be built: .*divisible"),
    ],
)
def test_a_damaged_folder_is_refused(
    tmp_path: Path, tokenizer: str | None, heads: int, expected: str
) -> None:
    text = {**SIZES["text_cfg"], "heads": heads, "hf_tokenizer_name": "here"}
    config = {"model_cfg": {**SIZES, "text_cfg": text}, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    if tokenizer is not None:
        (tmp_path / "tokenizer.json").write_text(tokenizer)
    with pytest.raises(InputError, match=expected):
        clip.new_clip(f"local-dir:{tmp_path}")


def test_the_tiny_names_are_registered(tiny: nn.Module) -> None:
    assert NAME in _MODEL_CONFIGS
    assert clip.reads_forward(tiny)
