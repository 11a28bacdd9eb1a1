"""Measure search in a large index: `python benchmarks/search_speed.py --folder /tmp/speed`.

Writes an index of random unit vectors around 2,000 centres (float16, in shards like a real one),
and keeps it in --folder for the next run. Measures the memory bandwidth, exact search of one and of
32 queries, an approximate index, and opening in a fresh process. The time of an exact search is the
fastest of several runs, that of an approximate search a mean over 200 queries. All cores are used
(--threads sets another number of threads). Run it on a quiet machine.

--peers compares this project with two others on the first --peer_rows vectors, in the same run:

- rclip: its own code (`rclip.main.RClip.search` on its SQLite file), with an encoder that returns
  the query's vector. If rclip is not installed, a stand-in with the same steps is measured, and
  the output calls it a stand-in. To install rclip:

      .venv/bin/python -m venv /tmp/peers
      /tmp/peers/bin/pip install rclip==3.3.0
      .venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \\
          > $(ls -d /tmp/peers/lib/python*/site-packages)/project.pth
      PYTHONPATH=$PWD /tmp/peers/bin/python benchmarks/search_speed.py --folder DIR --peers

- clip-retrieval: its own `clip_index` and `KnnService.knn_search`, in a separate environment
  (`clip_retrieval_search.py`), because version 2.45 requires numpy below 2 and pyarrow below 16.
  --clip_retrieval is the Python interpreter of this environment, which needs neither torch nor a
  model:

      python -m venv /tmp/peers_cr
      /tmp/peers_cr/bin/pip install 'numpy<2' 'pyarrow<16' 'pandas<3' 'faiss-cpu<2' 'flask<4' \\
          'flask_restful<1' 'flask_cors<5' h5py 'prometheus-client<1' fsspec tqdm 'fire<0.6' \\
          pillow embedding-reader
      /tmp/peers_cr/bin/pip install --no-deps clip-retrieval==2.45.0 autofaiss==2.18.0

  Without --clip_retrieval, a stand-in is measured, and the output calls it so: a FAISS index
  HNSW32 of float32 vectors, which autofaiss chooses for this size and its default memory.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from machine import anonymous_mib, best_seconds, describe, flag_parser, in_fresh_process, peak_mib

WIDTH, CENTRES, DIRECTIONS = 768, 2000, 48
# Lengths of the offsets: in the shared directions, and in all dimensions.
SPREAD, NOISE = 0.8, 0.2
MEMBER, TOP, SEVERAL, DEPTH = "random", 20, 32, 10
FRESH = 200  # queries that measure recall@10 and the time of an approximate search
GIB = 2**30
# Targets for 1,000,000 rows on two cores.
BARS = {
    "exact, one query, s": (0.6, "at most"), "share of the bandwidth": (0.6, "at least"),
    "exact, 32 queries, s": (3.0, "at most"), "hnsw, one query, ms": (15.0, "at most"),
    "hnsw, recall@10": (0.95, "at least"), "opening, s": (1.0, "at most"),
    "opening, MiB": (200.0, "at most"),
}  # fmt: skip


def draw(count: int, seed: int) -> np.ndarray:
    """Draw unit vectors around shared centres, float32 [count, WIDTH].

    Offsets lie mostly in 48 shared directions, because real vectors fill few of their dimensions.
    """
    shared, made = np.random.default_rng(0), np.random.default_rng(seed)
    centres = shared.standard_normal((CENTRES, WIDTH), dtype=np.float32) / WIDTH**0.5
    directions = shared.standard_normal((DIRECTIONS, WIDTH), dtype=np.float32) / WIDTH**0.5
    offsets = made.standard_normal((count, DIRECTIONS), dtype=np.float32) @ directions
    noise = made.standard_normal((count, WIDTH), dtype=np.float32)
    offsets *= SPREAD / DIRECTIONS**0.5
    offsets += noise * (NOISE / WIDTH**0.5)
    rows = centres[made.integers(0, CENTRES, count)] + offsets
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def write(folder: Path, rows: int) -> None:
    """Write the index, unless the folder contains it.

    The benchmark ends if the folder contains another index.
    """
    from indexes import write_index

    from pab.search.index import Entry, Index, Manifest, Member

    if (folder / "manifest.json").is_file():
        found = Index.open(folder)
        facts = found.rows, found.members[0].name, found.members[0].width
        if facts != (rows, MEMBER, WIDTH):
            raise SystemExit(f"--folder {folder}: expected {rows} rows of this benchmark: {facts}")
        return
    start = time.perf_counter()
    member = Member(MEMBER, MEMBER, (), {}, {"checkpoint": "random.pth"}, WIDTH)
    manifest = Manifest({"kind": "folder"}, str(folder), [member])

    def entry(row: int) -> Entry:
        return Entry(f"{row:08}.jpg", folder / f"{row:08}.jpg", 1, 1)

    write_index(folder, manifest, rows, entry, lambda part: draw(len(part), 1 + part.start))
    print(f"wrote {rows} x {WIDTH} float16 in {time.perf_counter() - start:.0f} s", flush=True)


def opening(folder: Path) -> tuple[float, float]:
    """Open the index, map all vectors and read one entry; return seconds and peak MiB."""
    from pab.search.index import Index

    start = time.perf_counter()
    index = Index.open(folder)
    mapped = sum(len(block) for _, block in index.blocks(MEMBER))
    index.entry(mapped - 1)
    return time.perf_counter() - start, peak_mib()


def opening_approximate(folder: Path) -> tuple[float, float, float]:
    """Open an index with its approximate index; return seconds, and growth of memory in MiB.

    The two figures for memory are the growth of the peak of resident memory, and the growth of
    memory without pages of mapped files. The memory of the imported libraries is not counted.
    """
    import faiss  # noqa: F401

    from pab.search.ann import Ann
    from pab.search.index import Index

    before, start = (peak_mib(), anonymous_mib()), time.perf_counter()
    ann = Ann.open(Index.open(folder))
    found = time.perf_counter() - start, peak_mib() - before[0], anonymous_mib() - before[1]
    del ann  # open until the memory has been read
    return found


def bandwidth() -> float:
    """Return the memory bandwidth, bytes per second: the faster of summing and copying 1 GiB."""
    import torch

    values = torch.ones(GIB // 4)
    half = len(values) // 2
    reading = best_seconds(values.sum, 7)
    copying = best_seconds(lambda: values[:half].copy_(values[half:]), 7)  # reads and writes
    print(f"memory: sum {GIB / reading / 1e9:.1f} GB/s, copy {GIB / copying / 1e9:.1f} GB/s")
    return GIB / min(reading, copying)


def exact(index: Any, bytes_per_s: float) -> dict[str, float]:
    """Measure exact search of one and of several queries, on vectors that are in memory."""
    from pab.search.exact import longest_row, search_exact

    queries = draw(SEVERAL, 0)
    start = time.perf_counter()
    search_exact(index.blocks(MEMBER), queries[:1], TOP, longest_row(index.blocks(MEMBER)))
    print(f"exact, first query: {time.perf_counter() - start:.2f} s (disk, lengths of the rows)")
    longest = longest_row(index.blocks(MEMBER))
    numbers = iter(range(1000))

    def one() -> None:
        number = next(numbers) % SEVERAL
        search_exact(index.blocks(MEMBER), queries[number : number + 1], TOP, longest)

    single = best_seconds(one, 15)
    several = best_seconds(
        lambda: search_exact(index.blocks(MEMBER), queries, TOP, longest), 3, warm_up=0
    )
    rate = index.rows * WIDTH * 2 / single
    print(f"exact, one query: {rate / 1e9:.1f} GB/s")
    return {
        "exact, one query, s": single, "share of the bandwidth": rate / bytes_per_s,
        "exact, 32 queries, s": several,
    }  # fmt: skip


def approximate(folder: Path, kind: Any) -> dict[str, float]:
    """Build or open an approximate index; measure recall and time on fresh queries."""
    from pab.search.ann import Ann, build_ann, recall
    from pab.search.exact import search_exact
    from pab.search.index import Index

    start = time.perf_counter()
    record = build_ann(folder, kind)
    seconds = time.perf_counter() - start
    print(
        f"{kind}: built or found in {seconds:.0f} s: {record.parameters}, depth {record.depth}, "
        f"{record.bytes / GIB:.2f} GiB, recall@10 {record.recall_at_10:.3f} of {record.queries} "
        "held-out rows", flush=True,
    )  # fmt: skip
    index, start = Index.open(folder), time.perf_counter()
    ann = Ann.open(index)
    print(f"{kind}: opened in {time.perf_counter() - start:.2f} s")
    seconds, mib, anonymous = in_fresh_process(opening_approximate, folder)
    print(
        f"{kind}: opened with the index in a fresh process: {seconds:.2f} s, {mib:.0f} MiB more, "
        f"of which {anonymous:.0f} MiB are not pages of mapped files"
    )
    queries = draw(FRESH, 0)
    right = search_exact(index.blocks(MEMBER), queries, DEPTH)[1]
    found = recall(ann, queries, right)  # also reads the file into memory
    times = []
    for query in queries:
        start = time.perf_counter()
        ann.search(query, DEPTH)
        times.append(1000 * (time.perf_counter() - start))
    mean, p95 = float(np.mean(times)), float(np.percentile(times, 95))
    print(f"{kind}: one query {mean:.2f} ms on average, {p95:.2f} ms at the 95th percentile")
    return {f"{kind}, one query, ms": mean, f"{kind}, recall@10": found}


# ------------------------------------------------------------------------------------------- peers


def table_of(path: Path, vectors: np.ndarray) -> None:
    """Write an SQLite file as rclip does, with rclip's own code if it is installed."""
    names = [f"/photos/{row:08}.jpg" for row in range(len(vectors))]
    try:
        from rclip.db import DB
    except ModuleNotFoundError:
        with sqlite3.connect(path) as table:
            table.execute("CREATE TABLE images (filepath TEXT NOT NULL UNIQUE, vector BLOB)")
            pairs = ((name, row.tobytes()) for name, row in zip(names, vectors, strict=True))
            table.executemany("INSERT INTO images VALUES (?, ?)", pairs)
        return
    base = DB(path)
    for name, row in zip(names, vectors, strict=True):
        facts = {"modified_at": 1.0, "size": 1, "hash": None}
        base.upsert_image({"filepath": name, "vector": row.tobytes(), **facts}, commit=False)
    base.close()


