"""Read, load and save checkpoints and training states.

Reading a pickled file never runs code from it (:mod:`pab.core.tensor_files`).
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pab.core.counts import counted
from pab.core.errors import InputError
from pab.core.file_kinds import Kind, file_kind
from pab.core.files import atomic_path, existing_file, sha256_of_file
from pab.core.notices import notice
from pab.core.progress import progress
from pab.core.state_dicts import model_state as model_state
from pab.core.tensor_files import other_kind, read_tensors, write_tensors

COUNTER = "num_batches_tracked"  # integer buffer of BatchNorm
NAMES_SHOWN = 5  # maximum number of tensor names in a message
# Version 2 adds skipped steps, metadata of weight files and hashes of the run's input files.
TRAINING_STATE_VERSION = 2
READABLE_STATE_VERSIONS = (1, TRAINING_STATE_VERSION)
STATE_MARK = "training_state"  # key that holds a training state's version
SINCE_VERSION_2 = {"skipped", "facts", "content"}  # fields of a state that version 1 lacks
LET_IN = (argparse.Namespace,)  # released checkpoints store their arguments in this class
SAFETENSORS = ".safetensors"
COPY_AGAIN = "copy or download it again from its source"  # the remedy for a damaged checkpoint


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; tensors stay on disk until used, if the format allows it.

    The format is detected from the content, not from the file name.

    Args:
        path: a safetensors file, or a file written by ``torch.save``.

    Returns:
        ``{"model": tensors, "metadata": {str: str}}`` for a safetensors file, the result of
        :func:`weights_of_state` for a training state, otherwise the content of the file.

    Raises:
        InputError: the file is missing, damaged, not a checkpoint, or holds Python objects that are
            not allowed.
    """
    path = existing_file(path, "a checkpoint")
    found = file_kind(path)
    named_safetensors = path.suffix == SAFETENSORS
    if found.kind is Kind.SAFETENSORS:
        if path.suffix and not named_safetensors:
            notice(
                path,
                f"its extension is {path.suffix}, but it is a safetensors file",
            )
        return _read_safetensors(path)
    if named_safetensors and found.kind is not Kind.TORCH:
        raise other_kind(path, "a safetensors file", found, COPY_AGAIN)
    if named_safetensors:
        notice(path, f"its extension is {SAFETENSORS}, but it is a torch.save file")
    loaded = read_tensors(path, "a checkpoint", mmap=True, also=LET_IN, todo=COPY_AGAIN)
    if not isinstance(loaded, Mapping):
        raise InputError(
            path, f"expected a checkpoint (a dict of tensors), found {type(loaded).__name__}"
        )
    return weights_of_state(loaded, path) if STATE_MARK in loaded else dict(loaded)


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            return {"model": tensors, "metadata": handle.metadata() or {}}
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            path, f"expected a safetensors file, found a damaged one ({error})", todo=COPY_AGAIN
        ) from error


