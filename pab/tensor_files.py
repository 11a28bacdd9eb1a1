"""Files of ``torch.save``: read so that they can bring data but never run code, written whole."""

from __future__ import annotations

import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pab.errors import InputError
from pab.files import atomic_path, existing_file

# What torch.load raises for damaged or foreign files, found by damaging files in every way.
_UNREADABLE = (
    pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError,
    AttributeError, AssertionError, struct.error, zipfile.BadZipFile, OverflowError, OSError,
)  # fmt: skip


def read_tensors(path: str | Path, what: str, *, mmap: bool, also: Sequence[type] = ()) -> Any:
    """The tensors, plain values and containers of a file, on the CPU.

    Args:
        path: what ``torch.save`` wrote.
        what: what the file should be (``"a checkpoint"``), for the error.
        mmap: leave tensors on disk until they are used, where the file's format allows it.
        also: classes that may stand in the file besides; none of them may do anything when made.

    Raises:
        InputError: no such file, none of ``torch.save``, damaged, or holding other objects.
    """
    path = existing_file(path, what)
    try:
        mmap = mmap and zipfile.is_zipfile(path)  # files of torch before 1.6 cannot be mapped
        with torch.serialization.safe_globals(list(also)), warnings.catch_warnings():
            # Damaged files bring guesses about pickle protocols; the error below says it in a line.
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except _UNREADABLE as error:
        # torch's own text runs over many lines and advises to switch the protection off.
        text = str(error)
        foreign = re.search(r"GLOBAL (\S+)", text)
        if foreign is not None:
            raise InputError(
                path, f"expected {what} of tensors and plain values, found the Python object "
                f"{foreign[1]}",
                todo="it was not loaded, for it could run code; save the tensors alone",
            ) from error  # fmt: skip
        if "TorchScript" in text:
            raise InputError(
                path, f"expected {what}, found a TorchScript archive",
                todo="save its tensors and give those",
            ) from error  # fmt: skip
        raise InputError(
            path, f"expected {what} written by torch.save, found a file that is none or is "
            f"damaged ({type(error).__name__})", todo="check its size and fetch it again",
        ) from error  # fmt: skip


def write_tensors(path: str | Path, value: Any) -> None:
    """``torch.save``, whole or not at all; the same value gives the same bytes.

    Raises:
        InputError: the file cannot be written.
    """
    # Through a handle: given a path, torch writes the (temporary) file's name into the archive.
    with atomic_path(path) as temporary, temporary.open("wb") as handle:
        torch.save(value, handle)
