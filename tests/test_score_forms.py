"""Forms of scores: unambiguous files are read in any form; all others raise an error."""

from __future__ import annotations

import json
import os
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pab.core.errors import InputError
from pab.formats import export as score_export
from pab.formats import tables as score_tables
from pab.formats.contents import Listing
from pab.formats.forms import read_form
from pab.ranking import ranked_names, write_ranked_list
from pab.scores import ScoreFile, load_scores
from tests.scores import IDS, INF, NAN, SCORES, read, saved

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
        (torch.full((2, 3), -INF), "expected finite scores, found only -inf"),
        ({"sims": np.array([[object()] * 3] * 2)}, "expected a score file"),
    ],
)
def test_ambiguous_torch_files_are_refused(tmp_path: Path, content: Any, message: str) -> None:
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
    as_bytes = np.array([one.encode() for one in IDS["gallery_ids"]])  # NumPy dtype S
    np.savez(tmp_path / "bytes.npz", scores=SCORES.numpy(), query_ids=[7, 8], gallery_ids=as_bytes)
    assert load_scores(tmp_path / "bytes.npz").gallery_ids == IDS["gallery_ids"]
    np.savez(tmp_path / "half.npz", scores=SCORES.numpy(), query_ids=names["query_ids"])
    with pytest.raises(InputError, match=r"with ids of one axis only; convert"):
        load_scores(tmp_path / "half.npz")
    np.savez(tmp_path / "object.npz", scores=np.array([[None]]))
    with pytest.raises(InputError, match="found damaged ones or Python objects"):
        load_scores(tmp_path / "object.npz")


@pytest.mark.parametrize("name", ["s.npz", "answer.zip", "s.npy"])
def test_changed_bytes_raise_only_input_errors(tmp_path: Path, name: str) -> None:
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


def test_images_scored_minus_infinity_are_not_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = torch.tensor([[0.5, -INF, 1.0], [-INF, -INF, -INF]])
    found = read(saved(tmp_path, scores))
    below = torch.nextafter(torch.tensor(0.5), torch.tensor(-INF)).item()
    assert found.scores.tolist() == [[0.5, below, 1.0]]
    assert (found.query_ids, found.listed) == (["q1"], {"q1": 2})
    said = capsys.readouterr().err
    assert "scores of -inf: 4; their images count as not listed" in said
    assert "skipped queries without images: 1" in said


# ------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize(
    "text",
    [
        "query,a,b,c\nq1,0.5,0.25,1\nq2,2,-1,0\n",
        "\ufeff,c.jpg,b.jpg,a.jpg\r\nq1,1,.25,5e-1\r\nq2,0,-1,2\r\n",
        "a;b;c\nq1;0.5;0.25;1\n\nq2;2;-1;0",
        'id\ta\tb\tc\n"q1"\t0.5\t0.25\t1.0\nq2\t2\t-1\t0\n',
        "queries , b, c , a\nq1, 0.25, 1.0, 0.5\nq2, -1, 0, 2\n",
        "query,a,b,c\rq1,0.5,0.25,1\rq2,2,-1,0\r",
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


def test_numbers_separated_by_blanks_are_not_a_ranked_list(tmp_path: Path) -> None:
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
        ("query,a,b\nq1," + "0" * 140_000 + ",1\n", "line 2: expected a table, found field larger"),
        ("q" * 140_000 + ",a,b\nq1,0.5,1\n", "line 1: expected a table, found field larger"),
        ("0" * 140_000 + ",1\n", "line 1: expected a table, found field larger"),
        ("\xff", "expected a number|expected rows"),
    ],
)
def test_invalid_tables_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_scores(saved(tmp_path, text, "t.csv"))


