"""Score files: round trips, variants that are read, and one-line errors for all others."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import pab
from pab.core.errors import InputError
from pab.core.tensor_files import read_tensors, release_pages, write_tensors
from pab.formats.score_file import float32_columns
from pab.scores import ScoreFile, align, load_scores, main, reorder, save_scores


@pytest.fixture
def scores() -> ScoreFile:
    generator = torch.Generator().manual_seed(0)
    return ScoreFile(
        torch.randn(3, 4, generator=generator),
        ["q2", "q1", "q3"],
        ["a", "b", "c", "d"],
        {"model": "test", "epochs": 4},
    )


def raw(score_file: ScoreFile, /, **changes: Any) -> dict[str, Any]:
    content = {
        "scores": score_file.scores,
        "query_ids": score_file.query_ids,
        "gallery_ids": score_file.gallery_ids,
        "meta": score_file.meta,
    }
    return {**content, **changes}


@pytest.mark.parametrize("mmap", [True, False])
def test_round_trip(scores: ScoreFile, tmp_path: Path, mmap: bool) -> None:
    path = tmp_path / "new" / "scores.pt"
    save_scores(path, scores)
    loaded = load_scores(path, mmap=mmap)
    assert torch.equal(loaded.scores, scores.scores)
    assert raw(loaded, scores=None) == raw(scores, scores=None)
    assert [p.name for p in path.parent.iterdir()] == ["scores.pt"]


def test_the_format_is_the_documented_one(scores: ScoreFile, tmp_path: Path) -> None:
    save_scores(tmp_path / "s.pt", scores)
    content = torch.load(tmp_path / "s.pt", weights_only=True, mmap=True)
    assert list(content) == ["scores", "query_ids", "gallery_ids", "meta"]
    assert content["scores"].dtype == torch.float32


def test_equal_contents_give_equal_bytes(scores: ScoreFile, tmp_path: Path) -> None:
    one = "".join(["q", "1"])  # equal to an id, not the same object
    save_scores(tmp_path / "a.pt", replace(scores, meta={"q1": one, "again": one}))
    save_scores(tmp_path / "b.pt", replace(scores, meta={"q1": "q1", "again": "".join("q1")}))
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc/self/smaps")
def test_released_pages_of_a_file_are_read_again(tmp_path: Path) -> None:
    matrix = torch.rand(512, 1024, generator=torch.Generator().manual_seed(0))
    write_tensors(tmp_path / "m.pt", matrix)
    mapped = read_tensors(tmp_path / "m.pt", "a matrix", mmap=True)
    assert torch.equal(mapped, matrix)
    before = resident("m.pt")
    release_pages(mapped)
    assert before >= matrix.nbytes > 100 * resident("m.pt")
    assert torch.equal(mapped, matrix)
    release_pages(matrix)  # kept, because it is not mapped from a file
    assert torch.equal(mapped, matrix)
    mapped[-1, -1] = 2.0
    release_pages(mapped)  # kept, because the file does not contain the change
    assert mapped[-1, -1] == 2.0


def resident(name: str) -> int:
    """Return the number of bytes of a mapped file that are in memory."""
    mappings = Path("/proc/self/smaps").read_text().split(name)[1:]
    return sum(int(one.split("Rss:")[1].split()[0]) * 1024 for one in mappings)


def test_slice_of_a_large_matrix_is_saved_alone(tmp_path: Path) -> None:
    large = torch.zeros(2000, 1000)
    save_scores(tmp_path / "s.pt", ScoreFile(large[:1, :], ["q"], [f"{i:04}" for i in range(1000)]))
    assert (tmp_path / "s.pt").stat().st_size < 100_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": torch.zeros(12)}, "scores: expected a matrix [queries, gallery] of floating"),
        ({"scores": torch.zeros(3, 0)}, "scores: expected scores of at least one query and one"),
        ({"scores": torch.zeros(3, 4).long()}, "floating-point scores, found int64 [3, 4]"),
        ({"scores": torch.zeros(3, 4).to_sparse()}, "found float32 [3, 4], sparse"),
        ({"scores": [[0.0] * 4] * 3}, "scores: expected a tensor or a NumPy array, found list"),
        ({"query_ids": ["q1", "q2"]}, "query_ids: expected one id per row of scores (3)"),
        ({"query_ids": ["q1", "q2", "q1"]}, "query_ids: expected distinct ids, found 'q1' twice"),
        ({"query_ids": ["q1", "q2", 3.5]}, "query_ids: expected a list of strings"),
        ({"query_ids": ["q1", "q2", True]}, "query_ids: expected a list of strings"),
        ({"query_ids": "q1 q2 q3"}, "query_ids: expected a list of strings"),
        ({"query_ids": ["q1", "q2", "a\nb"]}, "query_ids: expected ids on one line"),
        ({"gallery_ids": ["a", "b", "c"]}, "gallery_ids: expected one id per column of scores (4)"),
        ({"gallery_ids": []}, "expected one id per column of scores (4), found 0"),
        ({"meta": None}, "meta: expected a dict"),
        ({"meta": {"listed": {"q1": 2}}}, "'listed': expected a number of images from 1 to 4"),
    ],
)
def test_broken_files_are_refused(
    scores: ScoreFile, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    torch.save(raw(scores, **changes), tmp_path / "s.pt")
    with pytest.raises(InputError) as error:
        load_scores(tmp_path / "s.pt")
    assert str(tmp_path / "s.pt") in str(error.value)
    assert message in str(error.value)


def test_unambiguous_variants_are_read(
    scores: ScoreFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ids in any order, numbers as ids, other dtypes, more keys, a tensor that requires grad."""
    path = tmp_path / "s.pt"
    order = [2, 0, 3, 1]
    content = raw(
        scores,
        scores=scores.scores[:, order].double().requires_grad_(),
        query_ids=(2, 1.0, "q3"),
        gallery_ids=[scores.gallery_ids[i] for i in order],
        more=1,
    )
    torch.save(content, path)
    found = load_scores(path)
    assert torch.equal(found.scores, scores.scores)
    assert not found.scores.requires_grad
    assert found.query_ids == ["2", "1", "q3"]
    assert (found.gallery_ids, found.meta) == (scores.gallery_ids, scores.meta)
    said = capsys.readouterr().err
    assert "columns are sorted by id" in said
    assert "ignored keys: 'more'" in said


