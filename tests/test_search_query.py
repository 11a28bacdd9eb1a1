"""Queries on an index: exact search, fusion, filters, negative terms, joint assignment, ties."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pab.core.errors import InputError
from pab.data.images import load_image
from pab.data.records import GalleryImage
from pab.scoring.encoder import Encoder, Origin
from pab.scoring.rerank import Reranker
from pab.search.exact import search_exact
from pab.search.index import Entry, Index, Manifest, Member, Shard
from pab.search.query import Filters, Query, Searcher, assigned
from pab.search.rerank import reranked
from pab.search.writing import with_shards, write_shard

WIDTH = 6


class Words(Encoder):
    """Encoder whose text vectors are set by the test; images have the vector of their colour."""

    origin = Origin("words", "words.pth")

    def __init__(self, texts: dict[str, np.ndarray]) -> None:
        self.texts = texts

    def encode_texts(self, captions: Sequence[str]) -> torch.Tensor:
        return torch.from_numpy(np.stack([self.texts[one] for one in captions]))

    def encode_images(self, images: Any, *, reader: Any = None) -> torch.Tensor:
        return torch.stack([unit(image.getpixel((0, 0))[0]) for image in images])


class Tokens(Words):
    """Encoder with two vectors per image; the higher of their similarities counts."""

    def similarity(self, texts: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        pairs = images.view(len(images), 2, -1)
        return torch.einsum("qd,gpd->qgp", texts, pairs).amax(dim=2)


def unit(place: int) -> torch.Tensor:
    return torch.eye(WIDTH)[place]


def vectors(count: int, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def member(name: str, width: int = WIDTH, dtype: Any = "float32") -> Member:
    return Member(name, name, (), {}, {"checkpoint": f"{name}.pth"}, width, dtype)


def make_index(
    folder: Path, rows: dict[str, np.ndarray], names: Sequence[str], *, shard: int = 3,
    times: Sequence[float | None] | None = None,
) -> Index:  # fmt: skip
    """Write an index in shards of a few rows, and open it."""
    members = [member(name, one.shape[1]) for name, one in rows.items()]
    manifest = Manifest({"kind": "folder"}, str(folder), members)
    entries = [
        Entry(name, folder / name, 1, 2, time_s=None if times is None else times[i])
        for i, name in enumerate(names)
    ]
    for start in range(0, len(names), shard):
        part = slice(start, start + shard)
        written = write_shard(
            folder, manifest, entries[part], {name: one[part] for name, one in rows.items()}
        )
        manifest = with_shards(manifest, [*manifest.shards, written])
    manifest.save(folder)
    return Index.open(folder)


NAMES = ["a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg", "b/c/3.jpg", "top.jpg", "z.jpg"]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("k", [1, 5, 100])
def test_exact_search_agrees_with_a_full_sort(dtype: str, k: int) -> None:
    rows = vectors(50).astype(dtype)
    rows[30] = rows[3]  # ties
    queries = vectors(4, seed=1)
    blocks = [(first, rows[first : first + 20]) for first in range(0, 50, 20)]
    scores, found = search_exact(iter(blocks), queries, k)
    every = queries @ rows.astype(np.float32).T
    expected = np.argsort(-every, axis=1, kind="stable")[:, :k]
    assert (found == expected).all()
    assert np.allclose(scores, np.take_along_axis(every, expected, 1), atol=1e-6)


def test_the_index_returns_what_was_written(tmp_path: Path) -> None:
    rows = {"clip": vectors(7), "lhp": vectors(7, 4, seed=2)}
    index = make_index(tmp_path, rows, NAMES)
    assert (index.rows, [m.name for m in index.members]) == (7, ["clip", "lhp"])
    assert [index.entry(row).name for row in range(7)] == NAMES
    assert [entry.path for entry in index.entries()] == [tmp_path / name for name in NAMES]
    assert index.names.tolist() == NAMES
    for name, one in rows.items():
        blocks = list(index.blocks(name))
        assert [first for first, _ in blocks] == [0, 3, 6]
        assert all(isinstance(block, np.memmap) for _, block in blocks)
        assert np.array_equal(np.concatenate([block for _, block in blocks]), one)
    assert (tmp_path / "img_emb/img_emb_1.npy").is_file()
    assert (tmp_path / "members/lhp/img_emb/img_emb_1.npy").is_file()
    assert (tmp_path / "metadata/metadata_2.parquet").is_file()
    with pytest.raises(IndexError):
        index.entry(7)


def test_a_text_finds_the_nearest_images(tmp_path: Path) -> None:
    rows = vectors(7)
    index = make_index(tmp_path, {"clip": rows}, NAMES)
    text = vectors(1, seed=5)[0]
    searcher = Searcher(index, {"clip": Words({"x": text})})
    (hits,) = searcher.search([Query("x")], top_k=3)
    expected = np.argsort(-(rows @ text))[:3]
    assert [hit.row for hit in hits] == expected.tolist()
    assert [hit.name for hit in hits] == [NAMES[row] for row in expected]
    assert hits[0].score == pytest.approx(float((rows @ text).max()), abs=1e-6)
    assert hits[0].scores == {"clip": hits[0].score}


def test_text_image_and_unwanted_text_are_combined(tmp_path: Path) -> None:
    """Compare with the weighted sum of unit vectors, scaled to unit length."""
    rows = vectors(7)
    index = make_index(tmp_path, {"clip": rows}, NAMES)
    texts = {"x": vectors(1, seed=5)[0], "no": vectors(1, seed=6)[0], "nor": vectors(1, seed=7)[0]}
    query = Query(
        "x", Image.new("RGB", (2, 2), (4, 0, 0)), ("no", "nor"),
        {"text": 0.7, "image": 0.3, "minus": 0.5},
    )  # fmt: skip
    (hits,) = Searcher(index, {"clip": Words(texts)}).search([query], top_k=7)
    total = 0.7 * texts["x"] + 0.3 * unit(4).numpy() - 0.5 * texts["no"] - 0.5 * texts["nor"]
    scores = rows @ (total / np.linalg.norm(total))
    assert [hit.row for hit in hits] == np.argsort(-scores).tolist()
    assert [hit.score for hit in hits] == pytest.approx(sorted(scores, reverse=True), abs=1e-6)


def test_members_are_fused_by_scaled_scores(tmp_path: Path) -> None:
    rows = {"clip": vectors(7), "blip2": vectors(14, 3, seed=3).reshape(7, 6)}
    index = make_index(tmp_path, rows, NAMES)
    encoders = {
        "clip": Words({"x": vectors(1, seed=5)[0]}), "blip2": Tokens({"x": vectors(1, 3)[0]}),
    }  # fmt: skip
    searcher = Searcher(index, encoders, {"clip": 0.75, "blip2": 0.25})
    (hits,) = searcher.search([Query("x")], top_k=7)
    clip = rows["clip"] @ encoders["clip"].texts["x"]
    blip2 = (rows["blip2"].reshape(7, 2, 3) @ encoders["blip2"].texts["x"]).max(axis=1)
    fused = sum(
        weight * (one - one.min()) / (one.max() - one.min())
        for weight, one in ((0.75, clip), (0.25, blip2))
    )
    assert [hit.row for hit in hits] == np.argsort(-fused).tolist()
    assert [hit.score for hit in hits] == pytest.approx(sorted(fused, reverse=True), abs=1e-6)
    for hit in hits:
        expected = {"clip": clip[hit.row], "blip2": blip2[hit.row]}
        assert hit.scores == pytest.approx(expected, abs=1e-6)


def test_equal_scores_go_to_the_smaller_name_whatever_the_row(tmp_path: Path) -> None:
    rows = np.tile(vectors(1), (7, 1))
    rows[4] = vectors(1, seed=9)
    index = make_index(tmp_path, {"clip": rows}, NAMES[::-1])
    (hits,) = Searcher(index, {"clip": Words({"x": rows[0]})}).search([Query("x")], top_k=3)
    assert [hit.name for hit in hits] == [name for name in NAMES if name != NAMES[::-1][4]][:3]


def test_filters(tmp_path: Path) -> None:
    times = [0.0, 1.0, 2.0, 3.0, 4.0, None, None]
    rows = vectors(7)
    index = make_index(tmp_path, {"clip": rows}, NAMES, times=times)
    searcher = Searcher(index, {"clip": Words({"x": rows[0]})})

    def found(**filters: Any) -> list[int]:
        (hits,) = searcher.search([Query("x")], 7, Filters(**filters))
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
        for hit in hits:
            assert hit.score == pytest.approx(float(rows[hit.row] @ rows[0]), abs=1e-6)
        return sorted(hit.row for hit in hits)

    assert found() == list(range(7))
    assert found(folder="b") == found(folder="b/") == [2, 3, 4]
    assert found(folder="b/c") == [4]
    assert found(folder="none") == []
    assert found(start_s=1.0, end_s=3.0) == [1, 2, 3]
    assert found(start_s=3.5) == [4]
    assert found(end_s=0.5, folder="a") == [0]
    above = [row for row in range(7) if rows[row] @ rows[0] >= 0.1]
    assert found(least=0.1) == above


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (Filters(start_s=float("nan")), "start: expected a finite number, found nan"),
        (Filters(least=float("inf")), "least: expected a finite number, found inf"),
        (Filters(start_s=5.0, end_s=1.0), "end: expected at least the start, 5.0, found 1.0"),
    ],
)
def test_filters_that_are_refused(tmp_path: Path, filters: Filters, expected: str) -> None:
    index = make_index(tmp_path, {"clip": vectors(2)}, NAMES[:2])
    searcher = Searcher(index, {"clip": Words({"x": vectors(1)[0]})})
    with pytest.raises(InputError, match=expected):
        searcher.search([Query("x")], 2, filters)
    with pytest.raises(InputError, match=expected):
        searcher.similar(0, 2, filters)


def test_more_like_this(tmp_path: Path) -> None:
    rows = vectors(7)
    index = make_index(tmp_path, {"clip": rows}, NAMES)
    hits = Searcher(index, {"clip": Words({})}).similar(2, top_k=3)
    order = np.argsort(-(rows @ rows[2]))
    assert [hit.row for hit in hits] == [row for row in order.tolist() if row != 2][:3]


def test_several_queries_share_no_first_image(tmp_path: Path) -> None:
    """Compare the sum of the first scores with all assignments of four queries."""
    from itertools import permutations

    rows = vectors(7)
    index = make_index(tmp_path, {"clip": rows}, NAMES)
    texts = {str(i): vectors(1, seed=20)[0] + 0.2 * vectors(1, seed=30 + i)[0] for i in range(4)}
    searcher = Searcher(index, {"clip": Words(texts)})
    queries = [Query(one) for one in texts]
    plain = searcher.search(queries, 2)
    assert len({hits[0].row for hits in plain}) < 4, "the queries must compete for an image"
    joint = searcher.search(queries, 2, one_to_one=True)
    assert len({hits[0].row for hits in joint}) == 4
    assert all(len(hits) == 2 for hits in joint)
    scores = np.stack([rows @ texts[one] for one in texts])
    best = max(sum(scores[q, row] for q, row in enumerate(p)) for p in permutations(range(7), 4))
    assert sum(hits[0].score for hits in joint) == pytest.approx(best, abs=1e-5)


def test_more_queries_than_images(tmp_path: Path) -> None:
    rows = vectors(2)
    index = make_index(tmp_path, {"clip": rows}, NAMES[:2])
    searcher = Searcher(index, {"clip": Words({"x": rows[0]})})
    joint = searcher.search([Query("x")] * 3, 2, one_to_one=True)
    assert sorted(hits[0].row for hits in joint) in ([0, 0, 1], [0, 1, 1])
    assert assigned([[], []]) == [[], []]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        (Query(), "expected a text or an image"),
        (Query("x", weights={"tekst": 1.0}), "expected one of text, image, minus, found 'tekst'"),
        (Query("x", weights={"text": -1.0}), "text: expected a number of at least 0"),
        (Query("x", weights={"text": 0.0}), "expected a positive weight"),
        (Query("x", minus=("x",)), "its parts cancel out"),
    ],
)
def test_queries_that_are_refused(tmp_path: Path, query: Query, expected: str) -> None:
    index = make_index(tmp_path, {"clip": vectors(2)}, NAMES[:2])
    with pytest.raises(InputError, match=expected):
        Searcher(index, {"clip": Words({"x": vectors(1)[0]})}).search([query])


def test_an_overridden_similarity_may_be_a_dot_product(tmp_path: Path) -> None:
    class Own(Words):
        compares_by_dot_product = True

        def similarity(self, texts: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
            return texts @ images.T

    index = make_index(tmp_path, {"clip": vectors(7)}, NAMES)
    text = {"x": vectors(1, seed=5)[0]}
    query = [Query("x", Image.new("RGB", (2, 2), (4, 0, 0)))]
    found = [Searcher(index, {"clip": one}).search(query) for one in (Own(text), Words(text))]
    assert found[0] == found[1]


def test_an_image_needs_a_member_with_one_vector(tmp_path: Path) -> None:
    index = make_index(tmp_path, {"blip2": vectors(2)}, NAMES[:2])
    searcher = Searcher(index, {"blip2": Tokens({})})
    with pytest.raises(InputError, match="blip2 has several vectors per image"):
        searcher.search([Query(image=Image.new("RGB", (2, 2)))])
    with pytest.raises(InputError, match="needs a member with one vector per image"):
        searcher.similar(0)


def test_scores_that_are_not_finite(tmp_path: Path) -> None:
    index = make_index(tmp_path, {"clip": vectors(4)}, NAMES[:4])
    searcher = Searcher(index, {"clip": Words({"x": np.full(WIDTH, np.nan, np.float32)})})
    with pytest.raises(InputError, match=r"words.pth, query 'x': the model's scores"):
        searcher.search([Query("x")], top_k=2)


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"manifest\.json: expected the manifest of an index"):
        Index.open(tmp_path)
    index = make_index(tmp_path, {"clip": vectors(7)}, NAMES)
    searcher = Searcher(index, {"clip": Words({"x": vectors(1)[0]})})
    np.save(tmp_path / "img_emb/img_emb_1.npy", vectors(2))
    with pytest.raises(InputError, match=r"img_emb_1.npy: expected float32 \[3, 6\], found"):
        searcher.search([Query("x")])
    (tmp_path / "metadata/metadata_0.parquet").write_text("no")
    with pytest.raises(InputError, match=r"metadata_0.parquet: cannot be read"):
        Index.open(tmp_path).entry(0)
    manifest = tmp_path / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"format": 1', '"format": 2'))
    with pytest.raises(InputError, match=r"found 2; remove the folder of the index, and index"):
        Index.open(tmp_path)
    manifest.write_text(text.replace('"width": 6', '"width": "six"'))
    with pytest.raises(InputError, match=r"members.0.width"):
        Index.open(tmp_path)
    manifest.write_text(text.replace('"name": "clip"', '"name": "../clip"'))
    with pytest.raises(InputError, match="expected members with distinct names"):
        Index.open(tmp_path)


def test_damaged_columns_and_headers_are_named(tmp_path: Path) -> None:
    make_index(tmp_path, {"clip": vectors(7)}, NAMES)
    arrow = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "metadata/metadata_0.parquet"
    table = arrow.read_table(path)
    for damaged in (table.drop_columns("file"), table.append_column("more", table["bytes"])):
        arrow.write_table(damaged, path)
        with pytest.raises(InputError, match=r"metadata_0.parquet: .*expected the columns"):
            Index.open(tmp_path).entry(0)
    path = tmp_path / "img_emb/img_emb_0.npy"
    path.write_bytes(path.read_bytes().replace(b"}", b"("))
    with pytest.raises(InputError, match=r"img_emb_0.npy: cannot be read"):
        list(Index.open(tmp_path).blocks("clip"))
    path.unlink()
    with pytest.raises(InputError, match=r"if another run has updated the index, open it again"):
        list(Index.open(tmp_path).blocks("clip"))


def test_vectors_that_overflow_are_refused(tmp_path: Path) -> None:
    manifest = Manifest({}, str(tmp_path), [member("clip", dtype="float16")])
    entry = Entry("a.jpg", tmp_path / "a.jpg", 1, 2)
    with pytest.raises(InputError, match=r"'a\.jpg': expected finite vectors in float16"):
        write_shard(tmp_path, manifest, [entry], {"clip": np.full((1, WIDTH), 1e6, np.float32)})


def test_numbers_of_shards_are_never_reused(tmp_path: Path) -> None:
    manifest = Manifest({}, str(tmp_path), [member("clip")])
    manifest = with_shards(manifest, [Shard(0, 3), Shard(1, 3)])
    assert manifest.next_number == 2
    assert with_shards(manifest, [Shard(0, 3)]).next_number == 2


class ByHand(Reranker):
    """Reranker with fixed scores per caption and row."""

    origin = Origin("hand", "hand.pth")

    def __init__(self, scores: dict[str, list[float]]) -> None:
        self.scores = scores

    def rerank(
        self, captions: Sequence[str], images: Sequence[GalleryImage], candidates: torch.Tensor
    ) -> torch.Tensor:
        """Look up the score of each image by its grey level, which is its row."""
        rows = [[load_image(images[i].path).getpixel((0, 0)) for i in one] for one in candidates]
        return torch.tensor(
            [[self.scores[c][r[0]] for r in one] for c, one in zip(captions, rows, strict=True)]
        )


@pytest.fixture
def pictures(tmp_path: Path) -> Index:
    """Index whose image n has the grey level n."""
    for number, name in enumerate(NAMES):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number,) * 3).save(tmp_path / name, "PNG")
    return make_index(tmp_path, {"clip": vectors(7)}, NAMES)


def test_reranking_orders_only_the_first_images(pictures: Index) -> None:
    texts = {"x": vectors(1, seed=5)[0]}
    (hits,) = Searcher(pictures, {"clip": Words(texts)}).search([Query("x")], 7)
    scores = [0.1, 0.7, 0.3, 0.7, 0.2, 0.9, 0.4]
    (found,) = reranked(pictures, [Query("x")], [hits], ByHand({"x": scores}), 4)
    expected = sorted(hits[:4], key=lambda hit: -scores[hit.row])
    assert [hit.row for hit in found[:4]] == [hit.row for hit in expected]
    assert [hit.rerank_score for hit in found[:4]] == pytest.approx(
        [scores[hit.row] for hit in expected]
    )
    assert found[4:] == hits[4:]
    assert [hit.score for hit in found[:4]] == [hit.score for hit in expected]
    with pytest.raises(InputError, match="--rerank_depth: must be at least 1"):
        reranked(pictures, [Query("x")], [hits], ByHand({}), 0)
    with pytest.raises(InputError, match="at least the number of queries, 2, found 1"):
        reranked(pictures, [Query("x")] * 2, [hits] * 2, ByHand({}), 1, one_to_one=True)
    with pytest.raises(InputError, match=r"hand.pth, query 'x': the reranker's scores"):
        reranked(pictures, [Query("x")], [hits], ByHand({"x": [np.nan] * 7}), 4)


def test_joint_assignment_uses_the_scores_of_the_reranker(pictures: Index) -> None:
    texts = {"x": vectors(1, seed=5)[0], "y": vectors(1, seed=5)[0]}
    queries = [Query("x"), Query("y")]
    hits = Searcher(pictures, {"clip": Words(texts)}).search(queries, 7)
    best, other = hits[0][0].row, hits[0][1].row
    scores = {"x": [0.0] * 7, "y": [0.0] * 7}
    scores["x"][best], scores["x"][other] = 1.0, 0.9  # a loss of 0.1
    scores["y"][best], scores["y"][other] = 0.8, 0.1  # a loss of 0.7
    plain = reranked(pictures, queries, hits, ByHand(scores), 3)
    assert [one[0].row for one in plain] == [best, best]
    joint = reranked(pictures, queries, hits, ByHand(scores), 3, one_to_one=True)
    assert [one[0].row for one in joint] == [other, best]
    assert all(sorted(hit.row for hit in one) == list(range(7)) for one in joint)
