"""The training set on disk: its pairs, its index, its errors."""

from __future__ import annotations

import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from pab.core.errors import InputError
from pab.core.notices import forget_notices
from pab.data import training_index_writer
from pab.data.annotations import read_retrieval, retrieval_of_pairs
from pab.data.splits import write_split
from pab.data.training_index import SKIPPED
from pab.data.training_set import TrainingSet
from pab.data.tree import find_shards
from tests.train_pairs import read_train_pairs


def pair(shard: int, k: int, **more: Any) -> dict[str, Any]:
    fields = {"image": f"train/imgs_{shard}/goal/{k}.jpg", "caption": f"caption {shard} é {k}"}
    return {**fields, "image_id": f"{shard}_{k}", "source_id": f"{k // 2}_{k % 2}", **more}


def write_shard(root: Path, shard: int, *pairs: dict[str, Any]) -> Path:
    folder = root / "annotation" / "train"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"pair_{shard}.json"
    path.write_text("".join(json.dumps(p, ensure_ascii=False) + "\n" for p in pairs), "utf-8")
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for shard in (0, 2, 10):
        write_shard(tmp_path, shard, *(pair(shard, k) for k in range(4)))
    return tmp_path


def ids(pairs: TrainingSet) -> list[str]:
    return [p.image_id for p in pairs]


def test_pairs_come_in_numeric_order_of_shards(root: Path) -> None:
    pairs = TrainingSet.open(root)
    assert len(pairs) == 12
    expected = [p for shard in find_shards(root) for p in read_train_pairs(shard)]
    assert list(pairs) == expected
    assert ids(pairs) == pairs.image_ids() == [f"{s}_{k}" for s in (0, 2, 10) for k in range(4)]
    assert pairs[-1].image_id == "10_3"
    with pytest.raises(IndexError):
        pairs[12]
    chosen = [root / "annotation/train/pair_10.json", root / "annotation/train/pair_2.json"]
    assert ids(TrainingSet.open(root, chosen))[0] == "2_0"


def test_blank_lines_and_a_missing_last_newline(root: Path) -> None:
    path = root / "annotation" / "train" / "pair_2.json"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n\n").rstrip())
    assert len(ids(TrainingSet.open(root))) == 12
    assert TrainingSet.open(root)[7].image_id == "2_3"


def test_videos_join_pairs_of_one_source_only(tmp_path: Path) -> None:
    no_source = {**pair(0, 0), "source_id": None}
    write_shard(tmp_path, 0, pair(0, 1), no_source, pair(0, 2), {**no_source, "image_id": "0"})
    write_shard(tmp_path, 1, pair(1, 1), pair(1, 2, source_id="a_b_1"), pair(1, 3, source_id="a_2"))
    # The video is x in a source_id x_y: 0, none, 1, none (the same image), 0, a_b, a.
    assert TrainingSet.open(tmp_path).videos.tolist() == [0, 1, 2, 1, 0, 3, 4]


def test_image_files(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, pair(0, 0), pair(0, 1, image="train/imgs_0/wentwrong/1.jpg"))
    place = tmp_path / "train" / "imgs_0" / "wentrong"
    place.mkdir(parents=True)
    (place / "1.jpg").touch()
    pairs = TrainingSet.open(tmp_path)
    assert pairs.image_path(pairs[0]) == tmp_path / "train/imgs_0/goal/0.jpg"
    assert pairs.image_path(pairs[1]) == place / "1.jpg"