def rclip_search(path: Path, query: np.ndarray) -> tuple[str, Callable[[], list[str]]]:
    """Return the name and the function of rclip's search; it reads the file at every call."""
    try:
        from rclip.db import DB
        from rclip.main import RClip
        from rclip.model import Model
    except ModuleNotFoundError:
        return "stand-in for rclip", partial(like_rclip, path, query)

    class Given(Model):
        """Model that returns the query's vector, or zeros if there are no queries."""

        def __init__(self) -> None:
            pass

        def compute_features_for_queries(self, queries: list[str]) -> np.ndarray:
            return query if queries else np.zeros_like(query)

    peer = RClip(Given(), DB(path), 8, None)

    def search() -> list[str]:
        return [found.filepath for found in peer.search("query", "/photos", TOP)]

    return "rclip", search


def like_rclip(path: Path, query: np.ndarray) -> list[str]:
    """Search as rclip 3.3 does: read all vectors, multiply with NumPy, sort all in Python."""
    with sqlite3.connect(path) as table:
        found = table.execute("SELECT filepath, vector FROM images").fetchall()
    names = [name for name, _ in found]
    scores = query @ np.stack([np.frombuffer(vector, np.float32) for _, vector in found]).T
    order = sorted(zip(scores, range(len(names)), strict=True), key=lambda x: x[0], reverse=True)
    return [names[row] for _, row in islice(order, TOP)]


