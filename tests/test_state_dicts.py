"""Weights in foreign checkpoints: any unambiguous combination of containers and prefixes."""

from __future__ import annotations

from argparse import Namespace
from collections import OrderedDict, defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pab.core.errors import InputError
from pab.core.state_dicts import CONTAINERS, model_state, unwrapped

WRAPPER_PARTS = ("module", "_orig_mod", "model", "_fsdp_wrapped_module")


class Blocks(nn.Module):
    """A model with nested parts, a buffer and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.blocks = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))


class Wrapped(nn.Module):
    """A model with a submodule that is itself named ``model``."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Blocks()


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def as_numpy(tensor: Tensor) -> object:
    array = tensor.numpy()
    return array if array.ndim else array[()]


@given(
    prefix=st.lists(st.sampled_from(WRAPPER_PARTS), max_size=4),
    containers=st.lists(st.sampled_from(CONTAINERS), max_size=3),
    kind=st.sampled_from([dict, OrderedDict]),
    arrays=st.booleans(),
    inside=st.booleans(),
    true_model=st.booleans(),
)
def test_any_combination_gives_the_same_weights(
    prefix: list[str], containers: list[str], kind: type, arrays: bool, inside: bool,
    true_model: bool,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    expected = state_of(Wrapped() if true_model else Blocks())
    names = {name: ".".join([*prefix, name]) for name in expected}
    if inside:  # a submodule compiled separately
        names = {n: new.replace("blocks.0", "blocks.0._orig_mod") for n, new in names.items()}
    found: Any = kind(
        (names[name], as_numpy(tensor) if arrays else tensor) for name, tensor in expected.items()
    )
    for container in reversed(containers):
        found = {"epoch": np.float64(3), container: found, "best": np.arange(2)[:0].tolist()}
    assert same(model_state(found, "f", expected.keys()), expected)


@given(
    parts=st.lists(st.lists(st.sampled_from(("module", "model")), max_size=3), min_size=7),
)
def test_prefixes_of_some_names_are_removed_if_the_names_then_match(parts: list[list[str]]) -> None:
    expected = state_of(Blocks())
    # The prefix that all names share is removed from all; the remaining prefixes differ.
    names = [".".join([*part, name]) for part, name in zip(parts, expected, strict=False)]
    names += list(expected)[len(names) :]
    assert unwrapped(names, expected.keys()) == list(expected)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_a_submodule_named_model_keeps_its_name(prefix: str) -> None:
    expected = state_of(Wrapped())
    found = {prefix + name: tensor for name, tensor in expected.items()}
    assert same(model_state({"state_dict": found}, "f", expected.keys()), expected)


def test_without_a_model_only_the_shared_prefix_is_removed() -> None:
    assert unwrapped(["module.a.w", "module.b.w"]) == ["a.w", "b.w"]
    assert unwrapped(["module.a.w", "b.w"]) == ["module.a.w", "b.w"]
    assert unwrapped(["model.module.a", "module.model.a.b"]) == ["a", "a.b"]
    assert unwrapped(["module", "model"]) == ["module", "model"]  # tensor names, not prefixes


def test_other_parts_of_a_training_wrapper_keep_their_names() -> None:
    expected = state_of(Blocks())
    found = {f"model.{name}": tensor for name, tensor in expected.items()}
    found["metric.total"] = torch.zeros(1)
    state = model_state({"state_dict": found}, "f", expected.keys())
    assert same({n: t for n, t in state.items() if n in expected}, expected)
    assert set(state) - set(expected) == {"metric.total"}


def test_a_submodule_wrapped_separately() -> None:
    expected = state_of(Blocks())
    names = [name.replace("blocks.", "blocks.module.") for name in expected]
    found = dict(zip(names, expected.values(), strict=True))
    assert same(model_state(found, "f", expected.keys()), expected)


def test_one_model_twice_is_refused_not_mixed() -> None:
    one, two = torch.ones(1), torch.zeros(1)
    with pytest.raises(InputError, match=r"f: holds the weights of one model twice: '.*a' and "):
        model_state({"module.a": one, "model.a": two}, "f", {"a"})


def test_model_is_preferred_to_model_ema(
    capsys: pytest.CaptureFixture[str],
) -> None:
    raw, average = {"a": torch.zeros(1)}, {"a": torch.ones(1)}
    found = {"model_ema": average, "optimizer": {}, "model": raw}
    assert same(model_state(found, "w.pth"), raw)
    assert capsys.readouterr().err == "note: w.pth: weights under model are read, not model_ema\n"
    assert same(model_state({"model_ema": average}, "w.pth"), average)
    settings: dict[str, Any] = {"model": {"width": 3}, "state_dict": raw}
    assert same(model_state(settings, "w.pth"), raw)  # `model` contains settings, not weights
    assert capsys.readouterr().err == ""


def test_nested_containers() -> None:
    state = {"a": torch.ones(1)}
    assert same(model_state({"state_dict": {"model": {"module": state}}}, "f"), state)
    ring: dict[str, Any] = {}
    ring["model"] = ring
    with pytest.raises(InputError, match=r"f, entry 'model': expected a tensor, found dict"):
        model_state(ring, "f")
    ring["w"] = torch.ones(1)
    with pytest.raises(InputError, match=r"more than 8 nested dicts"):
        model_state(ring, "f")


def test_numpy_values_become_tensors() -> None:
    found = model_state(
        {
            "half": np.ones(2, np.float16), "big": np.ones(2, ">f4"), "one": np.float32(2.5),
            "turned": np.arange(6.0).reshape(2, 3).T, "count": np.int64(7),
        },
        "f",
    )  # fmt: skip
    assert found["half"].dtype == torch.float16
    assert found["big"].tolist() == [1, 1]
    assert found["one"].dtype == torch.float32
    assert found["one"].shape == ()
    assert found["turned"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert found["count"].item() == 7
    with pytest.raises(InputError, match=r"f, entry 'name': expected a tensor, found ndarray"):
        model_state({"name": np.array(["a"])}, "f")
    with pytest.raises(InputError, match=r"f, entry 'lr': expected a tensor, found float"):
        model_state({"model": {"w": torch.ones(1), "lr": 0.1}}, "f")


def test_entries_that_are_not_tensors_are_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    weights = {"a.w": torch.ones(1), "scale": np.float32(2)}
    remarks = {"epoch": np.int64(3), "args": Namespace(lr=1), "name": "x", "history": [0.1]}
    found = model_state({**weights, **remarks}, "f", {"a.w", "scale"})
    assert found.keys() == weights.keys()
    told = "note: f: entries that are not tensors are skipped: epoch, args, name, history\n"
    assert capsys.readouterr().err == told


def test_a_defaultdict_creates_no_default() -> None:
    state: dict[str, Any] = defaultdict(lambda: pytest.fail("a default was made"))
    state["a"] = torch.ones(1)
    assert set(model_state(state, "f")) == {"a"}
