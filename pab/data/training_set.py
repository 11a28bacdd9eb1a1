"""Training set as a sequence of pairs that stays on disk.

A million annotation lines are a gigabyte of text. As Python objects, they would take several,
copied to every loader process. The lines therefore stay in their files. A small index (start,
source video and image of each line) is built once, with every line checked. It is then cached and
memory-mapped. Each pair takes one positioned read and no permanent memory. All processes share the
system's file cache, and each opens its own files.

Sources other than UTF-8 JSON (tables, folders of captioned images, UTF-16) are first converted to
JSON lines in the index folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, TextIO, overload

import numpy as np

from pab.core.errors import InputError
from pab.core.files import existing_file, existing_folder, write_text
from pab.core.notices import notice, recorded
from pab.core.progress import Progress, write_line
from pab.data.annotations import TrainPair, train_pair
from pab.data.bad_lines import BadLines
from pab.data.fields import FieldNotes
from pab.data.image_paths import ImageFinder
from pab.data.json_lines import entries, json_object, utf8_bytes, wide_encoding
from pab.data.tables import (
    TableColumns,
    captioned_images,
    folder_state,
    is_captioned_folder,
    is_own_data,
    is_table,
    table_base,
)
from pab.data.tree import find_shards, shard_order

INDEX_FORMAT = 4  # raise it when the index or the checks behind it change
SKIPPED = "skipped.txt"  # the bad lines of a set, one per line
_LINE = np.dtype(
    [
        ("offset", "<i8"), ("length", "<i4"), ("shard", "<i4"), ("video", "<i4"),
        ("identity", "<i4"),
    ]
)  # fmt: skip
# Columns of the first index version, so that saved runs keep their fingerprints.
_FINGERPRINTED = np.dtype([(name, _LINE[name]) for name in ("offset", "length", "shard", "video")])
_CHUNK = 1 << 20  # bytes copied at a time


@dataclass(frozen=True, slots=True)
class _Shard:
    """Source of training pairs.

    Attributes:
        path: the file or folder; errors name it.
        state: value that changes when the source changes.
        copy: name of the converted file in the index folder; None reads the source itself.
    """

    path: str
    state: str
    copy: str | None = None


class TrainingSet(Sequence[TrainPair]):
    """Training pairs by index: all pairs of some shards in numeric order, or a subset.

    Created by :meth:`open`. Pickling stores paths, and unpickling opens the set again.

    Attributes:
        root: the data root.
        cache_dir: folder of the index.
        skipped: number of skipped bad lines.
    """

    def __init__(
        self,
        root: Path,
        index: Path,
        shards: list[_Shard],
        skipped: int,
        selection: np.ndarray | None = None,
    ) -> None:
        self.root, self.cache_dir, self.skipped = root, index.parent, skipped
        self._index, self._shards, self._selection = index, shards, selection
        self._lines = _load_lines(index)
        self._finder = ImageFinder(root)
        self._handles: dict[int, BinaryIO] = {}

    @classmethod
    def open(
        cls,
        root: str | Path,
        shards: Sequence[str | Path] | None = None,
        cache_dir: str | Path | None = None,
        *,
        skip_bad_lines: bool = False,
        columns: TableColumns | None = None,
    ) -> TrainingSet:
        """Open the training pairs under a data root.

        The first call checks every line (`benchmarks/training_set_memory.py` measures it). The
        index remains valid while names, sizes and modification times of the shards are unchanged.
        It also stores ignored and assumed parts, which every opening prints.

        Args:
            root: the data root, the folder with ``annotation/`` and ``train/``; or a table or
                folder of captioned images, which is then the only shard.
            shards: annotation files, tables or folders of captioned images, read in order of the
                number in their names. None uses those of :func:`pab.data.tree.find_shards`.
            cache_dir: folder of the index; default ``ROOT/.cache``.
            skip_bad_lines: skip and count bad lines; :meth:`write_skipped` lists them.
            columns: column names of a table; the defaults are OpenCLIP's.

        Raises:
            InputError: no shards, bad lines or repeated ``image_id`` (all counted, the first twenty
                named), no valid line, or a cache folder that is not writable.
        """
        root, columns = Path(root), columns or TableColumns()
        if shards is None and is_own_data(root):
            shards, root = [root], root if root.is_dir() else root.parent
        root = existing_folder(root, "the data root")
        paths = find_shards(root) if shards is None else sorted(map(Path, shards), key=shard_order)
        if not paths:
            raise InputError(root, "expected training shards, found none")
        states = [_shard_state(path, root, columns) for path in paths]
        folder = Path(cache_dir) if cache_dir is not None else root / ".cache"
        index = folder / f"training_set-{_key(states, root, columns)}"
        if not index.is_dir():
            _write_index(index, states, root, columns)
        facts = _load_facts(index)
        bad = BadLines.from_plain(facts["bad"])
        where = states[0].path if len(states) == 1 else root
        if bad.total and not skip_bad_lines:
            raise bad.error(where, todo="mend them, or leave them out with --skip_bad_lines")
        if not facts["pairs"]:
            raise InputError(
                where, f"expected usable training pairs, found none: {bad.total} bad lines "
                f"({bad.summary()})",
            )  # fmt: skip
        for place, text in facts["notices"]:
            notice(place, text)
        if bad.total:
            notice(where, f"{bad.total} bad lines are left out: {bad.summary()}")
        return cls(root, index, [_Shard(**shard) for shard in facts["shards"]], bad.total)

    # ------------------------------------------------------------------------------ a sequence

    def __len__(self) -> int:
        return len(self._lines) if self._selection is None else len(self._selection)

    @overload
    def __getitem__(self, index: int) -> TrainPair: ...
    @overload
    def __getitem__(self, index: slice) -> TrainingSet: ...
    def __getitem__(self, index: int | slice) -> TrainPair | TrainingSet:
        """Return one pair, or a subset for a slice.

        Raises:
            IndexError: the pair does not exist.
            InputError: a shard was changed or removed after indexing.
        """
        if isinstance(index, slice):
            return self.subset(np.arange(len(self))[index])
        position = range(len(self))[index]  # handles negative numbers, raises IndexError
        if self._selection is not None:
            position = int(self._selection[position])
        offset, length, shard, *_ = self._lines[position].item()
        path = Path(self._shards[shard].path)
        raw = os.pread(self._handle(shard).fileno(), length, offset)
        if len(raw) != length:
            raise _changed(path)
        item = f"the line at byte {offset}"
        return train_pair(json_object(raw, path, item), path, item, root=self.root)

    def subset(self, indices: np.ndarray) -> TrainingSet:
        """Select pairs by index, in the given order; takes no more memory than the index array.

        Raises:
            IndexError: an index is negative or too large.
        """
        chosen = np.asarray(indices, dtype=np.int64)
        if len(chosen) and (chosen.min() < 0 or chosen.max() >= len(self)):
            raise IndexError(f"subset of {len(self)} pairs by an index outside 0..{len(self) - 1}")
        if self._selection is not None:
            chosen = self._selection[chosen]
        return TrainingSet(self.root, self._index, self._shards, self.skipped, chosen)

    # ------------------------------------------------------------------------- ids, videos, files

    @property
    def videos(self) -> np.ndarray:
        """Source video of every pair, int32 [N]; equal numbers share a video.

        A pair without ``source_id`` is its own video; captions of one image share it.
        """
        videos = self._lines["video"]
        return videos if self._selection is None else videos[self._selection]

    def identity(self, index: int) -> int:
        """Identity of a pair in the losses; pairs with equal numbers match each other.

        Every pair has its own identity, except captions of one image
        (:attr:`pab.data.records.TrainPair.captioned_image`).
        """
        position = index if self._selection is None else int(self._selection[index])
        return int(self._lines[position]["identity"])

    def image_ids(self) -> list[str]:
        """``image_id`` of every pair, in order."""
        every = (self._index / "image_ids.txt").read_text(encoding="utf-8").split("\n")
        return every if self._selection is None else [every[i] for i in self._selection]

    def images(self) -> list[str]:
        """``image`` of every pair, in order."""
        every = (self._index / "images.txt").read_text(encoding="utf-8").split("\0")[:-1]
        return every if self._selection is None else [every[i] for i in self._selection]

    def missing_images(self) -> list[str]:
        """Return ``image`` of the pairs without an image file, in order; lists each folder once.

        Raises:
            InputError: several files fit one image.
        """
        return self._finder.absent(self.images())

    def fingerprint(self) -> str:
        """SHA-256, 64 hex digits, of the index entries of all pairs: line, id and video.

        It changes with the shards, with length or order of the lines, and with the skipped lines.
        """
        lines = np.empty(len(self._lines), dtype=_FINGERPRINTED)
        for name in _FINGERPRINTED.names or ():
            lines[name] = self._lines[name]
        digest = hashlib.sha256(lines.tobytes())
        digest.update((self._index / "image_ids.txt").read_bytes())
        identity = np.ascontiguousarray(self._lines["identity"])
        if (identity != np.arange(len(identity))).any():  # captions that share an image
            digest.update(identity.tobytes())
        if self._selection is not None:
            digest.update(self._selection.tobytes())
        return digest.hexdigest()

    def indices_of(self, image_ids: Sequence[str]) -> np.ndarray:
        """Return indices of pairs by ``image_id``, int64, in the given order.

        Raises:
            InputError: an id is not in the set.
        """
        wanted = dict.fromkeys(image_ids, -1)
        for index, image_id in enumerate(self.image_ids()):
            if image_id in wanted:
                wanted[image_id] = index
        missing = [image_id for image_id, index in wanted.items() if index < 0]
        if missing:
            raise InputError(
                self.root,
                f"expected training pairs for all ids, found none for {len(missing)} of them",
                item=f"image_id {missing[0]!r}",
            )
        return np.array([wanted[image_id] for image_id in image_ids], dtype=np.int64)

    def image_path(self, pair: TrainPair) -> Path:
        """File of a pair's image."""
        return self._finder.find(pair.image)

    def twin_path(self, pair: TrainPair) -> Path | None:
        """File of the twin's image; None if the pair names none."""
        return None if pair.hard_i is None else self._finder.find(f"train/{pair.hard_i}")

    def write_skipped(self, folder: str | Path) -> None:
        """List the skipped bad lines in ``skipped.txt`` of a folder, if there are any.

        Raises:
            InputError: the file cannot be written.
        """
        if self.skipped:
            text = (self._index / SKIPPED).read_text(encoding="utf-8")
            write_text(Path(folder) / SKIPPED, text)

    # --------------------------------------------------------------------------------- processes

    def _handle(self, shard: int) -> BinaryIO:
        handle = self._handles.get(shard)
        if handle is None:
            source = self._shards[shard]
            path = Path(source.path) if source.copy is None else self._index / source.copy
            handle = existing_file(path, "an indexed training shard").open("rb")
            if source.copy is None and _state_of(os.fstat(handle.fileno())) != source.state:
                handle.close()
                raise _changed(path)
            self._handles[shard] = handle
        return handle

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lines": None, "_handles": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lines = _load_lines(self._index)