@dataclass(frozen=True, slots=True)
class LoadReport:
    """Names of the tensors that :func:`load_strict` has and has not loaded."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...]  # only in the model, which keeps its initial value
    unexpected: tuple[str, ...]  # only in the checkpoint
    ignored: tuple[str, ...]  # names that match `ignore`

    def warn(self, path: str | Path) -> None:
        """Print a notice about newly initialized tensors and one about skipped ones, if any."""
        for what, names in (("newly initialized", self.missing), ("left out", self.unexpected)):
            if names:
                groups = sorted({".".join(name.split(".")[:2]) for name in names})
                notice(path, f"{what}: {counted(len(names), 'tensor')} ({_some(groups)})")


def load_strict(
    model: nn.Module,
    state: Mapping[str, Tensor],
    path: str | Path,
    *,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    ignore: Sequence[str] = (),
) -> LoadReport:
    """Copy weights into a model and cast them to the model's dtype; copy all of them or none.

    Args:
        model: receives the weights.
        state: tensor name -> tensor, as :func:`model_state` returns it.
        path: file of the weights, for the error.
        allow_missing: shell-style patterns of names that the checkpoint may lack.
        allow_unexpected: patterns of names that the model may lack.
        ignore: patterns of names that are neither loaded nor compared.

    Raises:
        InputError: names, shapes or kinds of dtype (float or integer) differ, or a weight is NaN,
            infinite or too large for the model's dtype. The model is unchanged.
    """
    own = model.state_dict()
    # A cast of a whole state also casts the batch counters of BatchNorm, which scoring ignores.
    counts = {name: tensor for name, tensor in state.items() if name.endswith(COUNTER)}
    casts = (name for name in counts.keys() & own.keys() if counts[name].is_floating_point())
    ignore = (*ignore, *casts)
    ignored = tuple(sorted(name for name in {*own, *state} if _matches(name, ignore)))
    wanted = {name: tensor for name, tensor in own.items() if not _matches(name, ignore)}
    given = {name: tensor for name, tensor in state.items() if not _matches(name, ignore)}
    missing = [name for name in wanted if name not in given]
    unexpected = [name for name in given if name not in wanted]
    loaded = [name for name in wanted if name in given]
    problems = {
        "missing": [name for name in missing if not _matches(name, allow_missing)],
        "unexpected": [name for name in unexpected if not _matches(name, allow_unexpected)],
        "of another shape": [
            f"{name} (expected {list(wanted[name].shape)}, found {list(given[name].shape)})"
            for name in loaded if wanted[name].shape != given[name].shape
        ],
        "of another kind of dtype": [
            f"{name} (expected {wanted[name].dtype}, found {given[name].dtype})"
            for name in loaded
            if wanted[name].is_floating_point() != given[name].is_floating_point()
        ],
    }  # fmt: skip
    found = [f"{len(names)} {what}: {_some(names)}" for what, names in problems.items() if names]
    if found:
        raise InputError(
            path, f"its tensors do not fit the model: {'; '.join(found)}",
            todo="use a checkpoint of this model and size",
        )  # fmt: skip
    for name in progress(loaded, "reading weights", "tensors"):
        _require_finite(given[name], wanted[name].dtype, name, path)
    with torch.no_grad():
        for name in loaded:
            wanted[name].copy_(given[name])
    return LoadReport(tuple(loaded), tuple(missing), tuple(unexpected), ignored)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return f"{', '.join(names[:NAMES_SHOWN])}{more}"


def _require_finite(value: Tensor, dtype: torch.dtype, name: str, path: str | Path) -> None:
    """Reject NaN and infinity, and values that overflow in the model's dtype."""
    if not value.is_floating_point():
        return
    # The sum is finite for nearly every valid tensor; count elements only if it is not.
    if not torch.isfinite(value.sum(dtype=torch.float32)):
        bad = int((~torch.isfinite(value)).sum())
        if bad:
            raise InputError(
                path, f"expected finite weights, found NaN or infinity in {bad} of {value.numel()}",
                item=f"tensor '{name}'", todo="the file is damaged or its training diverged",
            )  # fmt: skip
    if torch.finfo(dtype).max < torch.finfo(value.dtype).max:
        bad = int((~torch.isfinite(value.to(dtype))).sum())
        if bad:
            raise InputError(
                path, f"expected weights in the range of {dtype}, found larger ones: {bad} of "
                f"{value.numel()}",
                item=f"tensor '{name}'", todo="load the model in fp32",
            )  # fmt: skip


def checkpoint_hash(path: str | Path) -> str:
    """Return the SHA-256 of a checkpoint file, as 64 hex digits."""
    return sha256_of_file(existing_file(path, "a checkpoint"))