def test_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow.parquet")  # an attribute of pyarrow only after this import
    arrow = pytest.importorskip("pyarrow")
    columns = {"c.jpg": [1.0, 0.0], "a": [0.5, 2.0], "b": [0.25, -1.0]}
    for name, ids in (("query", ["q1", "q2"]), ("anything", ["q1", "q2"]), ("qid", [1, 2])):
        arrow.parquet.write_table(arrow.table({**columns, name: ids}), tmp_path / "t.parquet")
        found = load_scores(tmp_path / "t.parquet")
        assert found.query_ids == [str(one) for one in ids]
        assert found.gallery_ids == IDS["gallery_ids"]
        assert torch.equal(found.scores, SCORES)
    arrow.parquet.write_table(arrow.table(columns), tmp_path / "t.parquet")
    with pytest.raises(InputError, match=r"with ids of one axis only; convert it .*--queries FILE"):
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
        "q1 Q0 c 1 1.0\nq1 Q0 a 2 0.5\nq2 Q0 a 1 2\nq2 Q0 c 2 0\n",
        "q1 0 c 1 1.0 tag\nq1 0 a 2 0.5\nq2 0 a 1 2 tag\nq2 0 c 2 0\n",
        "q1 Q0 c 1.0 1.0 tag\rq1 Q0 a - 0.5 tag\rq2 Q0 a -1 2 tag\rq2 Q0 c 2 0 tag\r",
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
    assert ("ignored field 'seconds' (records: 1)" in said) is ("seconds" in text)
    assert ("skipped queries without images: 1 (first: '9')" in said) is ('"9"' in text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"q1": {"a": 1}, "q1": {"a": 2}}', "expected every key once, found 'q1' twice"),
        ('{"q1": {"a": "high"}}', "query 'q1': expected a number for image 'a', found the string"),
        ('{"q1": {"a": true}}', "query 'q1': expected a number for image 'a', found the boolean"),
        ('{"q1": {"a": NaN}}', "query 'q1': expected finite scores, found nan for image 'a'"),
        ('{"q1": {"a": Infinity}}', "expected finite scores, found inf"),
        ('{"q1": {"a": 1e39}}', "expected finite scores, found 1e[+]39"),
        ('{"q1": {"a": -1e39}}', "expected finite scores, found -1e[+]39"),
        ('{"q1": {"a": 1' + 400 * "0" + "}}", "expected a finite score .*, found an integer"),
        ('{"q1": {"a": 1, "z": 2}}', "query 'q1': the name 'z' is not in the gallery"),
        ('{"q1": {"a.jpg": 1, "a.png": 2}}', "both match 'a' of the gallery"),
        ('{"q1": {"a": 1}, "q2": ["a"]}', "query 'q2': expected an object of images and scores"),
        ('{"q1": 5}', "query 'q1': expected an object of images and scores, found the number 5"),
        ('{"query_index": "q1", "topk_gallery": ["a", "a"]}', "once per query, found 'a' twice"),
        ('{"query_index": "q1", "topk_gallery": "a"}', "expected a list, found the string 'a'"),
        ('{"query_index": "q1", "caption": "a man"}', "'topk_gallery' or 'reranked', found 'query"),
        ('{"query_index": true, "topk_gallery": ["a"]}', "record 1: expected a list of strings"),
        ('[{"query_index": "q1", "topk_gallery": ["a"]}, 3]', "record 2: expected a JSON object"),
        ('{"query_index": 1, "topk_gallery": ["a"]}\n' * 2, "expected every query once"),
        (
            '{"query_index": 1, "topk_gallery": ["a"], "scores": [1, 2]}',
            r"one score per image \(1\), found 2",
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
def test_json_that_is_not_a_run_is_refused(tmp_path: Path, text: str, message: str) -> None:
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
def test_invalid_trec_lines_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_scores(saved(tmp_path, text, "r.trec"))


@pytest.mark.parametrize(
    "text",
    [
        "7 0 12 3 5\n", "3 0 1 2 4\n5 0 1 2 3\n", "7 0 12 3 5 9\n", "7 0 12 3 5 9\n12 7 0 3 5 9\n",
        "7 0 12 3 5 9 8\n0 7 12 3 5 9 8\n", "7 0 12 3 5 9 8\n3 0 12 7 5 9 8\n", "7 Q0 12 3\n",
    ],
)  # fmt: skip
def test_lists_of_numbers_are_not_trec_runs(tmp_path: Path, text: str) -> None:
    found = read_form(saved(tmp_path, text, "l.txt"))
    assert isinstance(found, Listing)
    assert found.names == [line.split() for line in text.splitlines()]


def test_scores_decide_the_order_of_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = load_scores(saved(tmp_path, "q Q0 a 1 0.1 t\nq Q0 b 2 0.9 t\n", "r.run"))
    assert ranked_names(found.scores, found.gallery_ids, 2) == [["b", "a"]]
    assert "the rank column contradicts the scores (queries: 1)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("high", "low"), [(0.9999999987, 0.9999999721), (1e-50, 1e-60), (-1e-60, -1e-50), (0.0, -1e-60)]
)
def test_scores_that_only_float32_makes_equal_keep_their_order(
    tmp_path: Path, high: float, low: float
) -> None:
    scores = {"bb": low, "zz": high, "aa": low, "mm": -2.0}
    reranked = [{"image": name, "score": score} for name, score in scores.items()]
    trec = "".join(f"q Q0 {name} 1 {score!r} t\n" for name, score in scores.items())
    for text in (json.dumps([{"query_index": "q", "reranked": reranked}]), trec):
        found = load_scores(saved(tmp_path, text, "r.json"), gallery_ids=[*scores, "a"])
        assert ranked_names(found.scores, found.gallery_ids, 5) == [["zz", "aa", "bb", "mm", "a"]]
        first = found.scores[0, found.gallery_ids.index("aa")]
        assert first == found.scores[0, found.gallery_ids.index("bb")]  # equal in the file, too
        assert found.scores[0, found.gallery_ids.index("zz")] == torch.tensor(high)
