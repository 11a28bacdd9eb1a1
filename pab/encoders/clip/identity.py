"""Check that CLIP weights were saved from the requested model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from open_clip.factory import get_model_config

from pab.core.errors import InputError
from pab.core.notices import notice
from pab.encoders.clip.names import FOLDER, label

# Keys of a checkpoint's metadata: the model's name, and its configuration as JSON.
ARCHITECTURE, CONFIGURATION = "architecture", "architecture_config"
# Settings that may differ: positions are resized, and weights do not contain the tokenizer.
FREE = frozenset({"image_size", "context_length", "hf_tokenizer_name", "tokenizer_kwargs"})


def check_made_as(
    metadata: Mapping[str, str], name: str, config: Mapping[str, Any], path: Path
) -> None:
    """Reject weights that were saved from another model.

    Configurations are compared, because a model folder may have been renamed. Files of earlier
    versions record only a name. If OpenCLIP has an architecture of this name, its configuration is
    compared. Otherwise, the name is that of a folder; loading the weights as the model of another
    folder only prints a notice. Files that record no name are accepted.

    Args:
        metadata: metadata of the weight file.
        name: OpenCLIP's name of the model to load.
        config: configuration of the model to load.
        path: weight file, for the error.

    Raises:
        InputError: the configurations differ, or weights that record only a folder's name are to be
            loaded into an architecture of OpenCLIP.
    """
    made_as = metadata.get(ARCHITECTURE)
    if made_as is None:
        return
    recorded = metadata.get(CONFIGURATION)
    its_own = get_model_config(made_as) if recorded is None else json.loads(recorded)
    if its_own is not None:
        differing = _differing(its_own, config)
        if differing:
            raise InputError(
                path, f"was saved from {made_as}, not {label(name)}: {', '.join(differing)} differ",
                todo=f"use --model {made_as}, or {FOLDER}FOLDER if this is the name of a folder",
            )  # fmt: skip
    elif made_as == label(name):
        return
    elif not name.startswith(FOLDER):
        raise InputError(
            path, f"was saved from the model of a folder named {made_as!r}, not {name}",
            todo=f"use --model {FOLDER}FOLDER with that folder",
        )  # fmt: skip
    elif path.resolve().parent != Path(name.removeprefix(FOLDER)).resolve():
        notice(path, f"saved from a folder named {made_as!r}, read as the model of {label(name)!r}")


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """List the settings that differ between two configurations; a missing setting counts as off."""
    first, second = _settings(one), _settings(other)
    return sorted(key for key in first | second if first.get(key) != second.get(key))


def _settings(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= _settings(value, f"{prefix}{key}.")
        elif key not in FREE and value:
            found[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return found
