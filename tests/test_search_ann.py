"""Approximate search with FAISS: recall, fewer dimensions, staleness, damaged files."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pab.core.errors import InputError
from pab.search import ann as ann_module
from pab.search.ann import Ann, AnnRecord, build_ann, read_record, recall, usable_ann
from pab.search.exact import search_exact
from pab.search.index import Entry, Index, Manifest, Member
from pab.search.index_command import main, update_ann
from pab.search.query import Filters, Query, Searcher
from pab.search.query_command import main as query_main
from pab.search.writing import with_shards, write_shard
from tests.conftest import draw
from tests.test_search_commands import CLIP, ROOT
from tests.test_search_query import Tokens, Words

faiss = pytest.importorskip("faiss")
WIDTH, WIDE = 32, 320


def clustered(count: int, seed: int = 0) -> np.ndarray:
    """Draw unit vectors around 20 centres, float32 [count, D]."""
    centres = np.random.default_rng(99).standard_normal((20, WIDTH))
    made = np.random.default_rng(seed)
    rows = centres[made.integers(0, 20, count)] + 0.4 * made.standard_normal((count, WIDTH))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def wide(count: int, seed: int, *, used: int = WIDE) -> np.ndarray:
    """Draw vectors of different lengths around a common mean, float32 [count, WIDE].

    Their offsets from the mean lie in a shared subspace of ``used`` dimensions.
    """
    shared, made = np.random.default_rng(98), np.random.default_rng(seed)
    mean = shared.standard_normal(WIDE) / WIDE**0.5
    directions = np.linalg.qr(shared.standard_normal((WIDE, used)))[0].T
    rows = 2 * mean + made.standard_normal((count, used)) @ directions / used**0.5
    return (rows * made.uniform(0.5, 1.5, (count, 1))).astype(np.float32)


def write(folder: Path, rows: np.ndarray, *, members: tuple[str, ...] = ("clip",)) -> Index:
    """Write an index in shards of 500 rows, or add the rows to an existing index."""
    if (folder / "manifest.json").is_file():
        manifest = Index.open(folder).manifest
    else:
        width = rows.shape[1]
        made = [Member(n, n, (), {}, {"checkpoint": f"{n}.pth"}, width, "float16") for n in members]
        manifest = Manifest({"kind": "folder"}, str(folder), made)
    for start in range(0, len(rows), 500):
        part = rows[start : start + 500]
        first = manifest.rows
        names = [f"{first + place:05}.jpg" for place in range(len(part))]
        entries = [Entry(name, folder / name, 1, 2) for name in names]
        shard = write_shard(folder, manifest, entries, dict.fromkeys(members, part))
        manifest = with_shards(manifest, [*manifest.shards, shard])
    manifest.save(folder)
    return Index.open(folder)


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return clustered(2000)


@pytest.mark.parametrize("kind", ann_module.KINDS)
def test_the_index_finds_what_exact_search_finds(
    kind: Any, rows: np.ndarray, tmp_path: Path
) -> None:
    write(tmp_path, rows)
    record = build_ann(tmp_path, kind)
    index = Index.open(tmp_path)
    assert read_record(index) == record
    assert (record.kind, record.member, record.rows) == (kind, "clip", 2000)
    assert record.shards == index.manifest.shards
    assert (record.queries, record.recall_at_10 >= 0.9) == (100, True)
    assert record.parameters["width"] == WIDTH  # a narrow member keeps all dimensions
    assert [path.name for path in (tmp_path / "ann").iterdir()] == [record.file]
    ann, queries = Ann.open(index), clustered(50, seed=1)
    scores, right = search_exact(index.blocks("clip"), queries, 10)
    assert recall(ann, queries, right) >= 0.9
    for query, of_query, found in zip(queries, scores, right, strict=True):
        some, places = ann.search(query, 10)
        same = np.isin(found, places)
        assert (of_query[same] == some[np.isin(places, found)]).all()  # exact scores
        assert (np.diff(some) <= 0).all()
    held = index.vectors("clip", np.arange(2000)).astype(np.float32)
    own = np.mean([ann.search(held[row], 1)[1][0] == row for row in range(0, 2000, 7)])
    assert own > 0.95  # the index also contains the held-out rows


@pytest.mark.parametrize("kind", ann_module.KINDS)
def test_a_wide_member_is_searched_in_fewer_dimensions(kind: Any, tmp_path: Path) -> None:
    rows = wide(2000, 1, used=100)
    write(tmp_path, rows)
    record = build_ann(tmp_path, kind)
    index = Index.open(tmp_path)
    assert record.parameters["width"] == 128
    assert record.recall_at_10 >= 0.9
    ann, queries = Ann.open(index), wide(30, 2, used=100)
    assert (ann._found.d, ann._found.ntotal) == (WIDE, 2000)
    scores, right = search_exact(index.blocks("clip"), queries, 2000)
    assert recall(ann, queries, right[:, :10]) >= 0.9
    for query, of_query, order in zip(queries, scores, right, strict=True):
        some, found = ann.search(query, 10)
        kept = np.isin(order, found)
        assert found.tolist() == order[kept].tolist()
        assert some.tolist() == of_query[kept].tolist()


def test_vectors_that_need_all_dimensions_keep_them(tmp_path: Path) -> None:
    write(tmp_path, np.random.default_rng(0).standard_normal((2000, WIDE), dtype=np.float32))
    record = build_ann(tmp_path, "ivf")
    assert record.parameters["width"] == WIDE
    assert record.recall_at_10 >= 0.9


def test_an_index_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    rows = wide(1000, 1, used=100)
    index = write(tmp_path, rows)
    found = faiss.index_factory(WIDE, "IDMap,HNSW32_SQ8", faiss.METRIC_INNER_PRODUCT)
    found.train(rows)
    found.add_with_ids(rows, np.arange(1000))
    path = tmp_path / "ann" / "hnsw_0.faiss"
    path.parent.mkdir()
    faiss.write_index(found, str(path))
    parameters = {"links": 32, "build_depth": 40}
    record = AnnRecord(
        "hnsw", "clip", path.name, path.stat().st_size, 1000, index.manifest.shards, parameters,
        64, 0.97, 50, "1.15.1",
    )  # fmt: skip
    replace(index.manifest, ann=asdict(record)).save(tmp_path)
    index = Index.open(tmp_path)
    queries = wide(30, 2, used=100)
    right = search_exact(index.blocks("clip"), queries, 10)[1]
    assert recall(Ann.open(index), queries, right) >= 0.9


def test_a_missed_target_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, wide(2000, 1))
    build_ann(tmp_path, "hnsw")
    assert "target" not in capsys.readouterr().err
    monkeypatch.setattr(ann_module, "LARGEST_DEPTH", 1)
    monkeypatch.setattr(ann_module, "MORE_RESULTS", 1)
    monkeypatch.setattr(ann_module, "LINKS", 4)
    other = tmp_path / "other"
    write(other, wide(2000, 1))
    record = build_ann(other, "hnsw")
    assert (record.depth, record.recall_at_10 < ann_module.TARGET_RECALL) == (1, True)
    (line,) = [one for one in capsys.readouterr().err.splitlines() if "target" in one]
    assert line == (
        f"--ann: recall@10 {record.recall_at_10:.3f} is below the target of 0.97, "
        "at the largest depth"
    )


@pytest.mark.parametrize("kind", ann_module.KINDS)
def test_more_results_than_lists_hold(kind: Any, rows: np.ndarray, tmp_path: Path) -> None:
    write(tmp_path, rows[:300])
    build_ann(tmp_path, kind)
    ann = Ann.open(Index.open(tmp_path))
    for k in (200, 300, 1000):
        scores, found = ann.search(rows[0], k)
        assert len(found) == len(scores) == len({*found.tolist()}) >= min(k, 300) * 0.98
    assert len(found) <= 300


def test_recall_counts_what_is_missing(rows: np.ndarray, tmp_path: Path) -> None:
    write(tmp_path, rows)
    build_ann(tmp_path, "ivf")
    index = Index.open(tmp_path)
    ann = Ann.open(index)
    right = search_exact(index.blocks("clip"), rows[:30], 10)[1]
    right[:, 5:] = -1  # row -1 is never found
    assert recall(ann, rows[:30], right) <= 0.5
    shallow = Ann(index, replace(ann.record, depth=1), ann._found)
    right = search_exact(index.blocks("clip"), rows[:30], 10)[1]
    assert recall(shallow, rows[:30], right) < recall(ann, rows[:30], right)


def test_ties_go_to_the_smaller_row(tmp_path: Path) -> None:
    rows = np.concatenate([clustered(150)] * 2)
    write(tmp_path, rows)
    build_ann(tmp_path, "hnsw")
    scores, found = Ann.open(Index.open(tmp_path)).search(rows[5], 2)
    assert (found.tolist(), scores[0]) == ([5, 155], scores[1])


def test_a_current_index_is_kept_and_a_stale_one_is_rebuilt(
    rows: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, rows[:1500])
    first = build_ann(tmp_path, "ivf")
    assert build_ann(tmp_path, "ivf") == first
    update_ann(tmp_path, None)
    assert capsys.readouterr().err == ""
    index = write(tmp_path, rows[1500:])
    assert read_record(index) == first
    update_ann(tmp_path, None)
    assert "--ann ivf rebuilds it" in capsys.readouterr().err
    assert usable_ann(index, ["clip"]) is None
    line = capsys.readouterr().err
    assert line.startswith("--ann: the search is exact, because the approximate index does not")
    assert line.count("\n") == 1
    with pytest.raises(InputError, match="found one of other vectors"):
        Ann.open(index)
    update_ann(tmp_path, "ivf")
    assert "index: ivf: 2000 vectors of clip, recall@10 0.9" in capsys.readouterr().err
    index = Index.open(tmp_path)
    ann = usable_ann(index, ["clip"])
    assert ann is not None
    assert (ann.record.rows, ann.record.file != first.file) == (2000, True)
    assert [path.name for path in (tmp_path / "ann").iterdir()] == [ann.record.file]


def test_an_index_that_cannot_serve_a_search(
    rows: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = write(tmp_path, rows, members=("clip", "lhp"))
    assert usable_ann(index, ["clip"]) is None
    assert "the index has no approximate one; run the index" in capsys.readouterr().err
    with pytest.raises(InputError, match="found no approximate index"):
        Ann.open(index)
    build_ann(tmp_path, "ivf")
    index = Index.open(tmp_path)
    for names in (["lhp"], ["clip", "lhp"]):
        assert usable_ann(index, names) is None
        assert "serves only --members clip" in capsys.readouterr().err
    assert usable_ann(index, ["clip"]) is not None


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    write(tmp_path, clustered(99))
    with pytest.raises(InputError, match="--ann: expected at least 100 images, found 99"):
        build_ann(tmp_path, "hnsw")
    assert not (tmp_path / "ann").exists()


def test_damaged_files_are_named(rows: np.ndarray, tmp_path: Path) -> None:
    write(tmp_path, rows[:500])
    record = build_ann(tmp_path, "ivf")
    path, manifest = tmp_path / "ann" / record.file, tmp_path / "manifest.json"
    content = path.read_bytes()
    for damaged, problem in (
        (content[:-100], f"expected {len(content)} bytes, found {len(content) - 100}"),
        (b"\0" * len(content), "cannot be read: "),
    ):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=problem) as caught:
            Ann.open(Index.open(tmp_path))
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)
    path.write_bytes(content[:-100])
    record = build_ann(tmp_path, "ivf")  # a truncated file is rebuilt
    path = tmp_path / "ann" / record.file
    assert path.stat().st_size == record.bytes
    path.unlink()
    with pytest.raises(InputError, match="cannot be read: No such file"):
        Ann.open(Index.open(tmp_path))
    assert build_ann(tmp_path, "ivf") != record  # a missing file is rebuilt
    for item, value, problem in (
        ("kind", "flat", "ann.kind"), ("rows", "many", "ann.rows"),
        ("file", "../other", "expected a file name, found '../other'"),
    ):  # fmt: skip
        facts = json.loads(manifest.read_text())
        own = facts["ann"][item]
        facts["ann"][item] = value
        manifest.write_text(json.dumps(facts))
        with pytest.raises(InputError, match=problem):
            read_record(Index.open(tmp_path))
        facts["ann"][item] = own
        manifest.write_text(json.dumps(facts))


def test_a_stopped_build_leaves_the_index_as_it_was(
    rows: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, rows[:500])
    before = build_ann(tmp_path, "ivf")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Manifest, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        build_ann(tmp_path, "hnsw")
    monkeypatch.undo()
    assert Ann.open(Index.open(tmp_path)).record == before
    after = build_ann(tmp_path, "hnsw")
    assert [path.name for path in (tmp_path / "ann").iterdir()] == [after.file]


def test_without_faiss_the_message_has_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    words = ["--model", "clip", "--image_folder", str(tmp_path), "--out", str(tmp_path / "out")]
    with pytest.raises(InputError, match=r"approximate indexes: need faiss.*\[search\]"):
        main([*words, "--ann", "hnsw"])


def test_queries_use_the_approximate_index(rows: np.ndarray, tmp_path: Path) -> None:
    write(tmp_path, rows)
    build_ann(tmp_path, "hnsw")
    index, texts = Index.open(tmp_path), {"a": clustered(1, seed=5)[0], "b": rows[7]}
    encoders = {"clip": Words(texts)}
    counted = []

    class Counting(Ann):
        def search(self, vector: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
            counted.append(k)
            return super().search(vector, k)

    queries = [Query("a"), Query("b")]
    exact = Searcher(index, encoders).search(queries, 5)
    searcher = Searcher(index, encoders, ann=Counting.open(index))
    assert searcher.search(queries, 5) == exact
    assert counted == [5, 5]
    assert searcher.similar(3, 5) == Searcher(index, encoders).similar(3, 5)
    assert counted == [5, 5, 6]
    filtered = searcher.search(queries, 5, Filters(folder="none"))
    assert (filtered, counted) == ([[], []], [5, 5, 6])
    texts["a"] = np.full(WIDTH, np.nan, dtype=np.float32)
    with pytest.raises(InputError, match="not finite"):
        searcher.search([Query("a")], 5)
    with pytest.raises(InputError, match="--ann: member clip has several vectors per image"):
        Searcher(index, {"clip": Tokens(texts)}, ann=Ann.open(index))


def test_the_commands_build_and_use_an_approximate_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ann_module, "LEAST_ROWS", 20)
    photos, out = tmp_path / "photos", tmp_path / "index"
    for number in range(20):
        draw(photos / f"{number:02}.jpg", number, normal=True)
    index = ["--num_workers", "0", *CLIP, "--image_folder", str(photos), "--out", str(out)]
    query = ["--index", str(out), "--text", "a man falls", "--json"]

    def results(name: str, *more: str) -> Any:
        query_main([*query, str(tmp_path / name), *more])
        return json.loads((tmp_path / name).read_text())["queries"]

    main([*index, "--ann", "ivf"])
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("index: ivf: 20 vectors of clip, recall@10 ") for line in lines)
    exact = results("exact.json")
    assert results("ann.json", "--ann") == exact  # one inverted list holds all images
    assert "the search is exact" not in capsys.readouterr().err
    draw(photos / "more.jpg", 50, normal=True)
    main(index)
    assert "does not have the images of this run; --ann ivf rebuilds" in capsys.readouterr().err
    assert len(results("stale.json", "--ann", "--top_k", "30")[0]["images"]) == 21
    assert "--ann: the search is exact, because" in capsys.readouterr().err
    main([*index, "--ann", "ivf"])
    assert "index: ivf: 21 vectors of clip" in capsys.readouterr().err


def test_a_failed_approximate_index_follows_the_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, out = tmp_path / "photos", tmp_path / "index"
    draw(photos / "a.jpg", 0, normal=True)
    (photos / "empty.jpg").touch()
    index = ["--num_workers", "0", *CLIP, "--image_folder", str(photos), "--out", str(out)]
    with pytest.raises(InputError, match="--ann: expected at least 100 images, found 1"):
        main([*index, "--ann", "ivf"])
    assert capsys.readouterr().err.splitlines()[-1].startswith("1 image indexed, 1 not readable")
    assert (out / "unreadable.txt").is_file()


@pytest.mark.parametrize("before", [False, True])
def test_a_member_with_several_vectors_gets_no_approximate_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    """Refuse before the images are encoded, or for an existing index before FAISS builds."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(ann_module, "LEAST_ROWS", 20)
    photos, out = tmp_path / "photos", tmp_path / "index"
    for number in range(20):
        draw(photos / f"{number:02}.jpg", number, normal=True)
    index = ["--num_workers", "0", "--model", "blip2", "--config", "configs/blip2/mini_infer.yaml"]
    index += ["--image_folder", str(photos), "--out", str(out)]
    if before:
        main(index)
    with pytest.raises(InputError, match="--ann: member blip2 has several vectors per image"):
        main([*index, "--ann", "ivf"])
    assert (out / "manifest.json").exists() == before
    assert not (out / "ann").exists()
