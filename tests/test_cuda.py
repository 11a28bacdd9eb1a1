"""Training steps and scoring of all four models on a GPU, compared with the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lhp.infer import main as lhp_infer
from lhp.train import main as lhp_train
from pab.scores import load_scores
from pab.training.run_log import read_log
from scripts import blip2_infer, clip_infer, finetune_blip2, finetune_clip
from tests.conftest import MODEL
from uit.infer import main as uit_infer
from uit.train import main as uit_train

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
ROOT = Path(__file__).resolve().parents[1]
MINI = ROOT / "checkpoints/mini"
Main = Callable[[list[str]], None]
UIT = {"model": "uit_mini", "input_size": 64, "window": 4, "text_encoder": MINI / "bert",
       "max_words": 72, "max_text_length": 72}  # fmt: skip
CLIP = {"model": f"local-dir:{MINI / 'clip'}"}
BLIP2 = {"model": "mini", "text_encoder": MINI / "bert"}


def argv(settings: dict[str, Any]) -> list[str]:
    words: list[str] = []
    for key, value in settings.items():
        words += [f"--no_{key}"] if value is False else [f"--{key}", str(value)]
    return words


def trained(main: Main, data: Path, out: Path, device: str, **settings: Any) -> list[float]:
    """Train for four steps in float32, and return the losses."""
    main(argv({
        "data_path": data, "output_dir": out, "device": device, "dtype": "fp32", "batch_size": 6,
        "epochs": 1, "num_workers": 0, "lr": 1e-4, "cache_dir": out.parent / "cache", **settings,
    }))  # fmt: skip
    return [row["loss"] for row in read_log(out / "log.jsonl", "train")]


@pytest.mark.parametrize(
    ("main", "settings"),
    [
        (lhp_train, {"model": MODEL, "input_size": 64, "drop_path": 0.0, "warmup_steps": 0,
                     "sentencepiece_model": MINI / "lhp.spm", "max_text_length": 62}),
        (uit_train, {**UIT, "drop_path": 0.0, "dropout": 0.0, "proj_dropout": 0.0, "mim_block": 16,
                     "mlm_weight": 0.0, "synonyms": False, "schedule": "linear", "warmup_steps": 1,
                     "checkpoint": MINI / "uit.safetensors"}),
        (finetune_clip.main, {**CLIP, "pretrained": "random", "warmup_steps": 0}),
        (finetune_blip2.main, {**BLIP2, "pretrained": "random", "warmup_steps": 0,
                               "freeze": "image"}),
    ],
    ids=["lhp", "uit", "clip", "blip2"],
)  # fmt: skip
def test_training_steps(
    main: Main, settings: dict[str, Any], tiny_data: Path, tmp_path: Path
) -> None:
    cpu = trained(main, tiny_data, tmp_path / "cpu", "cpu", **settings)
    gpu = trained(main, tiny_data, tmp_path / "gpu", "cuda", **settings)
    assert len(cpu) == len(gpu) == 4
    # BLIP-2's dropout drops different units on a GPU, so its losses agree only roughly.
    assert gpu == pytest.approx(cpu, rel=0.2 if main is finetune_blip2.main else 1e-2)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("main", "settings"),
    [
        (lhp_infer, {"model": "beit3_mini_patch8_64", "checkpoint": MINI / "lhp.safetensors",
                     "tokenizer": MINI / "lhp.spm"}),
        (uit_infer, {**UIT, "checkpoint": MINI / "uit.safetensors", "k_test": 10}),
        (clip_infer.main, CLIP),
        (blip2_infer.main, BLIP2),
    ],
    ids=["lhp", "uit", "clip", "blip2"],
)  # fmt: skip
def test_scoring(
    main: Main, settings: dict[str, Any], dtype: str, tiny_data: Path, tmp_path: Path
) -> None:
    masked = tiny_data / "name-masked_test-set"
    found = {}
    for device, format_ in (("cpu", "fp32"), ("cuda", dtype)):
        out = tmp_path / f"{device}.pt"
        main(argv({
            "image_folder": masked / "gallery", "annotation": masked / "query.json",
            "save_score": out, "output_file": out.with_suffix(".txt"), "device": device,
            "dtype": format_, "num_workers": 0, **settings,
        }))  # fmt: skip
        found[device] = load_scores(out).scores
    spread = float(found["cpu"].std())
    bound = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 1e-1}[dtype] * spread
    torch.testing.assert_close(found["cuda"], found["cpu"], atol=bound, rtol=0)
