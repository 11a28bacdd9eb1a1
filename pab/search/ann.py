"""Approximate search with FAISS: an index of one member's vectors, beside the exact ones.

Kinds, both with 8 bits per value (scalar quantization, QT_8bit):

- ``hnsw``: a graph of neighbours; builds slowly, answers fast;
- ``ivf``: lists of vectors around centres; builds fast, is smaller, answers more slowly.

If the recall permits, FAISS compares vectors in fewer dimensions: along their principal directions.
The vectors are not centred, because this would change the dot products. The rows that FAISS finds
are scored again by :mod:`pab.search.exact`, in all dimensions. Only the choice of rows is
approximate.

Some rows are held out while the index is built. One half of them, used as queries, chooses the
number of dimensions and the search depth; the other half measures recall@10 against exact search.
Finally, the held-out rows are added too.

FAISS: https://github.com/facebookresearch/faiss. The index is a file in the folder ``ann``. The
manifest names this file and the shards that the index was built from. If a later run changes the
shards, searches are exact until the index is built again.

Shape letters: `n` rows, `D` width of the vectors, `d` their width in FAISS's index, `k` results,
`q` held-out rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import TypeAdapter, ValidationError

from pab.core.errors import InputError
from pab.core.files import atomic_path
from pab.core.progress import Progress, write_line
from pab.search.exact import search_exact, selected
from pab.search.index import MANIFEST, Index, Shard
from pab.search.libraries import library

Kind = Literal["hnsw", "ivf"]
KINDS = ("hnsw", "ivf")
FOLDER = "ann"

LEAST_ROWS = 100  # fewer rows are searched faster without FAISS
LINKS = 32  # neighbours per vector in the graph (M); twice as many in its lowest layer
# Candidates while the graph is built (efConstruction). For 200,000 vectors, 80 takes twice as long
# as FAISS's 40; a recall of 0.98 then needs depth 64 instead of 512.
BUILD_DEPTH = 80
ROWS_PER_CENTRE = 39  # at least; FAISS warns below
TRAINING_ROWS = 50_000  # at most; for the directions, the ranges of the values, and the centres
HELD_OUT, DEPTH_OF_RECALL = 400, 10  # rows, at most; recall@10
TARGET_RECALL = 0.97  # the first tried depth that reaches it is chosen
LARGEST_DEPTH = 2048  # of hnsw
# Numbers of dimensions to try, if below D. The first is chosen in which an exact search finds at
# least this share of the nearest rows; if none does, FAISS's index has all dimensions.
WIDTHS, REACHABLE_RECALL = (128, 256, 384, 512), 0.99
SEED = 0  # of held-out rows and training rows
REBUILD = "remove the file and run the index command with --ann again"
MORE_RESULTS = 5  # rows from FAISS per result; exact scores choose among them


@dataclass(frozen=True)
class AnnRecord:
    """Description of an approximate index, in the manifest.

    Attributes:
        kind: ``hnsw`` or ``ivf``.
        member: name of the member whose vectors it holds.
        file: name of the file in the folder ``ann``.
        bytes: size of the file.
        rows: number of vectors.
        shards: the shards that the index was built from.
        parameters: parameters of the index: ``links`` and ``build_depth``, or ``lists``; and
            ``width``, which is d. Indexes of earlier versions have all dimensions and no ``width``.
        depth: search depth: candidates (efSearch) of ``hnsw``, lists (nprobe) of ``ivf``.
        recall_at_10: mean share of the 10 exact results that were found, over the queries.
        queries: number of held-out rows with which the recall was measured.
        faiss: version of FAISS that built the index.
    """

    kind: Kind
    member: str
    file: str
    bytes: int
    rows: int
    shards: list[Shard]
    parameters: dict[str, int]
    depth: int
    recall_at_10: float
    queries: int
    faiss: str


_RECORD = TypeAdapter(AnnRecord)


class Ann:
    """Opened approximate index.

    Args:
        index: the search index.
        record: description of the approximate one.
        found: FAISS's index; its ids are row numbers.
    """

    def __init__(self, index: Index, record: AnnRecord, found: Any) -> None:
        self.index, self.record, self._found = index, record, found

    @classmethod
    def open(cls, index: Index) -> Ann:
        """Open the approximate index; its file is memory-mapped if this version of FAISS can do so.

        Raises:
            InputError: there is none, it does not fit the vectors, its description or its file is
                damaged, or FAISS is not installed.
        """
        record = read_record(index)
        if record is None or not is_current(index, record):
            problem = "no approximate index" if record is None else "one of other vectors"
            raise InputError(
                index.folder, f"expected an approximate index, found {problem}",
                todo="run the index command with --ann hnsw",
            )  # fmt: skip
        faiss = _faiss()
        path = index.folder / FOLDER / record.file
        expected = (record.bytes, record.rows, index.member(record.member).width)
        try:
            size = path.stat().st_size
            if size != record.bytes:
                raise InputError(path, f"expected {record.bytes} bytes, found {size}", todo=REBUILD)
            found = faiss.read_index(str(path), getattr(faiss, "IO_FLAG_MMAP_IFC", 0))
        except (OSError, RuntimeError) as error:  # FAISS raises RuntimeError with many lines
            problem = getattr(error, "strerror", None) or str(error).strip().splitlines()[-1]
            raise InputError(path, f"cannot be read: {problem}", todo=REBUILD) from error
        if (size, found.ntotal, found.d) != expected:
            problem = f"expected {expected[1]} vectors of {expected[2]} values"
            raise InputError(path, f"{problem}, found {found.ntotal} of {found.d}", todo=REBUILD)
        return cls(index, record, found)

    def search(self, vector: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Find approximately the k rows with the largest dot products.

        Args:
            vector: float32 [D], finite.
            k: results, at least 1.

        Returns:
            Exact scores, float32 [m], and row numbers, int64 [m], best first; of equal scores, the
            smaller row comes first. m is at most k.
        """
        rows = self.candidates(vector, k)
        vectors = self.index.vectors(self.record.member, rows)
        scores, places = search_exact([(0, vectors)], vector[None], k)
        return scores[0], rows[places[0]]

    def candidates(self, vector: np.ndarray, k: int) -> np.ndarray:
        """Return the rows that FAISS finds, int64, ascending; at least k if it can find so many."""
        total = self._found.ntotal
        wanted, depth = min(total, MORE_RESULTS * k), self.record.depth
        query = np.ascontiguousarray(vector[None], dtype=np.float32)
        while True:
            _, found = self._found.search(query, wanted, params=self._parameters(depth, wanted))
            rows = np.unique(found[found >= 0])
            if len(rows) >= min(k, total) or depth >= total:
                return rows
            depth *= 4

    def _parameters(self, depth: int, wanted: int) -> Any:
        faiss = _faiss()
        if self.record.kind == "hnsw":
            found = faiss.SearchParametersHNSW(efSearch=max(depth, wanted))
        else:
            found = faiss.SearchParametersIVF(nprobe=min(depth, self.record.parameters["lists"]))
        if isinstance(self._found, faiss.IndexPreTransform):
            return faiss.SearchParametersPreTransform(index_params=found)
        return found


