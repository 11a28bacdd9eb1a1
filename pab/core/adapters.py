"""Merge low-rank adapters in a state dict into the weights that they update.

Source: Hu et al. 2021, "LoRA" (arXiv 2106.09685); Liu et al. 2024, "DoRA" (arXiv 2402.09353).
Tensor names follow the peft library, which need not be installed.

Shape letters: `O` outputs and `I` inputs of a weight matrix, `R` rank of an update.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pab.core.errors import InputError

LIBRARY_PREFIX = "base_model.model."  # peft's wrapper around the whole model
BASE_LAYER = ".base_layer."  # peft's name of the layer that an adapter updates
ADAPTER = re.compile(r"(.+)\.lora_(A|B|magnitude_vector)(?:\.(\w+))?\.weight")
# Parts of the tensor names of adapters, supported or not (biases, embeddings, copies of whole
# modules, other methods of peft).
TRACES = re.compile(r"\.lora_|\.(ia3_|hada_|lokr_|oft_|vera_|modules_to_save\.|original_module\.)")
IN_PROJECTION = "in_proj_weight"  # torch's attention: queries, keys and values in one matrix
ALPHA = "lora_alpha"  # setting: updates are scaled by alpha / rank
MERGE_FIRST = "merge them with the library that trained them (peft: merge_and_unload)"


def has_adapters(names: Mapping[str, object]) -> bool:
    """Return true if a state dict holds adapters that are not merged."""
    return any(TRACES.search(f".{name}") for name in names)


def own_name(name: str) -> str:
    """Remove peft's wrappers from a tensor name."""
    return name.replace(LIBRARY_PREFIX, "").replace(BASE_LAYER, ".")


def merged(state: Mapping[str, Tensor], alpha: float | None, path: str | Path) -> dict[str, Tensor]:
    """Add the low-rank updates to their weights and drop the adapters.

    A matrix ``W`` [O, I] becomes ``W + alpha / R * B A``. With a magnitude vector (DoRA), each row
    of the sum is then scaled to the norm in that vector.

    Args:
        state: tensor name -> tensor, with peft's names.
        alpha: LoRA's alpha, which scales updates by ``alpha / R``; None if the file lacks it.
        path: checkpoint file, for errors.

    Returns:
        State dict without adapters, and without peft's wrappers in the names.

    Raises:
        InputError: ``alpha`` is None, or the adapters cannot be merged.
    """
    own: dict[str, Tensor] = {}
    updates: dict[str, dict[str, Tensor]] = {}
    adapters: set[str] = set()
    for name, tensor in state.items():
        name = own_name(name)
        match = ADAPTER.fullmatch(name)
        if match is not None:
            updates.setdefault(match[1], {})[match[2]] = tensor
            adapters.add(match[3] or "")
        elif TRACES.search(f".{name}"):
            raise InputError(
                path, "holds adapters of an unsupported kind", item=f"tensor {name!r}",
                todo=MERGE_FIRST,
            )  # fmt: skip
        else:
            own[name] = tensor
    if len(adapters) > 1:
        raise InputError(
            path, f"holds {len(adapters)} sets of adapters: {', '.join(sorted(adapters))}",
            todo=MERGE_FIRST,
        )  # fmt: skip
    if alpha is None:
        raise InputError(
            path, f"holds LoRA adapters, but not {ALPHA}, which scales their updates",
            todo=MERGE_FIRST,
        )  # fmt: skip
    for owner, parts in updates.items():
        name, weight = _updated(owner, parts, own, path)
        own[name] = _with_update(weight, parts, alpha)
    return own


def _updated(
    owner: str, parts: Mapping[str, Tensor], own: Mapping[str, Tensor], path: str | Path
) -> tuple[str, Tensor]:
    """Return the name and value of the weight that an adapter updates."""
    down, up = parts.get("A"), parts.get("B")
    if down is not None and up is not None and down.ndim == up.ndim == 2:
        for name in (f"{owner}.weight", f"{owner}.{IN_PROJECTION}"):
            if name in own and own[name].shape == (len(up), down.shape[1]):
                return name, own[name]
    raise InputError(
        path, "holds an adapter without the weight [O, I] that it updates",
        item=f"adapter of {owner!r}", todo=f"pass merged weights, or {MERGE_FIRST}",
    )  # fmt: skip


def _with_update(weight: Tensor, parts: Mapping[str, Tensor], alpha: float) -> Tensor:
    """Add an update to a weight [O, I] in at least float32; keep the weight's dtype."""
    down, up, magnitude = parts["A"], parts["B"], parts.get("magnitude_vector")
    precise = torch.promote_types(weight.dtype, torch.float32)
    update = up.to(precise) @ down.to(precise) * (alpha / len(down))  # [O, R] [R, I] -> [O, I]
    result = weight.to(precise) + update
    if magnitude is not None:
        length = torch.linalg.norm(result, dim=1)  # [O]
        result = result * (magnitude.to(precise) / length)[:, None]
    return result.to(weight.dtype)


def alpha_of(checkpoint: Mapping[str, Any]) -> float | None:
    """Read the adapters' alpha from a checkpoint's settings; None without a valid number."""
    for key in ("config", "args", "metadata"):
        settings = checkpoint.get(key)
        held = settings if isinstance(settings, Mapping) else getattr(settings, "__dict__", {})
        if ALPHA in held:
            try:
                return float(held[ALPHA])
            except (TypeError, ValueError):
                return None
    return None