def test_sorted_float32_columns_stay_on_disk(scores: ScoreFile, tmp_path: Path) -> None:
    save_scores(tmp_path / "s.pt", scores)
    mapped = read_tensors(tmp_path / "s.pt", "a score file", mmap=True)["scores"]
    assert float32_columns(mapped, [0, 1, 2, 3]) is mapped
    assert float32_columns(mapped, [1, 0, 2, 3]).tolist() == scores.scores[:, [1, 0, 2, 3]].tolist()


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc/self/smaps")
def test_sorting_a_mapped_matrix_keeps_one_copy_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pab.formats.score_file.BLOCK_ELEMENTS", 1 << 14)
    matrix = torch.rand(1024, 1024, generator=torch.Generator().manual_seed(0))
    names = [f"g{1023 - i:04}" for i in range(1024)]
    torch.save(raw(ScoreFile(matrix, [f"q{i}" for i in range(1024)], names)), tmp_path / "m.pt")
    found = load_scores(tmp_path / "m.pt")
    assert torch.equal(found.scores, matrix.flip(1))
    assert resident("m.pt") < matrix.nbytes / 4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_scores_are_neither_saved_nor_loaded(
    scores: ScoreFile, tmp_path: Path, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pab.formats.score_file.BLOCK_ELEMENTS", 4)  # one row per block
    matrix = scores.scores.clone()
    matrix[2, 1] = value
    with pytest.raises(InputError, match=r"query 'q3': expected finite scores.*image 'b'"):
        save_scores(tmp_path / "s.pt", replace(scores, scores=matrix))
    assert not list(tmp_path.iterdir())
    torch.save(raw(scores, scores=matrix), tmp_path / "s.pt")
    with pytest.raises(InputError, match="query 'q3'"):
        load_scores(tmp_path / "s.pt")


def test_changes_in_place_are_noticed(scores: ScoreFile, tmp_path: Path) -> None:
    save_scores(tmp_path / "s.pt", scores)
    found = load_scores(tmp_path / "s.pt")
    low, high = found.bounds
    found.scores.mul_(10)
    assert found.bounds == (pytest.approx(10 * low), pytest.approx(10 * high))
    found.scores[0, 0] = float("nan")
    for use in (lambda: save_scores(tmp_path / "x.pt", found), lambda: pab.rank(found),
                lambda: pab.fuse([found, scores], [0.5])):  # fmt: skip
        with pytest.raises(InputError, match="query 'q2': expected finite scores, found nan"):
            use()
    with torch.inference_mode():  # such tensors do not count their changes
        untracked = replace(scores, scores=scores.scores.clone())
        assert untracked.bounds == (low, high)
        untracked.scores.mul_(10)
    assert untracked.bounds == (pytest.approx(10 * low), pytest.approx(10 * high))


def test_the_error_for_a_bare_tensor_names_the_import_command(tmp_path: Path) -> None:
    path = tmp_path / "bare score.pt"
    torch.save(torch.zeros(2, 2), path)
    with pytest.raises(InputError) as error:
        load_scores(path)
    assert f"python -m pab.scores import '{path}' --queries FILE --gallery FILE --out FILE" in str(
        error.value
    )


class _Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_malicious_pickle_is_not_run(scores: ScoreFile, tmp_path: Path) -> None:
    torch.save(raw(scores, meta={"x": _Malicious(tmp_path / "run")}), tmp_path / "s.pt")
    with pytest.raises(InputError, match=r"the Python object \w+\.mkdir; it was not loaded") as e:
        load_scores(tmp_path / "s.pt")
    assert "\n" not in str(e.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"\x80\x02garbage", b"PK\x03\x04garbage", pickle.dumps({"a": 1}, protocol=4)],
)
def test_foreign_files_are_refused_without_a_warning(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "s.pt").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match=r"expected a score file"):
            load_scores(tmp_path / "s.pt")


