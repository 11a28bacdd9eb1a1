"""Foreign checkpoints of UIT: parts that scoring does not read, and CMP's pose branch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pab.core.errors import InputError
from pab.data.wordpiece import Tokenizer
from uit.encode import load_model
from uit.make_vocabulary import make_vocabulary
from uit.model import Uit, model_config
from uit.weights import load_bert, load_swin, load_uit, start_weights

# CMP's names: an attention over image and pose tokens, and convolutions before the image encoder.
POSE = {
    "pose_block.norm.weight": (16,), "pose_block.attn.qkv.weight": (48, 16),
    "pose_conv.expand.0.weight": (96, 3, 3, 3), "pose_conv.expand.1.running_mean": (96,),
    "pose_conv.expand.1.num_batches_tracked": (),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("bert")
    lines = (tiny_data / "annotation/train/pair_0.json").read_text().splitlines()
    make_vocabulary([json.loads(line)["caption"] for line in lines], folder, 200)
    return Tokenizer(folder, 20, 20)


def small_model(tokenizer: Tokenizer, size: int = 32, window: int = 4) -> Uit:
    sizes = model_config("uit_debug", size, window)
    bert = dataclasses.replace(sizes.bert, vocab_size=tokenizer.vocab_size)
    return Uit(dataclasses.replace(sizes, bert=bert))


def cmp_state(model: Uit) -> dict[str, Tensor]:
    """Return a state as CMP saves it: without MIM, with a pose branch and a tied matrix twice."""
    state = {n: t for n, t in model.state_dict().items() if not n.startswith("simmim.")}
    words = state["text_encoder.bert.embeddings.word_embeddings.weight"]
    state["text_encoder.cls.predictions.decoder.weight"] = words
    state["text_encoder.bert.embeddings.position_ids"] = torch.arange(64)[None]
    return state | {name: torch.ones(shape) for name, shape in POSE.items()}


@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_cmp_scores_without_its_pose_branch(
    tokenizer: Tokenizer, tmp_path: Path, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(1)
    theirs, path = small_model(tokenizer).eval(), tmp_path / "cmp.pth"
    torch.save({"model": {prefix + n: t for n, t in cmp_state(theirs).items()}}, path)
    ours = load_model("uit_debug", 32, 4, str(path), tokenizer)
    image = torch.randn(2, 3, 32, 32)
    ids, mask = tokenizer.pad_rows([tokenizer.encode("a man in a red coat"), [2, 3]], 20)
    with torch.inference_mode():
        tokens = theirs.vision_encoder(image)
        assert torch.equal(ours.vision_encoder(image), tokens)
        assert torch.equal(ours.image_vector(tokens), theirs.image_vector(tokens))
        text = theirs.text_encoder.encode_text(ids, mask)
        assert torch.equal(ours.text_encoder.encode_text(ids, mask), text)
    missing, pose = capsys.readouterr().err.splitlines()
    assert missing.startswith(f"note: {path}: lacks parts that scoring does not use: ")
    assert missing.endswith("tensors (simmim)")
    assert pose == (
        f"note: {path}: CMP's pose branch is ignored, so images are encoded without poses: "
        "5 tensors (pose_block, pose_conv)"
    )


def test_training_starts_from_cmp(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, path = small_model(tokenizer), tmp_path / "cmp.pth"
    torch.save({"model": cmp_state(theirs)}, path)
    ours = small_model(tokenizer)
    start_weights(ours, checkpoint=str(path), swin="", bert="")
    for name, tensor in theirs.state_dict().items():
        same = torch.equal(ours.state_dict()[name], tensor)
        assert same or name.startswith("simmim."), name
    initialized, left = capsys.readouterr().err.splitlines()
    assert "newly initialized: " in initialized
    assert "simmim.decoder" in initialized
    assert "left out: 5 tensors (pose_block.attn, pose_block.norm, pose_conv.expand)" in left


def test_scoring_needs_what_it_reads(tokenizer: Tokenizer, tmp_path: Path) -> None:
    theirs, path = small_model(tokenizer), tmp_path / "uit.pth"
    for name in ("itm_head.0.weight", "vision_proj.2.weight", "vision_encoder.norm.weight"):
        state = theirs.state_dict()
        del state[name]
        torch.save({"model": state}, path)
        with pytest.raises(InputError, match=f"1 missing: {name}"):
            load_uit(small_model(tokenizer), path)
    torch.save({"model": {**theirs.state_dict(), "local_weight_text": torch.ones(77)}}, path)
    with pytest.raises(InputError, match=r"1 unexpected: local_weight_text"):
        load_uit(small_model(tokenizer), path)


def test_another_window_size_is_reported_once(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small, path = small_model(tokenizer), tmp_path / "small.pth"
    torch.save({"model": small.state_dict()}, path)
    load_uit(small_model(tokenizer, 64, 8), path)
    line = "relative position biases are resized from windows of 4 x 4 to 8 x 8 tokens"
    assert capsys.readouterr().err == f"note: {path}: {line}\n"


def test_towers_from_wrapped_files_and_renamed_folders(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    theirs = small_model(tokenizer)
    swin = {f"module.model.{n}": t for n, t in theirs.vision_encoder.state_dict().items()}
    torch.save({"state_dict": {**swin, "module.model.head.weight": torch.ones(3, 3)}},
               tmp_path / "swin.pth")  # fmt: skip
    bert = {f"_orig_mod.{n}": t for n, t in theirs.text_encoder.bert.state_dict().items()}
    folder = tmp_path / "any name"
    folder.mkdir()
    torch.save(bert, tmp_path / "blob")
    (folder / "weights of bert").symlink_to(tmp_path / "blob")
    (folder / "config.json").write_text('{"model_type": "bert"}')
    ours = small_model(tokenizer)
    load_swin(ours, tmp_path / "swin.pth")
    load_bert(ours, folder)
    for tower in ("vision_encoder", "text_encoder.bert"):
        found = ours.get_submodule(tower).state_dict()
        for name, tensor in theirs.get_submodule(tower).state_dict().items():
            assert torch.equal(found[name], tensor), name
    (folder / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(InputError, match=r"expected BERT's weights .*found a CLIP model of transf"):
        load_bert(ours, folder)