def read_record(index: Index) -> AnnRecord | None:
    """Return the description of the approximate index; None if the manifest has none.

    Raises:
        InputError: the description is damaged.
    """
    if index.manifest.ann is None:
        return None
    try:
        record = _RECORD.validate_python(index.manifest.ann)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, ("ann", *fault["loc"])))
        raise InputError(index.folder / MANIFEST, fault["msg"], item=where) from error
    if Path(record.file).name != record.file:
        problem = f"expected a file name, found {record.file!r}"
        raise InputError(index.folder / MANIFEST, problem, item="ann.file")
    return record


def is_current(index: Index, record: AnnRecord) -> bool:
    """Return whether an approximate index holds the vectors of the index; shards never change."""
    return record.shards == index.manifest.shards


def usable_ann(index: Index, members: Sequence[str]) -> Ann | None:
    """Open the approximate index for a search with some members.

    If it cannot be used, print the reason in one line, and return None; the search is then exact.

    Raises:
        InputError: its description or its file is damaged, or FAISS is not installed.
    """
    record = read_record(index)
    if record is None:
        why = "the index has no approximate one; run the index command with --ann hnsw"
    elif not is_current(index, record):
        why = (
            "the approximate index does not have the images of the last run; "
            f"run the index command with --ann {record.kind}"
        )
    elif list(members) != [record.member]:
        why = f"the approximate index serves only --members {record.member}"
    else:
        return Ann.open(index)
    write_line(f"--ann: the search is exact, because {why}")
    return None