def test_truncated_file(scores: ScoreFile, tmp_path: Path) -> None:
    save_scores(tmp_path / "s.pt", scores)
    content = (tmp_path / "s.pt").read_bytes()
    (tmp_path / "s.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"expected a score file written by torch\.save"):
        load_scores(tmp_path / "s.pt")


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found no such file"):
        load_scores(tmp_path / "none.pt")
    with pytest.raises(InputError, match="found a directory"):
        load_scores(tmp_path)


def test_reorder_moves_rows_with_their_ids(scores: ScoreFile) -> None:
    moved = reorder(scores, ["q1", "q2", "q3"])
    assert torch.equal(moved.scores, scores.scores[[1, 0, 2]])
    assert moved.query_ids == ["q1", "q2", "q3"]
    assert reorder(scores, scores.query_ids) is scores


def test_reorder_names_what_does_not_match(scores: ScoreFile) -> None:
    with pytest.raises(InputError) as error:
        reorder(scores, ["q1", "q9", "q1"], where="x.pt")
    message = str(error.value)
    assert "x.pt" in message
    assert "that are missing: 'q9'" in message
    assert "that are not in the requested order: 'q2', 'q3'" in message
    assert "duplicate ids of the requested order: 'q1'" in message


def test_align(scores: ScoreFile) -> None:
    other = replace(scores, scores=scores.scores[[2, 1, 0]], query_ids=["q3", "q1", "q2"])
    assert torch.equal(align(other, scores).scores, scores.scores)
    with pytest.raises(InputError, match=r"gallery_ids: .*missing: 'd'.*not in .*: 'e'"):
        align(replace(scores, gallery_ids=["a", "b", "c", "e"]), scores)


def test_an_export_does_not_overwrite_its_source(tmp_path: Path) -> None:
    path = tmp_path / "s.pt"
    save_scores(path, ScoreFile(torch.eye(2), ["q1", "q2"], ["a", "b"], {"model": "x"}))
    before = path.read_bytes()
    with pytest.raises(InputError, match="would overwrite"):
        main(["export", str(path), "--bare", "--out", str(tmp_path / "s")])
    assert path.read_bytes() == before
    assert {found.name for found in tmp_path.iterdir()} == {"s.pt"}


def test_import_sorts_the_gallery_and_export_writes_a_bare_tensor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], dtype=torch.float64)
    torch.save(bare, tmp_path / "bare.pt")
    (tmp_path / "q.txt").write_text("q1\nq2\n")
    (tmp_path / "g.txt").write_text("c\na\nb\n")
    lists = ["--queries", str(tmp_path / "q.txt"), "--gallery", str(tmp_path / "g.txt")]
    main(["import", str(tmp_path / "bare.pt"), *lists, "--out", str(tmp_path / "s.pt")])
    loaded = load_scores(tmp_path / "s.pt")
    assert loaded.gallery_ids == ["a", "b", "c"]
    assert loaded.scores.tolist() == [[2.0, 3.0, 1.0], [5.0, 6.0, 4.0]]
    assert loaded.meta["dtype"] == "float64"
    capsys.readouterr()

    main(["show", str(tmp_path / "s.pt")])
    shown = capsys.readouterr().out
    assert "2 queries x 3 images" in shown
    assert 'model: "imported"' in shown

    main(["export", str(tmp_path / "s.pt"), "--bare", "--out", str(tmp_path / "out")])
    exported = torch.load(tmp_path / "out.pt", weights_only=True)
    assert torch.equal(exported, loaded.scores)
    assert (tmp_path / "out.queries.txt").read_text() == "q1\nq2\n"
    assert (tmp_path / "out.gallery.txt").read_text() == "a\nb\nc\n"


