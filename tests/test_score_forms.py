"""Forms of scores: what has one meaning is read, whatever its form; the rest is refused by name."""

from __future__ import annotations

import io
import json
import os
import random
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble.run import main as fuse
from pab.core.errors import InputError
from pab.data.id_lists import read_gallery_ids, read_query_ids
from pab.evaluate import main as evaluate
from pab.formats import export as score_export
from pab.formats import tables as score_tables
from pab.formats.contents import Listing
from pab.formats.forms import read_form
from pab.ranking import ranked_names, write_ranked_list
from pab.scores import ScoreFile, load_scores, main, save_scores

SCORES = torch.tensor([[0.5, 0.25, 1.0], [2.0, -1.0, 0.0]])
IDS: dict[str, Any] = {"query_ids": ["q1", "q2"], "gallery_ids": ["a", "b", "c"]}
NAN, INF = float("nan"), float("inf")


def saved(folder: Path, content: Any, name: str = "s.pt") -> Path:
    path = folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    else:
        torch.save(content, path)
    return path


def read(path: Path) -> ScoreFile:
    return load_scores(path, **IDS)


# ------------------------------------------------------------------------------- arrays and tensors


@pytest.mark.parametrize(
    "content",
    [
        SCORES,
        SCORES.half(),
        SCORES.bfloat16(),
        SCORES.double(),
        SCORES.clone().requires_grad_(),
        SCORES.T.contiguous().T,
        SCORES.numpy(),
        {"sims": SCORES},
        {"similarity": SCORES.numpy(), "epoch": 3, "note": "x"},
        OrderedDict(scores=SCORES.numpy().astype(">f4")),
        {"sim": SCORES, "labels": torch.arange(2), "shape": torch.tensor([[2, 3]])},
        {"x": SCORES, "seconds": np.float64(1.5), "queries": np.array(["q1", "q2"])},
    ],
    ids=lambda content: type(content).__name__,
)
def test_one_matrix_in_a_torch_file(tmp_path: Path, content: Any) -> None:
    found = read(saved(tmp_path, content))
    assert torch.equal(found.scores, SCORES)
    assert found.scores.dtype == torch.float32
    assert not found.scores.requires_grad
    assert found.query_ids == IDS["query_ids"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"t2i": SCORES, "i2t": SCORES.T},
            r"found 2 \(t2i, i2t\).*save only the matrix of scores",
        ),
        ({"epoch": 3}, "found none in keys epoch: a int"),
        ({}, r"found none in keys \(none\)"),
        ((SCORES,), "found a tuple"),
        (torch.zeros(3), r"floating-point scores, found float32 \[3\]"),
        (torch.zeros(2, 3, 4), r"found float32 \[2, 3, 4\]"),
        (torch.tensor([[2, 0], [1, 0]]), r"found int64 \[2, 2\]; .*higher for better matches"),
        (torch.ones(2, 3).bool(), "found bool"),
        (SCORES + 0j, "found complex64"),
        (torch.tensor([[NAN, 0, 0], [0, 0, 0]]), "query 'q1': expected finite scores, found nan"),
        (torch.tensor([[INF, 0, 0], [0, 0, 0]]), "query 'q1': expected finite scores, found inf"),
        (SCORES.double() * 1e300, "expected finite scores, found inf"),
        (torch.full((2, 3), -INF), "expected finite scores, found -inf alone"),
        ({"sims": np.array([[object()] * 3] * 2)}, "expected a score file"),
    ],
)
def test_torch_files_of_no_one_meaning(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        read(saved(tmp_path, content))
    assert "fetch it again" not in str(error.value)


class _Command:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_code_beside_an_array_is_not_run(tmp_path: Path) -> None:
    made = tmp_path / "made"
    hidden = np.empty((1, 1), dtype=object)
    hidden[0, 0] = _Command(made)
    for content in ({"sims": SCORES.numpy(), "x": _Command(made)}, {"sims": hidden}):
        with pytest.raises(InputError, match="expected a score file"):
            read(saved(tmp_path, content))
    assert not made.exists()


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy(tmp_path: Path, dtype: str, order: Any) -> None:
    np.save(tmp_path / "s.npy", np.array(SCORES.numpy(), dtype=dtype, order=order))
    assert torch.equal(read(tmp_path / "s.npy").scores, SCORES)


def test_npz(tmp_path: Path) -> None:
    names = {"query_ids": np.array([7, 8]), "gallery_ids": np.array(["c.jpg", "a.png", "b"])}
    np.savez_compressed(tmp_path / "s.npz", scores=SCORES.numpy(), **names)
    found = load_scores(tmp_path / "s.npz")
    assert (found.query_ids, found.gallery_ids) == (["7", "8"], ["a", "b", "c"])
    assert torch.equal(found.scores, SCORES[:, [1, 2, 0]])
    as_bytes = np.array([one.encode() for one in IDS["gallery_ids"]])  # of NumPy's type S
    np.savez(tmp_path / "bytes.npz", scores=SCORES.numpy(), query_ids=[7, 8], gallery_ids=as_bytes)
    assert load_scores(tmp_path / "bytes.npz").gallery_ids == IDS["gallery_ids"]
    np.savez(tmp_path / "half.npz", scores=SCORES.numpy(), query_ids=names["query_ids"])
    with pytest.raises(InputError, match=r"without all; convert"):
        load_scores(tmp_path / "half.npz")
    np.savez(tmp_path / "object.npz", scores=np.array([[None]]))
    with pytest.raises(InputError, match="found damaged ones or Python objects"):
        load_scores(tmp_path / "object.npz")


@pytest.mark.parametrize("name", ["s.npz", "answer.zip", "s.npy"])
def test_changed_bytes_never_escape(tmp_path: Path, name: str) -> None:
    path, ids = tmp_path / name, [f"g{i:02}" for i in range(50)]
    if name == "s.npz":
        np.savez_compressed(path, scores=np.random.default_rng(0).random((9, 50)), gallery_ids=ids)
    elif name == "s.npy":
        np.save(path, np.zeros((9, 50), dtype=np.float32))
    else:
        write_ranked_list(path, [ids[i:] + ids[:i] for i in range(50)])
    whole, generator = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(200):
        changed = bytearray(whole)
        for _ in range(generator.choice((1, 30))):
            changed[generator.randrange(len(changed))] = generator.randrange(256)
        path.write_bytes(changed)
        try:
            load_scores(path, query_ids=ids, gallery_ids=ids)
        except InputError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("name", ["s.npy", "s.npz", "s.pt", "s.parquet"])
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    score_file = ScoreFile(torch.rand(40, 50), [f"q{i}" for i in range(40)],
                           [f"g{i:02}" for i in range(50)])  # fmt: skip
    form = "pt" if name == "s.pt" else name[2:]
    score_export.export(score_file, form, tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for share in (0.1, 0.5, 0.99):
        (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(InputError) as error:
            load_scores(tmp_path / name, query_ids=score_file.query_ids,
                        gallery_ids=score_file.gallery_ids)  # fmt: skip
        assert str(tmp_path / name) in str(error.value)
        assert "fetch it again" not in str(error.value)


def test_minus_infinity_is_not_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = torch.tensor([[0.5, -INF, 1.0], [-INF, -INF, -INF]])
    found = read(saved(tmp_path, scores))
    below = torch.nextafter(torch.tensor(0.5), torch.tensor(-INF)).item()
    assert found.scores.tolist() == [[0.5, below, 1.0]]
    assert (found.query_ids, found.listed) == (["q1"], {"q1": 2})
    said = capsys.readouterr().err
    assert "4 scores are -inf: those images count as not listed" in said
    assert "1 queries list no image and are left out" in said


# ------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize(
    "text",
    [
        "query,a,b,c\nq1,0.5,0.25,1\nq2,2,-1,0\n",
        "\ufeff,c.jpg,b.jpg,a.jpg\r\nq1,1,.25,5e-1\r\nq2,0,-1,2\r\n",
        "a;b;c\nq1;0.5;0.25;1\n\nq2;2;-1;0",
        'id\ta\tb\tc\n"q1"\t0.5\t0.25\t1.0\nq2\t2\t-1\t0\n',
        "queries , b, c , a\nq1, 0.25, 1.0, 0.5\nq2, -1, 0, 2\n",
    ],
)
@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.txt", "t"])
def test_tables(tmp_path: Path, text: str, name: str) -> None:
    found = load_scores(saved(tmp_path, text, name))
    assert (found.query_ids, found.gallery_ids) == (IDS["query_ids"], IDS["gallery_ids"])
    assert torch.equal(found.scores, SCORES)


def test_numbers_as_names_of_columns(tmp_path: Path) -> None:
    for head, names in (("0_1,0_2", ["0_1", "0_2"]), ("5,10", ["10", "5"])):
        for corner in ("query,", ",", ""):
            text = f"{corner}{head}\n0_3,0.5,0.25\n0_4,1,0\n"
            found = load_scores(saved(tmp_path, text, "t.csv"))
            assert (found.query_ids, found.gallery_ids) == (["0_3", "0_4"], names)
    with pytest.raises(InputError, match="expected a number for image '0_2', found '0_4'"):
        read_form(saved(tmp_path, "0_1,0_2\n0_3,0_4\n", "t.csv"))


def test_numbers_with_blanks_between_are_no_ranked_list(tmp_path: Path) -> None:
    np.savetxt(tmp_path / "s.txt", SCORES.numpy())
    assert torch.equal(read(tmp_path / "s.txt").scores, SCORES)
    with pytest.raises(InputError, match="found a table of numbers without ids"):
        load_scores(tmp_path / "s.txt")
    assert isinstance(read_form(saved(tmp_path, "12 7 0_1\n7 12 0_1\n", "l.txt")), Listing)


def test_a_table_of_numbers_alone_has_no_ids(tmp_path: Path) -> None:
    path = saved(tmp_path, "0.5,0.25,1\n2,-1,0\n", "t.csv")
    assert torch.equal(read(path).scores, SCORES)
    with pytest.raises(InputError, match=r"a CSV table without ids .*convert it with"):
        load_scores(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("query,a,b\nq1,0.5,0.25\nq2,1\n", "line 3: expected 2 scores, found 1"),
        ("query,a,b\nq1,0.5,0.25\nq2,1,x\n", "line 3: expected a number for image 'b', found 'x'"),
        ("query,a,b\nq1,0.5,0.25\nq2,,1\n", "for image 'a', found an empty cell"),
        ("0.5,0.25\n0.5,0.25,1\n", "line 2: expected 2 scores, found 3"),
        ("query,a,b\nq1,0.5,nan\n", "query 'q1': expected finite scores, found nan"),
        ("query,a,a\nq1,0.5,1\n", "expected distinct ids, found 'a' twice"),
        ("query,a.jpg,a.png\nq1,0.5,1\n", "found 'a.jpg' and 'a.png'; rename one"),
        ("query,a,b\nq1,0.5,1\nq1,1,1\n", "query_ids: expected distinct ids, found 'q1' twice"),
        ("query,a,b\n", "expected rows of scores below the header, found none"),
        ("", "found an empty file"),
        ("\xff", "expected a number|expected rows"),
    ],
)
def test_tables_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_scores(saved(tmp_path, text, "t.csv"))


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    columns = {"c.jpg": [1.0, 0.0], "a": [0.5, 2.0], "b": [0.25, -1.0]}
    for name, ids in (("query", ["q1", "q2"]), ("anything", ["q1", "q2"]), ("qid", [1, 2])):
        arrow.parquet.write_table(arrow.table({**columns, name: ids}), tmp_path / "t.parquet")
        found = load_scores(tmp_path / "t.parquet")
        assert found.query_ids == [str(one) for one in ids]
        assert found.gallery_ids == IDS["gallery_ids"]
        assert torch.equal(found.scores, SCORES)
    arrow.parquet.write_table(arrow.table(columns), tmp_path / "t.parquet")
    with pytest.raises(InputError, match=r"without all; convert it .*--queries FILE"):
        load_scores(tmp_path / "t.parquet")
    for bad, message in (
        (
            {"x": ["q1", "q2"], "y": ["a", "b"], **columns},
            "one column of query ids, found 'x', 'y'",
        ),
        ({"x": ["q1", "q2"], "a": [None, 1.0]}, "column 'a': expected a number in every row"),
        ({"x": ["q1", "q2"], "a": [True, False]}, "column 'a': expected a column of numbers"),
        ({"x": ["q1", "q2"]}, "expected rows and columns"),
    ):
        arrow.parquet.write_table(arrow.table(bad), tmp_path / "t.parquet")
        with pytest.raises(InputError, match=message):
            load_scores(tmp_path / "t.parquet")


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(score_tables.importlib, "import_module", missing)
    with pytest.raises(InputError, match=r"t\.parquet: Parquet needs pyarrow.*pip install pyarrow"):
        load_scores(saved(tmp_path, b"PAR1" + bytes(20) + b"PAR1", "t.parquet"))
    with pytest.raises(InputError, match="pip install pyarrow"):
        score_export.export(ScoreFile(SCORES, **IDS), "parquet", tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


# --------------------------------------------------------------------------------------------- runs


RUN: dict[str, dict[str, float]] = {"q1": {"c": 1.0, "a": 0.5}, "q2": {"a": 2.0, "c": 0.0}}
RERANKED = [
    {"query_index": q, "reranked": [{"image": f"{i}.jpg", "score": s} for i, s in d.items()]}
    for q, d in RUN.items()
]
BELOW = [torch.nextafter(torch.tensor(x), torch.tensor(-INF)).item() for x in (0.5, 0.0)]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(RUN),
        json.dumps(RUN, indent=2),
        "\ufeff" + json.dumps(RUN).replace('"c"', '"c.jpg"'),
        "q1 Q0 c 1 1.0 tag\nq1 Q0 a 2 0.5 tag\nq2 Q0 a 1 2 tag\nq2 Q0 c 2 0 tag\n",
        "q1\tq0\tc.jpg\t1\t1e0\ta tag of words\r\nq1 Q0 a.jpg 2 .5 t\r\n\r\n"
        "q2 Q0 a.jpg 0 2 t\r\nq2 Q0 c.jpg 1 0 t\r\n",
        "q2 Q0 c 2 0 tag\nq1 Q0 a 2 0.5 tag\nq2 Q0 a 1 2 tag\nq1 Q0 c 1 1.0 tag\n",
        "".join(
            json.dumps({"query_index": q, "topk_gallery": list(d), "topk_scores": list(d.values())})
            + "\n"
            for q, d in RUN.items()
        ),
        json.dumps(
            [
                {
                    "query_index": q,
                    "reranked": [{"image": f"{i}.jpg", "score": s} for i, s in d.items()],
                }
                for q, d in RUN.items()
            ]
        ),
        json.dumps({"q1": {"c": 1.0, "a": 0.5, "b": -INF}, "q2": {"a": 2.0, "c": 0}}),
    ],
)
@pytest.mark.parametrize("name", ["r.json", "r.txt", "r.trec"])
def test_runs(tmp_path: Path, text: str, name: str) -> None:
    path = saved(tmp_path, text, name)
    found = load_scores(path, gallery_ids=["a", "b", "c"])
    rows = [found.query_ids.index(query) for query in ("q1", "q2")]
    assert found.scores[rows].tolist() == [[0.5, BELOW[0], 1.0], [2.0, BELOW[1], 0.0]]
    assert found.listed == {"q1": 2, "q2": 2}
    assert load_scores(path).gallery_ids == ["a", "b", "c"] if "b" in text else ["a", "c"]


