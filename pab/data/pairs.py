"""Read training pairs.

For the fields, see :mod:`pab.data.annotations`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from pab.core.errors import InputError
from pab.core.files import existing_file
from pab.core.progress import progress
from pab.data import fields as checks
from pab.data.bad_lines import BadLines
from pab.data.fields import FieldNotes, optional_id, optional_text
from pab.data.image_paths import checked_path
from pab.data.record_lines import Once, read_records
from pab.data.records import TrainPair, video_of

# Optional fields, and the functions that check and convert their values.
_OPTIONAL = {
    "hard_i": optional_text,
    "hard_c": optional_text,
    "hard_i_id": optional_id,
    "source_id": optional_id,
    "source_caption": optional_text,
    "normal": optional_text,
    "anomaly": optional_text,
    "scene": optional_text,
}
PAIR_FIELDS = frozenset(("image", "caption", "image_id", *_OPTIONAL))


def read_shards(paths: Iterable[Path], root: Path, bad: BadLines) -> Iterator[TrainPair]:
    """Yield the valid pairs of several shards; ``bad`` collects invalid lines and repeated ids.

    Raises:
        InputError: a file is missing or unreadable, or cannot be separated into entries.
    """
    once = Once("image_id")

    def pair_of(fields: dict[str, Any], path: Path, item: str, notes: FieldNotes) -> TrainPair:
        pair = train_pair(fields, path, item, notes, root)
        once(pair.image_id, path, f"{item} of {path.name}")
        return pair

    for path in progress(paths, "reading shards", "files"):
        yield from read_records(existing_file(path, "a training annotation file"), pair_of, bad)


def train_pair(
    fields: dict[str, Any],
    path: Path,
    item: str,
    notes: FieldNotes | None = None,
    root: Path | None = None,
) -> TrainPair:
    """Check the fields of a training line and return its record.

    Args:
        fields: the line's JSON object.
        path: the file, for the error.
        item: name of the line in the error (``"line 17"``).
        notes: counts fields that are ignored or treated as absent; None disables counting.
        root: the data root; if None, the parent of the ``annotation`` folder above the file.

    Raises:
        InputError: a required field is missing or invalid, an image path is not inside the root,
            or both ``normal`` and ``anomaly`` are set.
    """
    caption = checks.one_caption(fields, partial(InputError, path, item=item))
    return TrainPair(caption=caption, **pair_fields(fields, path, item, notes, root))


def pair_fields(
    fields: dict[str, Any], path: Path, item: str, notes: FieldNotes | None, root: Path | None
) -> dict[str, Any]:
    """Check all fields of a pair except the caption, and return their values."""
    fault = partial(InputError, path, item=item)
    image = checks.required_text(fields, "image", fault)
    checked: dict[str, Any] = {
        "image": checked_path(image, "image", path, item, root=root),
        "image_id": checks.required_id(fields, "image_id", fault),
    }
    for name, read in _OPTIONAL.items():
        if name in fields:
            value = fields[name]
            checked[name] = value if checks.is_text(value) else read(fields, name, notes)
    if checked.get("hard_i") is not None:
        checked["hard_i"] = checked_path(
            checked["hard_i"], "hard_i", path, item, below="train", root=root
        )
    if checked.get("normal") is not None and checked.get("anomaly") is not None:
        raise fault("expected field 'normal' or field 'anomaly', found both")
    if notes is not None:
        if not fields.keys() <= PAIR_FIELDS:
            notes.ignore_unknown(fields, PAIR_FIELDS)
        source = checked.get("source_id")
        if source is not None and video_of(source) == source:
            notes.whole_sources += 1
    return checked
