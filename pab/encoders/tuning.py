"""Freeze towers and add LoRA in fine-tuning; settings shared by CLIP and BLIP-2.

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

from pab.core.adapters import IN_PROJECTION, own_name
from pab.core.config import flag, speed_flag
from pab.data.images import ImageTransform
from pab.encoders.layer_numbers import BLOCK
from pab.training.config import ContrastiveConfig

# Builds the random view of training images; takes the arguments of HybridView (lhp/views.py).
MakeView = Callable[..., ImageTransform]

SCRATCH = "random"  # value of --pretrained for training from scratch


@dataclass(frozen=True)
class FinetuneConfig(ContrastiveConfig):
    """Fine-tuning settings of CLIP and BLIP-2; the defaults are not from the paper."""

    # Model
    freeze: Literal["none", "image", "text"] = flag("none", "tower whose weights are frozen")
    lora_rank: int = flag(0, "rank of LoRA updates, trained instead of the weights; 0: off", ge=0)
    lora_alpha: int = flag(16, "LoRA: updates are scaled by alpha / rank", ge=1)
    checkpoint_activations: bool = speed_flag(False, "recompute blocks in the backward pass")

    # Optimization
    lr: float = flag(2e-5, "peak learning rate; LoRA needs about ten times as much")
    weight_decay: float = flag(0.05, "AdamW weight decay")
    opt_betas: tuple[float, float] = flag((0.9, 0.98), "AdamW betas")
    epochs: int = flag(3, "passes over the data")
    layer_decay: float = flag(0.75, "learning-rate factor from each layer to the one below")


def freeze(modules: Iterable[nn.Module | nn.Parameter]) -> None:
    """Freeze modules and parameters: disable gradients, and keep modules in evaluation mode."""
    for part in modules:
        part.requires_grad_(False)
        if isinstance(part, nn.Module):
            part.eval()
            for module in part.modules():
                module.train = _stays.__get__(module)  # type: ignore[method-assign]


def _stays(self: nn.Module, mode: bool = True) -> nn.Module:
    """Replace ``train`` of a frozen module; do not change the mode."""
    return self


def with_lora(
    model: nn.Module, rank: int, alpha: int, also: Iterable[nn.Parameter], *, dora: bool = False
) -> PeftModel:
    """Add low-rank updates to the trainable matrices of the blocks; freeze the model's weights.

    The output projections of torch's attention get no update. Call :func:`freeze` first, so that
    frozen towers are skipped.

    Args:
        model: changed in place; its methods remain usable.
        rank: rank of the updates.
        alpha: updates are scaled by ``alpha / rank``.
        also: other parameters to train, such as the temperature.
        dora: also train the length of each row of a matrix (DoRA, arXiv 2402.09353).

    Returns:
        The peft wrapper, which contains ``model``.
    """
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    linear = [
        name
        for name, module in model.named_modules()
        # exactly nn.Linear: torch's attention does not call its output projection, which is a
        # subclass of nn.Linear
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
            use_dora=dora,
            target_modules="|".join(map(re.escape, linear)),  # a list would match name suffixes
            target_parameters=projections or None,
        ),
    )
    # peft matches parameters by name suffix and so adds updates to a frozen tower: keep them at 0.
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
        model: changed in place; its methods remain usable.
        frozen: modules and parameters to freeze.
        temperature: temperature of the loss, which is always trained.

    Returns:
        The module with all parameters: the model, or the peft wrapper around it.
    """
    freeze(frozen)
    if not config.lora_rank:
        return model
    return with_lora(model, config.lora_rank, config.lora_alpha, also=[temperature])


def merged_state(model: nn.Module) -> Mapping[str, Tensor]:
    """Return the state dict with low-rank updates merged, under the names of the plain model."""
    if isinstance(model, PeftModel):
        model = copy.deepcopy(model).merge_and_unload()
    state: Mapping[str, Tensor] = model.state_dict()
    return state
