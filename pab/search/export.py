"""Export an index as files that the loaders of vector databases read.

- ``lancedb``: one Parquet file per shard, with a fixed-size list of numbers per member. LanceDB
  reads a folder of such files (https://docs.lancedb.com/tables/create).
- ``qdrant``: ``collection.json`` and one JSON Lines file per shard. ``collection.json`` is the body
  of Qdrant's request "create collection". Each line of the other files is the body of a request
  "upsert points" (https://api.qdrant.tech/api-reference).

Both formats have one vector per image and member, named after the member. The id of an image is a
UUID made from its name, so that a database can replace the images of an earlier export.

Shape letters: `n` rows of a shard, `D` width of the vectors.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from uuid import UUID, uuid5

import numpy as np

from pab.core.errors import InputError
from pab.core.files import atomic_path, write_json
from pab.core.outputs import check_free_space
from pab.core.progress import Progress
from pab.formats.tables import pyarrow
from pab.search.index import UNIT, Dtype, Entry, Index, Member

Format = Literal["lancedb", "qdrant"]

POINTS = 128  # per request; Qdrant's guide to bulk upload recommends 64 to 256
NAMESPACE = UUID("4a1c9c1e-54e3-5a52-9d5c-8a0c3d9cf2a7")  # of the ids; a constant, chosen once
# Significant decimal digits that convert back to the same number.
DIGITS = {"float16": 5, "float32": 9}
# Bytes per number and per image, to check the free space.
NUMBER_BYTES = {"lancedb": {"float16": 2, "float32": 4}, "qdrant": {"float16": 11, "float32": 15}}
IMAGE_BYTES = 500


def export_index(index: Index, out: Path, kind: Format, names: Sequence[str] = ()) -> int:
    """Export an index; the folder appears when it is complete.

    Args:
        index: the index.
        out: folder to write, new or empty.
        kind: ``lancedb`` or ``qdrant``.
        names: members to export; empty for all.

    Returns:
        Number of images.

    Raises:
        InputError: the folder is not empty or cannot be written, the disk has too little free
            space, the index cannot be read, or a member cannot be exported.
    """
    members = [index.member(name) for name in names] or index.members
    out = out.resolve()  # a link to an empty folder, or "."
    if out == Path.cwd() or out.is_mount():  # which cannot be replaced
        found = "the working directory" if out == Path.cwd() else "a mount point"
        raise InputError("--out", f"expected a new folder, found {found}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError("--out", f"expected a new or an empty folder, found {out}")
    numbers = sum(NUMBER_BYTES[kind][member.dtype] * member.width for member in members)
    needed = index.rows * (IMAGE_BYTES + numbers)
    check_free_space("--out", out, needed, "the export", todo="use another --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.", suffix=".tmp"))
    except OSError as error:
        problem = f"{out} cannot be written: {error.strerror or error}"
        raise InputError("--out", problem) from error
    try:
        _write(index, temporary, kind, members)
        temporary.chmod(0o755)  # mkdtemp makes folders private
        temporary.replace(out)
    except OSError as error:
        raise InputError(out, f"cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # no longer exists after a complete export
    return index.rows


def _write(index: Index, out: Path, kind: Format, members: Sequence[Member]) -> None:
    if kind == "qdrant":
        write_json(out / "collection.json", collection(members))
    entries = index.entries()
    with Progress(index.rows, "exporting", "images") as shown:
        for number, blocks in enumerate(zip(*(index.blocks(m.name) for m in members), strict=True)):
            vectors = {
                member.name: unit_rows(index, member, first, block)
                for member, (first, block) in zip(members, blocks, strict=True)
            }
            rows = [next(entries) for _ in blocks[0][1]]
            if kind == "qdrant":
                write_points(out / f"points_{number}.jsonl", rows, vectors)
            else:
                write_table(out / f"images_{number}.parquet", rows, vectors)
            shown.update(len(rows))


def unit_rows(index: Index, member: Member, first: int, rows: np.ndarray) -> np.ndarray:
    """Return the rows, [n, D]; reject vectors that are not of unit length.

    Several vectors per image are stored as one row, whose norm is larger. A database would compare
    that row by a dot product, and rank the images differently from this project.

    Raises:
        InputError: the norm of a row differs from 1 by more than :data:`UNIT`.
    """
    lengths = np.linalg.norm(rows.astype(np.float32), axis=1)
    bad = ~(np.abs(lengths - 1) <= UNIT)
    if bad.any():
        place = int(bad.argmax())
        raise InputError(
            index.folder, f"expected vectors of length 1, found {lengths[place]:.3g} at "
            f"{index.entry(first + place).name!r}", item=f"member {member.name!r}",
            todo="name other members with --members; several vectors per image are not exported",
        )  # fmt: skip
    return rows


def facts(entry: Entry) -> dict[str, Any]:
    """Return the id and the metadata of an image, as plain values; unknown values are None."""
    found = {name: getattr(entry, name) for name in COLUMNS if name not in ("id", "path")}
    path = os.fsencode(entry.path).decode("utf-8", "backslashreplace")
    return {"id": str(uuid5(NAMESPACE, entry.name)), "path": path, **found}


# Column -> Arrow type.
COLUMNS = {
    "id": "string", "name": "string", "path": "string", "sha256": "string", "width": "int32",
    "height": "int32", "time_s": "float64", "caption": "string",
}  # fmt: skip


def write_table(path: Path, entries: Sequence[Entry], vectors: Mapping[str, np.ndarray]) -> None:
    """Write a Parquet file for LanceDB.

    Args:
        path: the file.
        entries: n images.
        vectors: member -> [n, D].

    Raises:
        InputError: a member has the name of a column, or the file cannot be written.
    """
    arrow = pyarrow(path)
    if taken := sorted({*vectors} & {*COLUMNS}):
        raise InputError(path, f"the member {taken[0]!r} has the name of a column")
    rows = [facts(entry) for entry in entries]
    table = {
        name: arrow.array([row[name] for row in rows], getattr(arrow, kind)())
        for name, kind in COLUMNS.items()
    }
    for name, block in vectors.items():
        flat = arrow.array(np.ascontiguousarray(block).reshape(-1))
        table[name] = arrow.FixedSizeListArray.from_arrays(flat, block.shape[1])
    with atomic_path(path) as temporary:
        arrow.parquet.write_table(arrow.table(table), temporary)


def collection(members: Sequence[Member]) -> dict[str, Any]:
    """Return the body of Qdrant's request "create collection".

    The distance is the dot product, so that scores equal those of the exact search, up to rounding.
    """
    vectors = {
        member.name: {"size": member.width, "distance": "Dot", "datatype": member.dtype}
        for member in members
    }
    return {"vectors": vectors}


def write_points(path: Path, entries: Sequence[Entry], vectors: Mapping[str, np.ndarray]) -> None:
    """Write bodies of Qdrant's request "upsert points", one per line.

    For the arguments, see :func:`write_table`.

    Raises:
        InputError: the file cannot be written.
    """
    texts = {name: _numbers(block) for name, block in vectors.items()}
    points = []
    for place, entry in enumerate(entries):
        known = facts(entry)
        key = known.pop("id")
        payload = json.dumps({name: value for name, value in known.items() if value is not None})
        own = ", ".join(f"{json.dumps(name)}: {rows[place]}" for name, rows in texts.items())
        points.append(f'{{"id": "{key}", "vector": {{{own}}}, "payload": {payload}}}')
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for start in range(0, len(points), POINTS):
            file.write(f'{{"points": [{", ".join(points[start : start + POINTS])}]}}\n')


def _numbers(block: np.ndarray) -> list[str]:
    """Format rows as JSON lists; reading them gives the same numbers."""
    kind: Dtype = "float16" if block.dtype == np.float16 else "float32"
    row = f"[{', '.join([f'%.{DIGITS[kind]}g'] * block.shape[1])}]"
    return [row % tuple(one) for one in block.astype(np.float64).tolist()]
