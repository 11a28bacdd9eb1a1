"""Read scores in all supported forms: detect the form of a file, and parse its content.

The content determines the form. The extension decides between a table and a list. Text with the
extension of a binary form is rejected.

==================  ==============================================================================
``.pt``             a score file of this project; a bare tensor; a dict with one matrix
``.npy``, ``.npz``  a bare array; ``scores`` with ``query_ids`` and ``gallery_ids``
tables              CSV, TSV, Parquet (:mod:`pab.formats.tables`)
runs and lists      TREC, ranx, rankings, ranked lists (:mod:`pab.formats.runs`)
==================  ==============================================================================

torch is imported only for matrices, so that commands on lists start quickly.
"""

from __future__ import annotations

import io
import tokenize
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pab.core.errors import InputError
from pab.core.files import DAMAGED_ARCHIVE, check_unpacked_size, existing_file
from pab.core.text_files import read_text
from pab.data.id_lists import id_texts
from pab.data.json_lines import head_of, shortened
from pab.data.tables import TABLE_ENDINGS
from pab.formats.contents import GALLERY_ID_KEYS, QUERY_ID_KEYS, Listing, Matrix
from pab.formats.runs import json_run, ranked_list, trec_run
from pab.formats.tables import (
    bare_separator_of,
    decimal_lines,
    is_trec_run,
    parquet_table,
    separator_of,
    text_table,
)
from pab.ranking import is_list_archive

if TYPE_CHECKING:
    from torch import Tensor

KEYS = ("scores", "query_ids", "gallery_ids", "meta")
REMEDY = "export the scores again with the tool that wrote them"
_BINARY_ENDINGS = frozenset((".pt", ".pth", ".bin", ".npy", ".npz", ".parquet", ".pkl", ".zip"))
_BLANK_TABLE = "a table of numbers without ids"
_HEAD = 1 << 16  # bytes read to detect the form of a file
# Exceptions that NumPy raises for a damaged array; it parses the array's header as Python source.
_DAMAGED_ARRAY = (
    ValueError, TypeError, OSError, EOFError, OverflowError, MemoryError, SyntaxError,
    tokenize.TokenError,
)  # fmt: skip


def read_form(path: str | Path, *, mmap: bool = True) -> Matrix | Listing:
    """Read a file of scores in any form.

    Args:
        path: the file.
        mmap: leave the matrix on disk until it is used, if the form allows it.

    Raises:
        InputError: the file is missing, damaged, invalid or of unknown form, or is a Parquet file
            and pyarrow is not installed.
    """
    path = existing_file(path, "a score file")
    head = head_of(path, _HEAD)
    if head.startswith(b"\x93NUMPY"):
        return _npy(path, mmap)
    if head.startswith(b"PAR1"):
        return parquet_table(path)
    if zipfile.is_zipfile(path):
        if _is_npz(path):
            return _npz(path)
        if is_list_archive(path):
            return ranked_list(path)
        return _torch_form(path, mmap)
    if path.suffix.lower() in _BINARY_ENDINGS or head[:1] == b"\x80" or b"\0\0\0\0" in head:
        return _torch_form(path, mmap)
    return _text_form(path)


def _text_form(path: Path) -> Matrix | Listing:
    what = "a file of scores"
    text = read_text(path, what, todo=REMEDY)
    start = text.lstrip()
    if not start:
        raise InputError(path, f"expected {what}, found an empty file")
    if start[0] in "[{":
        return json_run(text, path)
    is_table = path.suffix.lower() in TABLE_ENDINGS
    if not is_table:
        if is_trec_run(io.StringIO(start)):
            return trec_run(text, path)
        if decimal_lines(start):
            tabbed = "\n".join("\t".join(line.split()) for line in text.split("\n"))
            return replace(text_table(tabbed, path, "\t", ids=False), form=_BLANK_TABLE)
    separator = separator_of(start)
    if separator is None and not is_table:
        return ranked_list(path)
    if separator is None and (bare := bare_separator_of(start)) is not None:
        return text_table(text, path, bare, ids=False)
    # Without a separator, the reader's error names the first cell that is not a number.
    fallback = "\t" if path.suffix.lower() == ".tsv" else ","
    return text_table(text, path, separator or fallback)


# ------------------------------------------------------------------------------------------ arrays


def _npy(path: Path, mmap: bool) -> Matrix:
    try:
        array = np.load(path, mmap_mode="c" if mmap else None, allow_pickle=False)
    except _DAMAGED_ARRAY as error:
        problem = f"expected a NumPy array, found a damaged one ({error})"
        raise InputError(path, problem, todo=REMEDY) from error
    return Matrix("a bare array (.npy)", matrix_of(array, path, "array"))


