"""Parameter groups, learning-rate schedule, skipped non-finite steps, and EMA of the weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pab.core.errors import InputError
from pab.training.optim import (
    Ema,
    clip_and_step,
    make_adamw,
    parameter_groups,
    set_lr,
    warmup_cosine,
)

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "beit3_tiny.json"
needs_golden = pytest.mark.skipif(
    not GOLDEN.is_file(), reason="reference values (../shared/golden) not found"
)


class Tower(nn.Module):
    """Model of an embedding, two blocks and a head, which are layers 0 to 3."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(3, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.head = nn.Linear(4, 2, bias=False)
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x)


def layer_of(name: str) -> int:
    if name.startswith("embed"):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks") else 3


def is_bias(name: str, parameter: Tensor) -> bool:
    return parameter.ndim == 1


def tower_groups(model: nn.Module) -> list[dict]:  # type: ignore[type-arg]
    return parameter_groups(
        model.named_parameters(), weight_decay=0.05, no_decay=is_bias, layer_of=layer_of,
        n_layers=2, layer_decay=0.5,
    )  # fmt: skip


def test_groups_by_layer_and_decay() -> None:
    found = {
        name: (group["lr_scale"], group["weight_decay"])
        for group in tower_groups(Tower())
        for name in group["names"]
    }
    assert found == {
        "embed.weight": (0.125, 0.05),
        "embed.bias": (0.125, 0.0),
        "blocks.0.weight": (0.25, 0.05),
        "blocks.0.bias": (0.25, 0.0),
        "blocks.1.weight": (0.5, 0.05),
        "blocks.1.bias": (0.5, 0.0),
        "head.weight": (1.0, 0.05),
    }  # no group has the frozen parameter


def test_every_trainable_parameter_is_in_one_group_with_its_name() -> None:
    model = Tower()
    pairs = [
        (name, id(parameter))
        for group in tower_groups(model)
        for name, parameter in zip(group["names"], group["params"], strict=True)
    ]
    assert sorted(pairs) == sorted((n, id(p)) for n, p in model.named_parameters() if n != "frozen")


def test_without_layers_all_groups_have_one_learning_rate() -> None:
    groups = parameter_groups(Tower().named_parameters(), weight_decay=0.1, no_decay=is_bias)
    assert [(g["lr_scale"], g["weight_decay"]) for g in groups] == [(1.0, 0.1), (1.0, 0.0)]


def test_a_layer_outside_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"embed.weight: layer 9 is not in 0 .. 3"):
        parameter_groups(
            Tower().named_parameters(), weight_decay=0.0, no_decay=is_bias,
            layer_of=lambda _: 9, n_layers=2,
        )  # fmt: skip


def beit3_layer_of(name: str) -> int:
    if ".layers." in name:
        return int(name.split(".layers.")[1].split(".")[0]) + 1
    return 0 if "embed" in name else 4


@needs_golden
def test_groups_equal_the_reference() -> None:
    golden = json.loads(GOLDEN.read_text())["optimizer_groups"]
    wanted = golden["params"]
    groups = parameter_groups(
        [(name, nn.Parameter(torch.zeros(1))) for name in wanted],
        weight_decay=golden["weight_decay"],
        no_decay=lambda name, _: wanted[name]["weight_decay"] == 0.0,
        layer_of=beit3_layer_of, n_layers=3, layer_decay=golden["layer_decay"],
    )  # fmt: skip
    for group in groups:
        for name in group["names"]:
            assert group["lr_scale"] == pytest.approx(wanted[name]["lr_scale"], rel=1e-12)
            assert group["weight_decay"] == wanted[name]["weight_decay"]
    assert sum(len(group["names"]) for group in groups) == len(wanted)


