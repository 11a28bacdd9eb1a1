"""Training and scoring of the four models on a GPU, compared with the CPU and with other runs.

Most tests also run with the CPU as their device, which checks the tests without a GPU. Float32
products have full precision on a GPU too, because TF32 is off unless `--tf32` is set.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import uit.train
from lhp.beit3 import Beit3Retrieval
from lhp.infer import main as lhp_infer
from lhp.train import main as lhp_train
from pab.core.checkpoints import load_training_state, model_state, read_checkpoint
from pab.core.precision import numerics
from pab.scores import load_scores
from pab.training.loop import FINAL
from pab.training.resume import LAST
from pab.training.run_log import read_log
from scripts import blip2_infer, clip_infer, finetune_blip2, finetune_clip
from tests.conftest import MODEL
from tests.recipe_memory import GIB, peak_memory, recipe_step, take_step
from tests.test_contrastive import whole_and_chunked
from uit.infer import main as uit_infer

ROOT = Path(__file__).resolve().parents[1]
MINI = ROOT / "checkpoints/mini"
Main = Callable[[list[str]], None]
GPUS = torch.cuda.device_count()
LR = 1e-4


def on_gpu(*values: object, gpus: int = 1) -> Any:
    """Return the parameters of a test case that needs GPUs."""
    reason = f"needs {gpus} CUDA GPU" + "s" * (gpus > 1)
    return pytest.param(
        *values, marks=[pytest.mark.cuda, pytest.mark.skipif(gpus > GPUS, reason=reason)]
    )


# cuBLAS reads this when CUDA starts; `--deterministic` needs it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
devices = pytest.mark.parametrize("device", ["cpu", on_gpu("cuda")])

UIT = {"model": "uit_mini", "input_size": 64, "window": 4, "text_encoder": MINI / "bert",
       "max_words": 72, "max_text_length": 72}  # fmt: skip
CLIP = {"model": f"local-dir:{MINI / 'clip'}"}
BLIP2 = {"model": "mini", "text_encoder": MINI / "bert"}
LHP_TRAINING = {"model": MODEL, "input_size": 64, "warmup_steps": 0, "max_text_length": 62,
                "sentencepiece_model": MINI / "lhp.spm"}  # fmt: skip
UIT_TRAINING = {**UIT, "mim_block": 16, "synonyms": False, "schedule": "linear", "warmup_steps": 1,
                "checkpoint": MINI / "uit.safetensors"}  # fmt: skip
# Dropout and drop path are off, because each kind of device draws other random numbers.
RECIPES: dict[str, tuple[Main, dict[str, Any]]] = {
    "lhp": (lhp_train, {**LHP_TRAINING, "drop_path": 0.0}),
    "uit": (
        uit.train.main, {**UIT_TRAINING, "drop_path": 0.0, "dropout": 0.0, "proj_dropout": 0.0},
    ),
    "clip": (finetune_clip.main, {**CLIP, "pretrained": "random", "warmup_steps": 0}),
    "blip2": (
        finetune_blip2.main,
        {**BLIP2, "pretrained": "random", "warmup_steps": 0, "freeze": "image", "dropout": 0.0},
    ),
}  # fmt: skip
of_recipes = pytest.mark.parametrize("recipe", RECIPES)


def argv(settings: dict[str, Any]) -> list[str]:
    words: list[str] = []
    for key, value in settings.items():
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no_'}{key}")
        else:
            words += [f"--{key}", str(value)]
    return words


def train(main: Main, data: Path, out: Path, device: str, **settings: Any) -> list[float]:
    """Train, by default for one epoch of four steps in float32, and return the losses."""
    main(argv({
        "data_path": data, "output_dir": out, "device": device, "dtype": "fp32", "batch_size": 6,
        "epochs": 1, "num_workers": 0, "lr": LR, "cache_dir": out.parent / "cache", **settings,
    }))  # fmt: skip
    return losses(out)


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_log(folder / "log.jsonl", "train")]


def weights(folder: Path) -> dict[str, Tensor]:
    return model_state(read_checkpoint(folder / FINAL), folder / FINAL)


def first_allowed(weights: Tensor) -> Tensor:
    """Choose UIT's negatives without randomness: the first column with a positive weight."""
    order = torch.arange(weights.shape[1], 0, -1, device=weights.device)
    return ((weights > 0) * order).argmax(dim=1)


# ---- Training


@devices
@of_recipes
def test_training_steps_are_those_of_the_cpu(
    recipe: str, device: str, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uit.train, "draw_negatives", first_allowed)
    main, settings = RECIPES[recipe]
    expected = train(main, tiny_data, tmp_path / "expected", "cpu", **settings)
    found = train(main, tiny_data, tmp_path / "found", device, **settings)
    assert len(found) == len(expected) == 4
    # Summing in another order has the effect of relative noise of 1e-6 in the weights, which
    # changes these losses by at most 6e-6 (measured on a CPU). Noise as large as TF32's rounding
    # changes at least one loss of each recipe by 1.3e-4 or more.
    assert found == pytest.approx(expected, rel=5e-5)


