"""Extract weights from other projects' checkpoints.

Containers may be nested, names may have wrapper prefixes, and values may be adapters or NumPy
arrays.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from itertools import combinations, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pab.core.adapters import alpha_of, has_adapters, merged
from pab.core.errors import InputError
from pab.core.notices import notice

# Keys of the weights. The two that BEiT-3's published reader looks for come first, in the same
# order. An average (EMA) comes last, because published results use the weights themselves.
CONTAINERS = ("model", "module", "state_dict", "model_state_dict", "model_ema")
DEEPEST = 8  # maximum nesting of containers
# Name parts that wrappers add. Those of torch.compile, FSDP and activation checkpointing are never
# a module's real name; those of DistributedDataParallel and Lightning may be.
ALWAYS_WRAPPERS = frozenset({
    "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module",
})  # fmt: skip
WRAPPERS = frozenset({"module", "model"})
COUNTERS = frozenset({"epoch", "step", "global_step", "iteration"})  # not weights


def model_state(
    checkpoint: Mapping[str, Any], path: str | Path, fits: Collection[str] = ()
) -> dict[str, Tensor]:
    """Extract the weights of a checkpoint.

    Args:
        checkpoint: content of the file.
        path: the file, for errors and notices.
        fits: names of the model's tensors. A wrapper prefix that only some names have is removed if
            the result is in ``fits``. Without ``fits``, only a prefix that all names have is
            removed. Parts in :data:`ALWAYS_WRAPPERS` are always removed.

    Returns:
        Tensor name -> tensor, with adapters merged.

    Raises:
        InputError: there are no weights, an entry of a container is not a tensor, two tensors would
            get the same name, or adapters cannot be merged.
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
                todo=f"weights are read under {', '.join(CONTAINERS)}, else at the top level",
            )  # fmt: skip
        state[name] = tensor
    names = ([part for part in name.split(".") if part not in ALWAYS_WRAPPERS] for name in state)
    state = _renamed(state, map(".".join, names), path)
    if has_adapters(state):
        state = merged(state, alpha_of(checkpoint), path)
        notice(path, "LoRA adapters are merged into the weights")
    return fit_names(state, fits, path)


def fit_names(
    state: Mapping[str, Tensor], fits: Collection[str], path: str | Path
) -> dict[str, Tensor]:
    """Remove wrapper prefixes from the names of a state dict; see :func:`model_state`.

    Raises:
        InputError: two tensors would get the same name.
    """
    return _renamed(state, unwrapped(list(state), fits), path)


def _container(checkpoint: Mapping[str, Any], path: str | Path) -> Mapping[str, Any]:
    """Find the nested mapping that holds the tensors."""
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
        raise InputError(path, f"expected weights, found more than {DEEPEST} nested dicts")
    empty = (level[key] for key in CONTAINERS if isinstance(level.get(key), Mapping))
    return level if place or _holds_tensors(level) else next(empty, level)


def _holds_tensors(value: object, depth: int = DEEPEST) -> bool:
    """Return true if a dict, or a container nested in it, has a tensor or a NumPy array."""
    if not isinstance(value, Mapping) or depth == 0:
        return False
    if any(isinstance(entry, (Tensor, np.ndarray)) for entry in value.values()):
        return True
    return any(_holds_tensors(value.get(key), depth - 1) for key in CONTAINERS)


def _without_remarks(
    found: Mapping[str, Any], fits: Collection[str], path: str | Path
) -> Mapping[str, Any]:
    """Drop entries that are not weights (``epoch``, ``args``) from a dict without a container.

    If a weight is dropped by mistake, strict loading reports it as missing.
    """
    if all(_as_tensor(value) is None for value in found.values()):
        return found  # the caller rejects the first entry by name
    remarks = [
        name for name, value in found.items()
        if _as_tensor(value) is None or _is_remark(name, value, fits)
    ]  # fmt: skip
    if remarks:
        named = ", ".join(map(str, remarks[:5])) + (" ..." if len(remarks) > 5 else "")
        notice(path, f"entries that are not tensors are skipped: {named}")
    return {name: value for name, value in found.items() if name not in remarks}


def _is_remark(name: object, value: object, fits: Collection[str]) -> bool:
    """Return true for a NumPy scalar that is not a weight: a counter, or not in the model."""
    if not isinstance(value, np.generic) or "." in str(name):
        return False
    return name not in fits if fits else name in COUNTERS


def _as_tensor(value: object) -> Tensor | None:
    """Return a tensor, or a numeric NumPy array or scalar converted to one; else None."""
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, (np.ndarray, np.generic)):
        return None
    array = np.array(value)  # own memory, writable
    try:
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    except TypeError:  # text, or a dtype that torch lacks
        return None


def _renamed(
    state: Mapping[str, Tensor], names: Iterable[str], path: str | Path
) -> dict[str, Tensor]:
    """Rename the tensors of a state dict, in order; reject equal names."""
    found: dict[str, Tensor] = {}
    source: dict[str, str] = {}
    for (old, tensor), new in zip(state.items(), names, strict=True):
        if new in found:
            raise InputError(
                path, f"holds the weights of one model twice: {source[new]!r} and {old!r}",
                todo="save only one of them",
            )  # fmt: skip
        found[new], source[new] = tensor, old
    return found


def unwrapped(names: list[str], fits: Collection[str] = ()) -> list[str]:
    """Remove wrapper prefixes, in any order and number, from names; always keep the last part.

    Args:
        names: tensor names without the parts in :data:`ALWAYS_WRAPPERS`.
        fits: names of the model's tensors; see :func:`model_state`.
    """
    wanted = frozenset(fits)
    wrappers = (takewhile(WRAPPERS.__contains__, name.split(".")[:-1]) for name in names)
    shared = min((len(list(leading)) for leading in wrappers), default=0)
    # Among equal fits, remove the fewest parts to keep real names; if no name fits, remove all.
    kept = [[_dropped(name, range(count)) for name in names] for count in range(shared + 1)]
    count = [len(wanted.intersection(candidate)) for candidate in kept]
    best = kept[count.index(max(count)) if any(count) else shared]
    taken = wanted.intersection(best)
    return [name if name in wanted else _fitting(name, wanted, taken) for name in best]


def _fitting(name: str, wanted: Collection[str], taken: Collection[str]) -> str:
    """Remove the fewest wrapper parts that give a name in ``wanted``; else keep the name."""
    places = [place for place, part in enumerate(name.split(".")[:-1]) if part in WRAPPERS]
    for count in range(1, len(places) + 1):
        for chosen in combinations(places, count):
            candidate = _dropped(name, chosen)
            if candidate in wanted and candidate not in taken:
                return candidate
    return name


def _dropped(name: str, places: Collection[int]) -> str:
    return ".".join(part for place, part in enumerate(name.split(".")) if place not in places)
