"""Find the folder of a vision-language model, and load a model of transformers strictly."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from pab.core.errors import InputError, first_line
from pab.core.files import sha256_of_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Files that a hub repository may hold and a model is read from. No pickles, no code.
FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
ADAPTER = "adapter_config.json"  # peft's settings; the folder then holds adapters of another model


def model_folder(name: str, flag: str = "--model") -> Path:
    """Return the folder of a model; download a model that is named by its id on the hub.

    A downloaded model is used again without the network. ``HF_HUB_OFFLINE=1`` forbids downloads.

    Args:
        name: a folder, or an id on the Hugging Face hub (``OWNER/NAME``).
        flag: flag of the name, for errors.

    Raises:
        InputError: no such folder, and the hub has no such model or cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    path = Path(name)
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(flag, f"expected a folder or a hub id, found the file {name}")
    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except (OSError, ValueError, HFValidationError) as error:  # HTTP errors are OSErrors
        raise InputError(
            flag, f"{name} is not a folder, nor a model that the hub has ({first_line(error)})",
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
        InputError: the adapters name a model that is not there.
    """
    base = read_json(folder / ADAPTER).get("base_model_name_or_path")
    return model_folder(str(base), str(folder / ADAPTER)) if base else folder


def check_image_text_model(folder: Path) -> None:
    """Reject a folder without a model, and models that do not read images and text.

    Raises:
        InputError: the message names what was found.
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig

    folder = base_folder(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            folder, f"expected a model of images and text: {first_line(error)}",
            todo="pass a folder with config.json, as transformers saves it",
        ) from error  # fmt: skip
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        found = ", ".join(config.architectures or [config.model_type])
        raise InputError(
            folder, f"expected a model of images and text, found {found}",
            todo="use a vision-language model (transformers' AutoModelForImageTextToText)",
        )  # fmt: skip


def load_image_text_model(
    folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """Load a model that reads images and text, in evaluation mode; every weight must exist.

    Args:
        folder: folder of the model.
        dtype: dtype of the weights.
        device: device of the weights; ``meta`` reads only their names and shapes.

    Raises:
        InputError: the folder holds another kind of model, or weights are missing or do not fit.
    """
    from transformers import AutoModelForImageTextToText

    try:
        with quiet_loading():
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                folder, dtype=dtype, device_map={"": str(device)}, output_loading_info=True,
                trust_remote_code=False,
            )  # fmt: skip
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise InputError(
            folder, f"its weights cannot be read: {first_line(error)}",
            todo="download or save the model again",
        ) from error  # fmt: skip
    model, report = loaded
    for key in ("missing_keys", "mismatched_keys"):
        if names := sorted(map(str, report[key])):
            raise InputError(
                folder, f"{len(names)} weights of the model are {key.removesuffix('_keys')}",
                item=f"weight {names[0]!r}", todo="download or save the model again",
            )  # fmt: skip
    return cast("PreTrainedModel", model.eval())


def load_processor(folder: Path) -> Any:
    """Load a model's processor: its tokenizer, image processor and chat template.

    Captions are padded on the left, so that the last position of each row is a token.

    Raises:
        InputError: one of the three is missing or cannot be read.
    """
    from transformers import AutoProcessor

    try:
        with quiet_loading():
            processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, TypeError) as error:
        raise InputError(
            folder, f"its processor cannot be read: {first_line(error)}",
            todo="the folder needs preprocessor_config.json or processor_config.json",
        ) from error  # fmt: skip
    for part, file in (
        ("image_processor", "preprocessor_config.json or processor_config.json"),
        ("tokenizer", "tokenizer.json"), ("chat_template", "chat_template.jinja"),
    ):  # fmt: skip
        if getattr(processor, part, None) is None:
            name = part.replace("_", " ")
            raise InputError(
                folder, f"expected a model with {'an' if name[0] in 'aei' else 'a'} {name}, found "
                f"only {type(processor).__name__}",
                todo=f"the folder needs {file}; a model of text alone cannot rank images",
            )  # fmt: skip
    processor.tokenizer.padding_side = "left"
    return processor


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence transformers' load reports in the block; show its bars only on a terminal."""
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
