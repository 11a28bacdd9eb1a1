"""Find the folder of a vision-language model, and read its files."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

from pab.core.errors import InputError, first_line
from pab.core.files import sha256_of_file
from pab.core.hub import MODEL_FILES

FILES = tuple(f"*{ending}" for ending in MODEL_FILES)
T = TypeVar("T")
Kind = Literal["dense", "late", "reranker", "sparse", "bare"]  # bare: only a transformer
KIND_NAMES: dict[Kind, str] = {
    "dense": "a model with one vector per caption and image", "late": "a late-interaction model",
    "reranker": "a reranker", "sparse": "a sparse embedder", "bare": "a model without modules.json",
}  # fmt: skip
MODULES = "modules.json"  # sentence-transformers' list of modules
LIBRARY_CONFIG = "config_sentence_transformers.json"  # its settings for the whole model
ADAPTER = "adapter_config.json"  # peft's settings; the folder then holds adapters of another model


def model_folder(name: str, flag: str = "--model") -> Path:
    """Return the folder of a model; download a model that is named by its id on the hub.

    A model that was downloaded before can be used without network access. ``HF_HUB_OFFLINE=1``
    forbids downloads.

    Args:
        name: a folder, or an id on the Hugging Face hub (``OWNER/NAME``).
        flag: flag of the name, for errors.

    Raises:
        InputError: the name is a file; or there is no such folder, and the hub has no such model or
            cannot be reached.
    """
    from huggingface_hub import snapshot_download

    path = Path(name)
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(flag, f"expected a folder or a hub id, found the file {name}")
    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except Exception as error:  # errors of HTTP clients share no base class
        raise InputError(
            flag, f"{name} is neither a folder nor available on the hub ({first_line(error)})",
            todo="check the name, or download the model and pass its folder",
        ) from error  # fmt: skip


def folder_hash(folder: Path) -> str:
    """Return the SHA-256 of all files that a model is read from, with their names.

    Weights, configuration, tokenizer, preprocessing and chat template all change it.
    """
    files = {file for pattern in (*FILES, "*.bin") for file in folder.rglob(pattern)}
    found = hashlib.sha256()
    for file in sorted(files):
        found.update(f"{file.relative_to(folder).as_posix()} {sha256_of_file(file)}\n".encode())
    base = base_folder(folder)
    if base != folder:  # adapters change with the model that they adapt
        found.update(folder_hash(base).encode())
    return found.hexdigest()


def base_folder(folder: Path) -> Path:
    """Return the folder of the model that a folder of adapters adapts, or the folder itself.

    Raises:
        InputError: the settings of the adapters are damaged, or the model that they name cannot be
            found.
    """
    base = read_json(folder / ADAPTER).get("base_model_name_or_path")
    return model_folder(str(base), str(folder / ADAPTER)) if base else folder


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence transformers' load reports in the block; show progress bars only on a terminal."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def setting(path: Path, found: dict[str, Any], name: str, kind: type[T]) -> T | None:
    """Return an entry of a settings file of a model folder; None if it is missing or null.

    Args:
        path: the file, for the error.
        found: its contents.
        name: name of the entry.
        kind: type that the entry must have.

    Raises:
        InputError: the entry has another type.
    """
    value = found.get(name)
    if value is None or (isinstance(value, kind) and not isinstance(value, bool)):
        return value
    raise InputError(
        path, f"field {name!r}: expected {kind.__name__}, found {value!r}",
        todo="download or save the model again",
    )  # fmt: skip


def read_json(path: Path, kind: type[dict[str, Any] | list[Any]] = dict) -> Any:
    """Read a JSON object or list of a model folder; return an empty one if the file is missing.

    Raises:
        InputError: the file is damaged or holds something else.
    """
    if not path.is_file():
        return kind()
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InputError(path, f"expected JSON, found: {first_line(error)}") from error
    if not isinstance(found, kind):
        raise InputError(path, f"expected a JSON {kind.__name__}, found {type(found).__name__}")
    return found