def test_import_refuses_lists_that_do_not_fit(tmp_path: Path, scores: ScoreFile) -> None:
    torch.save(torch.zeros(2, 3), tmp_path / "bare.pt")
    save_scores(tmp_path / "with_ids.pt", scores)
    (tmp_path / "two.txt").write_text("x\ny\n")
    two = str(tmp_path / "two.txt")
    out = ["--out", str(tmp_path / "s.pt")]
    with pytest.raises(
        InputError, match=r"--gallery: expected one id per column of a bare tensor \(3\), found 2"
    ):
        main(["import", str(tmp_path / "bare.pt"), "--queries", two, "--gallery", two, *out])
    (tmp_path / "three.txt").write_text("x\ny\nz\n")
    turned = ["--queries", str(tmp_path / "three.txt"), "--gallery", two]
    with pytest.raises(
        InputError, match=r"expected a matrix \[3, 2\].*found \[2, 3\]; .*transpose it"
    ):
        main(["import", str(tmp_path / "bare.pt"), *turned, *out])
    for given, asked in (([], "--queries FILE and --gallery FILE"), (turned[:2], "--gallery FILE")):
        with pytest.raises(InputError, match=f"pass {asked}, or convert"):
            main(["import", str(tmp_path / "bare.pt"), *given, *out])
    assert not (tmp_path / "s.pt").exists()


def test_ids_in_the_file_take_precedence(
    tmp_path: Path, scores: ScoreFile, capsys: pytest.CaptureFixture[str]
) -> None:
    save_scores(tmp_path / "with_ids.pt", scores)
    (tmp_path / "two.txt").write_text("q1\nother\n")
    given = ["--queries", str(tmp_path / "two.txt"), "--out", str(tmp_path / "s.pt")]
    main(["import", str(tmp_path / "with_ids.pt"), *given])
    assert load_scores(tmp_path / "s.pt").query_ids == scores.query_ids
    assert (
        "its own ids are used, although they differ from those of --queries; it lacks 1 of those, "
        "such as 'other'" in (capsys.readouterr().err)
    )


def test_a_failed_command_exits_with_2_and_one_line(tmp_path: Path) -> None:
    torch.save(torch.zeros(2, 2), tmp_path / "bare.pt")
    done = subprocess.run(
        [sys.executable, "-m", "pab.scores", "export", str(tmp_path / "bare.pt"), "--bare"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "python -m pab.scores import" in done.stderr
