"""Export of a checkpoint's weights."""

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


@pytest.mark.parametrize("extension", [".safetensors", ".pth"])
def test_floats_are_converted_and_other_entries_dropped(tmp_path: Path, extension: str) -> None:
    source, out = write(tmp_path / "in.pth", 1.25), tmp_path / f"out{extension}"
    main([str(source), "--out", str(out), "--dtype", "fp16"])
    checkpoint = read_checkpoint(out)
    state = model_state(checkpoint, out)
    assert state["a"].dtype == torch.float16
    assert state["a"].tolist() == [1.25, 0.5]
    assert state["count"].dtype == torch.int64
    assert checkpoint["metadata"]["dtype"] == "fp16"
    assert "optimizer" not in checkpoint


def test_values_beyond_the_range_of_the_dtype_are_refused(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.pth", 1e9), tmp_path / "out.pth"
    with pytest.raises(InputError, match="'a'"):
        export_weights(source, out, "fp16")
    assert not out.exists()


def test_an_epoch_beside_flat_weights_is_dropped(tmp_path: Path) -> None:
    source, out = tmp_path / "in.pth", tmp_path / "out.safetensors"
    torch.save({"a": torch.ones(2), "scale": np.float32(2), "epoch": np.int64(3)}, source)
    export_weights(source, out, "fp32")
    assert model_state(read_checkpoint(out), out).keys() == {"a", "scale"}
