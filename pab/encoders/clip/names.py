"""Resolve an OpenCLIP model name: an architecture, or a folder that describes one."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
from open_clip.factory import get_model_config

from pab.core.errors import InputError, first_line
from pab.core.files import existing_folder, sha256_of_file
from pab.core.weight_folders import OPENCLIP_CONFIG, weight_folder

FOLDER = "local-dir:"  # OpenCLIP's prefix for a model folder
TOKENIZER_FILES = ("*token*.json", "*.model", "vocab*", "merges.txt")
NAMES_SHOWN = 5


def architecture(name: str) -> dict[str, Any]:
    """Return OpenCLIP's configuration of a model.

    Raises:
        InputError: unknown model (the message suggests similar names), or a folder that is missing
            or lacks a valid configuration.
    """
    if name.startswith(FOLDER):
        found = folder_config(name).get("model_cfg")
        if not isinstance(found, dict):
            raise InputError(name.removeprefix(FOLDER), f"its {OPENCLIP_CONFIG} has no model_cfg")
        return found
    config = get_model_config(name)
    if config is None and Path(name).is_dir():
        raise InputError(
            "--model", f"{name} is a folder, expected the OpenCLIP name of a model",
            todo=f"use --model {FOLDER}{name}",
        )  # fmt: skip
    if config is None:
        near = difflib.get_close_matches(name, open_clip.list_models(), NAMES_SHOWN, cutoff=0.3)
        raise InputError(
            "--model", f"OpenCLIP has no architecture {name!r}",
            todo=f"the nearest names are {', '.join(near)}" if near else "see OpenCLIP's models",
        )  # fmt: skip
    return dict(config)


def folder_config(name: str) -> dict[str, Any]:
    """Read a model folder's configuration.

    Raises:
        InputError: the folder or its configuration is missing, or the file is not a JSON object.
    """
    folder = existing_folder(name.removeprefix(FOLDER), "the folder of an OpenCLIP model")
    path = folder / OPENCLIP_CONFIG
    if not path.is_file():
        raise InputError(
            folder, f"expected an OpenCLIP model with its {OPENCLIP_CONFIG}, found "
            f"{weight_folder(folder).family.value}",
            todo="download the model in OpenCLIP's format, or set --model to an architecture and "
            "--pretrained to the file",
        )  # fmt: skip
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(path, f"expected JSON, found: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise InputError(path, f"expected a JSON object, found {type(found).__name__}")
    return found


def folder_preprocessing(name: str) -> dict[str, Any]:
    """Read the preprocessing settings of a model folder; empty for an OpenCLIP architecture."""
    return dict(folder_config(name).get("preprocess_cfg") or {}) if name.startswith(FOLDER) else {}


def label(name: str) -> str:
    """Return the model name for checkpoints: the architecture, or the folder's base name."""
    return Path(name.removeprefix(FOLDER)).name if name.startswith(FOLDER) else name


def identity(name: str) -> str:
    """Return the model name for fingerprints; the path of a folder has no effect on vectors.

    The weights and the architecture are facts of their own. For a folder, the SHA-256 of its
    tokenizer files is part of the result.
    """
    if not name.startswith(FOLDER):
        return name
    found, folder = hashlib.sha256(), Path(name.removeprefix(FOLDER))
    files = {file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)}
    for file in sorted(files):
        found.update(f"{file.name} {sha256_of_file(file)}\n".encode())
    return f"local-dir, tokenizer {found.hexdigest()}"


@contextmanager
def only_errors_logged() -> Iterator[None]:
    """Suppress warnings of OpenCLIP and the hub client in the block."""
    loggers = [logging.getLogger(name) for name in (None, "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
