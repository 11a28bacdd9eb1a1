"""Read files of ``torch.save`` without running code, and write them atomically."""

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

# Exceptions that torch.load raised in tests with damaged or foreign files.
_UNREADABLE = (
    pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError,
    AttributeError, AssertionError, struct.error, zipfile.BadZipFile, OverflowError, OSError,
)  # fmt: skip

# torch keeps the allowed classes in one list per process. A thread that leaves the `with` block
# below would remove them while another thread is reading.
_ONE_READER = threading.Lock()

# Mapping in /proc/self/smaps: a line with its addresses, then lines such as "Anonymous:  0 kB".
_MAPPING = re.compile(
    r"^(?P<first>[0-9a-f]+)-(?P<last>[0-9a-f]+) \S+ \S+ \S+ (?P<inode>\d+).*\n"
    r"(?P<facts>(?:[A-Z]\w+:.*\n)+)", re.MULTILINE,
)  # fmt: skip
_CHANGED = re.compile(r"^(?:Anonymous|Swap): +[1-9]", re.MULTILINE)  # private copies of pages

SAVE_ALONE = "it was not loaded, because it could run code; save only the tensors"


def read_tensors(
    path: str | Path, what: str, *, mmap: bool, also: Sequence[Any] = (), todo: str | None = None
) -> Any:
    """Read tensors, plain values and containers from a file onto the CPU.

    Also reads NumPy values, paths, dates and ``defaultdict`` (:mod:`pab.core.foreign_values`).

    Args:
        path: file written by ``torch.save``, under any name.
        what: expected content (``"a checkpoint"``), for the error.
        mmap: leave tensors on disk until they are used, if the format allows it.
        also: further classes to allow; their construction must have no side effects.
        todo: remedy for a damaged file, if any.

    Raises:
        InputError: the file is missing, damaged, not from ``torch.save``, or holds objects that are
            not allowed.
    """
    path = existing_file(path, what)
    found = file_kind(path)
    if found.kind not in (Kind.TORCH, Kind.UNKNOWN):
        raise other_kind(path, f"{what} written by torch.save", found, todo)
    # A stand-in takes precedence over the class that it replaces.
    others = [kind for kind in also if f"{kind.__module__}.{kind.__qualname__}" not in STAND_INS]
    allowed = [*((made, name) for name, made in STAND_INS.items()), *others]
    try:
        with (
            _ONE_READER,
            torch.serialization.safe_globals(allowed),
            warnings.catch_warnings(),
            path.open("rb") as handle,
        ):
            # torch warns about pickle protocols in damaged files; the error below is enough.
            warnings.simplefilter("ignore", UserWarning)
            # Files from torch before 1.6 cannot be mapped. A mapped file is passed by its path, and
            # torch would read a path that ends in .safetensors as safetensors.
            if mmap and zipfile.is_zipfile(path) and path.suffix != ".safetensors":
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            return torch.load(handle, map_location="cpu", weights_only=True)
    except ForeignValueError as error:
        raise InputError(
            path, f"expected {what} of tensors and plain values, found {error}", todo=SAVE_ALONE
        ) from error
    except _UNREADABLE as error:
        # torch's own message spans many lines and advises disabling the protection.
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign is not None:
            problem = f"of tensors and plain values, found the Python object {foreign[1]}"
            todo = SAVE_ALONE
        elif "Unsupported operand" in str(error) and found.kind is Kind.TORCH:
            problem = "in torch.save's default pickle protocol, found another one or a damaged file"
            todo = "if the file is intact, save it again without pickle_protocol"
        else:
            none = "" if found.kind is Kind.TORCH else "none or "
            problem = f"written by torch.save, found {none}a damaged one ({type(error).__name__})"
        raise InputError(path, f"expected {what} {problem}", todo=todo) from error


def other_kind(path: Path, expected: str, found: FileKind, todo: str | None) -> InputError:
    """Build the error for a file of another kind.

    Args:
        expected: expected kind.
        found: kind of the file.
        todo: remedy for a truncated or empty file, if the kind does not determine one.
    """
    if found.kind is Kind.TORCHSCRIPT:
        todo = "save its tensors and pass that file"
    elif found.kind not in (Kind.CUT, Kind.EMPTY):
        todo = None
    return InputError(path, f"expected {expected}, found {found.text}", todo=found.todo or todo)


def release_pages(tensor: Tensor) -> None:
    """Release the memory pages of a tensor mapped from a file; they are read again on use.

    A pass over large files then needs memory only for its current part. Tensors in memory are not
    affected, and neither are tensors that were changed in place: their changes exist only in
    memory. Nothing happens on systems other than Linux, which do not list their mappings.

    Args:
        tensor: a contiguous tensor.
    """
    mappings = Path("/proc/self/smaps")
    if not mappings.exists() or tensor.numel() == 0:
        return
    start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    for found in _MAPPING.finditer(mappings.read_text(encoding="utf-8", errors="replace")):
        if int(found["first"], 16) <= start and stop <= int(found["last"], 16):
            # Releasing memory that is not mapped from a file, or was changed, would erase it.
            if found["inode"] != "0" and not _CHANGED.search(found["facts"]):
                start = -(-start // memory_map.PAGESIZE) * memory_map.PAGESIZE
                length = ctypes.c_size_t(max(0, stop - start))
                # A failure is harmless: pages that cannot be released, such as locked ones, stay.
                libc = ctypes.CDLL(None)
                libc.madvise(ctypes.c_void_p(start), length, memory_map.MADV_DONTNEED)
            return


def write_tensors(path: str | Path, value: Any) -> None:
    """Write a value with ``torch.save``, atomically; equal values give equal bytes.

    Raises:
        InputError: the file cannot be written.
    """
    # Pass a handle: with a path, torch stores the temporary file's name in the archive.
    with atomic_path(path) as temporary, temporary.open("wb") as handle:
        torch.save(value, handle, pickle_module=_BY_VALUE)


class _ByValue(pickle.Pickler):
    """Pickler that writes repeated objects in full instead of as references.

    Equal values then give equal bytes, whatever their object identity. The ids of a score file also
    load faster.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fast = True


_BY_VALUE = types.ModuleType("pickle")  # torch.save needs only the pickler
_BY_VALUE.Pickler = _ByValue  # type: ignore[attr-defined]
