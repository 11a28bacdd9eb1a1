"""Exports of an index: their numbers, and reading them with the databases' own loaders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset
import pytest

from pab.core.errors import InputError
from pab.search.export import Format, export_index
from pab.search.export_command import main
from pab.search.index import Dtype, Entry, Index, Manifest, Member
from pab.search.writing import with_shards, write_shard

NAMES = ["a.png", "b/ü.png", 'c".png', "v.mp4/00:00:01.000", "z\\xff.png"]


def make_index(folder: Path, dtypes: dict[str, Dtype], scale: float = 1.0) -> Index:
    """Write an index of two shards; each member has five vectors of length ``scale``, [5, D]."""
    widths = {name: 8 + place for place, name in enumerate(dtypes)}
    members = [
        Member(name, name, (), {}, {}, widths[name], dtype) for name, dtype in dtypes.items()
    ]
    manifest = Manifest({}, str(folder), members)
    rng = np.random.default_rng(3)
    rows = {name: rng.normal(size=(5, width)) for name, width in widths.items()}
    rows = {k: scale * v / np.linalg.norm(v, axis=1, keepdims=True) for k, v in rows.items()}
    entries = [
        Entry(name, folder / name, 1, 2, f"{place}a", 30, 40, 1.0 if ":" in name else None, None,
              'a "man"\nfalls' if place == 1 else None)
        for place, name in enumerate(NAMES)
    ]  # fmt: skip
    for part in (slice(0, 3), slice(3, 5)):
        shard = write_shard(
            folder, manifest, entries[part], {name: one[part] for name, one in rows.items()}
        )
        manifest = with_shards(manifest, [*manifest.shards, shard])
    manifest.save(folder)
    return Index.open(folder)


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return make_index(tmp_path / "index", {"clip": "float16", "lhp": "float32"})


def points_of(out: Path) -> list[dict[str, Any]]:
    lines = [line for file in sorted(out.glob("*.jsonl")) for line in file.open(encoding="utf-8")]
    return [point for line in lines for point in json.loads(line)["points"]]


def test_qdrant_files_hold_the_same_numbers(index: Index, tmp_path: Path) -> None:
    out = tmp_path / "out"
    main(["--index", str(index.folder), "--format", "qdrant", "--out", str(out)])
    assert json.loads((out / "collection.json").read_text()) == {
        "vectors": {
            "clip": {"size": 8, "distance": "Dot", "datatype": "float16"},
            "lhp": {"size": 9, "distance": "Dot", "datatype": "float32"},
        }
    }
    points = points_of(out)
    assert [point["payload"]["name"] for point in points] == NAMES
    for member in index.members:
        found = np.array([point["vector"][member.name] for point in points], member.dtype)
        assert np.array_equal(found, index.vectors(member.name, range(5)))
    assert points[1]["payload"] == {
        "name": "b/ü.png", "path": str(index.entry(1).path), "sha256": "1a", "width": 30,
        "height": 40, "caption": 'a "man"\nfalls',
    }  # fmt: skip
    assert points[3]["payload"]["time_s"] == 1.0
    assert len({point["id"] for point in points}) == 5
    export_index(index, tmp_path / "again", "qdrant", ["lhp"])
    again = points_of(tmp_path / "again")
    assert [point["id"] for point in again] == [point["id"] for point in points]
    assert {*again[0]["vector"]} == {"lhp"}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_printed_numbers_are_exact(dtype: str, tmp_path: Path) -> None:
    """Every float16 in [-1, 1] and random float32 numbers are read back unchanged."""
    from pab.search.export import _numbers

    if dtype == "float16":
        bits = np.arange(2**16, dtype=np.uint16).view(np.float16)
        values = bits[np.abs(bits) <= 1].reshape(1, -1)
    else:
        values = np.random.default_rng(0).normal(size=(1, 20_000)).astype(np.float32)
    found = np.array(json.loads(_numbers(values)[0])).astype(values.dtype)
    assert np.array_equal(found, values[0])


def test_lancedb_files_hold_the_same_numbers(index: Index, tmp_path: Path) -> None:
    out = tmp_path / "out"
    main(["--index", str(index.folder), "--format", "lancedb", "--out", str(out)])
    table = pyarrow.dataset.dataset(out).to_table()
    assert table["name"].to_pylist() == NAMES
    assert table["time_s"].to_pylist() == [None, None, None, 1.0, None]
    for member in index.members:
        kind = table.schema.field(member.name).type
        assert kind.list_size == member.width
        found = np.array(table[member.name].to_pylist(), member.dtype)
        assert np.array_equal(found, index.vectors(member.name, range(5)))


@pytest.mark.parametrize("kind", ["qdrant", "lancedb"])
def test_several_vectors_per_image_are_refused(kind: Format, tmp_path: Path) -> None:
    """A refused export leaves no file."""
    index = make_index(tmp_path / "index", {"blip2": "float16"}, scale=32**0.5)
    with pytest.raises(InputError, match=r"member 'blip2': expected vectors of length 1, found 5"):
        export_index(index, tmp_path / "out/deep", kind)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_with_files_and_an_unknown_member_are_refused(
    index: Index, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/letter.txt").write_text("dear")
    with pytest.raises(InputError, match="--out: expected a new or an empty folder"):
        export_index(index, tmp_path / "out", "qdrant")
    with pytest.raises(InputError, match="expected one of the members clip, lhp, found 'uit'"):
        export_index(index, tmp_path / "new", "qdrant", ["uit"])


def test_qdrant_reads_its_files(index: Index, tmp_path: Path) -> None:
    """Load and search the export with Qdrant's client, in memory."""
    qdrant = pytest.importorskip("qdrant_client")
    out = tmp_path / "out"
    export_index(index, out, "qdrant")
    client, models = qdrant.QdrantClient(":memory:"), qdrant.models
    made = models.CreateCollection.model_validate_json((out / "collection.json").read_text())
    client.create_collection("images", vectors_config=made.vectors)
    for file in sorted(out.glob("points_*.jsonl")):
        for line in file.open(encoding="utf-8"):
            client.upsert("images", models.PointsList.model_validate_json(line).points)
    query = index.vector("lhp", 3)
    found = client.query_points("images", query.tolist(), using="lhp", limit=5).points
    scores = index.vectors("lhp", range(5)) @ query
    order = np.argsort(-scores)
    assert [point.payload["name"] for point in found] == [NAMES[row] for row in order]
    assert np.allclose([point.score for point in found], scores[order], atol=1e-6)


def test_lancedb_reads_its_files(index: Index, tmp_path: Path) -> None:
    """Load and search the export with LanceDB."""
    lancedb = pytest.importorskip("lancedb")
    out = tmp_path / "out"
    export_index(index, out, "lancedb")
    files = pyarrow.dataset.dataset(out)
    table = lancedb.connect(tmp_path / "db").create_table("images", schema=files.schema)
    table.add(files)
    for member in index.members:
        query = index.vector(member.name, 3)
        search = table.search(query, vector_column_name=member.name).distance_type("dot").limit(5)
        found = search.to_list()
        scores = index.vectors(member.name, range(5)).astype(np.float32) @ query
        order = np.argsort(-scores)
        assert [row["name"] for row in found] == [NAMES[row] for row in order]
        assert np.allclose([1 - row["_distance"] for row in found], scores[order], atol=2e-3)


def test_links_and_the_working_directory(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real)
    export_index(index, link, "lancedb")
    assert link.is_symlink()
    assert list(real.glob("*.parquet"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(InputError, match="--out: expected a new folder, found the working"):
        export_index(index, Path(), "lancedb")