def _shard_state(path: Path, root: Path, columns: TableColumns) -> _Shard:
    if is_captioned_folder(path):
        return _Shard(str(path.absolute()), folder_state(path))
    existing_file(path, "a training shard")
    state = _state_of(path.stat())
    if is_table(path):  # not resolved, because its paths may be relative to its folder
        base = table_base(path, root, columns)
        return _Shard(str(path.absolute()), f"{state}, paths from {base.absolute()}")
    return _Shard(str(path.absolute()), state)


def _state_of(found: os.stat_result) -> str:
    return f"{found.st_size} bytes of {found.st_mtime_ns}"


def _key(shards: list[_Shard], root: Path, columns: TableColumns) -> str:
    facts: list[Any] = [INDEX_FORMAT, [asdict(shard) for shard in shards]]
    if any(is_own_data(shard.path) for shard in shards):  # copies hold paths below the root
        facts += [str(root.resolve()), asdict(columns)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:20]


def _changed(path: Path) -> InputError:
    return InputError(path, "changed since it was indexed", todo="start again to index it anew")


def _load_lines(index: Path) -> np.ndarray:
    """Memory-map the index: structured [N] with the place of each line."""
    try:
        table = np.load(index / "lines.npy", mmap_mode="r", allow_pickle=False)
        if table.dtype != _LINE or table.ndim != 1:
            raise ValueError(f"expected a list of {_LINE}, found {table.dtype}")
    except (OSError, EOFError, ValueError) as error:
        raise _damaged(index, error) from error
    return table


