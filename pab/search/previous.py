"""Lock an index for a run, and mark the rows of the index that the run keeps."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np

from pab.core.errors import InputError
from pab.search.index import MANIFEST, Entry, FileState, Index
from pab.search.writing import PARTS, is_temporary

LOCK = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create the folder of an index if needed; lock out other runs during the `with` block.

    Raises:
        InputError: another run has the lock, the folder holds something other than an index, or
            it cannot be written or locked.
    """
    if folder.is_dir() and not (folder / MANIFEST).is_file():
        # Entries that a run leaves if it is stopped before its first block.
        known = {"img_emb", "metadata", "members", PARTS, LOCK}
        found = {path.name for path in folder.iterdir() if not is_temporary(path)}
        if other := sorted(found - known):
            problem = f"expected an index or an empty folder, found {other[0]!r} in {folder}"
            raise InputError("--out", problem)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
    except OSError as error:
        raise InputError(
            "--out", f"{folder} cannot be written: {error.strerror or error}"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError("--out", f"another run is writing {folder}") from error
        except OSError as error:
            problem = f"{folder} cannot be locked: {error.strerror or error}"
            todo = "use a folder on a file system with file locks"
            raise InputError("--out", problem, todo=todo) from error
        yield


class Previous:
    """Index of G rows before a run; ``keep``, bool [G], marks the rows that remain."""

    def __init__(self, index: Index) -> None:
        self.index, self.keep = index, np.zeros(index.rows, dtype=bool)
        self._bytes = index.column("bytes").astype(np.int64)
        self._times = index.column("mtime_ns").astype(np.int64)
        self._captions, self._offsets = index.column("caption"), index.column("offset")
        names = index.column("name")
        # After a stopped run, a changed image may have two rows; the later row is the new one.
        self.rows = {name: row for row, name in enumerate(names)}
        self._containers: dict[str, list[int]] = {name: [] for name in index.manifest.complete}
        for row, name in enumerate(names) if self._containers else ():
            for container in map(str, PurePosixPath(name).parents):
                self._containers.get(container, []).append(row)

    def keeps(self, entry: Entry) -> bool:
        """Keep the row of an unchanged image; return false if the image is new or changed.

        An image with another caption, or at another offset in its archive, counts as changed.
        """
        row = self.rows.get(entry.name)
        if row is None:
            return False
        before = (self._bytes[row], self._times[row], self._captions[row], self._offsets[row])
        if before != (entry.bytes, entry.mtime_ns, entry.caption, entry.offset):
            return False
        self.keep[row] = True
        return True

    def keep_container(self, name: str, state: FileState) -> int:
        """Keep the rows of a complete container; return their number.

        A stopped run may have left rows of an earlier state of the container; these are dropped.
        """
        rows = [row for row in self._containers[name] if self._times[row] == state.mtime_ns]
        self.keep[rows] = True
        return len(rows)

    def has_same(self, entry: Entry) -> bool:
        """Keep the row with the same name, state and content; return false if there is none."""
        row = self.rows.get(entry.name)
        return row is not None and self.hashes[row] == entry.sha256 and self.keeps(entry)

    @cached_property
    def hashes(self) -> np.ndarray:
        """SHA-256 of each row's image, as hex digits; None if unknown."""
        return self.index.column("sha256")

    @cached_property
    def contents(self) -> dict[str, int]:
        """Map each known SHA-256 to a row with this hash."""
        return {sha: row for row, sha in enumerate(self.hashes) if sha is not None}
