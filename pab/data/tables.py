"""Read the user's own captioned images: CSV or TSV tables, and folders with ``.txt`` captions.

A table has a header line and one row per caption, as in OpenCLIP. An image with several captions
has several rows. In a folder, each text file is one caption, as in WebDataset archives; the
lines of a file are joined with spaces.
"""

from __future__ import annotations

import csv
import hashlib
import os
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from pab.core.errors import InputError
from pab.core.notices import notice
from pab.core.progress import progress
from pab.core.text_files import utf8_text
from pab.data.bad_lines import BadLines
from pab.data.captions import has_visible
from pab.data.fields import caption_text, identifier, required_text
from pab.data.image_paths import IMAGE_ENDINGS, inside_root, with_slashes
from pab.data.json_lines import shortened, text_of, utf8_bytes

TABLE_ENDINGS = frozenset((".csv", ".tsv"))
SEPARATORS = {"\t": "tabs", ",": "commas", ";": "semicolons"}
_PROBED = 100  # rows tried to find the folder that image paths are relative to


@dataclass(frozen=True)
class TableColumns:
    """Format of a table; the defaults are OpenCLIP's."""

    image: str = "filepath"
    caption: str = "title"
    separator: str = "\t"


class CaptionedImage(NamedTuple):
    """One caption of an image."""

    image: str  # relative to the data root
    image_id: str  # the same path without its extension
    number: int  # index of the caption among those of the image, from 0
    caption: str
    item: str  # place in the table or folder, for errors


class _Row(NamedTuple):
    item: str
    image: str
    caption: str


def is_table(path: str | Path) -> bool:
    """Return true if a path is a file with the extension of a table."""
    path = Path(path)
    return path.suffix.lower() in TABLE_ENDINGS and path.is_file()


def is_captioned_folder(path: str | Path) -> bool:
    """Return true if a folder contains images with ``.txt`` captions and is not a PAB root."""
    path = Path(path)
    if not path.is_dir() or (path / "annotation").exists():
        return False
    images, texts = _files(path)
    return not texts.keys().isdisjoint(image.with_suffix("") for image in images)


def is_own_data(path: str | Path) -> bool:
    """Return true if a path is a table or a folder of captioned images."""
    return is_table(path) or is_captioned_folder(path)


def captioned_images(
    path: Path,
    root: Path,
    columns: TableColumns,
    bad: BadLines,
    seen: dict[str, tuple[str, int]] | None = None,
) -> Iterator[CaptionedImage]:
    """Yield the captions of a table, or of a folder in path order.

    Args:
        path: the table or folder.
        root: the data root. A table's relative paths start at the table's folder if the first
            existing image is found there, otherwise at the root.
        columns: column names and separator of the table.
        bad: collects the invalid rows, and the images without a usable text file.
        seen: image_id -> image and number of its captions, of tables read before; updated.

    Raises:
        InputError: the table is unreadable, or its header is missing or invalid.
    """
    seen = {} if seen is None else seen
    if path.is_dir():
        rows, base = _folder_rows(path, bad), path
    else:
        base = table_base(path, root, columns)
        rows = _table_rows(path, columns, bad)
    for row in rows:
        fault = partial(InputError, path, item=row.item)
        try:
            written = required_text({"image": row.image}, "image", fault)
            image = _below_root(written, base, root, path, row.item)
            image_id = identifier(image.removesuffix(Path(image).suffix), "image", fault)
            caption = caption_text(row.caption, "caption", fault)
            before, number = seen.get(image_id, (image, 0))
            if before != image:
                expected = "images that differ in more than their extension"
                raise fault(f"expected {expected}, found {before!r} and {image!r}")
        except InputError as error:
            bad.add(error)
            continue
        seen[image_id] = image, number + 1
        yield CaptionedImage(image, image_id, number, caption, row.item)


