"""The training set as a sequence of pairs that stays on disk.

A million annotation lines are a gigabyte of text; as Python objects they would be several, copied
into every loader process. So the lines stay in their files, and a small index (where each line
starts, which source video it belongs to) is made once, checked line by line, cached, and
memory-mapped from then on. A pair is read with one positioned read: no memory is held for it, the
operating system's file cache is shared by all processes, and each opens its own files.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np

from pab.annotations import TrainPair, train_pair
from pab.data_tree import find_shards, shard_order
from pab.errors import InputError
from pab.files import existing_file, existing_folder, write_text
from pab.image_paths import ImageFinder, checked_path
from pab.json_lines import json_object, lines

INDEX_FORMAT = 1  # raise it when the index or the checks behind it change
_LINE = np.dtype([("offset", "<i8"), ("length", "<i4"), ("shard", "<i4"), ("video", "<i4")])


@dataclass(frozen=True, slots=True)
class _Shard:
    """An annotation file, and what shows that it is still the same."""

    path: str
    size: int
    mtime_ns: int


class TrainingSet(Sequence[TrainPair]):
    """Training pairs by index: all of some shards in numeric order, or a subset of them.

    Made by :meth:`open`. Pickles as paths, and is opened again where it is unpickled.

    Attributes:
        root: the data root.
        cache_dir: where the index lies.
    """

    def __init__(
        self, root: Path, index: Path, shards: list[_Shard], selection: np.ndarray | None = None
    ) -> None:
        self.root, self.cache_dir = root, index.parent
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
    ) -> TrainingSet:
        """Open the training pairs under a data root.

        The first time every line is checked (``benchmarks/training_set_memory.py`` measures it);
        the index serves as long as names, sizes and modification times of the shards stay as they
        are.

        Args:
            root: the data root, the folder that holds ``annotation/`` and ``train/``.
            shards: annotation files; None takes those of :func:`pab.data_tree.find_shards`. Read
                in order of the number in their names.
            cache_dir: folder for the index; without it ``ROOT/.cache``.

        Raises:
            InputError: no shards, a bad line or a repeated ``image_id`` (named), or a cache folder
                that cannot be written.
        """
        root = existing_folder(root, "the data root")
        paths = find_shards(root) if shards is None else sorted(map(Path, shards), key=shard_order)
        if not paths:
            raise InputError(root, "expected training shards, found none")
        states = [_shard_state(path) for path in paths]
        folder = Path(cache_dir) if cache_dir is not None else root / ".cache"
        index = folder / f"training_set-{_key(states)}"
        if not index.is_dir():
            _write_index(index, states, root)
        return cls(root, index, states)

    # ------------------------------------------------------------------------------ a sequence

    def __len__(self) -> int:
        return len(self._lines) if self._selection is None else len(self._selection)

    @overload
    def __getitem__(self, index: int) -> TrainPair: ...
    @overload
    def __getitem__(self, index: slice) -> TrainingSet: ...
    def __getitem__(self, index: int | slice) -> TrainPair | TrainingSet:
        """One pair, or a subset for a slice.

        Raises:
            IndexError: there is no such pair.
            InputError: a shard was changed or removed since it was indexed.
        """
        if isinstance(index, slice):
            return self.subset(np.arange(len(self))[index])
        position = range(len(self))[index]  # negative numbers, and IndexError
        if self._selection is not None:
            position = int(self._selection[position])
        offset, length, shard, _ = self._lines[position].item()
        path = Path(self._shards[shard].path)
        raw = os.pread(self._handle(shard).fileno(), length, offset)
        if len(raw) != length:
            raise _changed(path)
        item = f"the line at byte {offset}"
        return train_pair(json_object(raw, path, item), path, item, self.root)

    def subset(self, indices: np.ndarray) -> TrainingSet:
        """The pairs at some indices, in that order; costs no more than the index array.

        Raises:
            IndexError: an index is negative or too large.
        """
        chosen = np.asarray(indices, dtype=np.int64)
        if len(chosen) and (chosen.min() < 0 or chosen.max() >= len(self)):
            raise IndexError(f"subset of {len(self)} pairs by an index outside 0..{len(self) - 1}")
        if self._selection is not None:
            chosen = self._selection[chosen]
        return TrainingSet(self.root, self._index, self._shards, chosen)

    # ------------------------------------------------------------------------- ids, videos, files

    @property
    def videos(self) -> np.ndarray:
        """Source video of every pair, int32 [N]: equal numbers share a video.

        A pair without ``source_id`` is a video of its own.
        """
        videos = self._lines["video"]
        return videos if self._selection is None else videos[self._selection]

    def image_ids(self) -> list[str]:
        """``image_id`` of every pair, in order."""
        every = (self._index / "image_ids.txt").read_text(encoding="utf-8").split("\n")
        return every if self._selection is None else [every[i] for i in self._selection]

    def images(self) -> list[str]:
        """``image`` of every pair, in order.

        The first call reads every line; the list is kept in the index for later runs.
        """
        kept = self._index / "images.txt"
        if kept.is_file():
            every = kept.read_text(encoding="utf-8").split("\0")
        else:
            every = [self._image_at(*line) for line in self._lines.tolist()]
            if os.access(self._index, os.W_OK):  # others may share an index that they cannot write
                write_text(kept, "\0".join(every))
        return every if self._selection is None else [every[i] for i in self._selection]

    def _image_at(self, offset: int, length: int, shard: int, video: int) -> str:
        """``image`` of one line of the index; a pair's other fields are not looked at."""
        path = Path(self._shards[shard].path)
        item = f"the line at byte {offset}"
        raw = os.pread(self._handle(shard).fileno(), length, offset)
        if len(raw) != length:
            raise _changed(path)
        image = json_object(raw, path, item)["image"]
        return checked_path(image, "image", path, item, root=self.root)

    def missing_images(self) -> list[str]:
        """``image`` of the pairs whose file is not there, in order; lists each folder once.

        Raises:
            InputError: several files fit one image.
        """
        return self._finder.absent(self.images())

    def fingerprint(self) -> str:
        """SHA-256, 64 hex digits, over what the index says of every pair: its line, id and video.

        Other shards, or lines of other length or order, have another one.
        """
        digest = hashlib.sha256(np.ascontiguousarray(self._lines).tobytes())
        digest.update((self._index / "image_ids.txt").read_bytes())
        if self._selection is not None:
            digest.update(self._selection.tobytes())
        return digest.hexdigest()

    def indices_of(self, image_ids: Sequence[str]) -> np.ndarray:
        """Indices of pairs by ``image_id``, int64, in the order asked for.

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
        """The file of a pair's image."""
        return self._finder.find(pair.image)

    def twin_path(self, pair: TrainPair) -> Path | None:
        """The file of the twin's image; None where the pair names none."""
        return None if pair.hard_i is None else self._finder.find(f"train/{pair.hard_i}")

    # --------------------------------------------------------------------------------- processes

    def _handle(self, shard: int) -> BinaryIO:
        handle = self._handles.get(shard)
        if handle is None:
            state = self._shards[shard]
            path = existing_file(state.path, "an indexed training shard")
            handle = path.open("rb")
            found = os.fstat(handle.fileno())
            if (found.st_size, found.st_mtime_ns) != (state.size, state.mtime_ns):
                handle.close()
                raise _changed(path)
            self._handles[shard] = handle
        return handle

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lines": None, "_handles": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lines = _load_lines(self._index)


