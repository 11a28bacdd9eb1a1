"""Training set as a sequence of pairs that are read from disk on access.

A million annotation lines are a gigabyte of text. As Python objects, they would need several
gigabytes in every loader process. The lines therefore stay in their files. The first start checks
every line and writes a small index (start, source video and image of each line), which is then
memory-mapped. Each access to a pair is one positioned read. All processes share the operating
system's file cache, and each process opens its own files.

Sources other than UTF-8 JSON (tables, folders of captioned images, files in UTF-16 or UTF-32) are
first converted to UTF-8 JSON; the copies are stored in the index folder.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pab.core.counts import counted
from pab.core.errors import InputError
from pab.core.files import existing_file, existing_folder, write_text
from pab.core.notices import notice
from pab.data import training_index
from pab.data.bad_lines import BadLines
from pab.data.image_paths import ImageFinder
from pab.data.json_lines import json_object
from pab.data.pairs import train_pair
from pab.data.records import TrainPair
from pab.data.tables import TableColumns, is_own_data
from pab.data.training_index import FINGERPRINTED, SKIPPED, Shard, changed, load_lines, state_of
from pab.data.training_index_writer import write_index
from pab.data.tree import find_shards, shard_order


class TrainingSet(Sequence[TrainPair]):
    """Sequence of the training pairs of several shards, in numeric order of the shards.

    Create it with :meth:`open`. Pickling omits the index and the open files; unpickling reopens the
    index.

    Attributes:
        root: the data root.
        cache_dir: folder of the index.
        skipped: number of skipped bad lines.
    """

    def __init__(self, root: Path, index: Path, shards: list[Shard], skipped: int) -> None:
        self.root, self.cache_dir, self.skipped = root, index.parent, skipped
        self._index, self._shards = index, shards
        self._lines = load_lines(index)
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

        The first call checks every line (`benchmarks/training_set_memory.py` times it). The
        index remains valid while paths, sizes and modification times of the shards are unchanged.
        If there are tables or folders of captioned images, the data root, ``columns`` and the base
        folder of a table's relative paths must also be unchanged. Notices about the shards are
        stored in the index, and printed by every call.

        Args:
            root: the data root, the folder with ``annotation/`` and ``train/``. Without ``shards``,
                it may also be a table or a folder of captioned images, which is the only shard.
            shards: annotation files, tables or folders of captioned images, read in order of the
                number in their names. None uses those of :func:`pab.data.tree.find_shards`, or
                ``root`` itself.
            cache_dir: folder of the index; default ``ROOT/.cache``.
            skip_bad_lines: skip and count bad lines; :meth:`write_skipped` lists them.
            columns: column names and separator of a table; the defaults are OpenCLIP's.

        Raises:
            InputError: the data root or a shard is missing, a shard is unreadable or empty, lines
                are bad and not skipped (all counted, the first twenty named), no line is valid, the
                index cannot be written, or an existing index is damaged. A line that repeats an
                ``image_id`` is bad.
        """
        root, columns = Path(root), columns or TableColumns()
        if shards is None and is_own_data(root):
            shards, root = [root], root if root.is_dir() else root.parent
        root = existing_folder(root, "the data root")
        paths = find_shards(root) if shards is None else sorted(map(Path, shards), key=shard_order)
        if not paths:
            raise InputError(root, "expected training shards, found none")
        states = [training_index.shard_state(path, root, columns) for path in paths]
        folder = Path(cache_dir) if cache_dir is not None else root / ".cache"
        index = folder / f"training_set-{training_index.index_key(states, root, columns)}"
        if not index.is_dir():
            write_index(index, states, root, columns)
        facts = training_index.load_facts(index)
        bad = BadLines.from_plain(facts["bad"])
        where = states[0].path if len(states) == 1 else root
        if bad.total and not skip_bad_lines:
            raise bad.error(where, todo="fix bad lines, or skip them with --skip_bad_lines")
        if not facts["pairs"]:
            found = f"{counted(bad.total, 'bad line')} ({bad.summary()})"
            raise InputError(where, f"expected usable training pairs, found none: {found}")
        for place, text in facts["notices"]:
            notice(place, text)
        if bad.total:
            notice(where, f"skipped {counted(bad.total, 'bad line')}: {bad.summary()}")
        return cls(root, index, [Shard(**shard) for shard in facts["shards"]], bad.total)

    # ------------------------------------------------------------------------------ a sequence

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> TrainPair:  # type: ignore[override]
        """Return one pair.

        Raises:
            IndexError: the pair does not exist.
            InputError: a shard was changed or removed after indexing.
        """
        position = range(len(self))[index]  # handles negative numbers, raises IndexError
        offset, length, shard, *_ = self._lines[position].item()
        path = Path(self._shards[shard].path)
        raw = os.pread(self._handle(shard).fileno(), length, offset)
        if len(raw) != length:
            raise changed(path)
        item = f"the line at byte {offset}"
        return train_pair(json_object(raw, path, item), path, item, root=self.root)

    # ------------------------------------------------------------------------- ids, videos, files

    @property
    def videos(self) -> np.ndarray:
        """Source video of every pair, int32 [N] for N pairs; equal numbers mean the same video.

        Pairs of one image share a video. A pair without ``source_id`` also shares the video of its
        twin (``hard_i`` or ``hard_i_id``).
        """
        return self._lines["video"]

    @property
    def identities(self) -> np.ndarray:
        """Identity of every pair for the losses, int32 [N]: index of the first pair of its image.

        Pairs with equal identities match, and are not negatives of each other.
        """
        return self._lines["identity"]

    def identity(self, index: int) -> int:
        """Return the identity of one pair; see :attr:`identities`."""
        return int(self._lines[index]["identity"])

    def image_ids(self) -> list[str]:
        """Read ``image_id`` of every pair, in order."""
        return (self._index / "image_ids.txt").read_text(encoding="utf-8").split("\n")

    def images(self) -> list[str]:
        """Read ``image`` of every pair, in order."""
        return (self._index / "images.txt").read_text(encoding="utf-8").split("\0")[:-1]

    def missing_images(self) -> list[str]:
        """Return ``image`` of the pairs without an image file, in order.

        Raises:
            InputError: an image has several variants (:mod:`pab.data.image_paths`), or a folder
                cannot be listed.
        """
        return self._finder.absent(self.images())

    def fingerprint(self) -> str:
        """Hash the index entries of all pairs to 64 hex digits (SHA-256).

        The hash covers the position and length of each line, the ids, the videos and the shared
        images. It therefore depends on the order of shards and lines, and on the skipped lines.
        """
        lines = np.empty(len(self._lines), dtype=FINGERPRINTED)
        for name in FINGERPRINTED.names or ():
            lines[name] = self._lines[name]
        digest = hashlib.sha256(lines.tobytes())
        digest.update((self._index / "image_ids.txt").read_bytes())
        identity = np.ascontiguousarray(self._lines["identity"])
        if (identity != np.arange(len(identity))).any():  # captions that share an image
            digest.update(identity.tobytes())
        return digest.hexdigest()

    def image_path(self, pair: TrainPair) -> Path:
        """Return the image file of a pair; see :meth:`pab.data.image_paths.ImageFinder.find`."""
        return self._finder.find(pair.image)

    def write_skipped(self, folder: str | Path) -> None:
        """Write the errors of skipped lines to ``skipped.txt`` in a folder, if there are any.

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
            if source.copy is None and state_of(os.fstat(handle.fileno())) != source.state:
                handle.close()
                raise changed(path)
            self._handles[shard] = handle
        return handle

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lines": None, "_handles": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lines = load_lines(self._index)
