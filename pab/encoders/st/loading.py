"""Identify a model by the files of its folder, and load it; code in the folder never runs."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError

from pab.core.errors import InputError, first_line
from pab.encoders.st.extra import sentence_transformers
from pab.encoders.st.folders import (
    ADAPTER,
    LIBRARY_CONFIG,
    MODULES,
    Kind,
    base_folder,
    quiet_loading,
    read_json,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# `model_type` of config_sentence_transformers.json; PyLate writes ColBERT.
_KINDS: dict[str, Kind] = {
    "SentenceTransformer": "dense", "MultiVectorEncoder": "late", "ColBERT": "late",
    "CrossEncoder": "reranker", "SparseEncoder": "sparse",
}  # fmt: skip
# Errors of incomplete or damaged folders; the type depends on the file.
_LOADING_ERRORS = (
    OSError, ValueError, KeyError, ImportError, AttributeError, TypeError, SafetensorError,
    UnpicklingError, StrictDataclassError,
)  # fmt: skip
PLAIN_CAPTION = "a person"  # every model must accept this text and the image of :func:`plain_image`
PLAIN_SIDE = 224  # pixels
_ROW = re.compile(r"^(\S+) *\| *(MISSING|MISMATCH|UNEXPECTED)", re.MULTILINE)


def kind_of(folder: Path) -> Kind:
    """Identify the kind of model by the folder's files; ``bare``: only a transformer.

    Raises:
        InputError: a configuration is missing, not valid JSON, or of an unsupported model.
    """
    settings = read_json(folder / LIBRARY_CONFIG)
    modules = (folder / MODULES).is_file()
    if "model_type" in settings or modules:
        name = str(settings.get("model_type", "SentenceTransformer"))
        if name not in _KINDS:
            raise InputError(
                folder / LIBRARY_CONFIG,
                f"expected a model_type of {', '.join(_KINDS)}, found {name!r}",
            )
        return _KINDS[name]
    if not (folder / "config.json").is_file() and not (folder / ADAPTER).is_file():
        raise InputError(folder, "expected a model of transformers, found no config.json")
    found = read_json(folder / "config.json").get("architectures") or ()
    late = any(one.endswith("ForRetrieval") or one == "HF_ColBERT" for one in map(str, found))
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
            local_files_only=not (folder / ADAPTER).is_file(),
            model_kwargs={"dtype": dtype},
        )  # fmt: skip
    return model.eval()


def check_reads_images(model: Any, where: str | Path) -> None:
    """Reject a model of sentence-transformers that cannot encode images.

    Args:
        model: the model.
        where: its folder or name, for the error.

    Raises:
        InputError: it encodes text only, or its image processor is missing.
    """
    if not model.supports("image"):
        raise InputError(
            where, f"cannot encode images, only {', '.join(model.modalities)}; it is a text model, "
            "or its image processor is missing",
            todo="use a vision-language model, with its preprocessor_config.json or "
            "processor_config.json",
        )  # fmt: skip


def check_image_text_model(folder: Path) -> None:
    """Reject a folder without a model, and models that do not read images and text.

    Raises:
        InputError: the folder has no readable configuration, or that of another type of model.
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
    """Load a model of transformers that reads images and text, in evaluation mode.

    Args:
        folder: folder of the model.
        dtype: dtype of the weights.
        device: device of the weights.

    Raises:
        InputError: see :func:`loading`.
    """
    from transformers import AutoModelForImageTextToText

    with loading(folder):
        model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, device_map={"": str(device)}, trust_remote_code=False
        )
    return cast("PreTrainedModel", model.eval())


def load_processor(folder: Path) -> Any:
    """Load a model's processor: its tokenizer, image processor and chat template.

    Captions are padded on the left, so that the last position of each row is a token.

    Raises:
        InputError: one of the three is missing or cannot be read.
    """
    from transformers import AutoProcessor

    with loading(folder):
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
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


def plain_image() -> Image.Image:
    """Return a grey image that every model's processor must accept."""
    return Image.new("RGB", (PLAIN_SIDE, PLAIN_SIDE), "grey")


@contextmanager
def processing(where: str | Path) -> Iterator[None]:
    """Report errors of a processor or a chat template on plain inputs as errors of the model.

    Args:
        where: folder or name of the model.

    Raises:
        InputError: the block raises such an error.
    """
    from jinja2 import TemplateError

    try:
        yield
    except (*_LOADING_ERRORS, ZeroDivisionError, TemplateError) as error:
        raise InputError(
            where, f"its processor rejects a plain caption or image: {first_line(error)}",
            todo="check its processor settings and its chat template",
        ) from error  # fmt: skip


@contextmanager
def loading(folder: Path) -> Iterator[None]:
    """Report a library's errors as errors of the folder; reject a folder that lacks weights.

    transformers draws missing weights at random, and only logs a report.

    Raises:
        InputError: a file is missing or damaged, the weights do not fit, or the model needs code of
            its own.
    """
    logger, report = logging.getLogger("transformers.modeling_utils"), _Report()
    with quiet_loading():
        logger.setLevel(logging.WARNING)  # the level of the report
        logger.addFilter(report)
        try:
            yield
        except _LOADING_ERRORS as error:
            raise InputError(
                folder, f"the model cannot be loaded: {first_line(error)}",
                todo="check that the folder is complete",
            ) from error  # fmt: skip
        except RuntimeError:
            if not report.missing:  # exhausted memory, for instance
                raise
        finally:
            logger.removeFilter(report)
            logger.setLevel(logging.NOTSET)
    if report.missing:
        raise InputError(
            folder, f"weights missing or of another shape: {len(report.missing)}",
            item=f"weight {report.missing[0]!r}", todo="download or save the model again",
        )  # fmt: skip


class _Report(logging.Filter):
    """Collect missing and misshapen tensors from transformers' reports, and drop the reports."""

    def __init__(self) -> None:
        super().__init__()
        self.missing: list[str] = []

    def filter(self, record: logging.LogRecord) -> bool:
        rows = _ROW.findall(record.getMessage())
        self.missing += [name for name, status in rows if status in ("MISSING", "MISMATCH")]
        return not rows
