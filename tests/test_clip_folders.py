"""Folders of CLIP weights: names, content, image sizes and errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.factory import load_checkpoint

from pab.core.checkpoints import save_weights
from pab.core.errors import InputError
from pab.core.weight_folders import Family, weight_folder
from pab.encoders.blip2.model import MODELS, load_blip2
from pab.encoders.blip2.vit_g import load_vit_g
from pab.encoders.clip import identity as clip_identity
from pab.encoders.clip import model as clip
from pab.encoders.clip.names import architecture

MINI = Path(__file__).resolve().parents[1] / "checkpoints/mini/clip"
CAPTIONS = ["A man in a red coat falls.", "A woman is walking her dog past a row of parked cars."]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the mini model in a folder of another name."""
    return shutil.copytree(MINI, tmp_path / "any name [v2]")


def change(folder: Path, **settings: dict[str, Any]) -> None:
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    for part, values in settings.items():
        config["model_cfg"][part] |= values
    path.write_text(json.dumps(config))


def vectors(name: str, side: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    encoder = clip.load_clip(name)
    torch.manual_seed(0)
    with torch.inference_mode():
        images = encoder.encode_image(torch.randn(2, 3, side, side))
        return images, encoder.encode_text(encoder.tokenize(CAPTIONS))


def test_a_folder_is_known_by_its_content(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = vectors(f"local-dir:{MINI}")
    (folder / "open_clip_model.safetensors").rename(folder / "weights")
    for kind in ("copied", "linked folder", "linked files"):
        place = tmp_path / kind
        if kind == "copied":
            shutil.copytree(folder, place)
        elif kind == "linked folder":
            place.symlink_to(folder)
        else:
            place.mkdir()
            for file in folder.iterdir():
                (place / file.name).symlink_to(file)
        for found, wanted in zip(vectors(f"local-dir:{place}"), expected, strict=True):
            assert torch.equal(found, wanted), kind
    # A notice, because the folder's name differs from the one recorded in the weights.
    assert "read as the model of 'linked files'" in capsys.readouterr().err


def test_another_image_size_is_resized_as_openclip_does(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(folder, vision_cfg={"image_size": 96}, text_cfg={"context_length": 40})
    encoder = clip.load_clip(f"local-dir:{folder}")
    notices = capsys.readouterr().err.splitlines()
    file = folder / "open_clip_model.safetensors"
    assert notices == [
        f"note: {file}: image positions are resized from 8 x 8 to 12 x 12",
        f"note: {file}: text positions are resized from 72 to 40",
    ]
    theirs = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    whole = {n: t.float() for n, t in clip.read_weights(
        f"local-dir:{folder}", None, architecture(f"local-dir:{folder}"), None).state.items()
    }  # fmt: skip
    torch.save(whole, folder / "float.pt")
    load_checkpoint(theirs, str(folder / "float.pt"))
    own = dict(encoder.model.state_dict())
    for name in ("visual.positional_embedding", "positional_embedding"):
        # OpenCLIP's positions are float32; ours are rounded to float16, the dtype of the file.
        torch.testing.assert_close(own[name], theirs.state_dict()[name], rtol=1e-3, atol=1e-3)
    pixels = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        found = encoder.encode_image(pixels)
        expected = theirs.eval().encode_image(pixels, normalize=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


def test_the_mini_folder_is_read_without_a_notice(capsys: pytest.CaptureFixture[str]) -> None:
    clip.load_clip(f"local-dir:{MINI}")
    assert capsys.readouterr().err == ""


def test_what_cannot_be_resized_is_refused(folder: Path) -> None:
    change(folder, vision_cfg={"width": 192})
    with pytest.raises(InputError, match=r"of another shape"):
        clip.load_clip(f"local-dir:{folder}")


def test_models_are_compared_by_configuration(folder: Path, tmp_path: Path) -> None:
    name = f"local-dir:{folder}"
    config = architecture(name)
    record = {
        clip_identity.ARCHITECTURE: "elsewhere",
        clip_identity.CONFIGURATION: json.dumps(config),
    }
    state = clip.load_clip(name).model.state_dict()
    path = tmp_path / "tuned.safetensors"
    save_weights(path, state, record)
    clip.load_clip(name, str(path))
    change(folder, vision_cfg={"image_size": 96})  # positions are resized, so the model is the same
    clip.load_clip(name, str(path))
    changed = json.loads((folder / "open_clip_config.json").read_text())
    changed["model_cfg"]["quick_gelu"] = True
    (folder / "open_clip_config.json").write_text(json.dumps(changed))
    with pytest.raises(InputError, match=r"was saved from elsewhere, .*: quick_gelu differ"):
        clip.load_clip(name, str(path))
    save_weights(path, state, {clip_identity.ARCHITECTURE: "clip"})
    with pytest.raises(InputError, match=r"from the model of a folder named 'clip', not ViT-B-32"):
        clip.load_clip("ViT-B-32", str(path), "openai")
    save_weights(path, state, {clip_identity.ARCHITECTURE: "ViT-B-32"})
    with pytest.raises(InputError, match=r"from ViT-B-32, not any name \[v2\]: embed_dim"):
        clip.load_clip(name, str(path))


def test_other_folders_are_named(tmp_path: Path, folder: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(InputError, match=r"other: expected an OpenCLIP model .*found no weights"):
        clip.load_clip(f"local-dir:{other}")
    for kind, words in (
        ({"model_type": "clip"}, "a CLIP model of transformers"),
        ({"architectures": ["BertForMaskedLM"]}, "BERT's weights"),
        ({"model_type": "blip-2"}, "a BLIP-2 model of transformers"),
        ({"model_type": "llama"}, "another model of transformers"),
    ):
        (other / "config.json").write_text(json.dumps(kind))
        with pytest.raises(InputError, match=f"expected an OpenCLIP model .*found {words}"):
            clip.load_clip(f"local-dir:{other}")
    with pytest.raises(InputError, match=r"is a folder, .*use --model local-dir:"):
        clip.load_clip(str(folder))
    with pytest.raises(
        InputError, match=r"expected a checkpoint of LAVIS or of this project, found an OpenCLIP"
    ):
        load_blip2(MODELS["mini"], folder)
    with pytest.raises(InputError, match=r"expected the folder of a BLIP-2 .*found an OpenCLIP"):
        load_vit_g(str(folder))
    with pytest.raises(InputError, match=r"found a file; use --model pretrain_vitL"):
        load_vit_g(str(folder / "open_clip_config.json"))


def test_several_files_of_weights(folder: Path) -> None:
    file = folder / "open_clip_model.safetensors"
    shutil.copy(file, folder / "a.safetensors")
    assert weight_folder(folder).weights[0] == file  # the file with the usual name is used
    file.rename(folder / "b.safetensors")
    with pytest.raises(InputError, match=r"expected one file of weights, found 2 \(a\.safetensors"):
        clip.load_clip(f"local-dir:{folder}")
    (folder / "open_clip_config.json").unlink()
    assert weight_folder(folder).family is Family.WEIGHTS


def test_a_damaged_file_with_its_usual_name_is_named(folder: Path) -> None:
    file = folder / "open_clip_model.safetensors"
    file.write_bytes(file.read_bytes()[:100_000])
    with pytest.raises(InputError, match=r"open_clip_model\.safetensors: .*found 100000 of the"):
        clip.load_clip(f"local-dir:{folder}")


def test_a_folder_with_one_blip2_checkpoint(tmp_path: Path) -> None:
    mini = MINI.parent / "blip2.safetensors"
    expected = load_blip2(MODELS["mini"], mini).state_dict()
    (tmp_path / "0a1b").symlink_to(mini)
    found = load_blip2(MODELS["mini"], tmp_path).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