def save_weights(
    path: str | Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write weights atomically; equal weights and metadata give equal bytes.

    Args:
        path: file to write. Its extension selects the format: ``.safetensors``, or ``.pth`` or
            ``.pt`` with ``{"model": ..., "metadata": ...}``.
        state: tensor name -> tensor. Tied tensors are written once per name.
        metadata: description and origin of the weights.

    Raises:
        InputError: the extension is unknown, or the file cannot be written.
    """
    path = Path(path)
    facts = {str(key): str(value) for key, value in sorted((metadata or {}).items())}
    tensors = _apart(state)
    if path.suffix == SAFETENSORS:
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata=facts)
            _sort_metadata(temporary)
    elif path.suffix in (".pth", ".pt"):
        write_tensors(path, {"model": tensors, "metadata": facts})
    else:
        raise InputError(path, "expected the extension .safetensors, .pth or .pt")


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous tensors on the CPU of which no two share memory; copy only if necessary.

    Saving a view would write its whole storage, and safetensors rejects shared memory.
    """
    apart: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, given in state.items():
        tensor = given.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        apart[name] = tensor
    return apart


def _sort_metadata(path: Path) -> None:
    """Sort a safetensors file's metadata in place; the library writes it in random order."""
    with path.open("r+b") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
        header = json.loads(handle.read(length))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
        if len(text) > length:
            raise RuntimeError(f"safetensors header grew from {length} to {len(text)} bytes")
        handle.seek(8)
        handle.write(text.ljust(length))


@dataclass(frozen=True)
class TrainingState:
    """State of a training run, from which the run resumes exactly.

    Contains only tensors, plain values and plain containers. ``rng`` has one
    :func:`pab.core.devices.rng_state` per process, by rank.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    step: int  # steps done, skipped ones included; also the position in the schedule
    epoch: int  # current epoch, from 0
    step_in_epoch: int  # steps done in the current epoch
    rng: list[dict[str, Any]]
    config: dict[str, Any]
    scaler: dict[str, Any] = field(default_factory=dict)
    ema: dict[str, Any] | None = None
    best_metric: float | None = None
    skipped: dict[str, int] = field(default_factory=dict)  # numbers of skipped steps: total, in_row
    facts: dict[str, str] = field(default_factory=dict)  # metadata of the run's weight files
    content: dict[str, str] = field(default_factory=dict)  # setting -> hash of its files


_STATE_FIELDS = tuple(one.name for one in fields(TrainingState))


def save_training_state(path: str | Path, state: TrainingState) -> None:
    """Write a training state atomically.

    Raises:
        TypeError: a value of the state cannot be stored; the message says where it is.
        InputError: the file cannot be written.
    """
    values = {name: _plain(getattr(state, name), name) for name in _STATE_FIELDS}
    write_tensors(path, {STATE_MARK: TRAINING_STATE_VERSION, **values})


def load_training_state(path: str | Path, *, mmap: bool = False) -> TrainingState:
    """Read a training state of this or an earlier version onto the CPU.

    Args:
        path: the file.
        mmap: leave tensors on disk until they are used; only for callers that never write to them.

    Raises:
        InputError: the file is missing, damaged, or not a training state of a known version.
    """
    loaded = read_tensors(path, "a training state", mmap=mmap, also=LET_IN)
    version = loaded.pop(STATE_MARK, None) if isinstance(loaded, dict) else None
    names = set(_STATE_FIELDS) - (SINCE_VERSION_2 if version == 1 else set())
    if version not in READABLE_STATE_VERSIONS or loaded.keys() != names:
        found = "another file" if version is None else f"version {version}"
        if version in READABLE_STATE_VERSIONS:
            found += f" with missing or unknown fields: {', '.join(sorted(names ^ loaded.keys()))}"
        raise InputError(
            path,
            f"expected a training state of version 1 to {TRAINING_STATE_VERSION}, found {found}",
            todo="weights cannot resume a run, but a new run can start from them",
        )
    return TrainingState(**loaded)


def weights_of_state(loaded: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """Extract the weights and their metadata from a training state.

    Args:
        loaded: a training state as read from its file.
        path: the file, for the notice.

    Returns:
        ``{"model": ..., "metadata": ..., "config": ..., "training_state": ..., "step": ...}``.
        ``model`` holds the averaged weights if the run keeps an average (EMA). ``metadata`` is that
        of the run's weight files, and ``training_state`` the version of the state.

    Raises:
        InputError: the file has no weights, or a malformed average.
    """
    weights, average = loaded.get("model"), loaded.get("ema")
    if not isinstance(weights, Mapping):
        raise InputError(path, "expected a training state, found one without weights")
    kind = "its weights"
    if isinstance(average, Mapping):
        shadow, buffers = average.get("shadow"), average.get("buffers")
        if not (isinstance(shadow, Mapping) and isinstance(buffers, Mapping)):
            raise InputError(path, "expected shadow and buffers under ema, found another structure")
        averaged = {**shadow, **buffers}
        weights = {name: averaged.get(name, tensor) for name, tensor in weights.items()}
        kind = "its averaged weights (--ema_decay)"
    notice(path, f"a training state; {kind} are used")
    return {
        "model": dict(weights),
        "metadata": dict(loaded.get("facts") or {}),
        "config": dict(loaded.get("config") or {}),
        STATE_MARK: loaded[STATE_MARK],
        "step": loaded.get("step"),
    }


def _plain(value: Any, where: str) -> Any:
    """Convert a value to tensors, plain values and plain containers, which safe reading accepts."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, Mapping):
        return {_plain(k, where): _plain(v, f"{where}[{k!r}]") for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(item, f"{where}[{i}]") for i, item in enumerate(value))
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"{where}: {type(value).__name__} cannot be stored in a training state")
