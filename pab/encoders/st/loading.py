"""Find the folder of a vision-language model, identify its content, and load it.

A model is a local folder in the format of sentence-transformers or transformers, or a name on the
Hugging Face hub, which is downloaded first. Code from the hub is never run.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from pab.core.errors import InputError
from pab.core.files import sha256_of_file, sha256_of_lines
from pab.encoders.st.library import sentence_transformers

Kind = Literal["dense", "late", "reranker", "sparse", "bare"]

# `model_type` of config_sentence_transformers.json; PyLate writes ColBERT.
_KINDS: dict[str, Kind] = {
    "SentenceTransformer": "dense", "MultiVectorEncoder": "late", "ColBERT": "late",
    "CrossEncoder": "reranker", "SparseEncoder": "sparse",
}  # fmt: skip
_NOT_NEEDED = ("*.onnx*", "onnx/*", "openvino/*", "*.gguf", "*.h5", "*.msgpack", "*.ot")
_NO_PART_OF_THE_MODEL = (".md", ".gitattributes", ".gitignore", ".lock")
# Of incomplete or damaged folders; each file of a folder fails with another one.
_LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError)
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_MISSING = re.compile(r"^(\S+)\s*\|\s*(MISSING|MISMATCH)", re.MULTILINE)


def model_folder(name: str) -> Path:
    """Return the folder of a model; download a model of the hub, as far as it is not stored yet.

    Raises:
        InputError: the folder is missing, or the model cannot be downloaded.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists() or name.startswith(("/", ".", "~")) or not _HUB_NAME.fullmatch(name):
        found = "a file" if path.exists() else "no such folder"
        raise InputError("--model", f"expected a folder or a name on the hub, found {found} {name}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name, ignore_patterns=list(_NOT_NEEDED)))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise InputError(
            "--model", f"no folder, and cannot be downloaded: {first_line(error)}",
            item=f"model {name!r}", todo="check the name and the connection, or pass a folder",
        ) from error  # fmt: skip


def folder_hash(folder: Path) -> str:
    """SHA-256 of the names and contents of a model's files; documentation does not count."""
    lines = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and not hidden and not path.name.endswith(_NO_PART_OF_THE_MODEL):
            lines.append(f"{name.as_posix()}\t{sha256_of_file(path)}")
    return sha256_of_lines(lines)


def kind_of(folder: Path) -> Kind:
    """Identify what a folder's files say about the model; ``bare``: only a transformer.

    Raises:
        InputError: a configuration is not valid JSON, or of a model that is not supported.
    """
    settings = _json(folder / "config_sentence_transformers.json")
    modules = (folder / "modules.json").is_file()
    if "model_type" in settings or modules:
        name = str(settings.get("model_type", "SentenceTransformer"))
        if name not in _KINDS:
            raise InputError(
                folder / "config_sentence_transformers.json",
                f"expected a model_type of {', '.join(_KINDS)}, found {name!r}",
            )
        return _KINDS[name]
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise InputError(folder, "expected a model of transformers, found no config.json")
    architectures = [str(one) for one in _json(folder / "config.json").get("architectures") or ()]
    late = any(one.endswith("ForRetrieval") or one == "HF_ColBERT" for one in architectures)
    return "late" if late else "bare"


def load_model(name: str, folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """Load a model of sentence-transformers in evaluation mode.

    Args:
        name: class of the package, such as ``SentenceTransformer``.
        folder: folder of the model.
        device: device of the model.
        dtype: dtype of the weights.

    Raises:
        InputError: the package is not installed, a file is missing or damaged, the weights do not
            fit, or the model needs code of its own.
    """
    library = sentence_transformers()
    with loading(folder):
        model = getattr(library, name)(
            str(folder), device=str(device), trust_remote_code=False,
            # the base model of an adapter may be on the hub
            local_files_only=not (folder / "adapter_config.json").is_file(),
            model_kwargs={"dtype": dtype},
        )  # fmt: skip
    return model.eval()


@contextmanager
def loading(folder: Path) -> Iterator[None]:
    """Report a library's errors as errors of the folder; reject weights that are not in it.

    transformers draws missing weights at random, and only logs a warning.
    """
    logger, report = logging.getLogger("transformers.modeling_utils"), _Report()
    logger.addFilter(report)
    try:
        yield
    except (*_LOADING_ERRORS, SafetensorError) as error:
        raise InputError(
            folder, f"the model cannot be loaded: {first_line(error)}",
            todo="check that the folder is complete",
        ) from error  # fmt: skip
    except RuntimeError:
        if not report.missing:  # exhausted memory, for instance
            raise
    finally:
        logger.removeFilter(report)
    if report.missing:
        raise InputError(
            folder, f"{len(report.missing)} weights are missing or have another shape, "
            f"as {report.missing[0]}", todo="use a complete checkpoint",
        )  # fmt: skip


class _Report(logging.Filter):
    """Collects the missing tensors that transformers reports, and keeps its other messages."""

    def __init__(self) -> None:
        super().__init__()
        self.missing: list[str] = []

    def filter(self, record: logging.LogRecord) -> bool:
        found = [name for name, _ in _MISSING.findall(record.getMessage())]
        self.missing += found
        return not found


def first_line(error: Exception) -> str:
    """Return the first line of an exception's text, or the name of its class."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _json(path: Path) -> dict[str, Any]:
    """Read a JSON object; return an empty one if the file is missing.

    Raises:
        InputError: the file cannot be read, or is no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InputError(path, f"expected JSON: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise InputError(path, f"expected a JSON object, found {type(found).__name__}")
    return found
