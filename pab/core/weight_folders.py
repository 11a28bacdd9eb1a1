"""Detect the library and model of a folder of weights from its content.

The folder may be renamed, copied or made of links; its name is ignored.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pab.core.errors import InputError
from pab.core.file_kinds import Kind, file_kind
from pab.core.files import existing_folder

OPENCLIP_CONFIG = "open_clip_config.json"
TRANSFORMERS_CONFIG = "config.json"
# File names used by libraries; in a folder with several files, the first of these wins.
USUAL_NAMES = (
    "open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors",
    "pytorch_model.bin",
)  # fmt: skip
# Prefixes of files that training writes beside weights.
NO_WEIGHTS = ("optimizer", "scheduler", "scaler", "rng_state", "training_args")


class Family(enum.Enum):
    """Kind of model in a folder."""

    OPENCLIP = "an OpenCLIP model"
    TRANSFORMERS_CLIP = "a CLIP model of transformers"
    BERT = "BERT's weights"
    BLIP2 = "a BLIP-2 model of transformers"
    VOCABULARY = "a vocabulary without weights"
    WEIGHTS = "weights without a configuration"
    OTHER = "another model of transformers"
    NONE = "no weights"


@dataclass(frozen=True, slots=True)
class WeightFolder:
    """Model of a folder, and its weight files: those of ``torch.save`` and safetensors.

    Files with usual names come first. They are included even if they are damaged, so that reading
    them reports the damage.
    """

    path: Path
    family: Family
    weights: tuple[Path, ...]


def weight_folder(path: str | Path) -> WeightFolder:
    """Detect the content of a folder.

    Raises:
        InputError: the path is not a folder.
    """
    path = existing_folder(path, "a folder of weights")
    weights = tuple(sorted(_weights(path), key=_by_usual_name))
    return WeightFolder(path, _family(path, weights), weights)


def weights_of_folder(path: str | Path, family: Family) -> Path:
    """Find the weight file in a folder of the given kind, or in one without a configuration.

    Raises:
        InputError: the path is not a folder, or the folder holds another model, no weights, or
            several files without a usual name.
    """
    folder = weight_folder(path)
    if folder.family not in (family, Family.WEIGHTS):
        raise InputError(path, f"expected {family.value} in it, found {folder.family.value}")
    return only_weights(folder)


def only_weights(folder: WeightFolder) -> Path:
    """Return the folder's single weight file, or the one with a usual name.

    Raises:
        InputError: there is no weight file, or several but none with a usual name.
    """
    if not folder.weights:
        raise InputError(folder.path, "holds no weights", todo="pass the weight file instead")
    if len(folder.weights) > 1 and folder.weights[0].name not in USUAL_NAMES:
        names = ", ".join(file.name for file in folder.weights[:3])
        raise InputError(
            folder.path, f"expected one file of weights, found {len(folder.weights)} ({names})",
            todo="pass the file instead of the folder",
        )  # fmt: skip
    return folder.weights[0]


def weights_or_path(path: str | Path) -> Path:
    """Return the weight file in a folder; return the path itself if it holds none.

    Raises:
        InputError: there are several weight files, but none with a usual name.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    folder = weight_folder(path)
    return only_weights(folder) if folder.weights else path


def _weights(path: Path) -> Iterator[Path]:
    for file in path.iterdir():
        if not file.is_file() or file.name.startswith((*NO_WEIGHTS, ".")):
            continue
        kinds = (Kind.TORCH, Kind.SAFETENSORS)
        if file.name in USUAL_NAMES or file_kind(file).kind in kinds:
            yield file


def _by_usual_name(file: Path) -> tuple[int, str]:
    known = file.name in USUAL_NAMES
    return (USUAL_NAMES.index(file.name) if known else len(USUAL_NAMES), file.name)


def _family(path: Path, weights: tuple[Path, ...]) -> Family:
    if (path / OPENCLIP_CONFIG).is_file():
        return Family.OPENCLIP
    config = _json(path / TRANSFORMERS_CONFIG)
    if config is not None:
        return _family_of(config)
    if weights:
        return Family.WEIGHTS
    return Family.VOCABULARY if (path / "vocab.txt").is_file() else Family.NONE


def _family_of(config: dict[str, Any]) -> Family:
    """Return the kind of model that a transformers configuration describes."""
    kind = str(config.get("model_type", "")).lower()
    architectures = " ".join(map(str, config.get("architectures") or ())).lower()
    for family, word in (
        (Family.BLIP2, "blip-2"), (Family.TRANSFORMERS_CLIP, "clip"), (Family.BERT, "bert"),
    ):  # fmt: skip
        if kind == word or (not kind and word.replace("-", "") in architectures):
            return family
    return Family.OTHER


def _json(path: Path) -> dict[str, Any] | None:
    """Read a JSON file; return None if it is missing or does not contain an object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
