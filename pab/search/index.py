"""Search index on disk: format and reading; :mod:`pab.search.writing` writes it.

An index is a folder in clip-retrieval's layout (https://github.com/rom1504/clip-retrieval), with a
manifest::

    manifest.json                       members, shards, source; defines the contents of the index
    img_emb/img_emb_N.npy               [n, D] vectors of shard N, of the first member
    members/NAME/img_emb/img_emb_N.npy  the same rows of each further member
    metadata/metadata_N.parquet         one row per image of shard N

Shards never change. A run writes new shards, then replaces the manifest. Readers ignore shards that
the manifest does not name, and the next run removes them.

Shape letters: `n` rows of a shard, `D` width of the vectors.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from tokenize import TokenError
from typing import Any, Literal

import numpy as np
from pydantic import TypeAdapter, ValidationError

from pab import __version__
from pab.core.counts import counted
from pab.core.errors import InputError
from pab.core.files import existing_file, write_json
from pab.formats.tables import pyarrow

FORMAT = 1  # version of the format; other versions are rejected
MANIFEST = "manifest.json"
SHARD_ROWS = 10_000  # maximum rows of a shard that is merged from several
UNIT = 0.01  # largest deviation of a stored vector's norm from 1; rounding to float16 gives 0.0005
GROUP_ROWS = 1_000  # rows per row group of a metadata file, read together
_GROUPS_IN_MEMORY = 64
AGAIN = "remove the folder of the index, and index the images again"
# Exceptions of numpy and pyarrow for a damaged or missing file.
DAMAGED = (OSError, ValueError, EOFError, LookupError, TypeError, SyntaxError, TokenError)
_KEYS = {"name": "image_path"}  # field of an entry -> metadata column, if the names differ

Dtype = Literal["float16", "float32"]


@dataclass(frozen=True)
class Member:
    """Model whose vectors the index holds.

    Attributes:
        name: name in the index. For each member but the first, the folder of its vectors has the
            same name.
        model: name of the member's entry point, for :func:`pab.search.members.read_member`.
        arguments: command-line flags that open the model.
        fingerprint: facts that the vectors depend on; see :class:`pab.scoring.encoder.Encoder`.
        origin: architecture, checkpoint, checkpoint_sha256 and dtype of the model.
        width: D.
        dtype: type of the stored vectors.
    """

    name: str
    model: str
    arguments: tuple[str, ...]
    fingerprint: dict[str, str]
    origin: dict[str, str]
    width: int
    dtype: Dtype = "float16"


@dataclass(frozen=True)
class Shard:
    """Group of rows that share files; the file names contain ``number``."""

    number: int
    rows: int


@dataclass(frozen=True)
class FileState:
    """Size (bytes) and modification time (ns) of a file, to detect changes."""

    bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class Unreadable:
    """Problem of an image or file that cannot be read, and the state of the file if known."""

    problem: str
    state: FileState | None = None


@dataclass(frozen=True)
class Manifest:
    """Contents of ``manifest.json``.

    Attributes:
        source: settings of the source of the images; see :meth:`pab.search.sources.Source.facts`.
        root: absolute path of a folder; the files of the entries are relative to it.
        members: at least one.
        shards: in row order.
        next_number: number of the next shard.
        unreadable: name -> problem of an image or file that cannot be read.
        complete: name -> state of archives and videos that were read; in this state, they are not
            read again.
        ann: :class:`pab.search.ann.AnnRecord` as plain values; None without an approximate index.
        format, project_version: version of the format, and of the project that made the index.
    """

    source: dict[str, Any]
    root: str
    members: list[Member]
    shards: list[Shard] = field(default_factory=list)
    next_number: int = 0
    unreadable: dict[str, Unreadable] = field(default_factory=dict)
    complete: dict[str, FileState] = field(default_factory=dict)
    ann: dict[str, Any] | None = None
    format: int = FORMAT
    project_version: str = __version__

    @property
    def rows(self) -> int:
        """Number of images."""
        return sum(shard.rows for shard in self.shards)

    def save(self, folder: Path) -> None:
        """Write the manifest atomically.

        Raises:
            InputError: the file cannot be written.
        """
        write_json(folder / MANIFEST, _MANIFEST.dump_python(self, mode="json"))


_MANIFEST = TypeAdapter(Manifest)


@dataclass(frozen=True)
class Entry:
    """Image of an index; one row of the metadata.

    Attributes:
        name: unique name: the path of the file relative to the source, with the extension. In an
            archive or a video, the image's name or time follows.
        path: file on disk: the image, or the archive or video that contains it.
        bytes, mtime_ns: state of ``path``; for an image in an archive, ``bytes`` is the size of the
            image.
        sha256: hex digest of the encoded image, or of a frame's pixels; None if unknown.
        width, height: size of the upright image in pixels; None if unknown.
        time_s: time stamp in a video, seconds from its first frame; otherwise None.
        offset: position of the image in an archive, bytes; otherwise None.
        caption: caption from a table or an archive; otherwise None.
    """

    name: str
    path: Path
    bytes: int
    mtime_ns: int
    sha256: str | None = None
    width: int | None = None
    height: int | None = None
    time_s: float | None = None
    offset: int | None = None
    caption: str | None = None


_COLUMNS = {_KEYS.get(one.name, one.name) for one in fields(Entry)} - {"path"} | {"file"}


class Index:
    """Opened index. Vectors are memory-mapped; metadata is read in groups of rows when needed.

    Args:
        folder: folder of the index.
        manifest: its contents.
        entries: all entries in row order, for an index without metadata files.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, entries: Sequence[Entry] | None = None
    ) -> None:
        self.folder, self.manifest = folder, manifest
        self._entries = entries
        self._ends = list(accumulate(shard.rows for shard in manifest.shards))
        self._groups: OrderedDict[tuple[int, int], Any] = OrderedDict()  # values: pyarrow tables
        self._mapped: dict[tuple[str, int], np.ndarray] = {}

    @classmethod
    def open(cls, folder: str | Path) -> Index:
        """Open an index.

        Raises:
            InputError: the manifest is missing or damaged, or has another format.
        """
        folder = Path(folder)
        return cls(folder, read_manifest(folder))

    @property
    def rows(self) -> int:
        """Number of images."""
        return self._ends[-1] if self._ends else 0

    @property
    def members(self) -> list[Member]:
        """Models whose vectors the index holds."""
        return self.manifest.members

    def member(self, name: str) -> Member:
        """Return the member with a name.

        Raises:
            InputError: the index has no such member.
        """
        for member in self.members:
            if member.name == name:
                return member
        known = ", ".join(member.name for member in self.members)
        raise InputError(self.folder, f"expected one of the members {known}, found {name!r}")

    def blocks(self, member: str) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the vectors of a member as (first row, memory-mapped [n, D]), in row order.

        Raises:
            InputError: there is no such member, or a file is missing or damaged, or has another
                shape or type than the manifest says.
        """
        first = 0
        for shard in self.manifest.shards:
            yield first, self._vectors(self.member(member), shard)
            first += shard.rows

    def vector(self, member: str, row: int) -> np.ndarray:
        """Return the vector of one row, float32 [D]."""
        return self.vectors(member, [row])[0].astype(np.float32)

    def vectors(self, member: str, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the vectors of some rows as stored, [n, D]."""
        found = self.member(member)
        out = np.empty((len(rows), found.width), dtype=found.dtype)
        for place, row in enumerate(rows):
            shard, position = self._place(int(row))
            out[place] = self._vectors(found, shard)[position]
        return out

    def entry(self, row: int) -> Entry:
        """Return the entry of a row; rows are counted from 0.

        Raises:
            InputError: the metadata cannot be read.
            IndexError: there is no such row.
        """
        shard, place = self._place(row)
        if self._entries is not None:
            return self._entries[row]
        key = (shard.number, place // GROUP_ROWS)
        group = self._groups.get(key)
        if group is None:  # two threads of a server may both read the group
            group = self._groups[key] = self._read_group(*key)
            if len(self._groups) > _GROUPS_IN_MEMORY:
                self._groups.popitem(last=False)
        # Only one row is converted, because converting a whole group takes longer than reading it.
        (found,) = group.slice(place % GROUP_ROWS, 1).to_pylist()
        return self._entry(found)

    def entries(self) -> Iterator[Entry]:
        """Yield all entries in row order. This reads all metadata, so do not call it per query."""
        if self._entries is not None:
            yield from self._entries
            return
        for shard in self.manifest.shards:
            for group in range(-(-shard.rows // GROUP_ROWS)):
                yield from map(self._entry, self._read_group(shard.number, group).to_pylist())

    @cached_property
    def names(self) -> np.ndarray:
        """Names in row order, as an object array; read once, when they are first needed."""
        return self.column("name")

    @cached_property
    def times(self) -> np.ndarray:
        """Time stamps in row order, seconds, float64; NaN for images that have none."""
        return self.column("time_s").astype(np.float64)

    def column(self, name: str) -> np.ndarray:
        """Read a field other than ``path`` of all entries, in row order, as an object array."""
        if self._entries is not None:
            return np.array([getattr(entry, name) for entry in self._entries], dtype=object)
        parts = [np.empty(0, dtype=object)]
        for shard in self.manifest.shards:
            path, key = metadata_path(self.folder, shard.number), _KEYS.get(name, name)
            with _reading(path), pyarrow(path).parquet.ParquetFile(path) as file:
                found = file.read(columns=[key]).column(key).to_pylist()
            if len(found) != shard.rows:
                problem = f"expected {counted(shard.rows, 'row')}, found {len(found)}"
                raise InputError(path, problem, todo=AGAIN)
            parts.append(np.array(found, dtype=object))
        return np.concatenate(parts)

    def _place(self, row: int) -> tuple[Shard, int]:
        if not 0 <= row < self.rows:
            raise IndexError(f"expected a row below {self.rows}, found {row}")
        position = bisect_right(self._ends, row)
        shard = self.manifest.shards[position]
        return shard, row - (self._ends[position] - shard.rows)

    def _vectors(self, member: Member, shard: Shard) -> np.ndarray:
        key = (member.name, shard.number)
        if key not in self._mapped:
            path = vectors_path(self.folder, self.members, member.name, shard.number)
            with _reading(path):
                # Copy-on-write: PyTorch warns about read-only memory.
                found = np.load(path, mmap_mode="c", allow_pickle=False)
            expected = (member.dtype, (shard.rows, member.width))
            if (found.dtype, found.shape) != expected:
                raise InputError(
                    path, f"expected {member.dtype} {list(expected[1])}, found {found.dtype} "
                    f"{list(found.shape)}", todo=AGAIN,
                )  # fmt: skip
            self._mapped[key] = found
        return self._mapped[key]

    def _read_group(self, number: int, group: int) -> Any:
        path = metadata_path(self.folder, number)
        with _reading(path), pyarrow(path).parquet.ParquetFile(path) as file:
            table = file.read_row_group(group)
            if set(table.column_names) != _COLUMNS:
                raise ValueError(f"expected the columns {', '.join(sorted(_COLUMNS))}")
            return table

    def _entry(self, row: dict[str, Any]) -> Entry:
        name, file_name = row.pop("image_path"), row.pop("file")
        relative = name if file_name is None else os.fsdecode(file_name)
        return Entry(name=name, path=Path(self.manifest.root, relative), **row)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of an index.

    Raises:
        InputError: the manifest is missing or damaged, or has another format.
    """
    path = existing_file(folder / MANIFEST, "the manifest of an index")
    try:
        found = _MANIFEST.validate_json(path.read_bytes())
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        problem = f"expected the manifest of an index, found: {fault['msg']}"
        raise InputError(path, problem, item=where or None) from error
    if found.format != FORMAT:
        raise InputError(path, f"expected format {FORMAT}, found {found.format}", todo=AGAIN)
    names = [member.name for member in found.members]
    if not names or any(Path(name).name != name for name in names) or len({*names}) < len(names):
        raise InputError(
            path, f"expected members with distinct names, each a plain file name, found {names}"
        )
    return found


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Convert errors from reading a file of the index to :class:`InputError`."""
    try:
        yield
    except DAMAGED as error:
        problem = getattr(error, "strerror", None) or str(error)
        moved = isinstance(error, FileNotFoundError)
        todo = f"if another run has updated the index, open it again; otherwise {AGAIN}"
        raise InputError(
            path, f"cannot be read: {problem}", todo=todo if moved else AGAIN
        ) from error


def metadata_path(folder: Path, number: int) -> Path:
    """Return the path of a shard's metadata."""
    return folder / "metadata" / f"metadata_{number}.parquet"


def vectors_path(folder: Path, members: Sequence[Member], name: str, number: int) -> Path:
    """Return the path of a member's vectors in a shard."""
    home = folder if name == members[0].name else folder / "members" / name
    return home / "img_emb" / f"img_emb_{number}.npy"
