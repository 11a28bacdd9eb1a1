"""Check output files and folders before any work starts, without creating anything."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from pab.core.errors import InputError

NONE_HINT = "--{} none writes nothing"


def cannot_be_written(path: Path) -> str | None:
    """Return the end of a sentence that says why a file cannot be written; None if it can."""
    if path.is_dir():
        return "is a directory"
    if path.exists() and not path.is_file():
        return "is not a regular file"
    return _closed(path.absolute().parent)


def _closed(folder: Path) -> str | None:
    """Describe why no file can be created in a folder (which need not exist); None if one can."""
    above = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        return f"cannot be written: {above} is not a writable folder"
    return None


def check_outputs(outputs: Mapping[str, str | Path | None], *, omit: str = NONE_HINT) -> None:
    """Reject outputs that cannot be written or would overwrite one another.

    Args:
        outputs: flag without its dashes -> file to write; None writes nothing.
        omit: remedy for a file that cannot be written; the flag's name replaces ``{}``.

    Raises:
        InputError: an output is rejected; the message names the flag.
    """
    seen: dict[Path, str] = {}
    for name, value in outputs.items():
        if not value:
            continue
        problem = cannot_be_written(Path(value))
        if problem is not None:
            raise InputError(f"--{name}", f"{value} {problem}", todo=omit.format(name))
        path = Path(value)
        # A link to a file would be replaced, not followed; only links to folders matter.
        target = Path(os.path.realpath(path.parent), path.name)
        other = seen.setdefault(target, name)
        if other != name:
            raise InputError(
                f"--{other}", f"{value} is also --{name}", todo="use two different files"
            )


def check_inputs_are_kept(outputs: Mapping[str, object], inputs: Mapping[str, object]) -> None:
    """Refuse to write over a file that is read.

    Args:
        outputs: flag without its dashes -> path of the file to write; None writes nothing.
        inputs: flag, or description for the error -> any value. Paths are found in texts
            (``FILE``, ``NAME=FILE``, ``NAME:FILE`` and ``NAME:FILE:WEIGHT``) and in lists of them.

    Raises:
        InputError: an output is also an input; the message names the flag and the file.
    """
    for name, path in outputs.items():
        if not isinstance(path, (str, Path)) or not Path(path).is_file():
            continue  # nothing would be overwritten
        target = Path(path).resolve()
        for what, value in inputs.items():
            if any(source.resolve() == target for source in _paths(value)):
                raise InputError(
                    f"--{name}", f"{path} is the file of {what}: it would be overwritten"
                )


def _paths(value: object) -> list[Path]:
    """Return the paths that the value of a setting may name."""
    if isinstance(value, (list, tuple)):
        return [path for one in value for path in _paths(one)]
    if isinstance(value, Path):
        return [value]
    if not isinstance(value, str) or not value or "\0" in value:
        return []
    named = value.partition(":")[2]
    texts = (value, value.partition("=")[2], named, named.rpartition(":")[0])
    return [Path(text) for text in texts if text]


def check_output_folder(flag: str, path: str | Path) -> None:
    """Reject a folder (which need not exist) in which no file can be created; name the flag."""
    problem = _closed(Path(path).absolute())
    if problem is not None:
        raise InputError(flag, f"{path} {problem}")


def check_free_space(flag: str, path: str | Path, needed: int, what: str, *, todo: str) -> None:
    """Reject a folder whose disk has too little free space.

    Args:
        flag: setting that names the folder, for the error.
        path: the folder, which need not exist.
        needed: required bytes.
        what: purpose of the space.
        todo: remedy for the user.

    Raises:
        InputError: too little space is free; the message names the flag and both sizes.
    """
    folder = Path(path).absolute()
    disk = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(disk).free
    if free < needed:
        raise InputError(
            flag,
            f"expected {needed / 1e9:.2f} GB for {what} at {path}, found {free / 1e9:.2f} GB free",
            todo=todo,
        )
