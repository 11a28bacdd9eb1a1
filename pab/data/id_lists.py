"""Check ids of queries and gallery images, and read lists of them."""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterable
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

from pab.core.errors import Fault, InputError
from pab.core.files import existing_file
from pab.core.notices import notice
from pab.core.text_files import read_text
from pab.data.annotations import read_retrieval
from pab.data.names import plain_names

# The start of an annotation, or of an array of strings.
_OBJECTS = re.compile(rb"""\s*(\[\s*)?\{\s*("|\}|$)|\s*\[\s*("|$)""")


def read_id_list(path: str | Path, what: str = "a list of ids, one per line") -> list[str]:
    """Read unique ids, one per line, in file order.

    Blank lines and byte-order marks are ignored; line ends may be those of any system.

    Raises:
        InputError: the file is missing, unreadable, not text or empty, or repeats an id.
    """
    path = existing_file(path, what)
    first_seen: dict[str, int] = {}
    for number, line in enumerate(read_text(path, what).split("\n"), start=1):
        name = line.strip()
        if not name:
            continue
        if name in first_seen:
            problem = f"expected every id once, found {name!r} already on line {first_seen[name]}"
            raise InputError(path, problem, item=f"line {number}")
        first_seen[name] = number
    if not first_seen:
        raise InputError(path, f"expected {what}, found an empty file")
    return list(first_seen)


def read_query_order(path: str | Path) -> list[str]:
    """Read a query order file (Track 4's ``query_index.txt``): one query id per line.

    Raises:
        InputError: see :func:`read_id_list`.
    """
    return read_id_list(path, "a query order file, one query id per line")


def check_ids(where: str | Path, name: str, ids: Any) -> None:
    """Check that ids are distinct, non-empty, single-line strings without blanks at their ends.

    Raises:
        InputError: ``ids`` is not a list of such strings, or is empty; the message names ``where``
            and the field ``name``.
    """
    fault = partial(InputError, where, item=name)
    if not isinstance(ids, list) or not set(map(type, ids)) <= {str}:
        raise fault("expected a list of strings")
    if not ids:
        raise fault("expected at least one id, found none")
    if "\n".join(ids).splitlines() != ids or list(map(str.strip, ids)) != ids or "" in ids:
        # Id lists have one id per line.
        one = next(one for one in ids if one.splitlines() != [one] or one != one.strip())
        raise fault(f"expected ids on one line, without blanks at their ends, found {one!r}")
    if len(set(ids)) != len(ids):
        twice = next(one for one, count in Counter(ids).items() if count > 1)
        raise fault(f"expected distinct ids, found {twice!r} twice")


def read_query_ids(path: str | Path) -> list[str]:
    """Read query ids in row order, from a list (one per line or a JSON array) or an annotation.

    Raises:
        InputError: the file is missing, unreadable or of another kind, or repeats an id.
    """
    path = existing_file(path, "a list of query ids, one per line")
    if _is_json(path):
        return _json_ids(path) or [query.query_id for query in read_retrieval(path).queries]
    return read_id_list(path, "a list of query ids, one per line")


def read_gallery_ids(path: str | Path) -> list[str]:
    """Read gallery ids in column order, from a list or a folder of images.

    A list has one id per line, or is a JSON array. Images of a folder are sorted by their full file
    names, as in ``sorted(os.listdir(folder))``, where ``a-1.jpg`` comes before ``a.jpg``. The ids
    have no image extensions.

    Raises:
        InputError: the path is neither, or is unreadable. An id is repeated, or two names differ
            only in extension.
    """
    if Path(path).is_dir():
        from pab.data.images import list_gallery  # imports Pillow, which score files do not need

        images = sorted(list_gallery(path), key=lambda image: image.path.name)
        notice(path, f"images read in order of their file names: {len(images)}")
        return [image.gallery_id for image in images]
    path = existing_file(path, "a list of gallery ids, one per line, or a folder of images")
    if _is_json(path):
        ids = _json_ids(path)
        if ids is not None:
            return plain_names(ids, path)
        problem = "expected gallery ids (one per line, or a JSON array), found other JSON"
        raise InputError(path, problem)
    return plain_names(read_id_list(path, "a list of gallery ids, one per line"), path)


def _is_json(path: Path) -> bool:
    """Return true if a file holds JSON objects or an array; ``[1] a`` and ``{b}`` are ids."""
    with path.open("rb") as handle:
        head = handle.read(64).removeprefix(codecs.BOM_UTF8)
    if _OBJECTS.match(head):
        return True  # perhaps of JSON lines, or damaged: their reader reports that
    if not head.lstrip().startswith(b"["):
        return False
    try:
        json.loads(read_text(path, "a list of ids"))
    except (ValueError, RecursionError):
        notice(path, "is not a JSON array; read as one id per line")
        return False
    return True


def _json_ids(path: Path) -> list[str] | None:
    """Read the ids of a JSON array of strings and integers; return None for other content."""
    try:
        values = json.loads(read_text(path, "a list of ids"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, list) or not values or {type(one) for one in values} - {str, int}:
        return None
    ids = id_texts(values, partial(InputError, path, item="ids"))
    check_ids(path, "ids", ids)
    return ids


def id_text(value: Any, fault: Fault) -> str:
    """Convert an id to a string; a whole number becomes its decimal digits.

    Raises:
        InputError: the id is neither a string nor a whole number.
    """
    if isinstance(value, str):
        return str(value)
    whole = isinstance(value, Integral) or (isinstance(value, float) and value.is_integer())
    if whole and not isinstance(value, bool):
        return str(int(value))
    raise fault(f"expected a list of strings or whole numbers as ids, found {value!r:.60}")


def id_texts(values: Iterable[Any], fault: Fault) -> list[str]:
    """Convert ids to strings; see :func:`id_text`."""
    return [id_text(value, fault) for value in values]
