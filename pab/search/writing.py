"""Write shards of a search index; see :mod:`pab.search.index` for the format.

Shape letters: `n` rows of a shard, `D` width of the vectors.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pab.core.errors import InputError
from pab.core.files import atomic_path
from pab.formats.tables import pyarrow
from pab.search.index import (
    GROUP_ROWS,
    SHARD_ROWS,
    Entry,
    Index,
    Manifest,
    Shard,
    metadata_path,
    vectors_path,
)

PARTS = "parts"  # folder for the parts that workers write, until they are moved into the index
_SHARD_FILE = re.compile(r"(?:img_emb_(\d+)\.npy|metadata_(\d+)\.parquet)")


def write_shard(
    folder: Path,
    manifest: Manifest,
    entries: Sequence[Entry],
    vectors: Mapping[str, np.ndarray],
    *,
    metadata: bool = True,
) -> Shard:
    """Write the files of a new shard, which joins the index once the manifest names it.

    Args:
        folder: folder of the index.
        manifest: contents of the index so far.
        entries: n entries; their paths are below ``manifest.root``.
        vectors: name of each member -> [n, D].
        metadata: write the entries; False for an index that keeps them in memory.

    Raises:
        InputError: a file cannot be written, or a vector is not finite in the stored type.
    """
    shard = Shard(manifest.next_number, len(entries))
    for member in manifest.members:
        with np.errstate(over="ignore"):
            rows = np.ascontiguousarray(vectors[member.name].astype(member.dtype))
        assert rows.shape == (len(entries), member.width)
        bad = ~np.isfinite(rows).all(axis=1)
        if bad.any():
            raise InputError(
                member.origin.get("checkpoint") or member.name,
                f"expected finite vectors in {member.dtype}, found NaN or infinity",
                item=f"image {entries[int(bad.argmax())].name!r}",
                todo="check the checkpoint, or use --dtype fp32",
            )
        with (
            atomic_path(vectors_path(folder, manifest.members, member.name, shard.number)) as path,
            path.open("wb") as file,
        ):
            np.save(file, rows)
    if metadata:
        _write_metadata(metadata_path(folder, shard.number), entries, Path(manifest.root))
    return shard


def _write_metadata(path: Path, entries: Sequence[Entry], root: Path) -> None:
    arrow = pyarrow(path)
    integer = arrow.int64()
    columns = {
        "sha256": arrow.string(), "bytes": integer, "mtime_ns": integer, "width": integer,
        "height": integer, "time_s": arrow.float64(), "offset": integer, "caption": arrow.string(),
    }  # fmt: skip
    files = []
    for entry in entries:
        relative = os.path.relpath(entry.path, root)
        files.append(None if relative == entry.name else os.fsencode(relative))
    table = {"image_path": arrow.array([e.name for e in entries], arrow.string())}
    table["file"] = arrow.array(files, arrow.binary())
    for name, kind in columns.items():
        table[name] = arrow.array([getattr(entry, name) for entry in entries], kind)
    with atomic_path(path) as temporary:
        arrow.parquet.write_table(arrow.table(table), temporary, row_group_size=GROUP_ROWS)


def compacted(folder: Path, manifest: Manifest, keep: np.ndarray) -> Manifest:
    """Merge small neighbouring shards and drop rows; return the new manifest, without saving it.

    Args:
        folder: folder of the index.
        manifest: its contents.
        keep: bool [G] for the G rows of the index; true if a row remains.

    Raises:
        InputError: a file cannot be read or written.
    """
    index, shards, first = Index(folder, manifest), list[Shard](), 0
    groups: list[list[tuple[Shard, np.ndarray]]] = []
    size = SHARD_ROWS
    for shard in manifest.shards:
        rows = first + np.flatnonzero(keep[first : first + shard.rows])
        first += shard.rows
        if len(rows) == 0:
            continue
        if size + len(rows) > SHARD_ROWS:
            groups.append([])
            size = 0
        groups[-1].append((shard, rows))
        size += len(rows)
    for group in groups:
        (shard, rows), *others = group
        if not others and len(rows) == shard.rows:
            shards.append(shard)
            continue
        every = np.concatenate([rows for _, rows in group])
        vectors = {member.name: index.vectors(member.name, every) for member in manifest.members}
        written = write_shard(folder, manifest, [index.entry(row) for row in every], vectors)
        manifest = replace(manifest, next_number=written.number + 1)
        shards.append(written)
    return with_shards(manifest, shards)


def move_shards(source: Path, folder: Path, manifest: Manifest, part: Manifest) -> list[Shard]:
    """Move the shards of a part into the index, under the next numbers.

    Args:
        source: folder of the part, on the file system of the index.
        folder: folder of the index.
        manifest: contents of the index.
        part: contents of the part, whose members are those of the index.

    Returns:
        The new shards, which join the index once the manifest names them.

    Raises:
        InputError: a file cannot be moved.
    """
    moved = []
    for number, shard in enumerate(part.shards, start=manifest.next_number):
        pairs = [(metadata_path(source, shard.number), metadata_path(folder, number))]
        for member in manifest.members:
            before = vectors_path(source, part.members, member.name, shard.number)
            pairs.append((before, vectors_path(folder, manifest.members, member.name, number)))
        for before, after in pairs:
            try:
                after.parent.mkdir(parents=True, exist_ok=True)
                before.replace(after)
            except OSError as error:
                problem = f"cannot be moved to {after}: {error.strerror or error}"
                raise InputError(before, problem) from error
        moved.append(Shard(number, shard.rows))
    return moved


def is_temporary(path: Path) -> bool:
    """Return whether a path has the form of a temporary file of :func:`atomic_path`."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def remove_unnamed(folder: Path, manifest: Manifest) -> None:
    """Remove shards that the manifest does not name, temporary files, and parts of a stopped run.

    Raises:
        InputError: a file cannot be removed.
    """
    named = {shard.number for shard in manifest.shards}
    homes = [folder, folder / "metadata", folder / "img_emb", folder / "ann"]
    homes += folder.glob("members/*/img_emb")
    for path in (path for home in homes if home.is_dir() for path in home.iterdir()):
        match = _SHARD_FILE.fullmatch(path.name)
        if is_temporary(path) or (match is not None and int(match[1] or match[2]) not in named):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise InputError(path, f"cannot be removed: {error.strerror or error}") from error
    try:
        if (folder / PARTS).is_dir():
            shutil.rmtree(folder / PARTS)
    except OSError as error:
        problem = f"cannot be removed: {error.strerror or error}"
        raise InputError(folder / PARTS, problem) from error


def with_shards(manifest: Manifest, shards: Sequence[Shard]) -> Manifest:
    """Return the manifest with other shards and the matching ``next_number``."""
    if list(shards) == manifest.shards:
        return manifest
    following = 1 + max((shard.number for shard in shards), default=-1)
    number = max(manifest.next_number, following)
    return replace(manifest, shards=list(shards), next_number=number)
