"""Build and search an index with clip-retrieval's own code.

`search_speed.py --peers --clip_retrieval PYTHON` runs this script in clip-retrieval's environment,
without this project. The arguments are a folder and the number of threads. The folder contains
`img_emb`, `metadata`, `query.npy` (float32 [1, D]) and `right.npy` (int64 [k], the rows that exact
search returns).
"""

from __future__ import annotations

import importlib.util
import sys
import time
import types
from pathlib import Path

import numpy as np

REPEATS = 15


def main(folder: Path, threads: int) -> None:
    # The package's __init__ imports the models, which need torch. An empty package object replaces
    # it, so that the search modules can be imported without them.
    spec = importlib.util.find_spec("clip_retrieval")
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit(f"{sys.executable}: clip_retrieval is not installed")
    package = types.ModuleType("clip_retrieval")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["clip_retrieval"] = package
    import faiss
    from clip_retrieval.clip_back import KnnService, load_index
    from clip_retrieval.clip_index import clip_index

    faiss.omp_set_num_threads(threads)
    query, right = np.load(folder / "query.npy"), np.load(folder / "right.npy")
    start = time.perf_counter()
    clip_index(str(folder), str(folder / "index"), nb_cores=threads)
    print(f"clip-retrieval: built in {time.perf_counter() - start:.0f} s", flush=True)
    # Only the fields of ClipResource that a search without filters reads.
    resource = types.SimpleNamespace(
        image_index=load_index(str(folder / "index" / "image.index"), False), text_index=None,
        metadata_is_ordered_by_ivf=False, safety_model=None, violence_detector=None,
    )  # fmt: skip
    service = KnnService(clip_resources={"all": resource})
    times, found = [], []
    for _ in range(REPEATS):
        start = time.perf_counter()
        _, found = service.knn_search(query, "image", len(right), resource, False, False, False)
        times.append(time.perf_counter() - start)
    same = len({int(row) for row in found} & {*right.tolist()}) / len(right)
    rows = resource.image_index.ntotal
    print(
        f"{rows} rows, one query: clip-retrieval, {type(resource.image_index).__name__}: "
        f"{1000 * min(times):.2f} ms, {same:.2f} of the same images"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
