"""Deterministic algorithms: the setting, its record, and the operations of training."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import uit.model
from lhp.beit3 import Beit3Retrieval
from lhp.infer import InferConfig as LhpConfig
from lhp.train import main as lhp_train
from pab.core import precision
from pab.scores import load_scores
from pab.training.run_log import read_log
from scripts import finetune_blip2, finetune_clip
from tests.conftest import MODEL
from tests.fake_cuda import CUDA, fake_cuda
from uit.train import main as uit_train

CPU = torch.device("cpu")
MINI = Path(__file__).resolve().parents[1] / "checkpoints/mini"


def put(tensor: Tensor) -> Tensor:
    """Call an operation that has no deterministic algorithm, not even on a CPU."""
    return tensor.put_(torch.tensor([0, 1]), torch.ones(2))


def test_deterministic_algorithms_end_with_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    with precision.numerics(CPU, tf32=False, deterministic=True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
        with pytest.raises(RuntimeError, match="put_ does not have a deterministic implementation"):
            put(torch.zeros(4))
        with precision.numerics(CPU, tf32=False, deterministic=False):
            assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.benchmark
    assert put(torch.zeros(4)).sum() == 2


def test_cublas_is_prepared_unless_the_user_has_done_so(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "CUBLAS_WORKSPACE_CONFIG"
    monkeypatch.setitem(os.environ, name, ":16:8")
    precision.check_numerics(CPU, tf32=False, deterministic=True)
    assert os.environ[name] == ":16:8"
    monkeypatch.delitem(os.environ, name)
    precision.check_numerics(CPU, tf32=False, deterministic=False)
    assert name not in os.environ
    precision.check_numerics(CPU, tf32=False, deterministic=True)
    assert os.environ[name] == ":4096:8"


def test_a_score_file_records_whether_it_is_deterministic(
    debug_checkpoint: Path, tokenizer_file: Path, tiny_data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(os.environ, "CUBLAS_WORKSPACE_CONFIG", ":16:8")
    masked = tiny_data / "name-masked_test-set"
    seen: list[bool] = []
    encode = Beit3Retrieval.encode_image

    def encode_image(self: Beit3Retrieval, image: Tensor) -> Tensor:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return encode(self, image)

    monkeypatch.setattr(Beit3Retrieval, "encode_image", encode_image)
    files = {}
    for deterministic in (False, True):
        out = tmp_path / f"{deterministic}.pt"
        LhpConfig(
            image_folder=str(masked / "gallery"), annotation=str(masked / "query.json"),
            save_score=str(out), output_file=None, model=MODEL, checkpoint=str(debug_checkpoint),
            tokenizer=str(tokenizer_file), device="cpu", num_workers=0, feature_cache=False,
            deterministic=deterministic,
        ).score()  # fmt: skip
        files[deterministic] = load_scores(out)
        assert set(seen) == {deterministic}
        seen.clear()
        assert files[deterministic].meta["tf32"] is False
        assert files[deterministic].meta["deterministic"] is deterministic
    assert torch.equal(files[True].scores, files[False].scores)


# Operations of aten that raise under deterministic algorithms on a GPU, according to the
# documentation of torch.use_deterministic_algorithms. Its entry NLLLoss concerns only images
# (nll_loss2d).
WITHOUT_DETERMINISTIC_ALGORITHM = {
    "avg_pool3d_backward", "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward",
    "adaptive_max_pool2d_backward", "fractional_max_pool2d_backward",
    "fractional_max_pool3d_backward", "max_unpool2d", "max_unpool3d", "upsample_linear1d_backward",
    "upsample_bilinear2d_backward", "upsample_bicubic2d_backward", "upsample_trilinear3d_backward",
    "reflection_pad1d_backward", "reflection_pad2d_backward", "reflection_pad3d_backward",
    "nll_loss2d_forward", "_ctc_loss_backward", "put_", "histc", "bincount", "median",
    "grid_sampler_2d_backward", "grid_sampler_3d_backward",
}  # fmt: skip


class Operations(TorchDispatchMode):
    """Record the names of all operations in the block, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def flags(settings: Mapping[str, Any]) -> list[str]:
    words: list[str] = []
    for key, value in settings.items():
        words += [f"--{key}"] if value is True else [f"--{key}", str(value)]
    return words


