"""Small unusual annotation files (`tests/data/annotations`): their content, notices and errors."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from pab.core.errors import InputError
from pab.data.annotations import read_retrieval
from pab.data.id_lists import read_query_order
from pab.data.training_index import SKIPPED
from pab.data.training_set import TrainingSet
from pab.evaluate import main as evaluate

CASES = Path(__file__).parent / "data" / "annotations"
CAPTIONS = [
    "An elderly man with a cane waits alone at a tram stop at dusk.",
    "A woman in a green coat slips on a wet pavement beside a parked van.",
    "A boy in a striped shirt tumbles from a scooter near a fountain.",
    "Two men in dark suits shake hands in front of a glass door.",
]
TESTED = {
    "test_numeric_ids.json", "query_numeric.json", "train_extra_fields.json",
    "train_caption_of_nothing_visible.json", "query_bom.json", "query_index_bom_crlf.txt",
    "query_text_change.json", "query_text_object.json", "query_array.json", "pairs.csv",
}  # fmt: skip


def test_every_file_has_its_test() -> None:
    assert {path.name for path in CASES.iterdir()} == TESTED


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("query_numeric.json", ["1", "2", "3", "4"]),
        ("query_bom.json", ["0000", "0001", "0002", "0003"]),
        ("query_array.json", ["0000", "0001", "0002", "0003"]),
        ("query_text_change.json", ["Q01", "Q11", "Q21", "Q31"]),
        ("query_text_object.json", ["Q01", "Q11", "Q21", "Q31"]),
    ],
)
def test_queries(name: str, ids: list[str]) -> None:
    found = read_retrieval(CASES / name)
    assert [query.query_id for query in found.queries] == ids
    assert [query.caption for query in found.queries] == CAPTIONS


def test_an_unused_field_is_reported_once(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        read_retrieval(CASES / "query_text_change.json")
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 1
    assert "unknown fields are ignored: change (4 lines)" in printed[0]


def test_a_query_order_with_a_byte_order_mark_and_windows_line_ends() -> None:
    assert read_query_order(CASES / "query_index_bom_crlf.txt") == ["Q21", "Q01", "Q31", "Q11"]


def test_numeric_ids_of_a_labelled_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotation = tmp_path / "annotation/test/pair.json"
    annotation.parent.mkdir(parents=True)
    shutil.copy(CASES / "test_numeric_ids.json", annotation)
    found = read_retrieval(annotation)
    assert found.gallery is not None
    assert [image.gallery_id for image in found.gallery] == ["1", "2", "3", "4"]
    queries = ["1#0", "1#1", "2#0", "3#0", "3#1", "4#0"]
    assert [query.query_id for query in found.queries] == queries
    (tmp_path / "list.txt").write_text("1\n1\n2\n3\n3\n4\n")
    evaluate(["--predictions", str(tmp_path / "list.txt"), "--annotation", str(annotation)])
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["all", "6", "100.00"]


def test_extra_fields_of_a_training_shard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = tmp_path / "annotation/train/pair_0.json"
    shard.parent.mkdir(parents=True)
    shutil.copy(CASES / "train_extra_fields.json", shard)
    pairs = TrainingSet.open(tmp_path)
    assert [pair.caption for pair in pairs] == CAPTIONS
    assert [pair.hard_i_id for pair in pairs] == ["8954", "8955", "8956", "8957"]
    assert {pair.scene for pair in pairs} == {pair.source_caption for pair in pairs} == {None}
    assert "unknown fields are ignored: camera (4 lines), quality" in capsys.readouterr().err


def test_a_caption_without_visible_characters(tmp_path: Path) -> None:
    shard = tmp_path / "annotation/train/pair_0.json"
    shard.parent.mkdir(parents=True)
    shutil.copy(CASES / "train_caption_of_nothing_visible.json", shard)
    with pytest.raises(InputError, match=r"pair_0.json, line 3: .*--skip_bad_lines"):
        TrainingSet.open(tmp_path)
    pairs = TrainingSet.open(tmp_path, skip_bad_lines=True)
    assert [pair.image_id for pair in pairs] == ["0_0", "0_1", "0_3"]
    pairs.write_skipped(tmp_path)
    assert "pair_0.json, line 3: field 'caption'" in (tmp_path / SKIPPED).read_text()


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A table in OpenCLIP's format, with images drawn for it."""
    (tmp_path / "photos").mkdir()
    for number in range(4):
        Image.new("RGB", (40, 60), (60 * number, 90, 30)).save(tmp_path / f"photos/{number}.jpg")
    return Path(shutil.copy(CASES / "pairs.csv", tmp_path))


def test_a_table_is_scored(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = read_retrieval(table)
    assert found.gallery is not None
    assert [image.gallery_id for image in found.gallery] == [f"photos/{n}" for n in range(4)]
    assert all(image.path.is_file() for image in found.gallery)
    assert [query.caption for query in found.queries] == CAPTIONS
    assert "pairs.csv: columns are separated by commas" in capsys.readouterr().err


def test_a_table_trains(table: Path) -> None:
    pairs = TrainingSet.open(table)
    assert [pair.caption for pair in pairs] == CAPTIONS
    assert all(pairs.image_path(pair).is_file() for pair in pairs)
    assert list(TrainingSet.open(table.parent, [table])) == list(pairs)