def test_the_index_is_built_once_and_rebuilt_when_a_shard_changes(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    TrainingSet.open(root)
    checks = []
    check = training_index_writer._check_lines
    monkeypatch.setattr(
        training_index_writer, "_check_lines", lambda *args: checks.append(args) or check(*args)
    )
    TrainingSet.open(root)
    assert not checks
    write_shard(root, 2, *(pair(2, k, caption="new") for k in range(5)))
    assert TrainingSet.open(root)[4].caption == "new"
    assert len(checks) == 1
    assert not list((root / ".cache").glob("*.tmp"))


def test_a_shard_that_changes_while_open_is_noticed(root: Path) -> None:
    pairs = TrainingSet.open(root)
    path = write_shard(root, 2, *(pair(2, k, caption="other words") for k in range(4)))
    with pytest.raises(InputError, match=r"pair_2.json: changed since it was indexed"):
        pairs[5]
    path.unlink()
    with pytest.raises(InputError, match=r"pair_2.json: .*no such file"):
        pairs[5]
    first = root / "annotation/train/pair_0.json"
    assert pairs[0].image_id == "0_0"
    os.truncate(first, 10)  # while the file is open
    with pytest.raises(InputError, match=r"pair_0.json: changed since it was indexed"):
        pairs[1]


def test_copies_in_pickles_and_workers_read_the_same_pairs(root: Path) -> None:
    pairs = TrainingSet.open(root)
    assert pairs[0].image_id == "0_0"  # leaves the shard open
    again = pickle.loads(pickle.dumps(pairs))  # noqa: S301
    assert ids(again) == ids(pairs)
    assert len(pickle.dumps(pairs)) < 2000
    loader: DataLoader = DataLoader(pairs, batch_size=5, num_workers=2, collate_fn=list)  # type: ignore[arg-type]
    assert [p for batch in loader for p in batch] == list(pairs)


def test_a_cache_dir_elsewhere_leaves_the_data_unchanged(root: Path, tmp_path_factory: Any) -> None:
    elsewhere = tmp_path_factory.mktemp("cache") / "deeper"
    assert len(TrainingSet.open(root, cache_dir=elsewhere)) == 12
    assert not (root / ".cache").exists()


def test_a_cache_folder_that_is_not_writable_is_refused(root: Path) -> None:
    (root / ".cache").write_text("in the way")
    with pytest.raises(InputError, match="--cache_dir"):
        TrainingSet.open(root)


def test_several_processes_may_index_at_once(root: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(lambda _: len(TrainingSet.open(root)), range(4)))
    assert opened == [12] * 4
    assert len(list((root / ".cache").iterdir())) == 1


@pytest.mark.parametrize("damage", [b"", b"not numpy"])
def test_a_damaged_index_is_named(root: Path, damage: bytes) -> None:
    index = TrainingSet.open(root)._index
    (index / "lines.npy").write_bytes(damage)
    with pytest.raises(InputError, match=r"the index is damaged: .*remove this folder"):
        TrainingSet.open(root)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (pair(2, 9, caption=""), "pair_2.json, line 5: field 'caption': .*an empty string"),
        (pair(2, 9, caption=3), "pair_2.json, line 5: field 'caption': .*the number 3"),
        (pair(2, 9, image="../../x"), "pair_2.json, line 5: field 'image': .*leaves it"),
        (pair(2, 9, caption="\u200b"), "pair_2.json, line 5: .*a visible character"),
        (pair(0, 1), "pair_2.json, line 5: .*'0_1' already in pair_0.json, line 2"),
    ],
)
def test_bad_lines_are_named_at_every_opening(
    root: Path, bad: dict[str, Any], message: str
) -> None:
    write_shard(root, 2, *(pair(2, k) for k in range(4)), bad)
    for _ in range(2):
        with pytest.raises(InputError, match=message + ".*; fix bad lines, or skip them with"):
            TrainingSet.open(root)


def test_bad_lines_are_skipped_on_request(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = TrainingSet.open(root)
    expected = ids(whole)
    whole.write_skipped(tmp_path)
    assert not (tmp_path / SKIPPED).exists()
    bad = [pair(2, 9, caption=""), pair(2, 8, image="/x.jpg"), pair(0, 1), pair(2, 7, caption=" ")]
    write_shard(root, 2, *(pair(2, k) for k in range(4)), *bad)
    path = root / "annotation/train/pair_2.json"
    path.write_bytes(path.read_bytes() + b"{\n")
    with pytest.raises(InputError, match=r"found 5 bad ones \(2 x field 'caption': .*line 9: "):
        TrainingSet.open(root)
    for _ in range(2):
        forget_notices()
        capsys.readouterr()
        pairs = TrainingSet.open(root, skip_bad_lines=True)
        assert pairs.skipped == 5
        assert ids(pairs) == expected
        said = capsys.readouterr().err
        assert "skipped 5 bad lines: 2 x field 'caption': expected a non-empty string" in said
        assert "checking and indexing" not in said
    pairs.write_skipped(tmp_path / "out")
    listed = (tmp_path / "out" / SKIPPED).read_text().splitlines()
    assert [line.partition("pair_2.json, ")[2].partition(":")[0] for line in listed] == [
        f"line {n}" for n in range(5, 10)
    ]
    assert pairs.fingerprint() == whole.fingerprint()
    write_shard(root, 2, *(pair(2, k) for k in range(3)), pair(2, 3, caption=""))
    fewer = TrainingSet.open(root, skip_bad_lines=True)
    assert len(fewer) == 11
    assert fewer.fingerprint() != whole.fingerprint()


def test_a_set_of_bad_lines_only_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, *(pair(0, k, caption="") for k in range(3)))
    with pytest.raises(InputError, match=r"pair_0.json: .*found none: 3 bad lines \(3 x field"):
        TrainingSet.open(tmp_path, skip_bad_lines=True)


