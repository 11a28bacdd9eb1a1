"""Read the index of a training set from the cache folder.

The name of the index folder contains a hash of the shards' paths, sizes and modification times. For
tables and folders of captioned images, the hash also covers the data root and the columns.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pab.core.errors import InputError
from pab.core.files import existing_file
from pab.data import tables
from pab.data.tables import TableColumns

INDEX_FORMAT = 5  # increment when the index or the checks that build it change
SKIPPED = "skipped.txt"  # messages of the bad lines, one per line
# Fixed columns of the fingerprint; a change would invalidate the fingerprints of saved runs.
FINGERPRINTED = np.dtype([("offset", "<i8"), ("length", "<i4"), ("shard", "<i4"), ("video", "<i4")])
LINE = np.dtype([*FINGERPRINTED.descr, ("identity", "<i4")])


@dataclass(frozen=True, slots=True)
class Shard:
    """Source of training pairs.

    Attributes:
        path: the file or folder, as named in errors.
        state: text that changes when the source changes.
        copy: name of the converted file in the index folder; None if not converted.
    """

    path: str
    state: str
    copy: str | None = None


def shard_state(path: Path, root: Path, columns: TableColumns) -> Shard:
    """Describe the current state of a source.

    Raises:
        InputError: the file is missing or unreadable, or the header of a table is invalid.
    """
    if tables.is_captioned_folder(path):
        return Shard(str(path.absolute()), tables.folder_state(path))
    existing_file(path, "a training shard")
    state = state_of(path.stat())
    if tables.is_table(path):
        # Links are not resolved: image paths may be relative to the folder of a table's link.
        state += f", paths from {tables.table_base(path, root, columns).absolute()}"
    return Shard(str(path.absolute()), state)


def state_of(found: os.stat_result) -> str:
    """Describe the state of a file: size and modification time."""
    return f"{found.st_size} bytes of {found.st_mtime_ns}"


def index_key(shards: list[Shard], root: Path, columns: TableColumns) -> str:
    """Hash everything that the index depends on, to 20 hex digits."""
    facts: list[Any] = [INDEX_FORMAT, [asdict(shard) for shard in shards]]
    # Converted tables and folders contain image paths relative to the root.
    paths = [Path(shard.path) for shard in shards]
    if any(tables.is_table(path) or path.is_dir() for path in paths):
        facts += [str(root.resolve()), asdict(columns)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:20]


def changed(path: Path) -> InputError:
    """Build the error for a shard that changed after indexing."""
    return InputError(path, "changed since it was indexed", todo="restart to rebuild the index")


def load_lines(index: Path) -> np.ndarray:
    """Memory-map the index of N lines, a structured array [N] with the columns of :data:`LINE`."""
    try:
        table = np.load(index / "lines.npy", mmap_mode="r", allow_pickle=False)
        if table.dtype != LINE or table.ndim != 1:
            raise ValueError(f"expected a list of {LINE}, found {table.dtype}")
    except (OSError, EOFError, ValueError) as error:
        raise _damaged(index, error) from error
    return table


def load_facts(index: Path) -> dict[str, Any]:
    """Read the metadata of the index: pairs, shards, notices, bad lines."""
    try:
        facts: dict[str, Any] = json.loads((index / "index.json").read_text(encoding="utf-8"))
        if not facts.keys() >= {"pairs", "shards", "notices", "bad"}:
            raise ValueError(f"index.json contains only {', '.join(facts)}")
    except (OSError, ValueError, AttributeError) as error:
        raise _damaged(index, error) from error
    return facts


def _damaged(index: Path, error: Exception) -> InputError:
    problem = f"the index is damaged: {error}"
    return InputError(index, problem, todo="remove this folder; the next start rebuilds it")
