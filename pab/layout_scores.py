"""Score files and ranked lists of every form, as the layout check explains them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pab.layout_found import Found, count, quoted

# Form -> what it is, whether it has ids of its own.
FORMS = {
    "npy": ("a NumPy matrix of scores, without ids", False),
    "npz": ("a NumPy archive of scores", True),
    "parquet": ("a Parquet table of scores", True),
    "table": ("a table of scores, ids in the header and in the first column", True),
    "trec": ("a TREC run", True),
    "ranx": ("a run in ranx's JSON form", True),
    "rankings": ("rankings, one JSON object per query", True),
    "reranked": ("reranked images with their scores, a JSON array of queries", True),
    "list": ("a ranked list, one line of gallery names per query", False),
}


def describe_scores(path: Path, form: str, content: Any = None) -> Found:
    """Explain a score file or a ranked list.

    Args:
        path: the file.
        form: ``pt``, or a key of :data:`FORMS`.
        content: of a ``pt`` file, as read.

    Raises:
        InputError: the file breaks a rule of its form (named).
    """
    if form == "pt":
        return _tensor_file(path, content)
    what, with_ids = FORMS[form]
    if form == "list":
        return _ranked_list(path, what)
    ids = "" if with_ids else " --queries FILE --gallery FILE"
    out = quoted(path.with_suffix(".pt"))
    return Found(what, (), (f"python -m pab.scores import {quoted(path)}{ids} --out {out}",))


def _tensor_file(path: Path, content: Any) -> Found:
    """A file of ``torch.save``: a score file, or a matrix that has no ids yet."""
    from pab.scores import KEYS, describe, load_scores

    if isinstance(content, dict) and set(content) == set(KEYS):
        facts = tuple(describe(path, load_scores(path)).splitlines()[1:])
        commands = (
            f"python -m ensemble.run --member NAME={quoted(path)}:WEIGHT ...",
            f"python -m pab.evaluate --score {quoted(path)} --annotation FILE",
        )
        return Found("a score file", facts, commands)
    matrix = matrix_of(content)
    queries, images = (int(size) for size in matrix.shape)
    shape = (f"{count(queries, 'row')} (queries) x {count(images, 'column')} (images)",)
    out = quoted(path.with_name(f"{path.stem}_with_ids.pt"))
    command = (
        f"python -m pab.scores import {quoted(path)} --queries FILE --gallery FILE --out {out}"
    )
    return Found("a matrix of scores without ids", shape, (command,))


def matrix_of(content: Any) -> Any:
    """The matrix in a file's content: itself, or the one matrix that a dict holds; else None."""
    if getattr(content, "ndim", None) == 2:
        return content
    if not isinstance(content, dict):
        return None
    arrays = [value for value in content.values() if hasattr(value, "ndim")]
    return arrays[0] if len(arrays) == 1 and arrays[0].ndim == 2 else None


def _ranked_list(path: Path, what: str) -> Found:
    from pab.ranking import read_ranked_list

    names = read_ranked_list(path)
    facts = (
        f"{count(len(names), 'line')}, {count(len(names[0]), 'name')} per line, "
        f"{count(len({line[0] for line in names}), 'distinct first name')}",
    )
    commands = (
        f"python -m pab.evaluate --predictions {quoted(path)} --annotation FILE",
        f"python -m pab.compare {quoted(path)} OTHER.txt",
    )
    return Found(what, facts, commands)
