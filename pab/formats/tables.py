"""Detect the forms of texts, and read score matrices from tables: CSV, TSV and Parquet.

Parquet needs pyarrow, an optional dependency (``pip install pyarrow``).
"""

from __future__ import annotations

import csv
import importlib
import io
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pab.core.counts import counted
from pab.core.errors import Fault, InputError
from pab.core.progress import progress
from pab.data.id_lists import id_texts
from pab.data.json_lines import shortened
from pab.data.tables import SEPARATORS
from pab.formats.contents import QUERY_ID_KEYS, Matrix

TREC_FIELDS = 6
_BLANKS = re.compile(r"[ \t]+")  # other white space (U+00A0, U+202F) may be part of a name
PANDAS_INDEX = "__index_level_0__"  # pandas' name for an unnamed index


def separator_of(text: str) -> str | None:
    """Return the separator of a numeric table; None if the text is not such a table.

    The header has as many cells as the first data row, or one fewer if it names only the columns.
    All cells of the data row except the first must be numbers. At least one header cell must not be
    a number, unless the header names only the columns: then all its cells may be integers.
    """
    first_lines = io.StringIO(text).readlines(1 << 24)
    first, second, *_ = [line for line in first_lines if line.strip()][:2] + ["", ""]
    # A line without the separator would be one cell, and csv rejects very long cells.
    for separator in filter(second.__contains__, SEPARATORS):
        head, row = _cells(first, separator), _cells(second, separator)
        if len(row) > 1 and len(row) - len(head) in (0, 1):
            names_alone = len(head) < len(row) and not any("." in cell for cell in head)
            is_header = names_alone or any(number_of(cell) is None for cell in head)
            if is_header and all(number_of(cell) is not None for cell in row[1:]):
                return separator
    return None


def _cells(line: str, separator: str) -> list[str]:
    """Split a line into cells; return none if csv rejects it, for instance for a very long cell."""
    try:
        return next(csv.reader([line], delimiter=separator), [])
    except csv.Error:
        return []


def bare_separator_of(text: str) -> str | None:
    """Return the separator of a table of numbers without header and id column, or None."""
    first = next((line for line in io.StringIO(text) if line.strip()), "")
    for separator in filter(first.__contains__, SEPARATORS):
        row = _cells(first, separator)
        if len(row) > 1 and all(number_of(cell) is not None for cell in row):
            return separator
    return None


def decimal_lines(text: str) -> bool:
    """Return true if the first line consists of several decimal fractions (NumPy's savetxt).

    Names in a ranked list may be integers, but not fractions.
    """
    first = next((line for line in io.StringIO(text) if line.strip()), "").split()
    return len(first) > 1 and all("." in cell and number_of(cell) is not None for cell in first)


def trec_fields(line: str) -> list[str]:
    """Split a line ``query Q0 image rank score tag``; the tag may be missing or contain blanks."""
    return _BLANKS.split(line.strip(), TREC_FIELDS - 1)


def is_trec_run(lines: Iterable[str]) -> bool:
    """Return true if lines are in TREC format: Q0 in the second field, a number in the fifth.

    ``0`` may replace Q0. In a ranked list, it may also be a name, but the fifth name is never a
    fraction. Every line must then have ``0``, a number in the fifth field, and at most six fields;
    at least one of the numbers must be a fraction.
    """
    rows = (trec_fields(line) for line in lines if line.strip())
    first = next(rows, [])
    if len(first) < TREC_FIELDS - 1 or number_of(first[4]) is None:
        return False
    if first[1] != "0":
        return first[1].upper() == "Q0"
    has_fraction = False
    for _, zero, *rest in (first, *rows):
        if zero != "0" or len(rest) not in (3, 4) or number_of(rest[2]) is None:
            return False
        if _BLANKS.search(rest[-1]):
            return False
        has_fraction |= not rest[2].lstrip("+-").isdecimal()
    return has_fraction


def number_of(cell: str) -> float | None:
    """Convert a text to a number; return None if the text is not a number.

    ``0_12``, which Python reads as 12, is not a number here: PAB's image ids have this form.
    """
    try:
        return None if "_" in cell else float(cell)
    except ValueError:
        return None