@pytest.mark.parametrize(
    "text",
    [
        '{"query_index": 7, "topk_gallery": ["c.jpg", "a.jpg"]}\n'
        '{"query_index": 8, "topk_gallery": ["a.jpg"], "seconds": 1}\n',
        '[{"query_index": "7", "topk_gallery": ["c", "a"]}, {"qid": 8.0, "topk_gallery": ["a"]}]',
        '{"7": ["c", "a"], "8": ["a"], "9": []}',
        '{"query_index": "7",\n "topk_gallery": ["c",\n "a"]}\n{"qid": 8, "ranking": ["a"]}',
    ],
)
def test_rankings_without_scores(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = load_scores(saved(tmp_path, text, "r.jsonl"), gallery_ids=["a", "b", "c"])
    assert found.query_ids == ["7", "8"]
    assert found.is_order_alone
    assert found.listed == {"7": 2, "8": 1}
    assert found.scores[0, [2, 0]].tolist() == [1.0, 0.5]
    assert ranked_names(found.scores, found.gallery_ids, 2) == [["c", "a"], ["a", "b"]]
    said = capsys.readouterr().err
    assert ("ignored field 'seconds' of 1 records" in said) is ("seconds" in text)
    assert ("1 queries list no image, such as '9'" in said) is ('"9"' in text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"q1": {"a": 1}, "q1": {"a": 2}}', "expected every key once, found 'q1' twice"),
        ('{"q1": {"a": "high"}}', "query 'q1': expected a number for image 'a', found the text"),
        ('{"q1": {"a": true}}', "query 'q1': expected a number for image 'a', found the boolean"),
        ('{"q1": {"a": NaN}}', "query 'q1': expected finite scores, found nan for image 'a'"),
        ('{"q1": {"a": Infinity}}', "expected finite scores, found inf"),
        ('{"q1": {"a": 1e39}}', "expected finite scores, found 1e[+]39"),
        ('{"q1": {"a": -1e39}}', "expected finite scores, found -1e[+]39"),
        ('{"q1": {"a": 1' + 400 * "0" + "}}", "expected finite scores, found an integer"),
        ('{"q1": {"a": 1, "z": 2}}', "query 'q1': the name 'z' is not in the gallery"),
        ('{"q1": {"a.jpg": 1, "a.png": 2}}', "both mean 'a' of the gallery"),
        ('{"q1": {"a": 1}, "q2": ["a"]}', "query 'q2': expected an object of images and scores"),
        ('{"q1": 5}', "query 'q1': expected an object of images and scores, found the number 5"),
        ('{"query_index": "q1", "topk_gallery": ["a", "a"]}', "once per query, found 'a' twice"),
        ('{"query_index": "q1", "topk_gallery": "a"}', "expected a list, found the text 'a'"),
        ('{"query_index": "q1", "caption": "a man"}', "'topk_gallery' or 'reranked', found 'query"),
        ('{"query_index": true, "topk_gallery": ["a"]}', "record 1: expected a list of strings"),
        ('[{"query_index": "q1", "topk_gallery": ["a"]}, 3]', "record 2: expected a JSON object"),
        ('{"query_index": 1, "topk_gallery": ["a"]}\n' * 2, "expected every query once"),
        (
            '{"query_index": 1, "topk_gallery": ["a"], "scores": [1, 2]}',
            "each of 1 images, found 2",
        ),
        ('[{"query_index": 1, "reranked": [{"image": "a"}]}]', "with 'image' and 'score', found"),
        (
            '{"query_index": 1, "topk_gallery": ["a"]}\n'
            '{"query_index": 2, "topk_gallery": ["a"], "topk_scores": [1]}',
            "query '1': expected scores for all queries or for none, found them for 1 of 2",
        ),
        ("[]", "found an empty list"),
        ("{}", "expected ranked images per query, found none"),
        ('{"q1": {"a": 1}', "line 1: expected JSON, found broken JSON"),
        (
            '{"query_index": 1, "topk_gallery": ["a"]}\n{"query',
            "line 2: expected JSON, found broken",
        ),
        ("[" * 100_000, "broken JSON"),
    ],
)
def test_json_that_is_no_run(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        load_scores(saved(tmp_path, text, "r.json"), gallery_ids=["a", "b"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q Q0 a 1 0.5 t\nq Q0 b 2\n", "line 2: expected QUERY Q0 IMAGE RANK SCORE TAG, found 4"),
        ("q Q0 a 1 0.5 t\nq Q0 b 2 x t\n", "line 2: expected a number as the score, found 'x'"),
        ("q Q0 a 1 0.5 t\nq Q0 a 2 0.4 t\n", "line 2: expected every image once per query"),
        ("q Q0 a 1 nan t\n", "query 'q': expected finite scores, found nan"),
    ],
)
def test_trec_lines_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_scores(saved(tmp_path, text, "r.trec"))


def test_scores_decide_the_order_of_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = load_scores(saved(tmp_path, "q Q0 a 1 0.1 t\nq Q0 b 2 0.9 t\n", "r.run"))
    assert ranked_names(found.scores, found.gallery_ids, 2) == [["b", "a"]]
    assert "the rank column contradicts the scores in 1 queries" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- id lists


def test_a_folder_is_taken_as_sorted_file_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`sorted(os.listdir(folder))` sorts names with their endings: "a-1.jpg" before "a.jpg"."""
    folder = tmp_path / "gallery"
    folder.mkdir()
    for name in ("a.jpg", "a-1.jpg", "B.png"):
        (folder / name).touch()
    assert read_gallery_ids(folder) == ["B", "a-1", "a"]
    np.save(tmp_path / "s.npy", np.array([[1.0, 2.0, 3.0]], dtype=np.float32))
    (tmp_path / "query.json").write_text('{"query_index": "q1", "caption": "a man"}\n')
    ids = ["--queries", str(tmp_path / "query.json"), "--gallery", str(folder)]
    main(["import", str(tmp_path / "s.npy"), *ids, "--out", str(tmp_path / "s.pt")])
    found = load_scores(tmp_path / "s.pt")
    assert dict(zip(found.gallery_ids, found.scores[0].tolist(), strict=True)) == {
        "B": 1, "a-1": 2, "a": 3,
    }  # fmt: skip
    assert "its 3 images are taken in the sorted order" in capsys.readouterr().err


def test_id_lists(tmp_path: Path) -> None:
    path = saved(tmp_path, b"\xef\xbb\xbfb.jpg\r\na.jpg\r\n", "g.txt")
    assert read_gallery_ids(path) == ["b", "a"]
    assert read_query_ids(path) == ["b.jpg", "a.jpg"]
    labelled = saved(tmp_path, '{"image": "a.jpg", "image_id": "i", "caption": ["x", "y"]}\n', "l")
    with pytest.raises(InputError, match="found other JSON"):
        read_gallery_ids(labelled)
    array = saved(tmp_path, '["b.jpg", 7]', "ids.json")
    assert read_gallery_ids(array) == ["b", "7"]
    assert read_query_ids(array) == ["b.jpg", "7"]
    with pytest.raises(InputError, match="expected distinct ids, found 'a' twice"):
        read_query_ids(saved(tmp_path, '["a", "a"]', "ids.json"))
    with pytest.raises(InputError, match=r"found 'a\.jpg' and 'a\.png'"):
        read_gallery_ids(saved(tmp_path, "a.jpg\na.png\n", "g.txt"))
    with pytest.raises(InputError, match="found no such file"):
        read_gallery_ids(tmp_path / "none")


# -------------------------------------------------------------------------------------- round trips


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_export_is_read_back(data: st.DataObject, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("export")
    n_queries, n_gallery = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    name = st.text(st.sampled_from("abé.,\u4e2d-0;"), min_size=1, max_size=4).map(
        lambda s: f"x{s}x"
    )
    gallery = sorted(data.draw(st.sets(name, min_size=n_gallery, max_size=n_gallery)))
    queries = [f"q{i}" for i in range(n_queries)]
    value = st.floats(width=32, min_value=-(2.0**99), max_value=2.0**99)
    rows = st.lists(value, min_size=n_gallery, max_size=n_gallery)
    scores = torch.tensor(data.draw(st.lists(rows, min_size=n_queries, max_size=n_queries)))
    score_file = ScoreFile(scores, queries, gallery)
    for form in score_export.FORMATS:
        out = folder / {"bare": "s.pt", "pt": "s.pt"}.get(form, f"s.{form}")
        written = score_export.export(score_file, form, out)
        first = [path.read_bytes() for path in written]
        assert first == [p.read_bytes() for p in score_export.export(score_file, form, out)]
        ids = {} if len(written) == 1 else {
            "query_ids": read_query_ids(written[1]), "gallery_ids": read_gallery_ids(written[2]),
        }  # fmt: skip
        found = load_scores(out, **(ids or {"gallery_ids": gallery}))
        assert (found.query_ids, found.gallery_ids) == (queries, gallery)
        if form != "trec":
            assert torch.equal(found.scores, scores)
        assert ranked_names(found.scores, gallery, 9) == ranked_names(scores, gallery, 9)


def test_partial_scores_go_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = {"q1": {"a": 1.0, "c": 0.5}, "q2": {"b": 2.0}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    for form in ("trec", "ranx", "rankings"):
        out = tmp_path / f"out.{form}"
        main(["export", str(tmp_path / "run.json"), "--format", form, "--out", str(out)])
        again = load_scores(out)
        assert again.listed == {"q1": 2, "q2": 1}
        assert torch.equal(again.scores, load_scores(tmp_path / "run.json").scores)
    assert (tmp_path / "out.trec").read_text().splitlines()[-1] == "q2 Q0 b 1 2 pab"
    main(
        ["export", str(tmp_path / "run.json"), "--format", "csv", "--out", str(tmp_path / "o.tsv")]
    )
    assert (tmp_path / "o.tsv").read_text().startswith("query\ta\tb\tc\nq1\t1\t0.49999")
    assert "images that were not listed are written" in capsys.readouterr().err
    (tmp_path / "order.json").write_text('{"q1": ["c", "a"]}')
    main(["export", str(tmp_path / "order.json"), "--format", "rankings", "--out",
          str(tmp_path / "o.jsonl")])  # fmt: skip
    assert (
        tmp_path / "o.jsonl"
    ).read_text() == '{"query_index": "q1", "topk_gallery": ["c", "a"]}\n'


def test_how_many_images_are_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gallery = [f"g{i:04}" for i in range(1001)]
    save_scores(tmp_path / "s.pt", ScoreFile(torch.rand(1, 1001), ["q"], gallery))
    words = ["export", str(tmp_path / "s.pt"), "--format", "trec", "--out", str(tmp_path / "o.run")]
    for more, count in (([], 1000), (["--top_k", "3"], 3), (["--top_k", "2000"], 1001)):
        main([*words, *more])
        assert len((tmp_path / "o.run").read_text().splitlines()) == count
    assert capsys.readouterr().err.count("holds the first 1000 images of each query") == 1
    for flags, message in (
        (["--format", "csv", "--top_k", "3"], "--top_k: goes with --format trec, ranx, rankings"),
        (["--format", "ranx", "--top_k", "0"], "--top_k: must be at least 1"),
    ):
        with pytest.raises(InputError, match=message):
            main(["export", str(tmp_path / "s.pt"), *flags, "--out", str(tmp_path / "x")])
    with pytest.raises(InputError, match="--out: expected the file to write"):
        main(["export", str(tmp_path / "s.pt"), "--format", "csv"])
    with pytest.raises(InputError, match="would overwrite"):
        main(
            ["export", str(tmp_path / "s.pt"), "--format", "bare", "--out", str(tmp_path / "s.pt")]
        )
    save_scores(tmp_path / "s.pt", ScoreFile(torch.rand(1, 1), ["q"], ["two words"]))
    with pytest.raises(InputError, match=r"o\.run: expected ids without blanks, found 'two words'"):
        main(words)


# ----------------------------------------------------------------------------- order does not count


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_rows_and_columns_in_any_order_give_the_same_file(
    data: st.DataObject, tmp_path_factory: Any
) -> None:
    folder = tmp_path_factory.mktemp("order")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    scores = torch.randint(0, 5, (3, 5), generator=generator).float()
    queries, gallery = ["q1", "q2", "q3"], ["a", "b", "c", "d", "e"]
    rows = data.draw(st.permutations(range(3)))
    columns = data.draw(st.permutations(range(5)))
    moved = scores[list(rows)][:, list(columns)]
    ids = [queries[i] for i in rows], [gallery[i] for i in columns]
    ending = data.draw(st.sampled_from(["", ".jpg", ".PNG"]))
    names = [name + ending for name in ids[1]]
    form = data.draw(st.sampled_from(["pt", "npz", "csv", "json"]))
    path = folder / f"s.{form}"
    if form == "pt":
        torch.save({"scores": moved, "query_ids": ids[0], "gallery_ids": names}, path)
    elif form == "npz":
        np.savez(path, scores=moved.numpy(), query_ids=ids[0], gallery_ids=names)
    elif form == "csv":
        lines = [",".join(["", *names])]
        lines += [
            ",".join([q, *map(str, row)]) for q, row in zip(ids[0], moved.tolist(), strict=True)
        ]
        path.write_text("\n".join(lines))
    else:
        run = {
            q: dict(zip(names, row, strict=True))
            for q, row in zip(ids[0], moved.tolist(), strict=True)
        }
        path.write_text(json.dumps(run))
    found = load_scores(path)
    assert found.gallery_ids == gallery
    order = [found.query_ids.index(query) for query in queries]
    assert torch.equal(found.scores[order], scores)


# -------------------------------------------------------------------------------------- answer.zip


def test_answer_zip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_scores(tmp_path / "s.pt", ScoreFile(SCORES, **IDS))
    for name in ("answer.txt", "answer.zip"):
        fuse(["--beit3_score", str(tmp_path / "s.pt"), "--output_file", str(tmp_path / name)])
    text = (tmp_path / "answer.txt").read_bytes()
    with zipfile.ZipFile(tmp_path / "answer.zip") as archive:
        assert archive.namelist() == ["answer.txt"]
        assert archive.read("answer.txt") == text
    again = tmp_path / "again.zip"
    fuse(["--beit3_score", str(tmp_path / "s.pt"), "--output_file", str(again)])
    assert again.read_bytes() == (tmp_path / "answer.zip").read_bytes()
    assert not list(tmp_path.glob(".*"))

    rows = [{"image": f"test/{n}.jpg", "image_id": n, "caption": [n]} for n in "abc"]
    labelled = tmp_path / "annotation/labels.json"
    labelled.parent.mkdir()
    labelled.write_text("".join(json.dumps(row) + "\n" for row in rows[:1]))
    (tmp_path / "one.txt").write_text("a\n")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.write(tmp_path / "one.txt", "submission/list.txt")
        archive.writestr("__MACOSX/submission/._list.txt", "")
    capsys.readouterr()
    evaluate(["--predictions", str(tmp_path / "other.zip"), "--annotation", str(labelled)])
    said = capsys.readouterr()
    assert said.out.splitlines()[1].split()[2] == "100.00"
    assert "read its 'submission/list.txt' as answer.txt" in said.err


@pytest.mark.parametrize("members", [[], ["a.txt", "b.txt"], ["a.csv"]])
def test_zips_that_hold_no_list(tmp_path: Path, members: list[str]) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in members:
            archive.writestr(name, "a b\n")
    with pytest.raises(InputError, match=r"x\.zip: expected a score file"):
        read_form(tmp_path / "x.zip")


def test_a_name_with_a_blank_leaves_no_zip(tmp_path: Path) -> None:
    save_scores(tmp_path / "s.pt", ScoreFile(SCORES, ["q1", "q2"], ["a", "b", "c d"]))
    with pytest.raises(InputError, match="'c d' cannot be written"):
        fuse(["--beit3_score", str(tmp_path / "s.pt"), "--output_file", str(tmp_path / "x.zip")])
    assert [path.name for path in tmp_path.iterdir()] == ["s.pt"]


def declaring(path: Path, size: int) -> Path:
    """Make a zip file's first member declare this unpacked size."""
    raw = bytearray(path.read_bytes())
    at = raw.index(b"PK\1\2") + 24  # in the archive's directory
    raw[at : at + 4] = struct.pack("<I", size)
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("name", ["answer.zip", "s.npz"])
def test_an_archive_far_larger_inside_is_not_unpacked(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "s.npz":
        np.savez_compressed(path, scores=SCORES.numpy())
    else:
        write_ranked_list(path, [["a", "b"], ["b", "a"]])
    before = path.read_bytes()
    with pytest.raises(
        InputError, match=r"expected a zip file .*, found 2\.0 GiB packed in \d+ bytes"
    ):
        read_form(declaring(path, 1 << 31))
    path.write_bytes(before)
    read_form(declaring(path, struct.unpack_from("<I", before, before.index(b"PK\1\2") + 24)[0]))


# ------------------------------------------------------------------------------------------ members


def member_words(folder: Path, *paths: Path) -> list[str]:
    words = ["--beit3_score", str(paths[0])]
    for number, path in enumerate(paths[1:]):
        words += ["--member", f"m{number}={path}:0.5"]
    return [*words, "--output_file", str(folder / "o.txt"), "--save_score", str(folder / "o.pt")]


def test_members_in_two_spellings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = ScoreFile(torch.rand(1, 3), ["q"], ["B", "C", "Caf\u00e9"])
    other = ScoreFile(torch.rand(1, 3), ["q"], ["B.jpg", "C.jpg", "Cafe\u0301.jpg"])
    save_scores(tmp_path / "1.pt", one)
    save_scores(tmp_path / "2.pt", other)
    fuse(member_words(tmp_path, tmp_path / "1.pt", tmp_path / "2.pt"))
    assert load_scores(tmp_path / "o.pt").gallery_ids == one.gallery_ids
    assert capsys.readouterr().err.count("1 names are matched to") == 1
    both = ScoreFile(torch.rand(1, 3), ["q"], ["B", "Cafe\u0301", "Caf\u00e9"])
    save_scores(tmp_path / "3.pt", both)  # two images, whose names look alike
    with pytest.raises(InputError, match=r"3\.pt: expected distinct names, found .* both mean"):
        fuse(member_words(tmp_path, tmp_path / "1.pt", tmp_path / "3.pt"))


def test_runs_alone_have_the_images_that_they_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text('{"q": {"x.jpg": 1, "y.jpg": 0.5}}')
    (tmp_path / "b.json").write_text('{"q": {"z": 3, "y": 1}}')
    fuse(member_words(tmp_path, tmp_path / "a.json", tmp_path / "b.json"))
    assert load_scores(tmp_path / "o.pt").gallery_ids == ["x", "y", "z"]
    assert "its gallery is taken to be the 3 images that it names" in capsys.readouterr().err
    main(["import", str(tmp_path / "a.json"), "--out", str(tmp_path / "a.pt")])
    whole = (tmp_path / "o.txt").read_text()
    fuse(member_words(tmp_path, tmp_path / "a.pt", tmp_path / "b.json"))
    assert (tmp_path / "o.txt").read_text() == whole
    (tmp_path / "g.txt").write_text("w\nx\ny\nz\n")
    words = [*member_words(tmp_path, tmp_path / "a.json"), "--gallery", str(tmp_path / "g.txt")]
    fuse(words)
    assert load_scores(tmp_path / "o.pt").gallery_ids == ["w", "x", "y", "z"]


def test_a_run_that_lacks_queries_is_not_fused(tmp_path: Path) -> None:
    save_scores(tmp_path / "s.pt", ScoreFile(SCORES, **IDS))
    (tmp_path / "run.json").write_text('{"q2": {"a": 1}}')
    with pytest.raises(InputError, match=r"run\.json: expected all 2 queries, .*'q1'; complete it"):
        fuse(member_words(tmp_path, tmp_path / "s.pt", tmp_path / "run.json"))
    (tmp_path / "run.json").write_text('{"q1": {"a": 1}, "q2": {"a": 1}, "q3": {"a": 1}}')
    with pytest.raises(InputError, match=r"run\.json, query_ids: .*not in .*: 'q3'"):
        fuse(member_words(tmp_path, tmp_path / "s.pt", tmp_path / "run.json"))
    (tmp_path / "run.json").write_text('{"q1": {"z": 1}, "q2": {"a": 1}}')
    with pytest.raises(InputError, match=r"run\.json, query 'q1': the name 'z' is not in the gall"):
        fuse(member_words(tmp_path, tmp_path / "s.pt", tmp_path / "run.json"))


def test_ranked_lists_read_as_names_only(tmp_path: Path) -> None:
    """Files of other forms must not pass as ranked lists of odd names."""
    from pab.ranking import read_ranked_list

    for text, form in (
        ('{"query_index": "q", "topk_gallery": ["a"]}\n', "JSON"),
        ('[\n {"query_index": "q"}]\n', "JSON"),
        ("q Q0 a 1 0.5 tag\nq Q0 b 2 0.4 tag\n", "a TREC run"),
    ):
        with pytest.raises(InputError, match=f"found {form}"):
            read_ranked_list(saved(tmp_path, text, "l.txt"))


def test_text_in_a_binary_file_is_no_list(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a score file"):
        load_scores(saved(tmp_path, "no scores\n", "x.pt"), query_ids=["q"])


@pytest.mark.parametrize("make", [io.BytesIO], ids=["old format"])
def test_files_of_old_torch(tmp_path: Path, make: Callable[[], io.BytesIO]) -> None:
    stream = make()
    torch.save({"sims": SCORES}, stream, _use_new_zipfile_serialization=False)
    assert torch.equal(read(saved(tmp_path, stream.getvalue(), "old.pt")).scores, SCORES)
