"""Optimizer: layer-wise learning-rate decay, schedule, weight average (EMA), and update.

An update is skipped if the loss or the gradient norm is not finite. The model defines which
parameters have no weight decay, and the layer of each parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pab.core.errors import InputError
from pab.core.gradients import GradientAverage

WORST_GRADIENTS = 3  # number of gradients named in the report of a skipped step


class StepOutcome(NamedTuple):
    """Result of :func:`clip_and_step`.

    Attributes:
        norm: total norm of all gradients, after unscaling and before clipping.
        problem: reason for a skipped step; empty if the step was not skipped.
        figures: the loss and the other figures of the step.
    """

    norm: float
    problem: str
    figures: list[float]


def parameter_groups(
    named_parameters: Iterable[tuple[str, Tensor]],
    *,
    weight_decay: float,
    no_decay: Callable[[str, Tensor], bool],
    layer_of: Callable[[str], int] | None = None,
    n_layers: int = 0,
    layer_decay: float = 1.0,
    lr_scale_of: Callable[[str], float] | None = None,
) -> list[dict[str, Any]]:
    """Group trainable parameters by weight decay and learning rate.

    Args:
        named_parameters: parameters of a model; those with ``requires_grad=False`` are ignored.
        weight_decay: weight decay of parameters for which ``no_decay(name, parameter)`` is false.
        no_decay: returns true for parameters without weight decay.
        layer_of: maps a name to 0 (embeddings), 1 .. ``n_layers`` (blocks) or ``n_layers + 1``
            (after the blocks); None uses one learning rate for all.
        n_layers: number of blocks.
        layer_decay: factor applied to the learning rate at each layer, from the top down.
        lr_scale_of: maps a name to a further factor of the learning rate.

    Returns:
        Groups with ``params``, ``names``, ``weight_decay`` and ``lr_scale = layer_decay **
        (n_layers + 1 - layer)`` times ``lr_scale_of``, in order of first appearance.

    Raises:
        ValueError: a layer is outside 0 .. ``n_layers + 1``.
    """
    groups: dict[tuple[float, int, float], dict[str, Any]] = {}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        decay = 0.0 if no_decay(name, parameter) else weight_decay
        layer = n_layers + 1 if layer_of is None else layer_of(name)
        if not 0 <= layer <= n_layers + 1:
            raise ValueError(f"{name}: layer {layer} is not in 0 .. {n_layers + 1}")
        scale = 1.0 if lr_scale_of is None else lr_scale_of(name)
        group = groups.setdefault(
            (decay, layer, scale),
            {
                "params": [],
                "names": [],
                "weight_decay": decay,
                "lr_scale": scale * layer_decay ** (n_layers + 1 - layer),
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def warmup_cosine(
    base_lr: float, min_lr: float, total_steps: int, warmup_steps: int, start_lr: float = 0.0
) -> list[float]:
    """Compute the learning rate of each step: linear warm-up, then half a cosine.

    The warm-up is linear from ``start_lr`` at step 0 to ``base_lr`` at step ``warmup_steps - 1``.
    With ``warmup_steps=1``, step 0 has ``start_lr``. The cosine starts at ``base_lr``, too, and
    would reach ``min_lr`` at step ``total_steps``.

    Returns:
        ``total_steps`` learning rates.

    Raises:
        InputError: a number of steps is negative, or the warm-up has more steps than the run.
    """
    if total_steps < 0 or not 0 <= warmup_steps <= total_steps:
        raise InputError(
            "--warmup_steps", f"expected 0 to {total_steps} (all steps), found {warmup_steps}",
            todo="use fewer warm-up steps or train longer",
        )  # fmt: skip
    warmup = [float(rate) for rate in np.linspace(start_lr, base_lr, warmup_steps)]
    rest = total_steps - warmup_steps
    half = 0.5 * (base_lr - min_lr)
    return warmup + [min_lr + half * (1 + math.cos(math.pi * i / rest)) for i in range(rest)]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group to ``lr`` times the group's ``lr_scale``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def make_adamw(
    groups: list[dict[str, Any]], betas: tuple[float, float], eps: float
) -> torch.optim.AdamW:
    """Create AdamW over :func:`parameter_groups`, with learning rate 0 until :func:`set_lr`.

    The fused kernel is requested explicitly. Otherwise torch chooses a kernel by device and
    version, and kernels differ in rounding. The fused kernel also needs no temporary copy of the
    parameters.
    """
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)


def clip_and_step(
    optimizer: torch.optim.Optimizer,
    *,
    figures: Tensor,
    max_norm: float | None = None,
    scaler: torch.amp.GradScaler | None = None,
    gradients: GradientAverage | None = None,
) -> StepOutcome:
    """Clip the gradients if ``max_norm`` is set, and step; call after the backward pass.

    The figures and the gradient norm are read from the device together, in one transfer. Only a
    skipped step needs another one, for its report.

    For every dtype, the step is skipped if the loss or the gradient norm is not finite: weights and
    optimizer state stay unchanged. If a gradient is not finite, an active loss scaler (float16)
    halves its scale.

    Args:
        optimizer: optimizer whose groups have ``names``.
        figures: unscaled loss of this step, a scalar; or [F], the loss and other figures; with
            ``gradients``, the result of its ``finish``.
        max_norm: maximum total norm of all gradients; None disables clipping.
        scaler: scaler that scaled the loss before the backward pass; None without scaling.
        gradients: average over processes that returned ``figures``; None without one.

    Raises:
        RuntimeError: no parameter has a gradient.
    """
    if scaler is None:
        scaler = torch.amp.GradScaler(enabled=False)  # a disabled scaler scales nothing
    scaler.unscale_(optimizer)
    found = [gradient for _, gradient in _named_gradients(optimizer)]
    if not found:
        raise RuntimeError("no parameter has a gradient: backward was not called")
    norm = torch.nn.utils.get_total_norm(found)
    together = torch.cat([figures.detach().float().reshape(-1), norm.float().reshape(1)])
    *values, norm_value = together.tolist()  # the only read unless the step is skipped
    if gradients is not None:
        values = gradients.without_fractions(values)
    finite = math.isfinite(values[0]) and math.isfinite(norm_value)
    problem = "" if finite else (
        f"loss {values[0]:g}, gradient norm {norm_value:g}, "
        f"worst gradients: {_worst_gradients(optimizer)}"
    )  # fmt: skip
    if max_norm is not None and finite:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    if finite:
        scaler.step(optimizer)
    scaler.update()
    return StepOutcome(norm_value, problem, values)


def _named_gradients(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            if parameter.grad is not None:
                yield name, parameter.grad


def _worst_gradients(optimizer: torch.optim.Optimizer) -> str:
    """Describe the gradients with the largest norms, non-finite ones first."""
    names, gradients = zip(*_named_gradients(optimizer), strict=True)
    norms = list(zip(names, torch.stack(torch._foreach_norm(gradients)).tolist(), strict=True))
    norms.sort(key=lambda item: (math.isfinite(item[1]), -item[1]))
    return ", ".join(f"{name} ({norm:g})" for name, norm in norms[:WORST_GRADIENTS])


def batch_statistics(model: nn.Module) -> list[Tensor]:
    """Return the buffers that a training forward pass changes: batch norm's running statistics."""
    return [
        buffer
        for module in model.modules()
        if getattr(module, "running_mean", None) is not None
        for buffer in module.buffers(recurse=False)
    ]


