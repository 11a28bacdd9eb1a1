"""Devices: selection, dtypes, seeds, bfloat16, and results read late."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pab.core import devices
from pab.core.errors import InputError
from tests.fake_cuda import fake_cuda

CPU = torch.device("cpu")


@pytest.fixture
def no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.usefixtures("no_accelerator")
def test_without_accelerator_auto_is_the_cpu_and_others_are_refused() -> None:
    assert devices.pick_device("auto") == CPU
    for name in ("cuda", "mps"):
        with pytest.raises(InputError, match=r"--device: expected .* use --device cpu"):
            devices.pick_device(name)


def test_auto_prefers_cuda_then_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert devices.pick_device("auto") == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert devices.pick_device("cuda") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="expected CUDA GPU 2, found 2 usable GPUs"):
        devices.pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.pick_device("auto") == torch.device("mps")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InputError, match="expected auto, cuda, mps or cpu, found 'tpu'"):
        devices.pick_device("tpu")
    with pytest.raises(InputError, match="expected fp32, bf16, fp16, found 'int8'"):
        devices.dtype_of("int8")


def test_dtypes_of_autocast_and_scaler() -> None:
    left, right = torch.randn(4, 4), torch.randn(4, 4)
    for name in ("fp32", "bf16"):
        with devices.autocast(CPU, devices.dtype_of(name)):
            assert (left @ right).dtype == devices.dtype_of(name)
    with pytest.raises(InputError, match="fp16 is not supported on a CPU"):
        devices.autocast(CPU, torch.float16)
    assert devices.make_scaler(torch.device("cpu"), torch.float32).is_enabled() is False


def test_seeding_covers_every_generator_and_differs_by_rank() -> None:
    def draw(seed: int, rank: int) -> tuple[float, float, float]:
        devices.seed_everything(seed, rank)
        return random.random(), float(np.random.rand()), torch.rand(()).item()

    assert draw(16, 0) == draw(16, 0)
    assert all(a != b for a, b in zip(draw(16, 0), draw(16, 1), strict=True))
    assert all(a != b for a, b in zip(draw(16, 0), draw(17, 5), strict=True))


@pytest.mark.parametrize(
    ("capabilities", "wanted"),
    [
        ({"avx512_bf16": True, "amx_bf16": False, "num_sockets": 1}, True),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"avx512_bf16": False, "avx512_fp16": True, "num_sockets": 2}, False),
        ({"arm_bf16": True}, True),
    ],
)
def test_bf16_units_are_recognised(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, Any], wanted: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert devices.cpu_has_bf16() is wanted


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_attention_in_bf16_is_close_to_float32(
    monkeypatch: pytest.MonkeyPatch, tiles: bool, grad: bool
) -> None:
    monkeypatch.setattr(devices, "HAS_TILES", tiles)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 7, 8) for _ in range(3))
    bias = torch.randn(1, 3, 7, 7)
    exact = devices.attention(q, k, v, bias)
    for mask in (bias, bias.bfloat16()):  # float32 as in training, bfloat16 as in a bfloat16 model
        with torch.set_grad_enabled(grad):
            half = devices.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask)
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), exact, rtol=0.05, atol=0.05)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs /proc/cpuinfo")
def test_bf16_units_agree_with_proc_cpuinfo() -> None:
    flags = set(Path("/proc/cpuinfo").read_text().split())
    assert devices.cpu_has_bf16() == bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def test_results_are_read_while_the_next_one_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []

    class Event:
        def __init__(self) -> None:
            self.number = steps[-1][-1]

        def record(self) -> None:
            steps.append(f"record {self.number}")

        def synchronize(self) -> None:
            steps.append(f"wait {self.number}")

    def results() -> Iterator[tuple[int, Tensor]]:
        for number in range(3):
            steps.append(f"compute {number}")
            yield number, torch.empty(number, device="cuda")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    with fake_cuda(monkeypatch) as trace:
        found = list(devices.read_late(results()))
        assert [(key, one.device, len(one)) for key, one in found] == [
            (number, CPU, number) for number in range(3)
        ]
        assert (trace.host_reads, trace.copies) == (0, 3)
    assert steps == [
        "compute 0", "record 0", "compute 1", "record 1", "wait 0", "compute 2", "record 2",
        "wait 1", "wait 2",
    ]  # fmt: skip


def test_results_on_the_cpu_are_not_delayed() -> None:
    seen: list[int] = []

    def results() -> Iterator[tuple[int, Tensor]]:
        for number in range(3):
            seen.append(number)
            yield number, torch.tensor(number)

    for number, found in devices.read_late(results()):
        assert int(found) == number
        assert seen[-1] == number