def _is_npz(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except DAMAGED_ARCHIVE:
        return False
    return bool(names) and all(name.endswith(".npy") for name in names)


def _npz(path: Path) -> Matrix:
    try:
        with zipfile.ZipFile(path) as packed:
            check_unpacked_size(path, packed.infolist())
        with np.load(path, allow_pickle=False) as archive:
            content = {name: archive[name] for name in archive.files}
    except (*_DAMAGED_ARRAY, *DAMAGED_ARCHIVE) as error:
        problem = f"expected NumPy arrays, found damaged ones or Python objects ({error})"
        raise InputError(path, problem, todo=REMEDY) from error
    return _of_dict(content, path, "arrays with ids (.npz)", "arrays without ids (.npz)")


# ----------------------------------------------------------------------------------------- tensors


def _torch_form(path: Path, mmap: bool) -> Matrix:
    from torch import Tensor

    from pab.core.tensor_files import read_tensors

    content = read_tensors(path, "a score file", mmap=mmap, todo=REMEDY)
    if isinstance(content, Tensor | np.ndarray):
        return Matrix("a bare tensor", matrix_of(content, path, "tensor"))
    if not isinstance(content, Mapping):
        found = type(content).__name__
        raise InputError(path, f"expected a matrix of scores or a dict with one, found a {found}")
    if set(content) >= set(KEYS):
        return _own_form(dict(content), path)
    return _of_dict(dict(content), path, "a dict with a matrix and ids", "a dict with a matrix")


def _own_form(content: dict[Any, Any], path: Path) -> Matrix:
    """Parse a dict with all keys of this project's score files."""
    meta = content["meta"]
    if not isinstance(meta, dict) or any(not isinstance(key, str) for key in meta):
        raise InputError(path, "expected a dict with string keys", item="meta")
    query_ids, gallery_ids = (ids_of(content[name], path, name) for name in KEYS[1:3])
    scores, remarks = matrix_of(content["scores"], path, "scores"), _ignored(content, KEYS)
    return Matrix("a score file", scores, query_ids, gallery_ids, meta, own=True, remarks=remarks)


def _of_dict(content: dict[Any, Any], path: Path, with_ids: str, without: str) -> Matrix:
    """Parse a dict of arrays with one matrix and optional ids."""
    matrices = [key for key, value in content.items() if _is_matrix(value)]
    if len(matrices) != 1:
        found = f"{len(matrices)} ({', '.join(map(str, matrices))})" if matrices else "none"
        shown = ", ".join(f"{key}: {_kind(value)}" for key, value in content.items())
        wanted = "exactly one matrix [queries, gallery] of floating-point scores"
        problem = f"expected {wanted}, found {found} in keys {shown[:300] or '(none)'}"
        raise InputError(path, problem, todo="save only the matrix of scores")
    used = {matrices[0]}
    ids: list[list[str] | None] = []
    for keys in (QUERY_ID_KEYS, GALLERY_ID_KEYS):
        key = next((key for key in keys if key in content), None)
        ids.append(None if key is None else ids_of(content[key], path, key))
        used.add(key)
    scores = matrix_of(content[matrices[0]], path, str(matrices[0]))
    meta = content.get("meta")
    if isinstance(meta, dict) and all(isinstance(key, str) for key in meta):
        used.add("meta")
    else:
        meta = {}
    form = without if ids == [None, None] else with_ids
    return Matrix(form, scores, ids[0], ids[1], meta, remarks=_ignored(content, used))


def _ignored(content: Mapping[Any, Any], used: Any) -> tuple[str, ...]:
    rest = ", ".join(shortened(str(key)) for key in content if key not in used)
    return (f"ignored keys: {rest}",) if rest else ()


def ids_of(values: Any, path: str | Path, name: str) -> list[str]:
    """Convert a list, an array or a tensor of ids to a list of strings.

    Raises:
        InputError: the ids are of another kind; the message names ``path`` and ``name``.
    """
    fault = partial(InputError, path, item=name)
    if type(values) is list and set(map(type, values)) == {str}:
        return values  # common case: return the list without copying
    if getattr(values, "ndim", None) == 1:  # an array or a tensor
        values = values.tolist()
    if isinstance(values, list) and values and set(map(type, values)) == {bytes}:
        try:  # NumPy byte strings (dtype S), as HDF5 and Python 2 store text
            return [value.decode("utf-8") for value in values]
        except UnicodeDecodeError as error:
            raise fault(f"expected ids in UTF-8, found {error.object!r:.60}") from error
    if not isinstance(values, list | tuple):
        raise fault(f"expected a list of strings, found {_kind(values)}")
    return id_texts(values, fault)


def _is_matrix(value: Any) -> bool:
    """Return true if a value is a floating-point matrix of NumPy or torch."""
    if isinstance(value, np.ndarray):
        return value.ndim == 2 and value.dtype.kind == "f"
    floating = getattr(value, "is_floating_point", None)
    return floating is not None and value.ndim == 2 and bool(floating())


def _kind(value: Any) -> str:
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return f"a {type(value).__name__}"


def matrix_of(value: Any, path: Path, item: str) -> Tensor:
    """Convert a matrix of scores to a detached floating-point tensor, [queries, gallery].

    Integers are rejected: in other tools' files, they are usually ranks or column numbers, where
    higher is not better.

    Raises:
        InputError: the value is not a matrix, not floating point, sparse, or empty.
    """
    import torch

    if not isinstance(value, torch.Tensor | np.ndarray):
        found = type(value).__name__
        raise InputError(path, f"expected a tensor or a NumPy array, found {found}", item=item)
    sparse = isinstance(value, torch.Tensor) and value.layout != torch.strided
    if sparse or not _is_matrix(value):
        found = f"{_kind(value)}{', sparse' if sparse else ''}"
        problem = f"expected a matrix [queries, gallery] of floating-point scores, found {found}"
        todo = "save float32 scores, higher for better matches"
        raise InputError(path, problem, item=item, todo=todo)
    if 0 in value.shape:
        problem = f"expected scores of at least one query and one image, found {_kind(value)}"
        raise InputError(path, problem, item=item)
    if isinstance(value, torch.Tensor):
        return value.detach()
    if not value.dtype.isnative:
        value = value.astype(value.dtype.newbyteorder("="))
    if value.dtype == np.longdouble:
        value = value.astype(np.float64)
    return torch.from_numpy(value)
