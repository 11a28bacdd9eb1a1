"""Weights inside a checkpoint of others: containers, wrappers' prefixes, adapters, NumPy arrays.

Every mixture of them with one meaning gives the same weights, under the model's own names.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pab.core.adapters import alpha_of, has_adapters, merged
from pab.core.errors import InputError
from pab.core.notices import notice

# Keys of the weights, first the two that BEiT-3's published reader looks for, in its order. An
# average (EMA) comes last: published results are those of the weights themselves.
CONTAINERS = ("model", "module", "state_dict", "model_state_dict", "model_ema")
DEEPEST = 8  # containers within containers
# Parts of names that wrappers add: torch.compile's, FSDP's and activation checkpointing's never are
# a module's real name; DistributedDataParallel's and Lightning's may be.
ALWAYS_WRAPPERS = frozenset({
    "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module",
})  # fmt: skip
WRAPPERS = frozenset({"module", "model"})


def model_state(
    checkpoint: Mapping[str, Any], path: str | Path, fits: Collection[str] = ()
) -> dict[str, Tensor]:
    """Find a checkpoint's weights.

    Args:
        checkpoint: what the file holds.
        path: the file, for errors and notices.
        fits: names of the model's tensors. A wrapper's prefix that only some names have is removed
            if they then are among these; without them, one that all names share.

    Returns:
        Tensor name -> tensor, adapters merged.

    Raises:
        InputError: no weights, an entry that is no tensor, two entries of one name, or adapters
            that cannot be merged.
    """
    found = _container(checkpoint, path)
    if not found:
        raise InputError(path, "expected a model's weights, found an empty dict")
    if found is checkpoint:
        found = _without_remarks(found, fits, path)
    state: dict[str, Tensor] = {}
    for name, value in found.items():
        tensor = _as_tensor(value)
        if not isinstance(name, str) or tensor is None:
            raise InputError(
                path, f"expected a tensor, found {type(value).__name__}", item=f"entry {name!r}",
                todo=f"weights are looked for under {', '.join(CONTAINERS)}, then at the top",
            )  # fmt: skip
        state[name] = tensor
    state = _renamed(state, (_without_always(name) for name in state), path)
    if has_adapters(state):
        state = merged(state, alpha_of(checkpoint), path)
        notice(path, "LoRA adapters are merged into the weights")
    return fit_names(state, fits, path)


def fit_names(
    state: Mapping[str, Tensor], fits: Collection[str], path: str | Path
) -> dict[str, Tensor]:
    """Remove wrappers' prefixes from the names of a state dict; see :func:`model_state`.

    Raises:
        InputError: two tensors would have one name.
    """
    return _renamed(state, unwrapped(list(state), fits), path)


def _container(checkpoint: Mapping[str, Any], path: str | Path) -> Mapping[str, Any]:
    """Descend to the mapping that holds the tensors."""
    place = ""
    level = checkpoint
    for _ in range(DEEPEST):
        held = [key for key in CONTAINERS if _holds_tensors(level.get(key))]
        if not held:
            break
        if len(held) > 1:
            notice(path, f"weights under {place}{held[0]} are read, not {', '.join(held[1:])}")
        level, place = level[held[0]], f"{place}{held[0]}."
    else:
        raise InputError(path, f"expected weights, found more than {DEEPEST} dicts in one another")
    empty = (level[key] for key in CONTAINERS if isinstance(level.get(key), Mapping))
    return level if place or _holds_tensors(level) else next(empty, level)


def _holds_tensors(value: object, depth: int = DEEPEST) -> bool:
    """Whether a value is a dict with a tensor in it or in one of its containers."""
    if not isinstance(value, Mapping) or depth == 0:
        return False
    if any(isinstance(entry, (Tensor, np.ndarray)) for entry in value.values()):
        return True
    return any(_holds_tensors(value.get(key), depth - 1) for key in CONTAINERS)


def _without_remarks(
    found: Mapping[str, Any], fits: Collection[str], path: str | Path
) -> Mapping[str, Any]:
    """The entries of a file without a container that may be weights, if it has tensors.

    Others (``epoch``, ``args``) stand beside them; strict loading tells whether a weight is lost.
    """
    if all(_as_tensor(value) is None for value in found.values()):
        return found  # refused, by the name of its first entry
    remarks = [
        name for name, value in found.items()
        if _as_tensor(value) is None
        or (isinstance(value, np.generic) and fits and name not in fits and "." not in str(name))
    ]  # fmt: skip
    if remarks:
        named = ", ".join(map(str, remarks[:5])) + (" ..." if len(remarks) > 5 else "")
        notice(path, f"entries that are no tensors are left out: {named}")
    return {name: value for name, value in found.items() if name not in remarks}


def _as_tensor(value: object) -> Tensor | None:
    """A tensor, or a NumPy array or scalar of numbers as one; None for anything else."""
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, (np.ndarray, np.generic)):
        return None
    array = np.array(value)  # owned, writable
    try:
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    except TypeError:  # text, or a number that torch does not have
        return None


def _renamed(
    state: Mapping[str, Tensor], names: Iterable[str], path: str | Path
) -> dict[str, Tensor]:
    """The state dict under other names, in the same order.

    Raises:
        InputError: two tensors would have one name.
    """
    found: dict[str, Tensor] = {}
    source: dict[str, str] = {}
    for (old, tensor), new in zip(state.items(), names, strict=True):
        if new in found:
            raise InputError(
                path, f"holds the weights of one model twice: {source[new]!r} and {old!r}",
                todo="save one of them alone",
            )  # fmt: skip
        found[new], source[new] = tensor, old
    return found


def _without_always(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in ALWAYS_WRAPPERS)


def unwrapped(names: list[str], fits: Collection[str] = ()) -> list[str]:
    """Names without the prefixes of wrappers, in any order and number.

    Args:
        names: of tensors, without the parts of :data:`ALWAYS_WRAPPERS`.
        fits: names of the model's tensors; see :func:`model_state`.
    """
    wanted = frozenset(fits)
    shared = min((len(list(_leading(name))) for name in names), default=0)
    # Of equal fits the fewest parts go, so that no real name is lost; all go if no name fits.
    kept = [[_dropped(name, range(count)) for name in names] for count in range(shared + 1)]
    count = [len(wanted.intersection(candidate)) for candidate in kept]
    best = kept[count.index(max(count)) if any(count) else shared]
    taken = wanted.intersection(best)
    return [name if name in wanted else _fitting(name, wanted, taken) for name in best]


def _fitting(name: str, wanted: Collection[str], taken: Collection[str]) -> str:
    """A name that lacks a model's tensor because of wrappers inside it, without these."""
    for candidate in _without_wrappers(name):
        if candidate in wanted and candidate not in taken:
            return candidate
    return name


def _leading(name: str) -> Iterator[str]:
    """The wrappers' parts before a name; its last part is none."""
    return itertools.takewhile(WRAPPERS.__contains__, name.split(".")[:-1])


def _without_wrappers(name: str) -> Iterator[str]:
    """A name with some of its wrappers' parts left out, fewest first."""
    parts = name.split(".")
    places = [place for place, part in enumerate(parts[:-1]) if part in WRAPPERS]
    for count in range(1, len(places) + 1):
        for chosen in itertools.combinations(places, count):
            yield _dropped(name, chosen)


def _dropped(name: str, places: Collection[int]) -> str:
    return ".".join(part for place, part in enumerate(name.split(".")) if place not in places)
