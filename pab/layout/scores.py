"""Describe scores and ranked lists in any form for the layout check."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pab.formats.contents import Matrix
from pab.formats.forms import read_form
from pab.layout.found import Found, quoted


def describe_scores(path: Path) -> Found:
    """Describe a file of scores or a ranked list, and suggest the commands that accept the file.

    Raises:
        InputError: the file cannot be read, or its scores or ids are invalid.
    """
    from pab.formats.description import show  # imports torch

    found = read_form(path)
    lines = show(path, found).splitlines()
    facts = tuple(line for line in lines if not line.startswith(("file ", "form ")))
    file = quoted(path)
    if isinstance(found, Matrix) and (found.query_ids is None or found.gallery_ids is None):
        out = quoted(path.with_name(f"{path.stem}_with_ids.pt"))
        commands = [f"python -m pab.scores import {file} --queries FILE --gallery FILE --out {out}"]
    elif found.query_ids is None:
        commands = [f"python -m pab.evaluate --predictions {file} --annotation FILE"]
        commands.append(f"python -m pab.compare {file} OTHER.txt")
    else:
        commands = [f"python -m ensemble.run --member NAME={file}:WEIGHT ..."]
        commands.append(f"python -m pab.evaluate --score {file} --annotation FILE")
    return Found(found.form, facts, tuple(commands))


def holds_scores(content: Any) -> bool:
    """Return true if a file's content is a matrix, or a dict whose only array is a matrix."""
    if getattr(content, "ndim", None) == 2:
        return True
    if not isinstance(content, dict):
        return False
    arrays = [value for value in content.values() if hasattr(value, "ndim")]
    return len(arrays) == 1 and arrays[0].ndim == 2