class Ema:
    """Exponential moving average of a model's parameters, in float32.

    Buffers are copied, because the buffers of batch norm are already averages.

    Args:
        model: model with the initial values.
        decay: weight of the old average in each update.
        warmup: use the decay min(decay, (1 + n) / (10 + n)) in update n, counted from 0, so that
            the initial weights soon lose their influence.

    Raises:
        InputError: ``decay`` is negative, or not below 1.
    """

    def __init__(self, model: nn.Module, decay: float, *, warmup: bool = False) -> None:
        if not 0.0 <= decay < 1.0:
            raise InputError("--ema_decay", f"expected 0 <= decay < 1, found {decay}")
        self.decay, self.warmup, self.updates = decay, warmup, 0
        self.shadow = {
            name: parameter.detach().to(torch.float32, copy=True)
            for name, parameter in model.named_parameters()
        }
        self.buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the model's current values."""
        decay = self.decay
        if self.warmup:
            decay = min(decay, (1 + self.updates) / (10 + self.updates))
        shadows, values = zip(
            *((self.shadow[name], p.to(torch.float32)) for name, p in model.named_parameters()),
            strict=True,
        )
        torch._foreach_lerp_(shadows, values, 1.0 - decay)
        _copy_all((self.buffers[name], buffer) for name, buffer in model.named_buffers())
        self.updates += 1

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Copy the average into the model."""
        _write_into(model, self.shadow, self.buffers)

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """Copy the average into the model inside the block; restore the model afterwards."""
        parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
        buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        self.copy_to(model)
        try:
            yield
        finally:
            with torch.no_grad():
                _write_into(model, parameters, buffers)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain containers and tensors, for an exact resume."""
        return {"updates": self.updates, "shadow": self.shadow, "buffers": self.buffers}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a saved average of the same model.

        Raises:
            ValueError: the names differ from those of this average.
        """
        for own, saved in ((self.shadow, state["shadow"]), (self.buffers, state["buffers"])):
            if own.keys() != saved.keys():
                differing = sorted(own.keys() ^ saved.keys())
                raise ValueError(f"the saved average belongs to another model: {differing[:3]}")
            for name, value in saved.items():
                own[name].copy_(value)
        self.updates = int(state["updates"])


def _write_into(
    model: nn.Module, parameters: dict[str, Tensor], buffers: dict[str, Tensor]
) -> None:
    _copy_all((parameter, parameters[name]) for name, parameter in model.named_parameters())
    _copy_all((buffer, buffers[name]) for name, buffer in model.named_buffers())


def _copy_all(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy the second tensor of each pair into the first, in few kernels."""
    listed = list(pairs)
    if listed:  # torch rejects empty lists
        targets, sources = zip(*listed, strict=True)
        torch._foreach_copy_(targets, sources)
