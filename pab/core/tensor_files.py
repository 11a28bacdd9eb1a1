"""Files of ``torch.save``: read so that they can bring data but never run code, written whole."""

from __future__ import annotations

import ctypes
import mmap as memory_map
import pickle
import re
import struct
import threading
import types
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pab.core.errors import InputError
from pab.core.file_kinds import FileKind, Kind, file_kind
from pab.core.files import atomic_path, existing_file
from pab.core.foreign_values import STAND_INS, ForeignValueError

# What torch.load raises for damaged or foreign files, found by damaging files in every way.
_UNREADABLE = (
    pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError,
    AttributeError, AssertionError, struct.error, zipfile.BadZipFile, OverflowError, OSError,
)  # fmt: skip

# torch keeps the allowed classes in one list per process: a second thread that leaves the block
# below would take them away from a first one that is still reading.
_ONE_READER = threading.Lock()

SAVE_ALONE = "it was not loaded, for it could run code; save the tensors alone"


def read_tensors(
    path: str | Path, what: str, *, mmap: bool, also: Sequence[Any] = (), todo: str | None = None
) -> Any:
    """Read tensors, plain values and containers from a file onto the CPU.

    NumPy's values, paths, dates and ``defaultdict`` are read too (:mod:`pab.core.foreign_values`).

    Args:
        path: what ``torch.save`` wrote, under any name.
        what: what the file should be (``"a checkpoint"``), for the error.
        mmap: leave tensors on disk until they are used, where the file's format allows it.
        also: further classes that may stand in the file; none of them may do anything when made.
        todo: the remedy for a file that is damaged; None names none.

    Raises:
        InputError: no such file, none of ``torch.save``, damaged, or holding other objects.
    """
    path = existing_file(path, what)
    found = file_kind(path)
    if found.kind not in (Kind.TORCH, Kind.UNKNOWN):
        raise other_kind(path, f"{what} written by torch.save", found, todo)
    # A stand-in wins over the class it stands for.
    others = [kind for kind in also if f"{kind.__module__}.{kind.__qualname__}" not in STAND_INS]
    allowed = [*((made, name) for name, made in STAND_INS.items()), *others]
    try:
        with (
            _ONE_READER,
            torch.serialization.safe_globals(allowed),
            warnings.catch_warnings(),
            path.open("rb") as handle,
        ):
            # Damaged files bring guesses about pickle protocols; the error below says it in a line.
            warnings.simplefilter("ignore", UserWarning)
            # Files of torch before 1.6 cannot be mapped. A mapped file is given by its path, which
            # torch would read as safetensors by its ending alone.
            if mmap and zipfile.is_zipfile(path) and path.suffix != ".safetensors":
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            return torch.load(handle, map_location="cpu", weights_only=True)
    except ForeignValueError as error:
        raise InputError(
            path, f"expected {what} of tensors and plain values, found {error}", todo=SAVE_ALONE
        ) from error
    except _UNREADABLE as error:
        # torch's own text runs over many lines and advises to switch the protection off.
        text = str(error)
        foreign = re.search(r"GLOBAL (\S+)", text)
        if foreign is not None:
            raise InputError(
                path, f"expected {what} of tensors and plain values, found the Python object "
                f"{foreign[1]}",
                todo=SAVE_ALONE,
            ) from error  # fmt: skip
        if "Unsupported operand" in text and found.kind is Kind.TORCH:
            raise InputError(
                path, f"expected {what} in torch.save's own pickle protocol, found another one or "
                "a damaged file",
                todo="if it is whole, save it again without pickle_protocol",
            ) from error  # fmt: skip
        raise InputError(
            path, f"expected {what} written by torch.save, found "
            + ("a damaged one" if found.kind is Kind.TORCH else "none or a damaged one")
            + f" ({type(error).__name__})",
            todo=todo,
        ) from error  # fmt: skip


def other_kind(path: Path, expected: str, found: FileKind, todo: str | None) -> InputError:
    """Make the error for a file of another kind.

    Args:
        expected: what was expected.
        found: what the file is.
        todo: the remedy for a damaged file; used where the kind tells none.
    """
    if found.kind is Kind.TORCHSCRIPT:
        todo = "save its tensors and give those"
    elif found.kind not in (Kind.CUT, Kind.EMPTY):
        todo = None
    return InputError(path, f"expected {expected}, found {found.text}", todo=found.todo or todo)


def release_pages(tensor: Tensor) -> None:
    """Give the memory of a tensor that is mapped from a file back; it is read again when needed.

    So a walk through large files needs no more memory than the stretch it is at. Nothing happens
    to a tensor in memory, nor where the system does not list its mappings (outside Linux).

    Args:
        tensor: contiguous, never written to: what was written would be lost.
    """
    mappings = Path("/proc/self/maps")
    if not mappings.exists() or tensor.numel() == 0:
        return
    start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    for line in mappings.read_text(encoding="utf-8", errors="replace").splitlines():
        span, *_, inode = line.split(maxsplit=5)[:5]
        first, last = (int(address, 16) for address in span.split("-"))
        if first <= start and stop <= last:
            if inode != "0":  # of a file: anything else would be emptied
                start = -(-start // memory_map.PAGESIZE) * memory_map.PAGESIZE
                length = ctypes.c_size_t(max(0, stop - start))
                # Advice: where the system cannot follow it (locked pages), they stay.
                libc = ctypes.CDLL(None)
                libc.madvise(ctypes.c_void_p(start), length, memory_map.MADV_DONTNEED)
            return


def write_tensors(path: str | Path, value: Any) -> None:
    """``torch.save``, whole or not at all; the same value gives the same bytes.

    Raises:
        InputError: the file cannot be written.
    """
    # Through a handle: given a path, torch writes the (temporary) file's name into the archive.
    with atomic_path(path) as temporary, temporary.open("wb") as handle:
        torch.save(value, handle, pickle_module=_BY_VALUE)


class _ByValue(pickle.Pickler):
    """Writes what stands at two places twice instead of pointing back to the first.

    Equal values then give equal bytes whichever objects they are, and a score file's ids, each
    written once anyway, are read back in less than half of the time.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fast = True


_BY_VALUE = types.ModuleType("pickle")  # all that torch.save asks of it is the pickler
_BY_VALUE.Pickler = _ByValue  # type: ignore[attr-defined]
