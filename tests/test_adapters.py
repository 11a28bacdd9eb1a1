"""Adapters are merged when weights are read, and therefore in exported files."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip import CLIP
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from pab.core.adapters import alpha_of, merged
from pab.core.checkpoints import TrainingState, load_strict, read_checkpoint, save_training_state
from pab.core.errors import InputError
from pab.core.state_dicts import model_state
from pab.encoders.blip2.model import MODELS, Blip2, load_blip2
from pab.encoders.clip.model import load_clip
from pab.encoders.tuning import merged_state, with_lora
from pab.export_weights import main
from pab.training.loop import FINAL, LAST
from tests import test_finetune_encoders as encoders

clip_folder = encoders.clip_folder  # pytest finds the fixture under this name
ALPHA = 6
SIZES: dict[str, Any] = {
    "embed_dim": 16, "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 40, "vocab_size": 300, "width": 32, "heads": 2, "layers": 2},
}  # fmt: skip


def trained(model: nn.Module, scale: nn.Parameter) -> nn.Module:
    """Add adapters with random weights; untrained adapters would change nothing."""
    wrapped = with_lora(model, 2, ALPHA, also=[scale])
    for name, parameter in wrapped.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    return wrapped


@pytest.fixture(scope="module")
def clip() -> nn.Module:
    torch.manual_seed(0)
    model = CLIP(**SIZES)
    return trained(model, model.logit_scale)


@pytest.fixture(scope="module")
def blip2() -> nn.Module:
    torch.manual_seed(0)
    model = Blip2(MODELS["mini"])
    return trained(model, model.temp)


def run_state(path: Path, model: nn.Module, **settings: Any) -> Path:
    """Write the training state of a run with adapters; return its path."""
    state = TrainingState(
        model=model.state_dict(), optimizer={}, step=3, epoch=0, step_in_epoch=3, rng=[],
        config={"lora_rank": 2, "lora_alpha": ALPHA, **settings},
    )  # fmt: skip
    save_training_state(path, state)
    return path


def equal(left: dict[str, Tensor], right: Any) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


@pytest.mark.parametrize("kind", ["clip", "blip2"])
def test_a_training_state_is_read_with_merged_adapters(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = request.getfixturevalue(kind)
    path = run_state(tmp_path / "checkpoint-last.pth", model)
    found = model_state(read_checkpoint(path), path)
    assert equal(found, merged_state(model))
    assert capsys.readouterr().err.count("LoRA adapters are merged into the weights") == 1


@pytest.mark.parametrize("extension", ["safetensors", "pth"])
def test_exported_weights_load_strictly_and_give_the_same_vectors(
    clip: nn.Module, tmp_path: Path, extension: str
) -> None:
    out = tmp_path / f"out.{extension}"
    main([str(run_state(tmp_path / "last.pth", clip)), "--out", str(out)])
    again = CLIP(**SIZES).eval()
    load_strict(again, model_state(read_checkpoint(out), out), out)
    pixels, ids = torch.randn(2, 3, 32, 32), torch.randint(1, 300, (2, 40))
    clip.eval()
    with torch.inference_mode():
        for inputs, name in ((pixels, "encode_image"), (ids, "encode_text")):
            found, expected = getattr(again, name)(inputs), getattr(clip, name)(inputs)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_blip2_loads_a_training_state_with_merged_adapters(
    blip2: nn.Module, tmp_path: Path
) -> None:
    model = load_blip2(MODELS["mini"], run_state(tmp_path / "last.pth", blip2))
    assert equal(dict(model.state_dict()), merged_state(blip2))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_adapters_are_merged_as_in_peft(
    tmp_path: Path, dora: bool, dtype: torch.dtype, prefix: str
) -> None:
    torch.manual_seed(1)
    plain = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).to(dtype)
    wrapped = get_peft_model(
        plain, LoraConfig(r=2, lora_alpha=ALPHA, target_modules=["0", "2"], use_dora=dora)
    )
    for name, parameter in wrapped.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, mean=0.3 * ("magnitude" in name), std=0.3)
    state = {prefix + name: t.clone() for name, t in wrapped.state_dict().items()}
    path = tmp_path / "w.pth"
    torch.save({"state_dict": state, "args": argparse.Namespace(lora_alpha=str(ALPHA))}, path)
    found = model_state(read_checkpoint(path), path)
    expected = copy.deepcopy(wrapped).merge_and_unload().state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == dtype
        tolerance = 0.02 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance)


WEIGHT = {"fc.weight": torch.ones(3, 4), "fc.bias": torch.ones(3)}
LORA = {"fc.lora_A.default.weight": torch.ones(2, 4), "fc.lora_B.default.weight": torch.ones(3, 2)}


@pytest.mark.parametrize(
    ("state", "alpha", "words"),
    [
        (WEIGHT | LORA, None, "not lora_alpha, which scales .*; merge them"),
        (LORA, 4.0, "adapter of 'fc': holds an adapter without the weight .*; pass merged weights"),
        (WEIGHT | {"fc.lora_A.weight": torch.ones(2, 4)}, 4.0, "adapter of 'fc'"),
        (WEIGHT | LORA | {"fc.lora_embedding_A": torch.ones(2)}, 4.0, "of an unsupported kind"),
        (WEIGHT | {"fc.modules_to_save.default.weight": torch.ones(3)}, 4.0, "of an unsupported"),
        (WEIGHT | LORA | {"fc.lora_B.other.weight": torch.ones(3, 2)}, 4.0, "2 sets of adapters"),
        ({**WEIGHT, "fc.weight": torch.ones(4, 3)} | LORA, 4.0, "adapter of 'fc'"),
    ],
)
def test_unmergeable_adapters_are_refused_and_never_exported(
    tmp_path: Path, state: dict[str, Tensor], alpha: float | None, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        merged(state, alpha, "f")
    source, out = tmp_path / "in.pth", tmp_path / "out.safetensors"
    settings = {} if alpha is None else {"lora_alpha": alpha}
    torch.save({"model": state, "config": settings}, source)
    with pytest.raises(InputError, match=words):
        main([str(source), "--out", str(out)])
    assert not out.exists()


@pytest.mark.parametrize("kind", ["clip", "blip2"])
def test_the_last_training_state_loads_as_the_final_weights(
    tiny_data: Path,
    clip_folder: str,
    tmp_path: Path,
    kind: str,
) -> None:
    runs = encoders.Runs(tiny_data, clip_folder, tmp_path)
    tuned = runs(kind, "tuned", lora_rank=2, lr=1e-2, epochs=1)
    states = []
    for name in (LAST, FINAL):
        path = tuned / name
        model = (
            load_clip(str(runs.own["clip"]["model"]), str(path)).model
            if kind == "clip"
            else load_blip2(MODELS["mini"], path)
        )
        states.append(dict(model.state_dict()))
    assert equal(*states)


@pytest.mark.parametrize("value", [None, "many", [1]])
def test_an_alpha_that_is_not_a_number_is_read_as_none(value: object) -> None:
    assert alpha_of({"config": {"lora_alpha": value}}) is None
