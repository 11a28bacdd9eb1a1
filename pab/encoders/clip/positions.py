"""Resize CLIP's position embeddings to another image size or text length, as in OpenCLIP."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from open_clip.model import resize_pos_embed, resize_text_pos_embed
from torch import Tensor, nn

from pab.core.notices import notice

IMAGE = "visual.positional_embedding"
TEXT = ("positional_embedding", "text.positional_embedding")


def resized_positions(
    model: nn.Module, state: Mapping[str, Tensor], path: str | Path
) -> dict[str, Tensor]:
    """Resize position embeddings to the model's grid and text length, with a notice.

    OpenCLIP's functions interpolate in float32 (bicubic with antialiasing for images, linear for
    text). Positions of a non-square grid are not resized; strict loading then raises an error.

    Args:
        model: model that will load the weights.
        state: weights under OpenCLIP's names.
        path: file of the weights, for the notice.
    """
    found, own = dict(state), model.state_dict()
    for name in (IMAGE, *TEXT):
        table, wanted = found.get(name), own.get(name)
        if table is None or wanted is None or table.shape == wanted.shape:
            continue
        if table.ndim != 2 or wanted.ndim != 2 or table.shape[1] != wanted.shape[1]:
            continue
        alone = {name: table.float()}
        if name == IMAGE:
            side = math.isqrt(len(table) - 1)
            if side**2 != len(table) - 1 or not hasattr(model.visual, "grid_size"):
                continue
            resize_pos_embed(alone, model)
            rows, columns = model.visual.grid_size  # type: ignore[union-attr, misc]
            change = f"image positions are resized from {side} x {side} to {rows} x {columns}"
        else:
            resize_text_pos_embed(alone, model)
            change = f"text positions are resized from {len(table)} to {len(wanted)}"
        notice(path, change)
        found[name] = alone[name].to(table.dtype)
    return found