@of_recipes
@pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", "bf16"), on_gpu("cuda", "bf16"), on_gpu("cuda", "fp16")]
)
def test_training_in_16_bits_is_near_float32(
    recipe: str, device: str, dtype: str, tiny_data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(uit.train, "draw_negatives", first_allowed)
    main, settings = RECIPES[recipe]
    settings = {**settings, "epochs": 3}
    expected = train(main, tiny_data, tmp_path / "fp32", device, **settings)
    found = train(main, tiny_data, tmp_path / "half", device, **settings, dtype=dtype)
    assert all(map(math.isfinite, found))
    # In bf16 on a CPU, the largest difference is 0.004. In fp16, rounding errors are smaller, but
    # after a step that the loss scaler skips, the weights are one update behind.
    assert found == pytest.approx(expected, rel=0.01 if dtype == "bf16" else 0.05)
    state = load_training_state(tmp_path / "half" / LAST)
    skipped = state.skipped["total"]
    assert skipped < state.step == len(expected)
    if dtype == "fp16":  # the scaler halves its scale at each skipped step
        assert state.scaler["scale"] == 2.0 ** (16 - skipped)
    else:
        assert skipped == 0


@devices
@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_have_the_gradient_of_the_whole_batch_with_drop_path(
    chunk: int, device: str, debug_model: Callable[..., Beit3Retrieval]
) -> None:
    """The second pass of a chunk draws the same random numbers as the first."""
    target = torch.device(device)
    with numerics(target, tf32=False, deterministic=False):
        found, gradients = whole_and_chunked(debug_model, 0.5, chunk, target)
    # Both passes run the same kernels; the sums over chunks differ in order.
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    assert len(gradients[0]) == len(gradients[1]) > 50
    for whole, chunked in zip(*gradients, strict=True):
        torch.testing.assert_close(chunked, whole, atol=1e-6, rtol=1e-4)


@devices
@pytest.mark.parametrize(
    ("main", "settings"),
    [
        (lhp_train, {**LHP_TRAINING, "drop_path": 0.3, "grad_cache_chunk": 2, "ema_decay": 0.9}),
        (uit.train.main, {**UIT_TRAINING, "drop_path": 0.3, "dropout": 0.1}),
    ],
    ids=["lhp", "uit"],
)
def test_a_resumed_run_ends_with_the_same_weights(
    main: Main, settings: dict[str, Any], device: str, tiny_data: Path, tmp_path: Path
) -> None:
    """Drop path, dropout and negatives continue from the saved states of the generators."""
    settings = {**settings, "epochs": 2, "deterministic": True}
    whole = train(main, tiny_data, tmp_path / "whole", device, **settings)
    train(main, tiny_data, tmp_path / "resumed", device, **settings, max_steps=3)
    resumed = train(main, tiny_data, tmp_path / "resumed", device, **settings)
    assert resumed == whole
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "resumed")
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


@pytest.mark.distributed
@pytest.mark.parametrize("device", ["cpu", on_gpu("cuda", gpus=2)])
def test_two_processes_train_as_one(device: str, tiny_data: Path, tmp_path: Path) -> None:
    """With CUDA, each process has its own GPU, and NCCL connects them."""
    settings = {**RECIPES["lhp"][1], "epochs": 2}
    expected = train(lhp_train, tiny_data, tmp_path / "one", device, **settings)
    settings |= {
        "data_path": tiny_data, "output_dir": tmp_path / "two", "device": device, "dtype": "fp32",
        "batch_size": 3, "num_workers": 0, "lr": LR, "cache_dir": tmp_path / "cache",
    }  # fmt: skip
    launch = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "lhp.train",
    ]
    subprocess.run([sys.executable, *launch, *argv(settings)], cwd=ROOT, check=True, timeout=300)
    # Only the order of sums differs, which changes the losses by 2e-7 on a CPU.
    assert losses(tmp_path / "two") == pytest.approx(expected, rel=1e-4)


@pytest.mark.cuda
@pytest.mark.skipif(GPUS == 0, reason="needs 1 CUDA GPU")
def test_memory_of_a_step_is_as_computed(tmp_path: Path) -> None:
    """Compare `peak_memory`, which computes a table of docs/reproduce.md, with the allocator."""
    flags = ["--model", "beit3_base_patch16_384", "--batch_size", "8"]
    computed = peak_memory("lhp/finetune", flags, tmp_path)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    take_step(*recipe_step("lhp/finetune", flags, tmp_path))
    measured = torch.cuda.max_memory_allocated() - before
    # cuBLAS allocates up to 64 MiB, which the computation does not include.
    assert measured == pytest.approx(computed, rel=0.05, abs=0.1 * GIB)


# ---- Scoring


@pytest.mark.parametrize(
    ("device", "dtype"),
    [("cpu", "bf16"), *(on_gpu("cuda", dtype) for dtype in ("fp32", "bf16", "fp16"))],
)
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
def test_scores_are_near_those_of_the_cpu_in_float32(
    main: Main, settings: dict[str, Any], device: str, dtype: str, tiny_data: Path, tmp_path: Path
) -> None:
    masked = tiny_data / "name-masked_test-set"

    def scores(device: str, dtype: str) -> Tensor:
        out = tmp_path / f"{device}_{dtype}.pt"
        main(argv({
            "image_folder": masked / "gallery", "annotation": masked / "query.json",
            "save_score": out, "output_file": out.with_suffix(".txt"), "device": device,
            "dtype": dtype, "num_workers": 0, **settings,
        }))  # fmt: skip
        return load_scores(out).scores

    expected, found = scores("cpu", "fp32"), scores(device, dtype)
    # In bf16 on a CPU, the largest difference is 0.06 of the standard deviation. fp16 has three
    # more bits, as many as TF32; the bound of fp32 is too small for TF32.
    bound = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 1e-1}[dtype] * float(expected.std())
    torch.testing.assert_close(found, expected, atol=bound, rtol=0)
