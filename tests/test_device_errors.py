"""One-line errors for exhausted memory and for operations without deterministic algorithms."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import lhp.train
from lhp.beit3 import Beit3Retrieval
from lhp.config import TrainConfig as LhpConfig
from lhp.infer import main as lhp_infer
from lhp.train import main as lhp_train
from pab.core import device_errors
from pab.core.device_errors import check_shared_memory, explaining_memory
from pab.core.errors import InputError, run_cli
from pab.core.precision import numerics
from pab.encoders.clip.finetune import TrainConfig as ClipConfig
from pab.scoring.encoding import Compute
from pab.training.command import memory_remedy
from tests.conftest import MODEL
from tests.fake_cuda import CUDA
from uit.config import TrainConfig as UitConfig

CPU = torch.device("cpu")
Refused = Callable[..., str]


def too_much(*_: Any) -> Tensor:
    """Request more memory than any machine has."""
    return torch.empty(10**15)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the functions that report a GPU's memory."""
    properties = SimpleNamespace(total_memory=79.2e9, name="NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 77.6e9)


# ------------------------------------------------------------------------------------------ memory


@pytest.mark.usefixtures("card")
def test_the_memory_of_a_gpu(refused: Refused) -> None:
    def main(_: list[str] | None) -> None:
        with (
            explaining_memory(CUDA, "scoring", "buy a larger card"),
            Compute(CUDA, torch.float32, torch.float32, 184, 0).running("encoding images"),
        ):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    assert refused(main, []) == (
        "error: out of memory while encoding images: peak 77.6 GB of the 79.2 GB of NVIDIA H100; "
        "lower --batch_size (now 184), or use --dtype bf16 (now fp32)"
    )


def test_the_memory_of_a_cpu(refused: Refused) -> None:
    def main(_: list[str] | None) -> None:
        with Compute(CPU, torch.bfloat16, torch.bfloat16, 8, 0).running("encoding captions"):
            too_much()

    line = refused(main, [])
    assert line.startswith("error: out of memory while encoding captions: peak ")
    assert line.endswith(" GB of this machine; lower --batch_size (now 8)")


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(
    ("dtype", "remedy"),
    [(torch.float32, "use --dtype bf16 (now fp32)"), (torch.float16, "free memory on the device")],
)
def test_work_whose_memory_does_not_depend_on_the_batch_size(
    dtype: torch.dtype, remedy: str
) -> None:
    with (
        pytest.raises(torch.OutOfMemoryError) as error,
        Compute(CUDA, dtype, dtype, 8, 0).running("re-ranking", batched=False),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    assert error.value.__notes__[0].endswith(f"NVIDIA H100; {remedy}")


def test_an_error_outside_any_block(refused: Refused) -> None:
    assert "error: out of memory: " in refused(too_much, [])
    assert "can't allocate memory" in refused(too_much, [])


def test_the_library_keeps_the_type_of_the_error() -> None:
    with (
        pytest.raises(RuntimeError, match="can't allocate memory") as error,
        explaining_memory(CPU, "encoding images", "use less"),
    ):
        too_much()
    (note,) = error.value.__notes__
    assert note.startswith("out of memory while encoding images: peak ")
    assert note.endswith("; use less")


def test_other_errors_keep_their_traceback() -> None:
    def main(_: list[str] | None) -> None:
        with explaining_memory(CPU, "scoring", "use less"):
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug") as error:
        run_cli(main, [])
    assert not hasattr(error.value, "__notes__")


def test_scoring_that_runs_out_of_memory(
    refused: Refused, debug_checkpoint: Path, tokenizer_file: Path, tiny_data: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    masked = tiny_data / "name-masked_test-set"
    argv = [
        "--image_folder", str(masked / "gallery"), "--annotation", str(masked / "query.json"),
        "--save_score", str(tmp_path / "s.pt"), "--output_file", str(tmp_path / "s.txt"),
        "--model", MODEL, "--checkpoint", str(debug_checkpoint), "--num_workers", "0",
        "--tokenizer", str(tokenizer_file), "--device", "cpu", "--batch_size", "7",
    ]  # fmt: skip
    monkeypatch.setattr(Beit3Retrieval, "encode_image", too_much)
    line = refused(lhp_infer, argv)
    assert "out of memory while encoding images: peak " in line
    assert "lower --batch_size (now 7), or use --dtype bf16 (now fp32)" in line
    monkeypatch.setattr(Beit3Retrieval, "to", too_much)
    assert "out of memory while scoring: peak " in refused(lhp_infer, argv)
    assert list(tmp_path.glob("s.*")) == []


def test_training_that_runs_out_of_memory(
    capsys: pytest.CaptureFixture[str], tiny_data: Path, tokenizer_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(lhp.train, "pair_vectors", too_much)
    with pytest.raises(SystemExit) as stop:
        run_cli(lhp_train, [
            "--data_path", str(tiny_data), "--cache_dir", str(tmp_path / "cache"),
            "--output_dir", str(tmp_path / "out"), "--model", MODEL, "--input_size", "64",
            "--sentencepiece_model", str(tokenizer_file), "--max_text_length", "62",
            "--batch_size", "6", "--device", "cpu", "--dtype", "fp32", "--num_workers", "0",
            "--warmup_steps", "0", "--finetune", "",
        ])  # fmt: skip
    assert stop.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: out of memory while training: peak ")
    assert line.endswith(
        "lower --batch_size (now 6) and raise --update_freq, or set --grad_cache_chunk, "
        "or set --checkpoint_activations, or use --dtype bf16"
    )


def test_a_recipe_names_only_its_own_settings() -> None:
    assert memory_remedy(LhpConfig(grad_cache_chunk=46, checkpoint_activations=True)) == (
        "lower --grad_cache_chunk (now 46)"
    )
    assert "--grad_cache_chunk" not in memory_remedy(LhpConfig(update_freq=2))
    assert "--checkpoint_activations" in memory_remedy(ClipConfig())
    assert "--grad_cache_chunk" not in memory_remedy(UitConfig())


# ----------------------------------------------------------------------------------- shared memory


def free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, megabytes: int) -> None:
    """Replace /dev/shm with a folder that reports this much free space."""
    monkeypatch.setattr(device_errors, "SHARED_MEMORY", tmp_path)
    usage = SimpleNamespace(free=megabytes * 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


def test_batches_must_fit_in_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, tmp_path, 64)  # Docker's default
    megabyte = 10**6
    check_shared_memory(4, megabyte, 8, 1000)  # 4 workers x 2 batches x 8 MB
    check_shared_memory(0, megabyte, 1000, 10**6)
    check_shared_memory(16, megabyte, 8, 60)  # at most all 60 samples
    with pytest.raises(InputError) as error:
        check_shared_memory(16, megabyte, 8, 1000)
    assert str(error.value) == (
        f"{tmp_path}: expected room for 0.26 GB of loaded batches, found 0.06 GB; "
        "use --num_workers 4, or a larger /dev/shm (Docker: --shm-size)"
    )
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(InputError, match="use --num_workers 2, or"):
        check_shared_memory(4, megabyte, 8, 1000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "two")
    with pytest.raises(InputError, match=r"LOCAL_WORLD_SIZE: .*found 'two'"):
        check_shared_memory(4, megabyte, 8, 1000)
    monkeypatch.setattr(device_errors, "SHARED_MEMORY", tmp_path / "missing")  # not Linux
    check_shared_memory(16, megabyte, 8, 1000)


def test_scoring_checks_shared_memory_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, tmp_path, 0)
    images = [Image.new("RGB", (8, 8))] * 4

    def encode(pixels: Tensor) -> Tensor:
        raise AssertionError("encoded")

    compute = Compute(CPU, torch.float32, torch.float32, 2, 2)
    with pytest.raises(InputError, match=r"use --num_workers 0, or .*--shm-size"):
        compute.images(encode, images, lambda image: torch.zeros(3, 8, 8))


def test_training_checks_shared_memory_first(
    refused: Refused, tiny_data: Path, tokenizer_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    free(monkeypatch, tmp_path, 10**6)
    argv = [
        "--data_path", str(tiny_data), "--cache_dir", str(tmp_path / "cache"),
        "--output_dir", str(tmp_path / "out"), "--model", MODEL, "--input_size", "64",
        "--sentencepiece_model", str(tokenizer_file), "--max_text_length", "62",
        "--batch_size", "6", "--device", "cpu", "--dtype", "fp32", "--num_workers", "2",
        "--warmup_steps", "0", "--finetune", "", "--max_steps", "1",
    ]  # fmt: skip
    lhp_train(argv)
    shutil.rmtree(tmp_path / "out")
    free(monkeypatch, tmp_path, 0)
    assert "expected room for 0.00 GB of loaded batches" in refused(lhp_train, argv)


def test_a_worker_that_died_of_full_shared_memory(refused: Refused) -> None:
    def main(_: list[str] | None) -> None:
        raise RuntimeError(
            "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
            "dataloader's workers are out of shared memory. Please try to raise your shared "
            "memory limit."
        )

    assert refused(main, []) == (
        "error: /dev/shm is full, so a loader process died: use --num_workers 0, "
        "or a larger /dev/shm (Docker: --shm-size)"
    )


# ------------------------------------------------------------------------------------- determinism


def test_an_operation_without_deterministic_algorithm(refused: Refused) -> None:
    def main(_: list[str] | None) -> None:
        with numerics(CPU, tf32=False, deterministic=True):
            torch.zeros(4).put_(torch.tensor([0, 1]), torch.ones(2))

    assert refused(main, []) == (
        "error: --deterministic: put_ has no deterministic algorithm on this device; "
        "run without --deterministic"
    )
