"""Additions to the contrastive recipe for tuning CLIP and BLIP-2: frozen towers and LoRA.

Source of LoRA: Hu et al. 2021 (arXiv 2106.09685), by the peft library.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from pab.core.config import flag
from pab.encoders.layer_numbers import BLOCK
from pab.training.config import ContrastiveConfig

IN_PROJECTION = "in_proj_weight"  # of torch's attention: queries, keys, values in one matrix
SCRATCH = "random"  # --pretrained: no weights, a start from scratch


@dataclass(frozen=True)
class FinetuneConfig(ContrastiveConfig):
    """Flags that fine-tuning CLIP and BLIP-2 share; defaults are this project's, not published."""

    # Model
    freeze: Literal["none", "image", "text"] = flag("none", "tower that keeps its weights")
    lora_rank: int = flag(0, "train low-rank updates of this rank instead of the weights; 0 is off")
    lora_alpha: int = flag(16, "LoRA: updates are scaled by alpha / rank")
    checkpoint_activations: bool = flag(False, "recompute blocks in the backward pass")

    # Optimization
    lr: float = flag(2e-5, "peak learning rate; LoRA wants about ten times as much")
    weight_decay: float = flag(0.05, "AdamW weight decay")
    opt_betas: tuple[float, float] = flag((0.9, 0.98), "AdamW betas")
    epochs: int = flag(3, "passes over the data")
    layer_decay: float = flag(0.75, "factor on the rate from each layer to the one below")

    def check(self) -> None:
        """See :class:`ContrastiveConfig`.

        Raises:
            InputError: naming the flag.
        """
        super().check()
        self.check_least(0, "lora_rank")
        self.check_least(1, "lora_alpha")


def freeze(modules: Iterable[nn.Module | nn.Parameter]) -> None:
    """Take modules out of training: no gradients, and evaluation mode even while others train."""
    for part in modules:
        part.requires_grad_(False)
        if isinstance(part, nn.Module):
            part.eval()
            for module in part.modules():
                module.train = _stays.__get__(module)  # type: ignore[method-assign]


def _stays(self: nn.Module, mode: bool = True) -> nn.Module:
    """Stands for ``train`` in a frozen module."""
    return self


def with_lora(model: nn.Module, rank: int, alpha: int, also: Iterable[nn.Parameter]) -> PeftModel:
    """Add low-rank updates to every matrix of the blocks that are to be trained.

    All other weights keep their values. Called after :func:`freeze`: a frozen tower gets none.

    Args:
        model: changed in place; its own methods go on working.
        rank: of the updates.
        alpha: their scale times the rank.
        also: parameters that are trained themselves, such as the temperature.

    Returns:
        The library's wrapper, which holds ``model``.
    """
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    linear = [
        name
        for name, module in model.named_modules()
        # exactly nn.Linear: an attention's output projection, which torch's own never calls, is not
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
            target_modules="|".join(map(re.escape, linear)),  # a list would match endings of names
            target_parameters=projections or None,
        ),
    )
    # Parameters are matched by the ending alone: an update of a frozen tower's stays at zero.
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
    """The model as the settings train it: parts frozen, low-rank updates added.

    Args:
        model: changed in place; its own methods go on working.
        frozen: what keeps its weights.
        temperature: trained whatever else is.

    Returns:
        What holds all its parameters: the model, or the library's wrapper around it.
    """
    freeze(frozen)
    if not config.lora_rank:
        return model
    return with_lora(model, config.lora_rank, config.lora_alpha, also=[temperature])


def merged_state(model: nn.Module) -> Mapping[str, Tensor]:
    """A model's weights under its own names, low-rank updates added to what they update."""
    if isinstance(model, PeftModel):
        model = copy.deepcopy(model).merge_and_unload()
    state: Mapping[str, Tensor] = model.state_dict()
    return state


def own_name(name: str) -> str:
    """A parameter's name in the model itself, whatever the library has wrapped around it."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")
