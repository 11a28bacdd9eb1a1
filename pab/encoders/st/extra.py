"""Import sentence-transformers, which only the extra ``vlm`` installs."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from pab.core.errors import InputError

INSTALL = 'python -m pip install "person-anomaly-retrieval[vlm]"'
FROM_CLONE = '.venv/bin/python -m pip install --editable ".[vlm]"'


def sentence_transformers(module: str = "") -> ModuleType:
    """Import sentence-transformers, or one of its modules.

    Args:
        module: name inside the package, such as ``cross_encoder``; empty for the package itself.

    Raises:
        InputError: the package is not installed; the message contains the command that installs it.
    """
    try:
        return import_module(".".join(("sentence_transformers", module)).rstrip("."))
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("sentence_transformers"):
            raise
        raise InputError(
            "vision-language models", "need sentence-transformers, which is not installed",
            todo=f"run {INSTALL}, or in a clone {FROM_CLONE}",
        ) from error  # fmt: skip
