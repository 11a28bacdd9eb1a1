"""Additions to the contrastive recipe for tuning CLIP and BLIP-2: frozen towers and LoRA.

Source of LoRA: Hu et al. 2021 (arXiv 2106.09685), implemented by the peft library.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from pab.core.config import flag, speed_flag
from pab.data.images import ImageTransform
from pab.encoders.layer_numbers import BLOCK
from pab.training.config import ContrastiveConfig

# Makes the view of a training image from its side and the settings of the crop (lhp/views.py).
MakeView = Callable[..., ImageTransform]

IN_PROJECTION = "in_proj_weight"  # torch's attention: queries, keys and values in one matrix
SCRATCH = "random"  # value of --pretrained for training from scratch


@dataclass(frozen=True)
class FinetuneConfig(ContrastiveConfig):
    """Flags shared by the fine-tuning of CLIP and BLIP-2; the defaults are ours, not published."""

    # Model
    freeze: Literal["none", "image", "text"] = flag("none", "tower whose weights are frozen")
    lora_rank: int = flag(
        0, "rank of low-rank updates to train instead of the weights; 0: off", ge=0
    )
    lora_alpha: int = flag(16, "LoRA: updates are scaled by alpha / rank", ge=1)
    checkpoint_activations: bool = speed_flag(False, "recompute blocks in the backward pass")

    # Optimization
    lr: float = flag(2e-5, "peak learning rate; LoRA needs about ten times as much")
    weight_decay: float = flag(0.05, "AdamW weight decay")
    opt_betas: tuple[float, float] = flag((0.9, 0.98), "AdamW betas")
    epochs: int = flag(3, "passes over the data")
    layer_decay: float = flag(0.75, "learning-rate factor from each layer to the one below")


def freeze(modules: Iterable[nn.Module | nn.Parameter]) -> None:
    """Freeze modules: no gradients, and evaluation mode even while other modules train."""
    for part in modules:
        part.requires_grad_(False)
        if isinstance(part, nn.Module):
            part.eval()
            for module in part.modules():
                module.train = _stays.__get__(module)  # type: ignore[method-assign]


def _stays(self: nn.Module, mode: bool = True) -> nn.Module:
    """Replacement for ``train`` in a frozen module."""
    return self


def with_lora(model: nn.Module, rank: int, alpha: int, also: Iterable[nn.Parameter]) -> PeftModel:
    """Add low-rank updates to every trainable matrix of the blocks.

    All other weights stay fixed. Call it after :func:`freeze`, so that a frozen tower gets no
    updates.

    Args:
        model: changed in place; its own methods keep working.
        rank: rank of the updates.
        alpha: scale of the updates times the rank.
        also: other parameters to train, such as the temperature.

    Returns:
        The peft wrapper, which holds ``model``.
    """
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    linear = [
        name
        for name, module in model.named_modules()
        # exactly nn.Linear: torch's attention never calls its output projection, a subclass of
        # nn.Linear
        if type(module) is nn.Linear and BLOCK.search(name) and f"{name}.weight" not in frozen
    ]
    projections = [
        name
        for name, _ in model.named_parameters()
        if name.endswith(IN_PROJECTION) and BLOCK.search(name) and name not in frozen
    ]
    wrapped = get_peft_model(
        model,
        LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules="|".join(map(re.escape, linear)),  # a list would match name endings
            target_parameters=projections or None,
        ),
    )
    # peft matches parameters by name ending, so a frozen tower gets updates too: keep them at zero.
    for name, parameter in wrapped.named_parameters():
        owner = own_name(name).partition(".lora_")[0]
        if f"{owner}.{IN_PROJECTION}" in frozen:
            parameter.requires_grad_(False)
    for parameter in also:
        parameter.requires_grad_(True)
    assert isinstance(wrapped, PeftModel)
    return wrapped


def adapted(
    model: nn.Module,
    config: FinetuneConfig,
    *,
    frozen: Iterable[nn.Module | nn.Parameter],
    temperature: nn.Parameter,
) -> nn.Module:
    """Freeze parts of the model and add low-rank updates, according to the settings.

    Args:
        model: changed in place; its own methods keep working.
        frozen: modules and parameters to freeze.
        temperature: always trained.

    Returns:
        The module with all parameters: the model, or the peft wrapper around it.
    """
    freeze(frozen)
    if not config.lora_rank:
        return model
    return with_lora(model, config.lora_rank, config.lora_alpha, also=[temperature])


def merged_state(model: nn.Module) -> Mapping[str, Tensor]:
    """State dict under the model's own names, with low-rank updates merged."""
    if isinstance(model, PeftModel):
        model = copy.deepcopy(model).merge_and_unload()
    state: Mapping[str, Tensor] = model.state_dict()
    return state


def own_name(name: str) -> str:
    """Name of a parameter in the model itself, without peft's wrappers."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")