def listed_images(
    path: Path, root: Path, columns: TableColumns, bad: BadLines
) -> Iterator[tuple[str, str]]:
    """Yield the images of a table, relative to the data root, each with a caption or an empty text.

    Unlike in :func:`captioned_images`, images may differ only in their extension, and captions may
    be empty. A column with the default name of the captions may be missing.

    Args:
        path: the table.
        root, columns, bad: see :func:`captioned_images`.

    Raises:
        InputError: see :func:`captioned_images`.
    """
    base = table_base(path, root, columns, captions=False)
    for row in _table_rows(path, columns, bad, captions=False):
        fault = partial(InputError, path, item=row.item)
        try:
            written = required_text({"image": row.image}, "image", fault)
            image = _below_root(written, base, root, path, row.item)
        except InputError as error:
            bad.add(error)
            continue
        yield image, row.caption if has_visible(row.caption) else ""


def table_base(path: Path, root: Path, columns: TableColumns, *, captions: bool = True) -> Path:
    """Return the base folder of a table's relative paths: the table's folder, or the data root.

    For the other arguments, see :func:`captioned_images`.

    Args:
        captions: require a column of captions.

    Raises:
        InputError: see :func:`captioned_images`.
    """
    if path.parent.resolve() == root.resolve():
        return root
    for row in islice(_table_rows(path, columns, BadLines(), captions=captions), _PROBED):
        for folder in (path.parent, root):
            names = (row.image, row.image.replace("\\", "/")) if row.image.strip() else ()
            if "\0" not in row.image and any((folder / name).exists() for name in names):
                return folder
    return root


def folder_state(folder: Path) -> str:
    """Hash names, sizes and modification times of images and texts (SHA-256), to detect changes."""
    digest = hashlib.sha256()
    images, texts = _files(folder)
    for path in progress(sorted([*images, *texts.values()]), "looking for changes", "files"):
        try:
            found = path.stat()
            state = f"{found.st_size} {found.st_mtime_ns}"
        except OSError:  # a link to a missing file
            state = "not there"
        digest.update(f"{path.relative_to(folder)}\0{state}\n".encode())
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------- tables


def _table_rows(
    path: Path, columns: TableColumns, bad: BadLines, *, captions: bool = True
) -> Iterator[_Row]:
    broken: list[InputError] = []  # errors in the lines of the current row
    with utf8_bytes(path) as (handle, _):

        def texts() -> Iterator[str]:
            found = progress(handle, f"reading {path.name}", "B", path.stat().st_size, len)
            for number, raw in enumerate(found, start=1):
                try:
                    yield utf8_text(raw, path, f"line {number}")
                except InputError as error:
                    broken.append(error)
                    yield raw.decode("utf-8", "replace")

        source = texts()
        header_line = next(source, None)
        if broken:
            raise broken[0]
        if header_line is None or not header_line.strip():
            raise InputError(path, "expected a header line with column names, found none")
        separator, header = _header(path, header_line, columns, captions=captions)
        image = header.index(columns.image)
        caption = header.index(columns.caption) if columns.caption in header else None
        rows = csv.reader(source, delimiter=separator, strict=True)
        first = 2
        while True:
            problem = ""
            try:
                cells = next(rows)
            except StopIteration:
                break
            except csv.Error as error:
                cells, problem = [], f"expected valid CSV quoting, found: {error}"
            last = rows.line_num + 1  # the reader does not count the header
            item = f"line {first}" if first >= last else f"lines {first} to {last}"
            first = last + 1
            if broken:
                problem, item = broken[0].problem, broken[0].item or item
                broken.clear()
            elif cells and len(cells) != len(header):
                problem = f"expected {len(header)} columns, found {len(cells)}"
            if problem:
                bad.add(InputError(path, problem, item=item))
            elif cells:
                yield _Row(item, cells[image], "" if caption is None else cells[caption])


