"""Check every line of a training set's shards, and write the index."""

from __future__ import annotations

import hashlib
import json
import posixpath
import shutil
import tempfile
from array import array
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TextIO

import numpy as np

from pab.core.counts import counted
from pab.core.errors import InputError
from pab.core.files import sha256_of_file
from pab.core.notices import notice, recorded
from pab.core.progress import Progress, write_line
from pab.data.bad_lines import BadLines
from pab.data.fields import FieldNotes
from pab.data.image_paths import IMAGE_ENDINGS, SEARCH_ONLY_ENDINGS, written_variants
from pab.data.images import is_readable
from pab.data.json_lines import entries, json_object, utf8_bytes, wide_encoding
from pab.data.pairs import train_pair
from pab.data.tables import CaptionedImage, TableColumns, captioned_images, is_table
from pab.data.training_index import LINE, SKIPPED, Shard

_CHUNK = 1 << 20  # bytes copied at a time


def write_index(index: Path, shards: list[Shard], root: Path, columns: TableColumns) -> None:
    """Check every line of the shards and write the index folder atomically.

    The index also stores the bad lines, so that later runs need not check the lines again.

    Raises:
        InputError: a shard cannot be read or is empty, or the index cannot be written.
    """
    try:
        index.parent.mkdir(parents=True, exist_ok=True)
        name = tempfile.mkdtemp(dir=index.parent, prefix=f".{index.name}.", suffix=".tmp")
    except OSError as error:
        raise _no_room(index, error, "set a writable folder") from error
    temporary = Path(name)
    write_line(f"checking and indexing {counted(len(shards), 'training shard')}")
    try:
        with (
            (temporary / SKIPPED).open("w", encoding="utf-8", errors="backslashreplace") as listed,
            (temporary / "images.txt").open("w", encoding="utf-8") as images,
            recorded() as notices,
        ):
            bad = BadLines(lambda text: listed.write(f"{text}\n"))
            found = _check_lines(shards, temporary, root, columns, bad, images)
            for text in found.notes.texts():
                notice(shards[0].path if len(shards) == 1 else root, text)
        np.save(temporary / "lines.npy", found.table(), allow_pickle=False)
        image_ids = "\n".join(found.first_seen)
        (temporary / "image_ids.txt").write_text(image_ids, encoding="utf-8")
        facts = {
            "pairs": len(found.numbers),
            "shards": [asdict(shard) for shard in found.shards],
            "notices": notices,
            "bad": bad.as_plain(),
        }
        (temporary / "index.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
        temporary.chmod(0o755)  # mkdtemp grants access to the owner only; all users may read
        try:
            temporary.rename(index)
        except OSError:
            if not index.is_dir():  # otherwise another process wrote the same index first
                raise
    except OSError as error:
        raise _no_room(index, error, "set another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):  # after an error, the cache folder is removed if it is empty
            index.parent.rmdir()


def _no_room(index: Path, error: OSError, todo: str) -> InputError:
    problem = f"the training set's index cannot be written: {error.strerror or error}"
    return InputError(index.parent, problem, todo=f"{todo} with --cache_dir")


def _copy_table(
    shard: Shard, copy: Path, rows: Iterator[CaptionedImage], items: list[str]
) -> Shard:
    """Write the captions of a table or folder as a shard; add their places to ``items``."""
    with copy.open("w", encoding="utf-8") as lines:
        for found in rows:
            line = {"image": found.image, "caption": found.caption}
            line["image_id"] = f"{found.image_id}#{found.number}"
            lines.write(json.dumps(line, ensure_ascii=False) + "\n")
            items.append(found.item)
    return replace(shard, copy=copy.name)


def _readable(shard: Shard, copy: Path) -> Shard:
    """Return the shard; if it is not UTF-8, write a copy and record its name."""
    path = Path(shard.path)
    if wide_encoding(path) is not None:
        with utf8_bytes(path) as (text, _), copy.open("wb") as narrow:
            shutil.copyfileobj(text, narrow, _CHUNK)
        return replace(shard, copy=copy.name)
    return shard


class _Checked:
    """Index under construction; writes each pair's ``image``, followed by a NUL, to ``images``."""

    def __init__(self, root: Path, images: TextIO) -> None:
        self._root, self._image_list = root, images
        self.shards: list[Shard] = []  # shards read so far
        self.items: list[list[str]] = []  # per shard: places of its rows; empty for JSON
        self.notes = FieldNotes()
        self.columns = {name: array("q") for name in LINE.names or ()}
        self._append = [column.append for column in self.columns.values()]
        self.numbers = array("q")  # line number of each pair
        self.first_seen: dict[str, int] = {}  # image_id -> index of its pair
        self._videos: dict[str, int] = {}  # source video -> number
        self._images = array("Q")  # key of each pair's image; the paths would fill the memory
        self._twins: list[tuple[int, str | None, str | None]] = []  # of pairs without source
        self._next_video = 0

    def _item(self, shard: int, number: int) -> str:
        items = self.items[shard]
        return items[number - 1] if items else f"line {number}"

    def add(self, raw: bytes, path: Path, number: int, offset: int) -> None:
        """Check the next line of the last shard, and add the pair to the index.

        Raises:
            InputError: the line is bad, repeats an ``image_id``, or names an image whose format
                training does not read.
        """
        item = self._item(len(self.shards) - 1, number)
        pair = train_pair(json_object(raw, path, item), path, item, self.notes, self._root)
        ending = posixpath.splitext(pair.image)[1].lower()
        if ending in SEARCH_ONLY_ENDINGS and not is_readable(Path(self._root, pair.image)):
            readable = ", ".join(sorted(IMAGE_ENDINGS))
            problem = f"field 'image': expected a format that training reads ({readable})"
            raise InputError(path, f"{problem}, found {ending}", item=item)
        index = len(self.numbers)
        before = self.first_seen.setdefault(pair.image_id, index)
        if before != index:
            shard = self.columns["shard"][before]
            name = Path(self.shards[shard].path).name
            place = f"{name}, {self._item(shard, self.numbers[before])}"
            problem = f"expected every image_id once, found {pair.image_id!r} already in {place}"
            raise InputError(path, problem, item=item)
        video, source = self._next_video, pair.source_video
        if source is not None:
            video = self._videos.setdefault(source, video)
        elif pair.hard_i is not None or pair.hard_i_id is not None:
            self._twins.append((index, pair.hard_i, pair.hard_i_id))
        self._next_video = max(self._next_video, video + 1)
        self._images.append(_image_key(pair.image))
        row = (offset, len(raw), len(self.shards) - 1, video, index)
        for append, value in zip(self._append, row, strict=True):
            append(value)
        self._image_list.write(f"{pair.image}\0")
        self.numbers.append(number)

    def table(self) -> np.ndarray:
        """Build the structured array [N] of the N lines."""
        table = np.empty(len(self.numbers), dtype=LINE)
        for name, column in self.columns.items():
            table[name] = np.frombuffer(column, dtype=np.int64)
        keys = np.frombuffer(self._images, dtype=np.uint64)
        known, first, number = np.unique(keys, return_index=True, return_inverse=True)
        table["identity"] = first[number]
        again = np.flatnonzero(table["identity"] != np.arange(len(table)))
        related = list(zip(again.tolist(), table["identity"][again].tolist(), strict=True))
        if self._twins:
            images = dict(zip(known.tolist(), first.tolist(), strict=True))
            related.extend(self._twin_rows(images))
        table["video"] = _joined(table["video"], np.array(related, dtype=np.int64).reshape(-1, 2))
        return table

    def _twin_rows(self, images: Mapping[int, int]) -> Iterator[tuple[int, int]]:
        """Yield the indices of pairs without source and of their twins in the training set."""
        for index, hard_i, hard_i_id in self._twins:
            names = () if hard_i is None else written_variants(f"train/{hard_i}")
            found = (images.get(_image_key(name)) for name in names)
            twin = next((row for row in found if row is not None), None)
            if twin is None and hard_i_id is not None:
                twin = self.first_seen.get(hard_i_id)
            if twin is not None:
                yield index, twin


def _image_key(image: str) -> int:
    """Hash an image path to 64 bits; a collision among a million has a chance of 3e-8."""
    path = posixpath.normpath(image).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(path, digest_size=8).digest())


def _joined(videos: np.ndarray, related: np.ndarray) -> np.ndarray:
    """Join the videos of related pairs, and number the videos in order of their first pair.

    Args:
        videos: video of every pair, [N].
        related: indices of related pairs, [M, 2].
    """
    if not len(related):
        return videos
    from scipy.sparse import csr_array  # most training sets do not need scipy
    from scipy.sparse.csgraph import connected_components

    size = int(videos.max()) + 1
    rows, columns = videos[related].T
    graph = csr_array((np.ones(len(related), dtype=np.int8), (rows, columns)), shape=(size, size))
    labels: np.ndarray = connected_components(graph, directed=False)[1]
    return labels[videos]


def _entries(path: Path, source: Shard, folder: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield the entries of a shard or of its copy; errors name the shard."""
    try:
        yield from entries(path if source.copy is None else folder / source.copy)
    except InputError as error:
        raise InputError(path, error.problem, item=error.item, todo=error.todo) from error


def _check_lines(
    shards: list[Shard],
    folder: Path,
    root: Path,
    columns: TableColumns,
    bad: BadLines,
    images: TextIO,
) -> _Checked:
    """Check all lines; ``bad`` collects invalid ones, and ``folder`` receives the copies."""
    checked = _Checked(root, images)
    files = [path for path in (Path(shard.path) for shard in shards) if path.is_file()]
    total = sum(path.stat().st_size for path in files)
    shown = Progress(total or None, "indexing training pairs", "B")
    seen: dict[str, tuple[str, int]] = {}
    tables: dict[str, int] = {}  # SHA-256 of a table -> number of its shard
    for number, shard in enumerate(shards):
        path, known_bad, empty = Path(shard.path), bad.total, True
        copy, items = folder / f"shard_{number}.json", list[str]()
        if is_table(path):
            first = tables.setdefault(sha256_of_file(path), number)
            if first != number:
                other = Path(shards[first].path).name
                problem = f"expected different tables, found the content of {other} again"
                raise InputError(path, problem, todo="list each table once")
        if is_table(path) or path.is_dir():
            rows = captioned_images(path, root, columns, bad, seen)
            source = _copy_table(shard, copy, rows, items)
        else:
            source = _readable(shard, copy)
        checked.shards.append(source)
        checked.items.append(items)
        for line, offset, raw in _entries(path, source, folder):
            empty = False
            shown.update(len(raw))
            try:
                checked.add(raw, path, line, offset)
            except InputError as error:
                bad.add(error)
        if empty and bad.total == known_bad:
            raise InputError(path, "expected training pairs, found an empty file")
    shown.close()
    return checked