def _shard_state(path: Path) -> _Shard:
    path = existing_file(path, "a training shard").absolute()
    state = path.stat()
    return _Shard(str(path), state.st_size, state.st_mtime_ns)


def _key(shards: list[_Shard]) -> str:
    named = json.dumps([INDEX_FORMAT, [asdict(shard) for shard in shards]])
    return hashlib.sha256(named.encode()).hexdigest()[:20]


def _changed(path: Path) -> InputError:
    return InputError(path, "changed since it was indexed", todo="start again to index it anew")


def _load_lines(index: Path) -> np.ndarray:
    """The index, memory-mapped: structured [N] of where each line is."""
    try:
        table = np.load(index / "lines.npy", mmap_mode="r", allow_pickle=False)
        if table.dtype != _LINE or table.ndim != 1:
            raise ValueError(f"expected a list of {_LINE}, found {table.dtype}")
    except (OSError, EOFError, ValueError) as error:
        raise InputError(
            index, f"the index is damaged: {error}", todo="remove this folder to make it anew"
        ) from error
    return table


def _write_index(index: Path, shards: list[_Shard], root: Path) -> None:
    """Check every line of the shards and write the index folder, whole or not at all."""
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
    print(f"checking and indexing {len(shards)} training shards", file=sys.stderr)
    try:
        table, image_ids = _check_lines(shards, root)
        np.save(temporary / "lines.npy", table, allow_pickle=False)
        (temporary / "image_ids.txt").write_text("\n".join(image_ids), encoding="utf-8")
        shape = {"pairs": len(table), "shards": [asdict(shard) for shard in shards]}
        (temporary / "index.json").write_text(json.dumps(shape, indent=1), encoding="utf-8")
        temporary.chmod(0o755)  # mkdtemp makes folders private; others may share the data
        try:
            temporary.rename(index)
        except OSError:
            if not index.is_dir():  # else another process made the same index first
                raise
    except OSError as error:
        raise InputError(
            index.parent,
            f"cannot hold the training set's index: {error.strerror or error}",
            todo="name another folder with --cache_dir",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_lines(shards: list[_Shard], root: Path) -> tuple[np.ndarray, list[str]]:
    """Check all lines. Returns the table of lines [N] and the N image ids."""
    offsets, lengths, homes, videos = array("q"), array("i"), array("i"), array("i")
    first_seen: dict[str, int] = {}
    video_numbers: dict[str, int] = {}
    n_videos = 0
    for shard, state in enumerate(shards):
        path = Path(state.path)
        for number, offset, raw in lines(path):
            item = f"line {number}"
            pair = train_pair(json_object(raw, path, item), path, item, root)
            index = first_seen.setdefault(pair.image_id, len(offsets))
            if index != len(offsets):
                before = Path(shards[homes[index]].path)
                line = next(n for n, start, _ in lines(before) if start == offsets[index])
                raise InputError(
                    path,
                    f"expected every image_id once, found {pair.image_id!r} already in "
                    f"{before.name}, line {line}",
                    item=item,
                )
            source = pair.source_video
            video = n_videos if source is None else video_numbers.setdefault(source, n_videos)
            n_videos = max(n_videos, video + 1)
            offsets.append(offset)
            lengths.append(len(raw))
            homes.append(shard)
            videos.append(video)
        if not homes or homes[-1] != shard:
            raise InputError(path, "expected training pairs, found an empty file")
    table = np.empty(len(offsets), dtype=_LINE)
    for name, column in zip(_LINE.names or (), (offsets, lengths, homes, videos), strict=True):
        table[name] = np.frombuffer(column, dtype=np.dtype(column.typecode))
    return table, list(first_seen)
