"""Tuning a small reranker on the tiny data: losses, LoRA, resume, the folder of the result."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pab.core.errors import InputError
from pab.data.annotations import retrieval_of_pairs
from pab.data.training_set import TrainingSet
from pab.encoders.st.pair_inputs import PROMPT, PairModel, read_settings
from pab.encoders.st.rerank import RerankConfig
from pab.encoders.st.tune_reranker import TrainConfig, losses, validation_candidates
from pab.training.loop import FINAL
from pab.training.resume import LAST
from pab.training.run_log import read_log
from scripts.finetune_reranker import main
from tests.vlm import small_vlm


def mined(folder: Path, *questions: tuple[str, str, str]) -> Path:
    """Write a file of questions: caption, right and wrong image."""
    path = folder / "mined.jsonl"
    lines = [{"caption": c, "image": right, "wrong": [wrong]} for c, right, wrong in questions]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class Runs:
    """Start short training runs on 24 pairs."""

    def __init__(self, data: Path, model: Path, folder: Path) -> None:
        self.data, self.model, self.folder = data, model, folder

    def argv(self, name: str, *flags: str, **settings: Any) -> list[str]:
        given = {
            "model": self.model, "data_path": self.data, "batch_size": 6, "epochs": 1,
            "output_dir": self.folder / name, "lr": 1e-3, "warmup_steps": 1, "num_workers": 0,
            "dtype": "fp32", "device": "cpu", "cache_dir": self.folder / "cache", "lora_rank": 0,
            "prompt": "Match?", **settings,
        }  # fmt: skip
        return [*flags, *(word for k, v in given.items() for word in (f"--{k}", str(v)))]

    def __call__(self, name: str, *flags: str, **settings: Any) -> Path:
        main(self.argv(name, *flags, **settings))
        return self.folder / name


@pytest.fixture
def runs(tiny_data: Path, tmp_path: Path) -> Runs:
    return Runs(tiny_data, small_vlm("reranker"), tmp_path)


def scores(folder: Path) -> Tensor:
    """Score a pair of images with the model of a folder."""
    model = PairModel.open(folder, prompt="Match?")
    images = [Image.new("RGB", (60, 80), colour) for colour in ("red", "navy")]
    with torch.inference_mode():
        return model.scores(model.inputs(["A red coat."] * 2, images))


def test_losses_are_those_of_their_definitions() -> None:
    found = torch.tensor([[2.0, -1.0, 3.0], [0.5, 0.0, -4.0]])
    pointwise = losses(found, "pointwise")["loss"]
    target = torch.tensor([[1.0, 0.0, 0.0]] * 2)
    right = F.binary_cross_entropy_with_logits(found[:, :1], target[:, :1])
    wrong = F.binary_cross_entropy_with_logits(found[:, 1:], target[:, 1:])
    torch.testing.assert_close(pointwise, (right + wrong) / 2)
    pairwise = losses(found, "pairwise")["loss"]
    chances = [torch.tensor(2.0 - x) for x in (-1.0, 3.0)] + [
        torch.tensor(0.5 - x) for x in (0.0, -4.0)
    ]
    expected = -torch.stack([torch.sigmoid(x).log() for x in chances]).mean()
    torch.testing.assert_close(pairwise, expected)
    both = losses(found, "both")
    torch.testing.assert_close(both["loss"], pointwise + pairwise)
    assert float(both["right"]) == 0.75


def test_the_tuned_folder_is_read_as_a_reranker_and_differs(runs: Runs) -> None:
    folder = runs("plain", val_pairs=6, val_candidates=4)
    assert not torch.allclose(scores(folder / "model"), scores(runs.model))
    tuned = {path.name for path in (folder / "model").iterdir()}
    assert tuned == {path.name for path in runs.model.iterdir()}
    (row,) = read_log(folder / "log.jsonl", "val")
    assert {"R@1", "mAP", "over twin"} <= row.keys()
    from sentence_transformers import CrossEncoder

    pair = ({"text": "A red coat."}, {"image": Image.new("RGB", (60, 80), "red")})
    library = CrossEncoder(str(folder / "model"), device="cpu")
    found = library.predict([pair], activation_fn=torch.nn.Identity())  # with its own instruction
    torch.testing.assert_close(torch.tensor(found), scores(folder / "model")[:1], rtol=0, atol=1e-4)
    assert read_settings(folder / "model").prompt == "Match?"
    given = {"candidates": "c.pt", "device": "cpu", "feature_cache": False}
    opened = RerankConfig(model=str(folder / "model"), **given).open_reranker()
    assert opened.model.prompt == "Match?"
    assert RerankConfig(model=str(runs.model), **given).open_reranker().model.prompt == PROMPT


def test_a_caption_and_its_twin_are_learned(runs: Runs, tmp_path: Path) -> None:
    """Both captions share two images, so a low loss needs a model that reads caption and image."""
    one, two = list(TrainingSet.open(runs.data, cache_dir=tmp_path / "cache"))[:2]
    path = mined(tmp_path, (one.caption, one.image, two.image), (two.caption, two.image, one.image))
    settings = {"batch_size": 2, "easy_negatives": 0, "epochs": 100, "save_ckpt_freq": 100}
    folder = runs("learn", pairs=path, lr=3e-3, **settings)
    rows = read_log(folder / "log.jsonl", "train")
    assert rows[-1]["loss"] < 0.1 < 1.0 < rows[0]["loss"]
    assert rows[-1]["right"] == 1.0


@pytest.mark.parametrize("flags", [(), ("--dora",), ("--freeze", "vision")])
def test_low_rank_updates_are_merged_into_the_folder(runs: Runs, flags: tuple[str, ...]) -> None:
    folder = runs("lora", *flags, lora_rank=4, loss="pairwise")
    from safetensors.torch import load_file

    before, after = (
        load_file(path / "model.safetensors") for path in (runs.model, folder / "model")
    )
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("language_model" in name and "q_proj" in name for name in changed)
    assert any("visual" in name for name in changed) == ("vision" not in flags)
    assert not any("embed" in name or "norm" in name for name in changed)


def test_weights_in_a_subfolder_are_replaced_there(runs: Runs, tmp_path: Path) -> None:
    """In a folder of sentence-transformers, every module may have a subfolder."""
    source = tmp_path / "source"
    shutil.copytree(runs.model, source / "0_Transformer")
    shutil.move(source / "0_Transformer/1_LogitScore", source)
    modules = json.loads((source / "0_Transformer/modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (source / "modules.json").write_text(json.dumps(modules))
    assert torch.equal(scores(source), scores(runs.model))
    tuned = runs("subfolder", model=source) / "model"
    assert not (tuned / "model.safetensors").exists()
    assert not torch.equal(scores(tuned), scores(source))


def test_adapters_are_refused(runs: Runs, tmp_path: Path) -> None:
    base = {"base_model_name_or_path": str(runs.model)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(base))
    with pytest.raises(InputError, match="expected a full model, found only adapters"):
        main(runs.argv("adapters", model=tmp_path))


def test_a_stopped_run_resumes_exactly(runs: Runs) -> None:
    settings: dict[str, Any] = {"epochs": 2, "lora_rank": 4, "ema_decay": 0.9, "val_pairs": 4}
    whole = runs("whole", **settings)
    runs("parts", max_steps=2, **settings)
    assert not (runs.folder / "parts/model").exists()
    runs("parts", max_steps=4, **settings)
    parts = runs("parts", **settings)
    assert (whole / FINAL).read_bytes() == (parts / FINAL).read_bytes()
    name = "model/model.safetensors"
    assert (whole / name).read_bytes() == (parts / name).read_bytes()


def test_accumulated_batches_equal_one_large_batch(runs: Runs) -> None:
    one = runs("one", batch_size=8, clip_grad="none", max_steps=1)
    two = runs("two", batch_size=4, update_freq=2, clip_grad="none", max_steps=1)
    first, second = (read_log(folder / "log.jsonl", "train")[0] for folder in (one, two))
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
    assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-4)


def test_mined_questions_are_the_training_data(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = TrainingSet.open(runs.data, cache_dir=tmp_path / "cache")
    path = mined(tmp_path, *((p.caption, p.image, f"train/{p.hard_i}") for p in list(pairs)[:12]))
    folder = runs("mined", pairs=path)
    assert len(read_log(folder / "log.jsonl", "train")) == 2  # 12 questions in batches of 6
    assert "training questions: 12, validation pairs: 0, steps: 2" in capsys.readouterr().err
    path.write_text(path.read_text().replace("walking", "running"))
    with pytest.raises(InputError, match="pairs \\(was SHA-256"):
        runs("mined", pairs=path)


def test_each_validation_caption_is_compared_with_its_twin(runs: Runs, tmp_path: Path) -> None:
    pairs = TrainingSet.open(runs.data, cache_dir=tmp_path / "cache")
    retrieval = retrieval_of_pairs(list(pairs)[:10], pairs.root)
    assert retrieval.gallery is not None
    assert retrieval.relevant is not None
    found = validation_candidates(retrieval, 4, seed=0)
    assert found.shape == (10, 4)
    ids = [image.gallery_id for image in retrieval.gallery]
    for query, row in zip(retrieval.queries, found.tolist(), strict=True):
        named = [ids[i] for i in row]
        assert named[0] in retrieval.relevant[query.query_id]
        assert len(set(named)) == 4
        twin = retrieval.twins.get(query.query_id)
        assert twin is None or named[1] == twin
    assert torch.equal(found, validation_candidates(retrieval, 4, seed=0))


@pytest.mark.parametrize(
    ("flags", "settings", "message"),
    [
        ((), {"easy_negatives": 0, "hard_negatives": 0}, "--easy_negatives"),
        (("--dora",), {}, "--dora"),
        ((), {"weights": "bf16"}, "--weights"),
        ((), {"twin_batches_from": 1}, "--twin_batches_from"),
        ((), {"easy_negatives": 30}, "--easy_negatives"),
        ((), {"pairs": "missing.jsonl"}, "missing.jsonl"),
        ((), {"model": "/nowhere/model"}, "--model"),
        ((), {"min_lr": 1.0}, "--lr"),
    ],
)
def test_bad_settings_give_one_line(
    runs: Runs, refused: Callable[..., str], flags: tuple[str, ...], settings: dict[str, Any],
    message: str,
) -> None:  # fmt: skip
    assert message in refused(main, runs.argv("bad", *flags, **settings))
    assert not (runs.folder / "bad" / LAST).exists()


def test_an_image_that_the_processor_rejects_is_named(
    runs: Runs, tmp_path: Path, data_copy: Path
) -> None:
    one, two = list(TrainingSet.open(data_copy, cache_dir=tmp_path / "cache"))[:2]
    Image.new("RGB", (1000, 2)).save(data_copy / two.image)
    path = mined(tmp_path, *((one.caption, one.image, two.image),) * 6)
    with pytest.raises(InputError, match="aspect ratio") as error:
        runs("bad", pairs=path, data_path=data_copy, easy_negatives=0)
    assert two.image in str(error.value)


def test_missing_images_of_mined_questions_are_counted(
    runs: Runs, refused: Callable[..., str], tmp_path: Path
) -> None:
    path = mined(tmp_path, ("A man.", "a.jpg", "b.jpg"))
    said = refused(main, runs.argv("bad", pairs=path))
    assert "images missing under " in said
    assert ": 2 of 2; set --data_path" in said


def test_missing_twins_are_counted_if_they_are_used(
    runs: Runs, refused: Callable[..., str], data_copy: Path, tmp_path: Path
) -> None:
    for path in sorted((data_copy / "annotation/train").glob("*.json")):
        path.write_text(path.read_text().replace('"hard_i": "', '"hard_i": "none/'))
    given = {"data_path": data_copy, "cache_dir": tmp_path / "new", "max_steps": 1}
    said = refused(main, runs.argv("bad", **given))
    assert "images missing under " in said
    assert ": 24 of 24; " in said
    assert "set --hard_negatives 0" in said
    runs("easy", **given, hard_negatives=0)


def test_the_defaults_are_valid() -> None:
    TrainConfig().check()
