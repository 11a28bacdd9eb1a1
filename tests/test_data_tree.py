"""PAB's file names: shards of every release, labelled test sets, values of --train_shards."""

from __future__ import annotations

from pathlib import Path

import pytest

from ensemble.protocol import load_protocol
from pab.core.config import config_from_args, load_config
from pab.core.errors import InputError
from pab.data.training_set import TrainingSet
from pab.data.tree import find_shards, labelled_test
from pab.training.config import TrainingConfig
from pab.training.data import training_shards, training_sources
from tests.conftest import write_lines


def make_shards(root: Path, kind: str, *numbers: int) -> None:
    for n in numbers:
        row = {"image": f"train/imgs_{n}/goal/0.jpg", "caption": "a", "image_id": f"{n}_0"}
        write_lines(root / f"annotation/{kind}_{n}.json", [row])


def notes(capsys: pytest.CaptureFixture[str]) -> list[str]:
    lines = capsys.readouterr().err.splitlines()
    return [line for line in lines if line.startswith("note: ")]


def settings(root: Path, *shards: str) -> TrainingConfig:
    words = ["--data_path", str(root), *(["--train_shards", *shards] if shards else [])]
    return config_from_args(TrainingConfig, words, prog="x")[0]


@pytest.mark.parametrize("kind", ["train/pair", "train/attr", "train/imgs", "train_attr/attr"])
def test_shards_of_every_release(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_shards(tmp_path, kind, 10, 2, 0)
    (tmp_path / f"annotation/{kind}_old.json").touch()
    expected = [tmp_path / f"annotation/{kind}_{n}.json" for n in (0, 2, 10)]
    assert find_shards(tmp_path) == training_shards(settings(tmp_path)) == expected
    assert TrainingSet.open(tmp_path).image_ids() == ["0_0", "2_0", "10_0"]
    assert notes(capsys) == []


def test_of_several_kinds_of_shards_one_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_shards(tmp_path, "train/pair", 0, 1)
    make_shards(tmp_path, "train_attr/attr", 0, 1)
    assert [path.name for path in find_shards(tmp_path)] == ["pair_0.json", "pair_1.json"]
    make_shards(tmp_path, "train/imgs", 0, 1, 2)
    found = [path.name for path in training_shards(settings(tmp_path))]
    assert found == ["imgs_0.json", "imgs_1.json", "imgs_2.json"]
    assert notes(capsys) == [
        f"note: {tmp_path}: reading annotation/train/pair_N.json (2 files), not "
        "annotation/train_attr/attr_N.json (2 files): all contain the same pairs",
        f"note: {tmp_path}: reading annotation/train/imgs_N.json (3 files), not "
        "annotation/train/pair_N.json (2 files), annotation/train_attr/attr_N.json (2 files): "
        "all contain the same pairs",
    ]


def test_no_shards(tmp_path: Path) -> None:
    (tmp_path / "annotation/train").mkdir(parents=True)
    with pytest.raises(InputError, match=r"annotation/train: expected training shards pair_N"):
        training_shards(settings(tmp_path))


@pytest.mark.parametrize(
    ("named", "numbers"),
    [
        (["0..7"], range(8)),
        (["3"], [3]),
        (["8..9", "1"], [8, 9, 1]),
        (["annotation/train/attr_1*.json", "10..11", "0"], [1, 10, 11, 0]),
    ],
)
def test_numbers_ranges_and_patterns(tmp_path: Path, named: list[str], numbers: list[int]) -> None:
    make_shards(tmp_path, "train/attr", *range(12))
    expected = [f"attr_{n}.json" for n in numbers]
    assert [path.name for path in training_shards(settings(tmp_path, *named))] == expected
    yaml = tmp_path / "a.yaml"
    for text in (f"[{', '.join(named)}]", named[0]):
        yaml.write_text(f"data_path: {tmp_path}\ntrain_shards: {text}\n")
        found = training_shards(load_config(TrainingConfig, yaml, {}))
        assert [path.name for path in found] == expected[: len(found)]
    assert settings(tmp_path, "none").train_shards is None


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        (["0..9"], "no such shards under .*: 3, 4, 5, 6, 7, 8, 9; use existing shards"),
        (["2..1"], r"no such shards under .*: 2\.\.1;"),
        (["7"], "no such shards under .*: 7;"),
        (["annotation/train/none_*.json"], "no file under"),
        (["/x"], "expected a pattern under"),
        ([""], "expected a pattern under"),
    ],
)
def test_missing_shards_are_refused(tmp_path: Path, named: list[str], expected: str) -> None:
    make_shards(tmp_path, "train/pair", 0, 1, 2)
    with pytest.raises(InputError, match=f"--train_shards: .*{expected}"):
        training_shards(settings(tmp_path, *named))
    with pytest.raises(InputError, match="expected patterns or shard numbers, found none"):
        training_shards(load_config(TrainingConfig, None, {"train_shards": ()} | {
            "data_path": str(tmp_path)}))  # fmt: skip


def test_shards_of_other_data_than_pab(tmp_path: Path) -> None:
    text = "filepath\ttitle\na.jpg\tx\n"
    for name in ("a.jpg", "a.txt"):  # a captioned image beside the table
        (tmp_path / name).write_text("other")
    table = tmp_path / "pairs [1].csv"
    table.write_text(text)
    assert training_sources(settings(tmp_path)) is None
    assert training_sources(settings(tmp_path, table.name)) == [table]
    with pytest.raises(InputError, match=r"--train_shards: contradicts --data_path .*, a table"):
        training_sources(settings(table, "0..7"))


def test_the_labelled_test_file_of_each_release(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "annotation/test"
    assert labelled_test(tmp_path) == folder / "pair.json"  # the default if neither exists
    write_lines(folder / "attr.json", [])
    assert labelled_test(tmp_path) == folder / "attr.json"
    protocol = load_protocol("pab").files(str(tmp_path))
    assert protocol["annotation"] == str(folder / "attr.json")
    assert load_protocol("ucc").files(str(tmp_path))["annotation"].endswith("ucc.json")
    assert len(notes(capsys)) == 1
    write_lines(folder / "pair.json", [])
    assert labelled_test(tmp_path) == folder / "pair.json"
    assert notes(capsys) == []