@needs_golden
def test_schedule_equals_the_reference() -> None:
    golden = json.loads(GOLDEN.read_text())["lr_schedule"]
    total = golden["epochs"] * golden["steps_per_epoch"]
    rates = warmup_cosine(
        golden["lr"], golden["min_lr"], total, golden["warmup_steps"], golden["start_warmup_lr"]
    )
    assert len(rates) == total
    for step, rate in golden["values_at"].items():
        assert rates[int(step)] == pytest.approx(rate, rel=1e-12, abs=0.0)


def test_schedule_by_hand() -> None:
    rates = warmup_cosine(1.0, 0.2, total_steps=9, warmup_steps=5)
    assert rates[:5] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert rates[5:] == pytest.approx(
        [1.0, 0.6 + 0.4 * math.sqrt(0.5), 0.6, 0.6 - 0.4 * math.sqrt(0.5)], rel=1e-12
    )
    assert warmup_cosine(1.0, 0.0, 3, 3, start_lr=0.5) == [0.5, 0.75, 1.0]
    assert warmup_cosine(1.0, 0.0, 2, 0) == [1.0, 0.5]
    assert warmup_cosine(1.0, 0.0, 0, 0) == []
    assert all(type(rate) is float for rate in rates)


@pytest.mark.parametrize(("total", "warmup"), [(10, 11), (10, -1), (-1, 0)])
def test_impossible_schedules_are_refused(total: int, warmup: int) -> None:
    with pytest.raises(InputError, match="--warmup_steps"):
        warmup_cosine(1.0, 0.0, total, warmup)


def test_learning_rate_is_base_times_scale() -> None:
    optimizer = make_adamw(tower_groups(Tower()), (0.9, 0.999), 1e-8)
    assert {group["lr"] for group in optimizer.param_groups} == {0.0}
    set_lr(optimizer, 0.8)
    assert {(g["lr_scale"], g["lr"]) for g in optimizer.param_groups} == {
        (0.125, 0.1), (0.25, 0.2), (0.5, 0.4), (1.0, 0.8),
    }  # fmt: skip


def test_adamw_step_by_hand() -> None:
    """Check parameters with and without weight decay against the published rule in float64."""
    weight, bias = nn.Parameter(torch.tensor([[2.0]])), nn.Parameter(torch.tensor([2.0]))
    groups = parameter_groups(
        [("weight", weight), ("bias", bias)], weight_decay=0.1, no_decay=is_bias
    )
    optimizer = make_adamw(groups, (0.9, 0.98), 1e-8)
    set_lr(optimizer, 0.01)
    expected = {"weight": 2.0, "bias": 2.0}
    first, second = 0.0, 0.0
    for step, gradient in enumerate([0.5, -1.5, 3.0], 1):
        weight.grad, bias.grad = torch.tensor([[gradient]]), torch.tensor([gradient])
        clip_and_step(optimizer, figures=torch.ones(()))
        first = 0.9 * first + 0.1 * gradient
        second = 0.98 * second + 0.02 * gradient**2
        move = first / (1 - 0.9**step) / (math.sqrt(second / (1 - 0.98**step)) + 1e-8)
        for name, decay in (("weight", 0.1), ("bias", 0.0)):
            expected[name] = expected[name] * (1 - 0.01 * decay) - 0.01 * move
    assert weight.item() == pytest.approx(expected["weight"], rel=1e-6)
    assert bias.item() == pytest.approx(expected["bias"], rel=1e-6)


def backward(
    model: nn.Module, factor: float = 1.0, scaler: torch.amp.GradScaler | None = None
) -> Tensor:
    torch.manual_seed(1)
    loss: Tensor = factor * model(torch.randn(6, 3)).square().mean()
    (loss if scaler is None else scaler.scale(loss)).backward()
    return loss


