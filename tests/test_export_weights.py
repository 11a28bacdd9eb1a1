"""Weights taken out of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pab.core.checkpoints import model_state, read_checkpoint
from pab.core.errors import InputError
from pab.export_weights import export_weights, main


def write(path: Path, value: float) -> Path:
    state = {"a": torch.tensor([value, 0.5]), "count": torch.tensor([3])}
    torch.save({"model": state, "optimizer": {"lr": 1.0}, "epoch": 2}, path)
    return path


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_halves_the_floats_and_drops_the_rest(tmp_path: Path, ending: str) -> None:
    source, out = write(tmp_path / "in.pth", 1.25), tmp_path / f"out{ending}"
    main([str(source), "--out", str(out), "--dtype", "fp16"])
    checkpoint = read_checkpoint(out)
    state = model_state(checkpoint, out)
    assert state["a"].dtype == torch.float16
    assert state["a"].tolist() == [1.25, 0.5]
    assert state["count"].dtype == torch.int64
    assert checkpoint["metadata"]["dtype"] == "fp16"
    assert "optimizer" not in checkpoint


def test_refuses_what_the_format_cannot_hold(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.pth", 1e9), tmp_path / "out.pth"
    with pytest.raises(InputError, match="'a'"):
        export_weights(source, out, "fp16")
    assert not out.exists()


def test_an_epoch_beside_flat_weights_is_no_weight(tmp_path: Path) -> None:
    source, out = tmp_path / "in.pth", tmp_path / "out.safetensors"
    torch.save({"a": torch.ones(2), "scale": np.float32(2), "epoch": np.int64(3)}, source)
    export_weights(source, out, "fp32")
    assert model_state(read_checkpoint(out), out).keys() == {"a", "scale"}
