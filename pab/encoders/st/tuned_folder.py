"""Write the folder of a tuned model whole or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from pab.core.errors import InputError


def check_model_folder(folder: Path) -> None:
    """Reject a target that is not a folder; an earlier model is replaced at the end.

    Raises:
        InputError: a file has the folder's name.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError("--output_dir", f"{folder} exists and is not a folder")


def write_folder(folder: Path, write: Callable[[str], None]) -> None:
    """Write a folder beside its place, then move it there; an older one is replaced.

    Args:
        folder: folder to write.
        write: writes the files into the folder that it is given.

    Raises:
        InputError: the folder cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
            made = Path(temporary) / folder.name
            write(str(made))
            if folder.exists():
                folder.rename(Path(temporary) / "old")
            made.rename(folder)
    except OSError as error:
        raise InputError(folder, f"cannot be written: {error.strerror or error}") from error