RECIPES: dict[str, tuple[Callable[[list[str]], None], dict[str, Any]]] = {
    "lhp": (lhp_train, {
        "model": MODEL, "input_size": 64, "drop_path": 0.1, "warmup_steps": 0,
        "sentencepiece_model": MINI / "lhp.spm", "max_text_length": 62,
    }),
    "uit": (uit_train, {
        "model": "uit_mini", "input_size": 64, "window": 4, "text_encoder": MINI / "bert",
        "max_words": 72, "max_text_length": 72, "mim_block": 16, "no_synonyms": True,
        "checkpoint": MINI / "uit.safetensors",
    }),
    "clip": (finetune_clip.main, {
        "model": f"local-dir:{MINI / 'clip'}", "pretrained": "random", "warmup_steps": 0,
    }),
    "blip2": (finetune_blip2.main, {
        "model": "mini", "text_encoder": MINI / "bert", "pretrained": "random", "warmup_steps": 0,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_training_uses_no_operation_without_a_deterministic_algorithm(
    name: str, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uit.model, "_pool", uit.model._pool_by_slices)  # as on a GPU
    main, settings = RECIPES[name]
    with Operations() as seen:
        main(flags({
            "data_path": tiny_data, "output_dir": tmp_path, "cache_dir": tmp_path / "cache",
            "device": "cpu", "dtype": "fp32", "batch_size": 6, "epochs": 1, "num_workers": 0,
            "lr": 1e-4, "max_steps": 1, "no_save_ckpt": True, **settings,
        }))  # fmt: skip
    assert seen.names["native_layer_norm_backward"] > 0, "the backward pass is recorded"
    assert WITHOUT_DETERMINISTIC_ALGORITHM.isdisjoint(seen.names)


def test_uit_pools_by_slices_under_deterministic_algorithms_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for tokens in (49, 56, 16, 5, 2):
        x = torch.randn(2, tokens, 8, generator=torch.Generator().manual_seed(tokens))
        torch.testing.assert_close(uit.model._pool_by_slices(x), uit.model._pool(x))
    with fake_cuda(monkeypatch) as trace:
        x = torch.empty(2, 49, 8, device=CUDA)
        uit.model._pool(x)
        assert any("pool" in name for name in trace.kernels)
        trace.kernels.clear()
        with precision.numerics(CUDA, tf32=False, deterministic=True):
            assert uit.model._pool(x).shape == (2, 24)
        assert not any("pool" in name for name in trace.kernels)


def test_a_training_run_records_whether_it_is_deterministic(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.setattr(precision, "product_rates", lambda: {"fp32": 290.0, "bf16": 158.0})
    losses = []
    for deterministic in (False, True):
        out = tmp_path / str(deterministic)
        main, settings = RECIPES["lhp"]
        main(flags({
            "data_path": tiny_data, "output_dir": out, "cache_dir": tmp_path / "cache",
            "device": "cpu", "dtype": "fastest", "batch_size": 6, "epochs": 1, "num_workers": 0,
            "lr": 1e-4, "max_steps": 2, **settings,
            **({"deterministic": True} if deterministic else {}),
        }))  # fmt: skip
        record = (out / "run.json").read_text()
        assert f'"deterministic": {str(deterministic).lower()}' in record
        assert '"tf32": false' in record
        assert '"dtype": "fp32"' in record
        losses.append([row["loss"] for row in read_log(out / "log.jsonl", "train")])
    assert losses[0] == losses[1]
    assert not torch.are_deterministic_algorithms_enabled()
