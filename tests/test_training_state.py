"""Training states: exact resuming, and files that are refused."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pab.core.checkpoints import (
    TrainingState,
    checkpoint_hash,
    load_strict,
    load_training_state,
    model_state,
    read_checkpoint,
    save_training_state,
    save_weights,
)
from pab.core.devices import rng_state, set_rng_state
from pab.core.errors import InputError
from tests.conftest import GOLDEN, needs_golden
from tests.small_model import same, small_model, values

CPU = torch.device("cpu")


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> list[float]:
    """Train with draws from the generators of torch, NumPy and Python; return the losses."""
    losses = []
    for _ in range(count):
        inputs = torch.randn(8, 3) + float(np.random.rand()) + random.random()
        loss = torch.nn.functional.dropout(model(inputs), 0.3).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_resumed_run_is_exact_to_the_last_bit(tmp_path: Path) -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    np.random.randn()  # leaves a cached second value in NumPy's generator
    random.gauss(0, 1)  # and in Python's
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    steps(model, optimizer, 3)
    path = tmp_path / "state.pth"
    state = TrainingState(
        model=model.state_dict(),
        optimizer=optimizer.state_dict(),
        step=3,
        epoch=1,
        step_in_epoch=2,
        rng=[rng_state(CPU)],
        config={"lr": 0.01, "betas": (0.9, 0.98), "out": Path("a/b")},
        best_metric=np.float64(0.5),
    )
    save_training_state(path, state)
    straight = [*steps(model, optimizer, 4), random.gauss(0, 1), float(np.random.randn())]

    torch.manual_seed(99)
    loaded = load_training_state(path)
    other = small_model()
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=0.5)
    load_strict(other, loaded.model, path)
    other_optimizer.load_state_dict(loaded.optimizer)
    set_rng_state(loaded.rng[0], CPU)
    resumed = [
        *steps(other, other_optimizer, 4), random.gauss(0, 1), float(np.random.randn())
    ]  # fmt: skip
    assert resumed == straight
    assert same(values(other), values(model))
    assert (loaded.step, loaded.epoch, loaded.step_in_epoch) == (3, 1, 2)
    assert loaded.config == {"lr": 0.01, "betas": (0.9, 0.98), "out": "a/b"}
    assert loaded.best_metric == 0.5
    assert loaded.ema is None


def test_resuming_does_not_touch_the_file(tmp_path: Path) -> None:
    path = tmp_path / "state.pth"
    save_training_state(path, TrainingState({"w": torch.ones(3)}, {}, 0, 0, 0, [], {}))
    before = checkpoint_hash(path)
    load_training_state(path).model["w"].add_(1)
    assert checkpoint_hash(path) == before


def test_files_without_a_training_state_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    save_weights(path, {"a": torch.ones(1)})
    with pytest.raises(InputError, match="found another file; weights cannot resume a run"):
        load_training_state(path)
    torch.save({"training_state": 99}, path)
    with pytest.raises(InputError, match="found version 99"):
        load_training_state(path)
    torch.save([1], path)
    with pytest.raises(InputError, match="found another file"):
        load_training_state(path)


@pytest.mark.parametrize("average", [{}, {"shadow": {}}, {"shadow": {}, "buffers": 1}])
def test_an_average_without_its_weights_is_refused(tmp_path: Path, average: object) -> None:
    path = tmp_path / "state.pth"
    torch.save({"model": {"a": torch.ones(1)}, "ema": average, "training_state": 2}, path)
    with pytest.raises(InputError, match="expected shadow and buffers"):
        read_checkpoint(path)


# Reference files


@needs_golden
def test_reference_checkpoints_are_read(tmp_path: Path) -> None:
    lhp = read_checkpoint(GOLDEN / "beit3_tiny.pth")
    assert isinstance(lhp["args"], argparse.Namespace)
    norms = json.loads((GOLDEN / "beit3_tiny.json").read_text())
    names = model_state(lhp, GOLDEN / "beit3_tiny.pth")
    assert set(names) == {*norms["grad_norms"], *norms["no_grad"]}
    uit = read_checkpoint(GOLDEN / "uit_tiny.pth")
    state = model_state(uit, GOLDEN / "uit_tiny.pth")
    copy = tmp_path / "copy.safetensors"
    save_weights(copy, state, {"source": "reference"})  # with repeated and tied tensors
    assert same(model_state(read_checkpoint(copy), copy), state)


# On a GPU


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_gpu_generator_and_weights_are_kept(tmp_path: Path) -> None:
    device = torch.device("cuda", 0)
    state = rng_state(device)
    save_training_state(
        tmp_path / "s.pth",
        TrainingState({"w": torch.ones(3, device=device)}, {}, 0, 0, 0, [state], {}),
    )
    drawn = torch.rand(4, device=device)
    loaded = load_training_state(tmp_path / "s.pth")
    set_rng_state(loaded.rng[0], device)
    assert torch.equal(torch.rand(4, device=device), drawn)
    assert loaded.model["w"].device == CPU