def clip_retrieval(
    interpreter: Path, folder: Path, vectors: np.ndarray, query: np.ndarray, right: np.ndarray
) -> None:
    """Measure clip-retrieval's own search in a separate process, on the vectors of the index.

    Args:
        interpreter: Python of its environment.
        folder: folder of the index, for its metadata.
        vectors: float32 [n, D].
        query: float32 [1, D].
        right: int64 [k], rows that exact search finds.
    """
    from pab.search.index import Index, metadata_path
    from pab.search.libraries import library

    with tempfile.TemporaryDirectory() as temporary:
        home, first = Path(temporary), 0
        for name in ("img_emb", "metadata"):
            (home / name).mkdir()
        for place, shard in enumerate(Index.open(folder).manifest.shards):
            part = vectors[first : first + shard.rows]
            if not len(part):
                break
            np.save(home / "img_emb" / f"img_emb_{place:04}.npy", part)
            metadata = home / "metadata" / f"metadata_{place:04}.parquet"
            shutil.copy(metadata_path(folder, shard.number), metadata)
            first += shard.rows
        np.save(home / "query.npy", query)
        np.save(home / "right.npy", right)
        script = Path(__file__).with_name("clip_retrieval_search.py")
        threads = str(library("faiss", "approximate indexes").omp_get_max_threads())
        subprocess.run([str(interpreter), str(script), str(home), threads], check=True)


