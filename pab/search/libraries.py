"""Import the optional libraries of the extras ``search`` and ``ray``."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from pab.core.errors import InputError

INSTALL = 'python -m pip install "person-anomaly-retrieval[{}]"'
FROM_CLONE = '.venv/bin/python -m pip install --editable ".[{}]"'


def library(name: str, purpose: str, extra: str = "search") -> ModuleType:
    """Import a module of an extra.

    Args:
        name: the module.
        purpose: subject of the error message, in the plural: what needs the module (``videos``).
        extra: the extra that installs the module.

    Raises:
        InputError: the module is not installed; the message contains the command to install it.
        ModuleNotFoundError: a library that the module needs is not installed.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != name.partition(".")[0]:
            raise
        problem = f"need {name.partition('.')[0]}, which is not installed"
        todo = f"run {INSTALL.format(extra)}, or in a clone {FROM_CLONE.format(extra)}"
        raise InputError(purpose, problem, todo=todo) from error