def _load_facts(index: Path) -> dict[str, Any]:
    """Read the index's facts about the whole set: shards, notices, bad lines."""
    try:
        facts: dict[str, Any] = json.loads((index / "index.json").read_text(encoding="utf-8"))
        if not facts.keys() >= {"pairs", "shards", "notices", "bad"}:
            raise ValueError(f"index.json holds {', '.join(facts)}")
    except (OSError, ValueError, AttributeError) as error:
        raise _damaged(index, error) from error
    return facts


def _damaged(index: Path, error: Exception) -> InputError:
    return InputError(
        index, f"the index is damaged: {error}", todo="remove this folder to make it anew"
    )


def _write_index(index: Path, shards: list[_Shard], root: Path, columns: TableColumns) -> None:
    """Check every line of the shards and write the index folder atomically.

    The index also stores the bad lines, so that a run that skips them need not check again.
    """
    try:
        index.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(
            tempfile.mkdtemp(dir=index.parent, prefix=f".{index.name}.", suffix=".tmp")
        )
    except OSError as error:
        raise InputError(
            index.parent,
            f"cannot hold the training set's index: {error.strerror or error}",
            todo="name a folder that can be written with --cache_dir",
        ) from error
    write_line(f"checking and indexing {len(shards)} training shards")
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
        temporary.chmod(0o755)  # mkdtemp makes folders private; others may share the data
        try:
            temporary.rename(index)
        except OSError:
            if not index.is_dir():  # otherwise another process made the same index first
                raise
    except OSError as error:
        raise InputError(
            index.parent,
            f"cannot hold the training set's index: {error.strerror or error}",
            todo="name another folder with --cache_dir",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _readable(
    number: int, shard: _Shard, folder: Path, root: Path, columns: TableColumns, bad: BadLines
) -> _Shard:
    """Return the shard, with a copy in JSON lines if its own format differs."""
    path, name = Path(shard.path), f"shard_{number}.json"
    if is_table(path) or path.is_dir():
        with (folder / name).open("w", encoding="utf-8") as copy:
            for found in captioned_images(path, root, columns, bad):
                line = {
                    "image": found.image,
                    "caption": found.caption,
                    "image_id": f"{found.image_id}#{found.number}",
                }
                copy.write(json.dumps(line, ensure_ascii=False) + "\n")
        return replace(shard, copy=name)
    if wide_encoding(path) is not None:
        with utf8_bytes(path) as (text, _), (folder / name).open("wb") as narrow:
            shutil.copyfileobj(text, narrow, _CHUNK)
        return replace(shard, copy=name)
    return shard


class _Checked:
    """Index under construction.

    Args:
        root: the data root.
        images: receives ``image`` of each pair, followed by a NUL.

    Attributes:
        shards: shards read so far.
        notes: counts of ignored and assumed parts.
        columns: columns of the table of lines.
        numbers: line number of each pair.
        first_seen: ``image_id`` -> index of its pair.
    """

    def __init__(self, root: Path, images: TextIO) -> None:
        self._root, self._image_list = root, images
        self.shards: list[_Shard] = []
        self.notes = FieldNotes()
        self.columns = {name: array("q") for name in _LINE.names or ()}
        self._append = [column.append for column in self.columns.values()]
        self.numbers = array("q")
        self.first_seen: dict[str, int] = {}
        self._videos: dict[object, int] = {}
        self._images: dict[tuple[str, str], int] = {}
        self._next_video = 0

    def add(self, raw: bytes, path: Path, number: int, offset: int) -> None:
        """Check the next line of the last shard and add its pair.

        Raises:
            InputError: the line is bad, or repeats an ``image_id``.
        """
        item = f"line {number}"
        pair = train_pair(json_object(raw, path, item), path, item, self.notes, self._root)
        index = len(self.numbers)
        before = self.first_seen.setdefault(pair.image_id, index)
        if before != index:
            name = Path(self.shards[self.columns["shard"][before]].path).name
            raise InputError(
                path,
                f"expected every image_id once, found {pair.image_id!r} already in "
                f"{name}, line {self.numbers[before]}",
                item=item,
            )
        image = pair.captioned_image
        source: object = pair.source_video
        if source is None:
            source = image
        video = self._next_video
        if source is not None:
            video = self._videos.setdefault(source, video)
        self._next_video = max(self._next_video, video + 1)
        identity = index if image is None else self._images.setdefault(image, index)
        row = (offset, len(raw), len(self.shards) - 1, video, identity)
        for append, value in zip(self._append, row, strict=True):
            append(value)
        self._image_list.write(f"{pair.image}\0")
        self.numbers.append(number)

    def table(self) -> np.ndarray:
        """Build the table of lines, structured [N]."""
        table = np.empty(len(self.numbers), dtype=_LINE)
        for name, column in self.columns.items():
            table[name] = np.frombuffer(column, dtype=np.int64)
        return table


def _entries(path: Path, source: _Shard, folder: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield the entries of a shard or of its copy; errors name the shard."""
    try:
        yield from entries(path if source.copy is None else folder / source.copy)
    except InputError as error:
        raise InputError(path, error.problem, item=error.item, todo=error.todo) from error


def _check_lines(
    shards: list[_Shard],
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
    for number, shard in enumerate(shards):
        path, known_bad, empty = Path(shard.path), bad.total, True
        source = _readable(number, shard, folder, root, columns, bad)
        checked.shards.append(source)
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