def kept_ann(index: Index, kind: Kind, member: str | None = None) -> AnnRecord | None:
    """Return the description of an approximate index if it need not be built again, else None.

    Args:
        index: the search index.
        kind: ``hnsw`` or ``ivf``.
        member: name of the member; None takes the first.

    Raises:
        InputError: the description is damaged.
    """
    found, name = read_record(index), index.members[0].name if member is None else member
    if found is None or (found.kind, found.member) != (kind, name) or not is_current(index, found):
        return None
    path = index.folder / FOLDER / found.file
    return found if path.is_file() and path.stat().st_size == found.bytes else None


def build_ann(folder: Path, kind: Kind, member: str | None = None) -> AnnRecord:
    """Build an approximate index, and name it in the manifest.

    A current index of the same kind and member is kept, unless its file is missing or truncated.

    The caller holds the lock of the folder.

    Args:
        folder: folder of the search index.
        kind: ``hnsw`` or ``ivf``.
        member: name of the member; None takes the first.

    Raises:
        InputError: FAISS is not installed, there is no such member, there are fewer than 100 rows,
            or a file cannot be read or written.
    """
    index = Index.open(folder)
    name = index.members[0].name if member is None else index.member(member).name
    before = read_record(index)
    kept = kept_ann(index, kind, name)
    if kept is not None:
        return kept
    faiss = _faiss()
    if index.rows < LEAST_ROWS:
        problem = f"expected at least {LEAST_ROWS} images, found {index.rows}"
        raise InputError("--ann", problem, todo="leave it out: exact search is faster")
    made = np.random.default_rng(SEED)
    held = np.sort(made.choice(index.rows, min(HELD_OUT, index.rows // 10), replace=False))
    others = np.setdiff1d(np.arange(index.rows), held)
    sample = np.sort(made.choice(others, min(TRAINING_ROWS, len(others)), replace=False))
    queries = index.vectors(name, held).astype(np.float32)
    blocks = selected(index.blocks(name), others)
    right = others[search_exact(blocks, queries, DEPTH_OF_RECALL)[1]]  # [q, 10]
    training = index.vectors(name, sample).astype(np.float32)
    directions = _directions(index, name, training, others, queries[::2], right[::2])
    found, parameters = _empty(kind, directions, len(sample), index.rows)
    found.train(training)
    with Progress(index.rows, f"building {kind}", "vectors") as shown:
        for rows, vectors in _vectors(index, name, others):
            found.add_with_ids(vectors, rows)
            shown.update(len(rows))
        ann = Ann(index, AnnRecord(
            kind, name, "", 0, index.rows, index.manifest.shards, parameters, 1, 0.0, len(held),
            faiss.__version__,
        ), found)  # fmt: skip
        ann.record = _tuned(ann, queries, right)
        for rows, vectors in _vectors(index, name, held):
            found.add_with_ids(vectors, rows)
            shown.update(len(rows))
    return _save(index, ann.record, before, found)


def _save(index: Index, record: AnnRecord, before: AnnRecord | None, found: Any) -> AnnRecord:
    """Write the file under a new name, then the manifest, then remove other files."""
    names = (f"{record.kind}_{number}.faiss" for number in count())
    file = next(name for name in names if before is None or name != before.file)
    path = index.folder / FOLDER / file
    with atomic_path(path) as temporary:
        try:
            _faiss().write_index(found, str(temporary))
        except RuntimeError as error:
            problem = str(error).strip().splitlines()[-1]
            raise InputError(path, f"cannot be written: {problem}") from error
    record = replace(record, file=file, bytes=path.stat().st_size)
    replace(index.manifest, ann=asdict(record)).save(index.folder)
    for other in path.parent.iterdir():
        if other != path:
            other.unlink(missing_ok=True)
    return record


def _directions(
    index: Index, name: str, training: np.ndarray, others: np.ndarray, queries: np.ndarray,
    right: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """Choose the directions of FAISS's index, float32 [d, D]: the fewest that keep the recall.

    They are principal directions of the training vectors, or the identity if d is D.

    Args:
        index: the search index.
        name: name of the member.
        training: float32 [n, D].
        others: int64 [n], rows to find, ascending.
        queries: float32 [q, D].
        right: int64 [q, 10], rows that exact search finds.
    """
    width = training.shape[1]
    ordered = np.linalg.eigh((training.T @ training).astype(np.float64))[1].T[::-1]
    for kept in (kept for kept in WIDTHS if kept < width):
        some = ordered[:kept].astype(np.float32)
        blocks = selected(index.blocks(name), others)
        reduced = ((first, block.astype(np.float32) @ some.T) for first, block in blocks)
        wanted = MORE_RESULTS * DEPTH_OF_RECALL
        found = others[search_exact(reduced, queries @ some.T, wanted)[1]]
        if _share(found, right) >= REACHABLE_RECALL:
            return some
    return np.eye(width, dtype=np.float32)


def _empty(
    kind: Kind, directions: np.ndarray, training: int, rows: int
) -> tuple[Any, dict[str, int]]:
    """Create an index without vectors; return it and its parameters."""
    faiss, (kept, width) = _faiss(), directions.shape
    metric = faiss.METRIC_INNER_PRODUCT
    if kind == "hnsw":
        found = faiss.index_factory(kept, f"IDMap,HNSW{LINKS}_SQ8", metric)
        faiss.downcast_index(found.index).hnsw.efConstruction = BUILD_DEPTH
        parameters = {"links": LINKS, "build_depth": BUILD_DEPTH}
    else:
        # 4 times the square root of the number of rows, as FAISS's guidelines say.
        lists = max(1, min(int(4 * rows**0.5), training // ROWS_PER_CENTRE))
        found, parameters = faiss.index_factory(kept, f"IVF{lists},SQ8", metric), {"lists": lists}
    if kept < width:
        transform = faiss.LinearTransform(width, kept, False)  # no bias
        faiss.copy_array_to_vector(directions.ravel(), transform.A)
        transform.is_trained = True
        found = faiss.IndexPreTransform(transform, found)
    return found, parameters | {"width": kept}


def _vectors(index: Index, name: str, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the numbers and the float32 vectors of chosen rows, block by block."""
    for place, block in selected(index.blocks(name), rows):
        yield rows[place : place + len(block)], block.astype(np.float32)


def _tuned(ann: Ann, queries: np.ndarray, right: np.ndarray) -> AnnRecord:
    """Double the search depth until the recall reaches its target; return the updated record.

    Args:
        ann: the approximate index.
        queries: float32 [q, D].
        right: int64 [q, 10], rows that exact search finds.
    """
    record = ann.record
    largest = record.parameters.get("lists", LARGEST_DEPTH)
    depth = min(8, largest) if record.kind == "hnsw" else 1
    while True:
        ann.record = replace(record, depth=depth)
        if depth >= largest or recall(ann, queries[::2], right[::2]) >= TARGET_RECALL:
            break
        depth = min(2 * depth, largest)
    measured = recall(ann, queries[1::2], right[1::2])
    if depth == largest and measured < TARGET_RECALL:
        problem = f"recall@10 {measured:.3f} is below the target of {TARGET_RECALL}"
        write_line(f"--ann: {problem}, at the largest depth")
    return replace(ann.record, recall_at_10=round(measured, 4), queries=len(queries[1::2]))


def recall(ann: Ann, queries: np.ndarray, right: np.ndarray) -> float:
    """Return the mean share of the exact results that the approximate index finds.

    Args:
        ann: the approximate index.
        queries: float32 [q, D].
        right: int64 [q, k], rows that exact search finds.
    """
    return _share((ann.search(query, right.shape[1])[1] for query in queries), right)


def _share(found: Iterable[np.ndarray], right: np.ndarray) -> float:
    """Return the mean share of the right rows, int64 [q, k], that were found, over the queries."""
    return float(np.mean([np.isin(r, one).mean() for one, r in zip(found, right, strict=True)]))


def _faiss() -> Any:
    return library("faiss", "approximate indexes")