def test_ignored_fields_are_reported_at_every_opening(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shard(root, 2, *(pair(2, k, camera="c", scene="", hard_i_id=k) for k in range(4)))
    for _ in range(2):
        forget_notices()
        pairs = TrainingSet.open(root)
        said = capsys.readouterr().err
        assert "unknown fields are ignored: camera (4 lines)" in said
        assert "treated as absent: scene empty (4 lines)" in said
    assert [pairs[n].hard_i_id for n in range(4, 8)] == ["0", "1", "2", "3"]


FORMS = {
    "byte-order mark": lambda rows: b"\xef\xbb\xbf" + json_lines(rows).encode(),
    "UTF-16": lambda rows: json_lines(rows).encode("utf-16"),
    "array": lambda rows: json.dumps(rows, ensure_ascii=False).encode(),
    "array, one per line": lambda rows: json.dumps(rows, indent=0).encode(),
    "indented array with byte-order mark": lambda rows: (
        b"\xef\xbb\xbf" + json.dumps(rows, indent=2, ensure_ascii=False).encode()
    ),
    "objects over several lines": lambda rows: "\r\n".join(
        json.dumps(row, indent=2, ensure_ascii=False) for row in rows
    ).encode(),
}


def json_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.mark.parametrize("ending", [".gif", ".TIFF", ".heic"])
def test_an_image_format_that_training_cannot_read_is_a_bad_line(root: Path, ending: str) -> None:
    write_shard(root, 2, pair(2, 0), pair(2, 1, image=f"train/x{ending}"))
    message = f"pair_2.json, line 2: field 'image': expected .* found {ending.lower()}"
    with pytest.raises(InputError, match=message):
        TrainingSet.open(root)
    assert TrainingSet.open(root, skip_bad_lines=True).skipped == 1


def test_a_readable_image_may_have_any_extension(root: Path) -> None:
    write_shard(root, 2, pair(2, 0), pair(2, 1, image="train/x.gif"))
    path = root / "train/x.gif"
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (8, 6)).save(path, format="JPEG")
    assert "train/x.gif" in [one.image for one in TrainingSet.open(root)]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_pairs(root: Path, form: str) -> None:
    expected = list(TrainingSet.open(root))
    path = root / "annotation/train/pair_2.json"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    path.write_bytes(FORMS[form](rows))
    pairs = TrainingSet.open(root)
    assert list(pairs) == expected
    copies = [p.name for p in pairs._index.glob("shard_*")]
    assert copies == (["shard_1.json"] if form == "UTF-16" else []), "only UTF-16 is copied"


def test_a_broken_array_is_named_by_its_own_file(root: Path) -> None:
    path = root / "annotation/train/pair_2.json"
    path.write_bytes('[{"image": "a.jpg"},\n{]'.encode("utf-16"))
    with pytest.raises(InputError, match=r"train/pair_2\.json, line 2: .*broken JSON"):
        TrainingSet.open(root, skip_bad_lines=True)
    assert not (root / ".cache").exists()