def test_norm_and_clipping() -> None:
    model = Tower()
    optimizer = torch.optim.SGD(tower_groups(model), lr=1.0, weight_decay=0.0)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss = backward(model, 1000.0)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    wanted = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    norm, problem, _ = clip_and_step(optimizer, figures=loss, max_norm=0.5)
    assert not problem
    assert norm == pytest.approx(wanted, rel=1e-5)
    assert norm > 0.5
    moved = [p.detach() - before[name] for name, p in model.named_parameters()]
    assert math.sqrt(sum(float(m.square().sum()) for m in moved)) == pytest.approx(0.5, rel=1e-4)


def test_small_gradients_are_not_changed_by_clipping() -> None:
    results = []
    for max_norm in (None, 1e6):
        model = Tower()
        optimizer = make_adamw(tower_groups(model), (0.9, 0.999), 1e-8)
        set_lr(optimizer, 0.1)
        clip_and_step(optimizer, figures=backward(model), max_norm=max_norm)
        results.append(model.head.weight.detach().clone())
    assert torch.equal(*results)


def plain(value: Any) -> Any:
    """Convert the tensors of a state dict to lists, for comparison."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped(where: str, bad: float, scale: float | None) -> None:
    model = Tower()
    optimizer = make_adamw(tower_groups(model), (0.9, 0.999), 1e-8)
    set_lr(optimizer, 0.1)
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    clip_and_step(optimizer, figures=backward(model, scaler=scaler), scaler=scaler)
    optimizer.zero_grad()
    before = plain([model.state_dict(), optimizer.state_dict()])
    loss = backward(model, scaler=scaler)
    bias = model.get_parameter("blocks.1.bias")
    assert bias.grad is not None
    if where == "gradient":
        bias.grad[2] = bad
    else:
        loss = loss.detach() * bad
    norm, problem, _ = clip_and_step(optimizer, figures=loss, max_norm=0.5, scaler=scaler)
    assert plain([model.state_dict(), optimizer.state_dict()]) == before
    assert math.isfinite(norm) == (where == "loss")
    assert f"loss {bad:g}" in problem if where == "loss" else f"gradient norm {bad:g}" in problem
    if where == "gradient":
        assert "worst gradients: blocks.1.bias" in problem
    if scaler is not None and where == "gradient":
        assert scaler.get_scale() == 512.0
    optimizer.zero_grad()
    outcome = clip_and_step(optimizer, figures=backward(model, scaler=scaler), scaler=scaler)
    assert not outcome.problem
    assert plain(model.state_dict()) != before[0]


def test_the_worst_gradients_are_named() -> None:
    model = Tower()
    optimizer = make_adamw(tower_groups(model), (0.9, 0.999), 1e-8)
    loss = backward(model)
    bias = model.get_parameter("blocks.1.bias")
    assert bias.grad is not None
    assert model.embed.weight.grad is not None
    bias.grad[2] = float("nan")
    model.embed.weight.grad.fill_(1e6)
    problem = clip_and_step(optimizer, figures=loss, max_norm=1.0).problem
    assert "gradients: blocks.1.bias (nan), embed.weight (" in problem


def test_no_gradient_at_all_is_an_error() -> None:
    optimizer = make_adamw(tower_groups(Tower()), (0.9, 0.999), 1e-8)
    with pytest.raises(RuntimeError, match="backward was not called"):
        clip_and_step(optimizer, figures=torch.ones(()))


def test_loss_scaling_gives_the_same_step() -> None:
    plain, scaled = Tower(), Tower()
    for model, scaler in ((plain, None), (scaled, torch.amp.GradScaler("cpu", init_scale=1024.0))):
        optimizer = make_adamw(tower_groups(model), (0.9, 0.999), 1e-8)
        set_lr(optimizer, 0.1)
        loss = backward(model, scaler=scaler)
        clip_and_step(optimizer, figures=loss, max_norm=0.1, scaler=scaler)
    assert torch.equal(plain.head.weight, scaled.head.weight)


def test_every_overflow_halves_the_scale() -> None:
    model = Tower()
    optimizer = make_adamw(tower_groups(model), (0.9, 0.999), 1e-8)
    set_lr(optimizer, 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for skipped in range(1, 21):
        optimizer.zero_grad()
        loss = model(torch.ones(1, 3)).sum()
        scaler.scale(loss).backward()
        assert model.head.weight.grad is not None
        model.head.weight.grad.fill_(float("inf"))
        assert "head.weight (inf)" in clip_and_step(optimizer, figures=loss, scaler=scaler).problem
        assert scaler.get_scale() == 4.0 * 0.5**skipped


def test_average_follows_its_rule() -> None:
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    ema, warm = Ema(model, 0.9), Ema(model, 0.9, warmup=True)
    with torch.no_grad():
        model.weight.fill_(2.0)
    ema.update(model)
    warm.update(model)
    assert ema.shadow["weight"].item() == pytest.approx(1.1)
    assert warm.shadow["weight"].item() == pytest.approx(0.1 * 1 + 0.9 * 2)
    warm.update(model)
    assert warm.shadow["weight"].item() == pytest.approx(1.9 * 2 / 11 + 2.0 * 9 / 11)


def test_average_is_kept_in_float32_and_buffers_are_copied() -> None:
    model = Tower().to(torch.bfloat16)
    ema = Ema(model, 0.999)
    assert all(value.dtype == torch.float32 for value in ema.shadow.values())
    start = ema.shadow["head.weight"].clone()
    with torch.no_grad():
        model.head.weight.add_(1)
        model.seen.add_(5)
    for _ in range(3):
        ema.update(model)
    # An average in bfloat16 would be too coarse to change.
    assert not torch.equal(ema.shadow["head.weight"], start)
    assert ema.buffers["seen"] == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_average_equals_a_loop_over_tensors_bit_for_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(7, 33), nn.BatchNorm1d(33), nn.Linear(33, 2)).to(dtype)
    ema = Ema(model, 0.9, warmup=True)
    wanted = {name: value.clone() for name, value in ema.shadow.items()}
    for update in range(4):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model(torch.randn(5, 7, dtype=dtype))
        ema.update(model)
        weight = 1 - min(0.9, (1 + update) / (10 + update))
        for name, parameter in model.named_parameters():
            wanted[name].lerp_(parameter.detach().float(), weight)
            assert torch.equal(ema.shadow[name], wanted[name])
    for name, buffer in model.named_buffers():
        assert torch.equal(ema.buffers[name], buffer)


def test_swapping_gives_the_average_and_then_the_model_back() -> None:
    model = Tower()
    ema = Ema(model, 0.5)
    averaged = ema.shadow["head.weight"].clone()
    with torch.no_grad():
        model.head.weight.add_(1)
        model.seen.add_(1)
    own = model.head.weight.detach().clone()
    with pytest.raises(KeyError), ema.swapped(model):  # noqa: PT012
        assert torch.equal(model.head.weight, averaged)
        assert model.seen == 0
        raise KeyError("even when the evaluation fails")
    assert torch.equal(model.head.weight, own)
    assert model.seen == 1
    ema.copy_to(model)
    assert torch.equal(model.head.weight, averaged)


def test_average_is_resumed_exactly() -> None:
    model = Tower()
    ema = Ema(model, 0.9, warmup=True)
    backward(model)
    with torch.no_grad():
        model.head.weight.add_(1)
    ema.update(model)
    other = Ema(Tower(), 0.9, warmup=True)
    other.load_state_dict(ema.state_dict())
    ema.update(model)
    other.update(model)
    assert torch.equal(other.shadow["head.weight"], ema.shadow["head.weight"])
    with pytest.raises(ValueError, match="belongs to another model"):
        Ema(nn.Linear(1, 1), 0.9).load_state_dict(ema.state_dict())


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_impossible_decay_is_refused(decay: float) -> None:
    with pytest.raises(InputError, match="--ema_decay"):
        Ema(nn.Linear(1, 1), decay)
