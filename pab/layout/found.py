"""Result of the layout check, and formatting shared by its modules."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pab.core.counts import counted
from pab.data.tables import TableColumns

count = partial(counted, spec=",")  # such as "1,978 images"


@dataclass(frozen=True)
class Found:
    """Description of a path."""

    what: str  # kind of file or folder, as a noun phrase
    facts: tuple[str, ...] = ()  # counts and other findings, one per line
    commands: tuple[str, ...] = ()  # commands to run next


def quoted(path: Path) -> str:
    """Quote a path for a shell command."""
    return shlex.quote(str(path))


def counts_by_ending(names: Iterable[str], without: str = "") -> str:
    """Format the number of names per extension; ``without`` labels names that have none."""
    endings = Counter(Path(name).suffix.lower() for name in names)
    return ", ".join(f"{number} {ending or without}" for ending, number in sorted(endings.items()))


def captioned_commands(place: Path, images: Path, columns: TableColumns) -> tuple[str, ...]:
    """Format the commands that score with CLIP, and fine-tune it, on the user's own data."""
    given = {"image": columns.image, "caption": columns.caption}
    flags = "".join(
        f" --csv_{name}_key {shlex.quote(column)}"
        for name, column in given.items()
        if column != getattr(TableColumns(), name)
    )
    data = quoted(place)
    score = f"python scripts/clip_infer.py --annotation {data} --image_folder {quoted(images)}"
    tune = f"python scripts/finetune_clip.py --config configs/clip/finetune.yaml --data_path {data}"
    return score + flags, tune + flags


def blank_names(names: Sequence[str]) -> tuple[str, ...]:
    """Format a warning about image names that a ranked list cannot contain; empty if none."""
    blank = [name for name in names if any(map(str.isspace, name))]
    if not blank:
        return ()
    what = f"{count(len(blank), 'image name')} with a blank, such as {blank[0]!r}"
    return (f"{what}: scoring rejects them, so rename the files first",)