def test_captions_of_one_image_share_its_identity(tmp_path: Path) -> None:
    one, other = {"image": "a.jpg", "caption": "x"}, {"image": "b.jpg", "caption": "y"}
    rows = [{**one, "image_id": "a#0"}, {**other, "image_id": "b#0"}, {**one, "image_id": "a#1"}]
    rows += [{**other, "image_id": "a#2"}, {**one, "image_id": "a"}]
    write_shard(tmp_path, 0, *rows)
    pairs = TrainingSet.open(tmp_path)
    assert [pairs.identity(n) for n in range(5)] == [0, 1, 0, 1, 0]
    assert pairs.videos.tolist() == [0, 1, 0, 1, 0]
    write_split(tmp_path / "out", pairs, np.array([1, 3, 4]), np.array([0, 2]))
    found = read_retrieval(tmp_path / "out/val_pairs.json", image_folder=tmp_path)
    assert [query.query_id for query in found.queries] == ["a#0", "a#1"]
    assert found.relevant == {"a#0": frozenset({"a"}), "a#1": frozenset({"a"})}
    assert found == retrieval_of_pairs([pairs[0], pairs[2]], tmp_path)


def test_an_image_with_two_ids_is_one_image_of_one_video(tmp_path: Path) -> None:
    one, other = {"image": "a.jpg", "source_id": None}, {"image": "./b.jpg", "source_id": "7_0"}
    rows = [pair(0, 0, **one), pair(0, 1, **other), pair(0, 2, **one), pair(0, 3)]
    rows += [pair(0, 4, image="b.jpg", source_id="8_0"), pair(0, 5, source_id="8_1")]
    write_shard(tmp_path, 0, *rows)
    pairs = TrainingSet.open(tmp_path)
    assert pairs.identities.tolist() == [0, 1, 0, 3, 1, 5]
    assert pairs.videos.tolist() == [0, 1, 0, 2, 1, 1]


def test_twins_without_a_source_share_a_video(tmp_path: Path) -> None:
    bare = {"source_id": None}
    rows = [
        pair(0, 0, **bare, hard_i="imgs_0/goal/2.jpg"),
        pair(0, 1, **bare),
        pair(0, 2, **bare),
        pair(0, 3, **bare, hard_i_id="0_1"),
        pair(0, 4, **bare, image="train/imgs_0/wentwrong/4.jpg"),
        pair(0, 5, **bare, hard_i="imgs_0/wentrong/4.webp"),
        pair(0, 6, **bare, hard_i="imgs_0/goal/missing.jpg", hard_i_id="none"),
        pair(0, 8, hard_i="imgs_0/goal/1.jpg"),  # a source_id decides alone
    ]
    write_shard(tmp_path, 0, *rows)
    pairs = TrainingSet.open(tmp_path)
    assert pairs.videos.tolist() == [0, 1, 0, 1, 2, 2, 3, 4]
    assert pairs.identities.tolist() == list(range(8))


def test_broken_json_on_line_17(tmp_path: Path) -> None:
    path = write_shard(tmp_path, 0, *(pair(0, k) for k in range(20)))
    text = path.read_text("utf-8").splitlines()
    text[16] = text[16][:-5]
    path.write_text("\n".join(text), "utf-8")
    with pytest.raises(InputError, match=r"pair_0.json, line 17: .*broken JSON"):
        TrainingSet.open(tmp_path)


def test_empty_and_missing_shards_are_refused(root: Path, tmp_path: Path) -> None:
    write_shard(root, 2)
    with pytest.raises(InputError, match=r"pair_2.json: .*found an empty file"):
        TrainingSet.open(root)
    with pytest.raises(InputError, match="no such file"):
        TrainingSet.open(root, [root / "pair_7.json"])
    with pytest.raises(InputError, match="no such folder"):
        TrainingSet.open(root / "missing")
    (tmp_path / "bare" / "annotation" / "train").mkdir(parents=True)
    with pytest.raises(InputError, match=r"expected training shards pair_N.json"):
        TrainingSet.open(tmp_path / "bare")


def test_attr_shards_are_used_if_there_are_fewer_pair_shards(root: Path) -> None:
    folder = root / "annotation" / "train"
    for path in folder.iterdir():
        path.rename(folder / path.name.replace("pair", "attr"))
    assert len(TrainingSet.open(root)) == 12
    write_shard(root, 0, pair(0, 0))
    assert len(TrainingSet.open(root)) == 12
    for shard in (2, 10):
        write_shard(root, shard, pair(shard, 0))
    assert len(TrainingSet.open(root)) == 3
