"""Read values of other libraries in pickled files without running their code.

A checkpoint may contain NumPy scalars, arrays, paths, dates, ``SimpleNamespace`` and
``defaultdict`` beside its tensors. ``torch.load(weights_only=True)`` rejects their classes. This
module maps each class to a stand-in that takes the same arguments and accepts only plain data.
Dates and ``SimpleNamespace`` need no other class. Stand-ins import nothing named in a file, and
pass only checked data to NumPy: with a forged dtype, NumPy would read raw bytes as pointers.
"""

from __future__ import annotations

import datetime
import re
import types
from collections.abc import Callable
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

# Bool, integers, floats, complex numbers, text and bytes: data without pointers.
PLAIN_DTYPE = re.compile(r"[<>=|]?(\?|b1|[iu][1248]|f(2|4|8|12|16)|c(8|16|24|32)|[SU]\d{1,6})")
FACTORIES = ("dict", "list", "int", "float", "str", "set", "tuple", "bool")
NUMPY_TYPES = (
    "bool_", "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "float32", "float64", "complex64", "complex128",
)  # fmt: skip


class ForeignValueError(Exception):
    """A file holds a value that the stand-in rejects; the message names the value."""


class PlainDtype:
    """Stand-in for ``numpy.dtype``; accepts only numbers, text and bytes.

    Raises:
        ForeignValueError: any other dtype.
    """

    def __init__(self, code: object, align: object = False, copy: object = True) -> None:
        del align, copy
        if not isinstance(code, str) or not PLAIN_DTYPE.fullmatch(code):
            kind = "Python objects" if code in ("O", "O8", "|O") else f"dtype {code!r:.40}"
            raise ForeignValueError(f"a NumPy array of {kind}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: object) -> None:
        """Read the byte order from a pickled state; reject anything else."""
        if not isinstance(state, tuple) or len(state) < 5 or state[2:5] != (None, None, None):
            raise ForeignValueError("a NumPy array of records")
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class PlainArray(np.ndarray[Any, Any]):
    """Stand-in for ``numpy.ndarray``: created empty, then filled from a checked state."""

    def __new__(cls, *arguments: object) -> PlainArray:
        """Create an empty array, regardless of the arguments in the file."""
        del arguments
        return super().__new__(cls, (0,), np.uint8)

    def __setstate__(self, state: Any) -> None:
        """Fill the array from (version, shape, dtype, Fortran order, raw bytes).

        Raises:
            ForeignValueError: the state is not plain data.
        """
        if not isinstance(state, tuple) or len(state) != 5:
            raise ForeignValueError("a NumPy array in an unknown form")
        _, shape, dtype, fortran, raw = state
        checked = _plain_array(raw, dtype, shape, "F" if fortran else "C")
        state = (1, checked.shape, checked.dtype, False, checked.tobytes())
        super().__setstate__(state)


def _plain_array(raw: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray[Any, Any]:
    """Build an array from raw bytes after checking every argument."""
    whole = (
        isinstance(raw, (bytes, bytearray))
        and isinstance(dtype, PlainDtype)
        and isinstance(shape, tuple)
        and all(type(side) is int and side >= 0 for side in shape)
    )
    if not whole or int(np.prod(shape, dtype=object)) * dtype.dtype.itemsize != len(raw):
        raise ForeignValueError("a NumPy array whose bytes do not fit its shape")
    if not raw:
        return np.zeros(shape, dtype.dtype)
    return np.frombuffer(raw, dtype.dtype).reshape(shape, order="F" if order == "F" else "C")


def _array_of_buffer(
    raw: Any, dtype: Any, shape: Any, order: Any = "C", *rest: object
) -> np.ndarray[Any, Any]:
    """Stand-in for ``_frombuffer``."""
    del rest
    return _plain_array(raw, dtype, shape, order)


def _scalar(dtype: Any, raw: Any = b"") -> np.generic:
    """Stand-in for NumPy's ``scalar``."""
    value: np.generic = _plain_array(raw, dtype, (1,), "C")[0]
    return value


def _default_dict(factory: object = None, *pairs: object) -> dict[Any, Any]:
    """Stand-in for ``defaultdict``: a dict without the factory."""
    del factory
    return dict(*pairs)  # type: ignore[call-overload, no-any-return]


def _no_bytes() -> bytes:
    """Stand-in for ``bytes``, which pickles call without arguments for an empty value."""
    return b""


def _name_of_type(name: str) -> Callable[..., object]:
    """Return a stand-in for a type stored as a value, such as a ``defaultdict``'s factory.

    The stand-in raises :class:`ForeignValueError` if the file calls it.
    """

    def stand_in(*arguments: object) -> object:
        raise ForeignValueError(f"a call of {name}")

    return stand_in


def _stand_ins() -> dict[str, Callable[..., Any] | type]:
    found: dict[str, Callable[..., Any] | type] = {
        "types.SimpleNamespace": types.SimpleNamespace,
        "collections.defaultdict": _default_dict,
        "numpy.dtype": PlainDtype,
        "numpy.ndarray": PlainArray,
    }
    found |= {
        f"datetime.{kind.__name__}": kind
        for kind in (
            datetime.date, datetime.time, datetime.datetime, datetime.timedelta, datetime.timezone
        )
    }  # fmt: skip
    for module in ("numpy.core", "numpy._core"):  # NumPy 1 and 2
        found[f"{module}.multiarray._reconstruct"] = PlainArray  # filled from its state later
        found[f"{module}.multiarray.scalar"] = _scalar
        found[f"{module}.numeric._frombuffer"] = _array_of_buffer
    for module in ("pathlib", "pathlib._local"):  # renamed in Python 3.13
        found |= {f"{module}.{kind}": PurePosixPath for kind in ("PosixPath", "PurePosixPath")}
        found |= {
            f"{module}.{kind}": PureWindowsPath for kind in ("WindowsPath", "PureWindowsPath")
        }
    found |= {
        f"{module}.{name}": _name_of_type(name)
        for module in ("builtins", "__builtin__")
        for name in FACTORIES
        if name != "set"  # torch's reader builds sets with it
    }
    found |= {f"{module}.bytes": _no_bytes for module in ("builtins", "__builtin__")}
    found |= {f"numpy.{name}": _name_of_type(name) for name in NUMPY_TYPES}
    return found


STAND_INS = _stand_ins()  # name in a file -> stand-in