def _header(
    path: Path, line: str, columns: TableColumns, *, captions: bool = True
) -> tuple[str, list[str]]:
    """Return the separator and the column names.

    Raises:
        InputError: no separator yields both columns, image and caption, or one of the two is
            repeated. Without ``captions``, a column with the default name may be missing.
    """
    wanted: tuple[str, ...] = (columns.image, columns.caption)
    headers = {}
    for separator in dict.fromkeys((columns.separator, *SEPARATORS)):
        try:
            headers[separator] = [
                name.strip() for name in next(csv.reader([line], delimiter=separator))
            ]
        except csv.Error:
            continue
    fitting = _fitting(headers, wanted)
    if not fitting and not captions and columns.caption == TableColumns.caption:
        wanted = (columns.image,)
        fitting = _fitting(headers, wanted)
        if fitting:
            notice(path, f"no column {columns.caption!r}: its images have no captions")
    chosen = columns.separator if columns.separator in fitting else next(iter(fitting), None)
    if chosen is None:
        found = f"the header {shortened(line.strip())}"
        problem = f"expected columns {' and '.join(map(repr, wanted))}, found {found}"
        todo = "set their names with --csv_image_key and --csv_caption_key"
        raise InputError(path, problem, item="line 1", todo=todo)
    names = fitting[chosen]
    repeated = next((name for name in wanted if names.count(name) > 1), None)
    if repeated is not None:
        raise InputError(path, f"expected every column once, found {repeated!r} twice")
    if chosen != columns.separator:
        notice(path, f"columns are separated by {SEPARATORS[chosen]}, as the header shows")
    return chosen, names


def _fitting(headers: dict[str, list[str]], wanted: tuple[str, ...]) -> dict[str, list[str]]:
    """Select the separators that yield the wanted columns."""
    return {one: names for one, names in headers.items() if all(name in names for name in wanted)}


def _below_root(written: str, base: Path, root: Path, path: Path, item: str) -> str:
    """Convert an image path to one relative to the data root, with ``/`` as the separator."""
    found, todo = "a path with a NUL character", None
    if "\0" not in written:
        if inside_root(f"{base.absolute().as_posix()}/x", root) is None:
            todo = f"pass the folder of the images with --image_folder instead of {root}"
        place = posixpath.join(base.absolute().as_posix(), with_slashes(written, path, base))
        inside = inside_root(place, root)
        if inside is not None:
            return inside
        found = "a path that leaves it"
    found = f"{found}: {shortened(written)}"
    problem = f"field 'image': expected a path inside the data root, found {found}"
    raise InputError(path, problem, item=item, todo=todo)


# ---------------------------------------------------------------------------------------- folders


def _folder_rows(folder: Path, bad: BadLines) -> Iterator[_Row]:
    images, texts = _files(folder)
    unused = texts.keys() - {image.with_suffix("") for image in images}
    if unused:
        endings = ", ".join(sorted(IMAGE_ENDINGS))
        notice(folder, f"ignored text files without an image ({endings}): {len(unused)}")
    joined = 0
    for image in progress(images, "reading captions", "images"):
        name = image.relative_to(folder).as_posix()
        item = f"image {shortened(name)}"
        try:
            text = texts.get(image.with_suffix(""))
            if text is None or not text.is_file():
                problem = "expected a text file beside every image, found none"
                raise InputError(folder, problem, item=item)
            paragraphs = [part.strip() for part in text_of(text).splitlines() if part.strip()]
        except InputError as error:
            bad.add(error)
            continue
        joined += len(paragraphs) > 1
        yield _Row(item, name, " ".join(paragraphs))
    if joined:
        notice(folder, f"captions of several lines are joined to one line each: {joined}")


def _files(folder: Path) -> tuple[list[Path], dict[Path, Path]]:
    """List the images under a folder, sorted, and map paths without ``.txt`` to text files.

    Links are followed; hidden files and folders are ignored. Of ``a.txt`` and ``a.TXT``, ``a.txt``
    is used.
    """
    images: list[Path] = []
    texts: dict[Path, Path] = {}
    entered: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in entered:  # a link to a folder that is already listed
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path = Path(place, name)
            ending = path.suffix.lower()
            if name.startswith("."):
                continue
            if ending in IMAGE_ENDINGS:
                images.append(path)
            elif ending == ".txt":
                known = texts.setdefault(path.with_suffix(""), path)
                texts[path.with_suffix("")] = max(known, path)  # lower case sorts last
    return sorted(images), texts