def like_clip_retrieval(vectors: np.ndarray, query: np.ndarray, right: np.ndarray) -> None:
    """Measure a FAISS index like clip-retrieval's; for arguments, see `clip_retrieval`."""
    import faiss

    found = faiss.index_factory(WIDTH, "HNSW32", faiss.METRIC_INNER_PRODUCT)
    start = time.perf_counter()
    found.add(vectors)
    print(f"stand-in for clip-retrieval: built in {time.perf_counter() - start:.0f} s")
    for depth in (16, 64, 256):
        found.hnsw.efSearch = depth
        seconds = best_seconds(lambda: found.search_and_reconstruct(query, TOP), 15)
        same = len({*found.search(query, TOP)[1][0].tolist()} & {*right.tolist()}) / TOP
        print(
            f"{len(vectors)} rows, one query: stand-in for clip-retrieval, efSearch {depth}: "
            f"{1000 * seconds:.2f} ms, {same:.2f} of the same images"
        )


def peers(folder: Path, rows: int, interpreter: Path | None) -> None:
    """Compare with the searches of rclip and clip-retrieval on the first rows of the index."""
    from pab.search.exact import longest_row, search_exact
    from pab.search.index import Index

    index = Index.open(folder)
    query = draw(1, 0)

    def blocks() -> Iterator[tuple[int, np.ndarray]]:
        for first, block in index.blocks(MEMBER):
            if first < rows:
                yield first, block[: rows - first]

    longest = longest_row(blocks())
    vectors = np.concatenate([block.astype(np.float32) for _, block in blocks()])
    right = search_exact(blocks(), query, TOP, longest)[1][0]
    seconds = best_seconds(lambda: search_exact(blocks(), query, TOP, longest), 7)
    print(f"{rows} rows, one query: this project, exact: {1000 * seconds:.1f} ms")
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "db.sqlite3"
        table_of(path, vectors)
        name, search = rclip_search(path, query[0])
        seconds = best_seconds(search, 3, warm_up=0)
        same = len({*search()} & {f"/photos/{row:08}.jpg" for row in right}) / TOP
    print(f"{rows} rows, one query: {name}: {1000 * seconds:.1f} ms, {same:.2f} of the same images")
    if interpreter is None:
        like_clip_retrieval(vectors, query, right)
    else:
        clip_retrieval(interpreter, folder, vectors, query, right)


def main() -> None:
    parser = flag_parser(
        __doc__,
        folder=(Path, "folder of the index, about 1.5 KB per row; reused if it exists"),
        rows=1_000_000,
        threads=(os.cpu_count() or 1, "threads of PyTorch and FAISS"),
        without_hnsw=(False, "skip the approximate index, which takes minutes to build"),
        ivf=(False, "also measure an IVF index; it replaces the HNSW index in the folder"),
        peers=(False, "compare with rclip and clip-retrieval"),
        peer_rows=100_000,
        clip_retrieval=(None, "Python interpreter of clip-retrieval's own environment"),
    )
    args = parser.parse_args()
    write(args.folder, args.rows)
    seconds, mib = in_fresh_process(opening, args.folder)
    found = {"opening, s": seconds, "opening, MiB": mib}
    import torch

    from pab.search.index import Index
    from pab.search.libraries import library

    torch.set_num_threads(args.threads)
    library("faiss", "approximate indexes").omp_set_num_threads(args.threads)
    print(describe(), f"load {os.getloadavg()[0]:.1f}", flush=True)
    found |= exact(Index.open(args.folder), bandwidth())
    if not args.without_hnsw:
        found |= approximate(args.folder, "hnsw")
    if args.ivf:
        found |= approximate(args.folder, "ivf")
    if args.peers:
        peers(args.folder, args.peer_rows, args.clip_retrieval)
    for name, value in found.items():
        limit, side = BARS.get(name, (float("nan"), ""))
        met = value <= limit if side == "at most" else value >= limit
        verdict = f", bar {side} {limit:g}: {'met' if met else 'MISSED'}" if side else ""
        print(f"{name}: {value:.3f}{verdict}")


if __name__ == "__main__":
    main()