def text_table(text: str, path: Path, separator: str, *, ids: bool = True) -> Matrix:
    """Read a table of scores.

    Args:
        text: content of the file.
        path: the file, for errors.
        separator: separator of the cells.
        ids: true if the first row and the first column hold ids.

    Raises:
        InputError: the text is not a table or has no rows, a row is longer or shorter than the
            header or first row, or a cell is not a number.
    """
    lines = progress(io.StringIO(text, newline=""), f"reading {path.name}", "B", len(text), len)
    rows = csv.reader(lines, delimiter=separator)
    header: list[str] = []
    query_ids: list[str] = []
    values: list[np.ndarray] = []
    width: int | None = None
    try:
        if ids:
            header = [cell.strip() for cell in next(filter(None, rows), [])]
        for row in filter(None, rows):
            if ids:
                query_ids.append(row[0].strip())
                row = row[1:]
                # A header with one cell fewer names only the columns, as R writes it.
                width = len(header) - (len(row) < len(header)) if width is None else width
            width = len(row) if width is None else width
            fault = partial(InputError, path, item=f"line {rows.line_num}")
            if len(row) != width:
                raise fault(f"expected {counted(width, 'score')}, found {len(row)}")
            values.append(_row(row, header[-width:], fault))
    except csv.Error as error:
        problem = f"expected a table, found {error}"
        raise InputError(path, problem, item=f"line {rows.line_num}") from error
    if not values or not width:
        raise InputError(path, "expected rows of scores below the header, found none")
    import torch

    name = "TSV" if separator == "\t" else "CSV"
    scores = torch.from_numpy(np.stack(values))
    if not ids:
        return Matrix(f"a {name} table without ids", scores)
    return Matrix(f"a {name} table", scores, query_ids, header[-width:])


def _row(row: list[str], columns: list[str], fault: Fault) -> np.ndarray:
    try:
        if "_" in "".join(row):  # see number_of
            raise ValueError("a digit separator")
        return np.array(row, dtype=np.float32)
    except ValueError as error:
        place = next((i for i, cell in enumerate(row) if number_of(cell) is None), 0)
        column = f"image {columns[place]!r}" if columns else f"column {place + 1}"
        found = shortened(row[place]) if row[place].strip() else "an empty cell"
        raise fault(f"expected a number for {column}, found {found}") from error


def pyarrow(path: str | Path) -> Any:
    """Import pyarrow with its Parquet module.

    Raises:
        InputError: pyarrow is not installed; the message contains the command that installs it.
    """
    try:
        importlib.import_module("pyarrow.parquet")
        return importlib.import_module("pyarrow")
    except ImportError as error:
        problem = "Parquet needs pyarrow, which is not installed"
        raise InputError(path, problem, todo="pip install pyarrow") from error


def parquet_table(path: Path) -> Matrix:
    """Read a Parquet file with one column per image and at most one column of query ids.

    Query ids are in the text column, else in the unnamed pandas index, else in a column named
    ``query_id`` or similar. Without such a column, the matrix has no query ids.

    Raises:
        InputError: pyarrow is missing, or the file is not Parquet or has no scores. Column names
            are repeated, several columns contain text, or a query id is invalid. A score is missing
            or not a number.
    """
    import torch

    arrow = pyarrow(path)
    try:
        table = arrow.parquet.read_table(path)
    except (arrow.ArrowException, OSError, ValueError) as error:
        problem = f"expected a Parquet file, found one that cannot be read ({error})"
        raise InputError(path, problem) from error
    kinds = dict(zip(table.column_names, table.schema.types, strict=True))
    if len(kinds) < len(table.column_names):
        raise InputError(path, "expected distinct column names")
    texts = [
        name
        for name, dtype in kinds.items()
        if arrow.types.is_string(dtype) or arrow.types.is_large_string(dtype)
    ]
    named = [name for name in (PANDAS_INDEX, *QUERY_ID_KEYS) if name in kinds]
    id_columns = texts or named[:1]
    if len(id_columns) > 1:
        shown = ", ".join(map(shortened, id_columns[:5]))
        problem = f"expected one column of query ids, found {shown}"
        raise InputError(path, problem, todo="save a table with a column per image")
    columns = [name for name in table.column_names if name not in id_columns]
    for name in columns:
        fault = partial(InputError, path, item=f"column {name!r}")
        if not (arrow.types.is_floating(kinds[name]) or arrow.types.is_integer(kinds[name])):
            raise fault(f"expected a column of numbers, found {kinds[name]}")
        if table[name].null_count:
            raise fault(f"expected a number in every row, found {table[name].null_count} empty")
    if not columns or not table.num_rows:
        raise InputError(path, "expected rows and columns of scores, found none")
    scores = np.stack([table[name].to_numpy() for name in columns], axis=1)
    if scores.dtype.kind != "f":
        scores = scores.astype(np.float64)
    query_ids = None
    if id_columns:
        fault = partial(InputError, path, item=id_columns[0])
        query_ids = id_texts(table[id_columns[0]].to_pylist(), fault)
    return Matrix("a Parquet table", torch.from_numpy(scores), query_ids, columns)
