"""Read images and their captions from labelled files, training pairs, tables and folders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pab.core.errors import Fault, InputError
from pab.core.files import existing_file
from pab.data.bad_lines import BadLines
from pab.data.fields import FieldNotes, caption_text, one_caption
from pab.data.pairs import pair_fields
from pab.data.record_lines import Once, read_records
from pab.data.records import LabelledImage, TrainPair, image_keys
from pab.data.tables import TableColumns, captioned_images


def labelled_images_of(pairs: Iterable[TrainPair]) -> list[LabelledImage]:
    """Convert training pairs to labelled images, in order; captions of one image are combined.

    See :func:`pab.data.records.image_keys`.
    """
    images: dict[object, LabelledImage] = {}
    pairs = list(pairs)
    for number, (pair, key) in enumerate(zip(pairs, image_keys(pairs), strict=True)):
        if key is not None and key in images:
            found = images[key]
            images[key] = replace(found, captions=(*found.captions, pair.caption))
            continue
        image_id = pair.image_id if key is None else key[0]
        images[number if key is None else key] = _labelled(pair, image_id, (pair.caption,))
    return list(images.values())


def _labelled(pair: TrainPair, image_id: str, captions: tuple[str, ...]) -> LabelledImage:
    return LabelledImage(
        pair.image, image_id, captions, pair.hard_i_id, pair.action, pair.is_normal,
        pair.hard_i, pair.hard_c,
    )  # fmt: skip


def read_labelled_images(
    path: str | Path, root: Path | None = None, bad: BadLines | None = None
) -> Iterator[LabelledImage]:
    """Yield the images of a labelled file or a training shard, then raise one error for bad lines.

    Args:
        path: the file.
        root: the data root; if None, the parent of the ``annotation`` folder above the file.
        bad: collects the bad lines; if None, they raise one error.

    Raises:
        InputError: the file is missing or unreadable, cannot be separated into entries, or has bad
            lines that ``bad`` does not collect (all counted, the first twenty named). A line with a
            repeated ``image_id`` is bad.
    """
    path = existing_file(path, "a labelled annotation file")
    once = Once("image_id")

    def image_of(fields: dict[str, Any], path: Path, item: str, notes: FieldNotes) -> LabelledImage:
        pair = TrainPair(caption="", **pair_fields(fields, path, item, notes, root))
        captions = _captions(fields, partial(InputError, path, item=item))
        once(pair.image_id, path, item)
        return _labelled(pair, pair.image_id, captions)

    yield from read_records(path, image_of, bad)


def _captions(fields: dict[str, Any], fault: Fault) -> tuple[str, ...]:
    """Read the captions of a labelled line: a list of texts, or one text."""
    value = fields.get("caption")
    if type(value) is not list:
        return (one_caption(fields, fault),)
    if not value:
        raise fault("field 'caption': expected at least one caption, found an empty list")
    return tuple(
        caption_text(caption, f"caption, entry {number}", fault)
        for number, caption in enumerate(value, start=1)
    )


def images_of_own_data(path: Path, root: Path, columns: TableColumns) -> list[LabelledImage]:
    """Read the images of a table or a folder; captions of one image are combined."""
    bad = BadLines()
    images: dict[str, LabelledImage] = {}
    for found in captioned_images(path, root, columns, bad):
        before = images.get(found.image_id)
        if before is None:
            images[found.image_id] = LabelledImage(found.image, found.image_id, (found.caption,))
        else:
            captions = (*before.captions, found.caption)
            images[found.image_id] = replace(before, captions=captions)
    bad.check(path)
    if not images:
        raise InputError(path, "expected captioned images, found none")
    return list(images.values())
