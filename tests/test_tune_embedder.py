"""Tuning a small late-interaction embedder on the tiny data, and the reranker made from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from pab.core.errors import InputError
from pab.data.images import load_image
from pab.encoders.st import tune_embedder
from pab.encoders.st.make_small import SmallConfig, make_small
from pab.encoders.st.pair_inputs import PairModel
from pab.encoders.st.tune_embedder import TrainConfig, mean_maxsim, open_embedder
from pab.training.data import validation_retrieval
from pab.training.loop import FINAL
from pab.training.run_log import read_log
from pab.training.setup import set_up
from scripts.finetune_embedder import main
from tests.vlm import images_of_many_sizes, small_vlm


@pytest.fixture(scope="module")
def late() -> Path:
    """Return the folder of a small, untrained late-interaction model."""
    return small_vlm("late")


def run(data: Path, model: Path, folder: Path, **settings: Any) -> Path:
    given = {
        "model": model, "data_path": data, "batch_size": 8, "epochs": 1, "output_dir": folder,
        "lr": 1e-3, "warmup_steps": 1, "num_workers": 0, "dtype": "fp32", "device": "cpu",
        "cache_dir": folder.parent / "cache", **settings,
    }  # fmt: skip
    main([word for k, v in given.items() for word in (f"--{k}", str(v))])
    return folder


def test_mean_maxsim_is_that_of_single_pairs() -> None:
    draw = torch.Generator().manual_seed(0)
    texts = [F.normalize(torch.randn(n, 8, generator=draw), dim=-1) for n in (3, 1, 5)]
    images = [F.normalize(torch.randn(n, 8, generator=draw), dim=-1) for n in (4, 2)]
    expected = torch.stack([
        torch.stack([(text @ image.T).amax(dim=1).mean() for image in images]) for text in texts
    ])  # fmt: skip

    def padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        length = max(map(len, rows))
        full = [F.pad(row, (0, 0, length - len(row), 0), value=0.9) for row in rows]
        mask = [torch.arange(length) >= length - len(row) for row in rows]
        return torch.stack(full), torch.stack(mask)

    torch.testing.assert_close(mean_maxsim(*padded(texts), *padded(images)), expected)


def test_the_loss_decreases_and_the_folder_is_read(
    tiny_data: Path, late: Path, tmp_path: Path
) -> None:
    folder = run(
        tiny_data, late, tmp_path / "run", epochs=15, lr=3e-3, val_pairs=6, save_ckpt_freq=15,
        crop_prob=0.5,
    )  # fmt: skip
    found = [row["loss"] for row in read_log(folder / "log.jsonl", "train")]
    assert sum(found[-4:]) / 4 < 0.8 * found[0]
    from sentence_transformers import MultiVectorEncoder

    captions = [{"text": "A man in a red coat is walking."}]
    before, after = (
        MultiVectorEncoder(str(path), device="cpu").encode_query(captions)[0]
        for path in (late, folder / "model")
    )
    assert before.shape == after.shape
    assert not torch.allclose(torch.as_tensor(before), torch.as_tensor(after))


def test_validation_scores_are_those_of_the_loss(
    tiny_data: Path, late: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[torch.Tensor] = []

    def metrics(retrieval: Any, scores: torch.Tensor) -> dict[str, float]:
        seen.append(scores)
        return {"R@1": 0.0, "mAP": 0.0}

    monkeypatch.setattr(tune_embedder, "retrieval_metrics", metrics)
    config = TrainConfig(
        model=str(late), data_path=str(tiny_data), val_pairs=5, batch_size=2, device="cpu",
        dtype="fp32", num_workers=0, output_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    setup = set_up(config, "test", {})
    model = open_embedder(config, late)
    with torch.no_grad():
        tune_embedder.validation_metrics(model, setup)
        retrieval = validation_retrieval(setup.data)
        assert retrieval.gallery is not None
        texts = model.vectors(model.captions([q.caption for q in retrieval.queries]), "query")
        pictures = [load_image(image.path) for image in retrieval.gallery]
        images = model.vectors(model.images(pictures), "document")
    torch.testing.assert_close(seen[0], mean_maxsim(*texts, *images))


def test_training_uses_the_instructions_of_scoring(late: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(late, tmp_path / "model"))
    path = folder / "config_sentence_transformers.json"
    prompts = {"query": "Find the person: ", "passage": "A photo: ", "document": "An image: "}
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "prompts": prompts}))
    model = open_embedder(TrainConfig(), folder)
    images = images_of_many_sizes(2)
    with torch.inference_mode():
        vectors, mask = model.vectors(model.captions(["A man."]), "query")
        expected = model.encoder.encode_query([{"text": "A man."}])[0]
        torch.testing.assert_close(vectors[0][mask[0]], torch.as_tensor(expected))
        vectors, mask = model.vectors(model.images(images), "document")
        for row, image in enumerate(images):
            expected = model.encoder.encode_document([{"image": image}])[0]
            found = vectors[row][mask[row]]
            torch.testing.assert_close(found, torch.as_tensor(expected), atol=1e-5, rtol=0)


def test_other_and_damaged_models_are_refused(late: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a late-interaction model, found a reranker"):
        open_embedder(TrainConfig(), small_vlm("reranker"))
    folder = Path(shutil.copytree(late, tmp_path / "model"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match=f"{folder}: the model cannot be loaded"):
        open_embedder(TrainConfig(), folder)


def test_a_stopped_run_resumes_exactly(tiny_data: Path, late: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"epochs": 2, "ema_decay": 0.9, "twin_batches_from": 1}
    whole = run(tiny_data, late, tmp_path / "whole", **settings)
    for stop in (2, 4, 0):
        parts = run(tiny_data, late, tmp_path / "parts", max_steps=stop, **settings)
    for name in (FINAL, "model/model.safetensors", "model/1_Dense/model.safetensors"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()


def test_a_damaged_start_is_refused(late: Path, tmp_path: Path) -> None:
    start = Path(shutil.copytree(late, tmp_path / "start"))
    (start / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match=f"{start}: the model cannot be loaded"):
        make_small(SmallConfig(out=str(tmp_path / "out"), start=str(start)), [])


def test_a_failed_write_leaves_no_folder(
    late: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from sentence_transformers import MultiVectorEncoder

    def half_written(model: Any, folder: str) -> None:
        Path(folder).mkdir()
        (Path(folder) / "modules.json").write_text("[]")
        raise OSError("disk full")

    monkeypatch.setattr(MultiVectorEncoder, "save", half_written)
    out = tmp_path / "new" / "out"
    with pytest.raises(InputError, match=f"{out}: cannot be written: disk full"):
        make_small(SmallConfig(kind="late", out=str(out), start=str(late)), [])
    assert not list(out.parent.iterdir())


def test_a_reranker_starts_from_an_embedder(late: Path, tmp_path: Path) -> None:
    out = tmp_path / "reranker"
    count = make_small(SmallConfig(kind="reranker", out=str(out), start=str(late)), [])
    model = PairModel.open(out)
    state = model.model.state_dict()
    assert count == sum(p.numel() for p in model.model.parameters())
    from safetensors.torch import load_file

    kept = load_file(late / "model.safetensors")
    assert kept
    for name, value in kept.items():
        assert torch.equal(state[f"model.{name.removeprefix('model.')}"], value), name
