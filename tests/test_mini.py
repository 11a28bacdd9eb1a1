"""Mini data: complete, reproducible, with correct answer keys and disjoint splits."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pab.core.errors import InputError
from pab.mini import settings
from pab.mini.__main__ import main
from pab.mini.actions import ACTIONS, ANOMALY, NORMAL
from pab.mini.build import Plan, Task, build, near_miss_of, video_of
from pab.mini.captions import ACTION, CUT_FIRST, OPTIONAL, SCENE, write_caption
from pab.mini.contact_sheet import main as contact_sheet
from pab.mini.people import FOREARM, Pose, solve
from pab.mini.scenes import SCENES
from pab.mini.videos import DISTRACTOR, TEST, TRAIN, draw_video, video_kinds

SIZES = {"train": 40, "test": 20, "distractors": 10, "ucc": 9}
SEED = 3


def _build(out: Path, workers: int = 1, seed: int = SEED) -> Path:
    build(Plan(out, seed=seed, workers=workers, **SIZES), ("test", "train", "distractors"), print)
    return out


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build(tmp_path_factory.mktemp("data") / "mini")


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _train(root: Path, kind: str = "train/pair") -> list[dict[str, Any]]:
    shards = range(settings.TRAIN_SHARDS)
    return [line for n in shards for line in _lines(root / f"annotation/{kind}_{n}.json")]


def _contents(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z'-]+", text.lower()))


def test_same_bytes_with_any_number_of_workers(mini: Path, tmp_path: Path) -> None:
    assert _contents(_build(tmp_path / "again", workers=3)) == _contents(mini)


def test_another_seed_gives_other_pictures(mini: Path, tmp_path: Path) -> None:
    other = _build(tmp_path / "other", seed=SEED + 1)
    first = {path.read_bytes() for path in (mini / "test").glob("*.jpg")}
    assert not first & {path.read_bytes() for path in (other / "test").glob("*.jpg")}


def test_layout_is_complete(mini: Path) -> None:
    train, test = _train(mini), _lines(mini / "annotation/test/pair.json")
    ucc = _lines(mini / "annotation/test/ucc.json")
    assert [len(train), len(test), len(ucc)] == [40, 20, 9]
    for line in train + test + ucc:
        with Image.open(mini / line["image"]) as image:
            assert (image.format, image.mode) == ("JPEG", "RGB")
            assert image.size == (settings.IMAGE_SIZE, settings.IMAGE_SIZE)
    for line in train:
        assert re.fullmatch(r"train/imgs_\d/(goal|wentwrong|full)/\d+\.jpg", line["image"])
    for records in (train, test, ucc):
        assert len({line["image_id"] for line in records}) == len(records)
        assert len({line["image"] for line in records}) == len(records)
    masked, track4 = mini / "name-masked_test-set", mini / "track4/name-masked_test-set"
    assert len(list((masked / "gallery").glob("*.jpg"))) == 20
    assert len(list((track4 / "gallery").glob("*.jpg"))) == 30
    order = (track4 / "query_index.txt").read_text().splitlines()
    assert order == [line["query_index"] for line in _lines(track4 / "query.json")]
    assert sorted(path.name for path in mini.iterdir()) == [
        "annotation", "manifest.json", "name-masked_test-set", "test", "track4", "train", "ucc",
    ]  # fmt: skip


def test_attribute_files_hold_the_pairs_and_their_actions(mini: Path) -> None:
    normal = {action.label for action in NORMAL.values()}
    anomaly = {action.label for action in ANOMALY.values()}
    pairs = _train(mini) + _lines(mini / "annotation/test/pair.json")
    attributes = _train(mini, "train_attr/attr") + _lines(mini / "annotation/test/attr.json")
    for pair, line in zip(pairs, attributes, strict=True):
        assert pair.items() <= line.items()
        assert line["scene"] in SCENES
        y = line["source_id"].split("_")[1]
        assert (line["normal"] in normal) if y == "0" else (line["anomaly"] in anomaly)
        assert ("normal" in line) != ("anomaly" in line)


def test_twins_share_the_video_and_differ_in_identity(mini: Path) -> None:
    train = _train(mini)
    by_id = {line["image_id"]: line for line in train}
    twins = [line for line in train if "hard_i_id" in line]
    assert len(twins) > len(train) / 2
    for line in twins:
        other = by_id[line["hard_i_id"]]
        assert other["image_id"] != line["image_id"]
        assert other["hard_i_id"] == line["image_id"]
        assert other["image"] == "train/" + line["hard_i"]
        assert other["caption"] == line["hard_c"]
        (video, y), (other_video, other_y) = (x["source_id"].split("_") for x in (line, other))
        assert video == other_video
        assert (y == "0") != (other_y == "0")
    test = {line["image_id"]: line for line in _lines(mini / "annotation/test/attr.json")}
    paired = [line for line in test.values() if "hard_i_id" in line]
    assert paired
    for line in paired:
        other = test[line["hard_i_id"]]
        assert other["source_id"].split("_")[0] == line["source_id"].split("_")[0]
        assert other["source_id"] != line["source_id"]


def test_share_of_test_queries_with_a_twin() -> None:
    kinds = [video_kinds(settings.SEED, TEST, index) for index in range(1250)]
    paired = sum(len(k) for k in kinds if len(k) == 2)
    assert 0.70 < paired / sum(len(k) for k in kinds) < 0.80


@pytest.mark.parametrize("folder", ["name-masked_test-set", "track4/name-masked_test-set"])
def test_the_answer_key_maps_every_query_to_its_picture(mini: Path, folder: str) -> None:
    queries = {
        line["query_index"]: line["caption"] for line in _lines(mini / folder / "query.json")
    }
    answers = json.loads((mini / folder / "answers.json").read_text())
    test = {line["caption"][0]: line for line in _lines(mini / "annotation/test/attr.json")}
    assert answers.keys() == queries.keys()
    assert len({answer["gallery"] for answer in answers.values()}) == len(queries) == 20
    for query, caption in queries.items():
        line, answer = test[caption], answers[query]
        assert re.fullmatch(r"[A-Z0-9]{15}", answer["gallery"])
        picture = mini / folder / "gallery" / (answer["gallery"] + ".jpg")
        assert picture.read_bytes() == (mini / line["image"]).read_bytes()
        kind = "normal" if "normal" in line else "anomaly"
        assert answer == {"gallery": answer["gallery"], kind: line[kind]}


def test_the_two_masked_sets_share_no_names(mini: Path) -> None:
    first, second = (
        json.loads((mini / folder / "name-masked_test-set/answers.json").read_text())
        for folder in (".", "track4")
    )
    assert not first.keys() & second.keys()


def test_captions_have_25_to_60_words_and_test_words_are_known() -> None:
    known: set[str] = set()
    for split, count in ((TRAIN, 6500), (TEST, 1250)):
        for index in range(count):
            video = draw_video(settings.SEED, split, index)
            for shot in video.shots:
                caption = write_caption(settings.SEED, video, shot)
                assert 25 <= len(caption.split()) <= 60, caption
                assert "{" not in caption
                assert "  " not in caption
                if split == TRAIN:
                    known |= _words(caption)
                else:
                    assert _words(caption) <= known, _words(caption) - known


def test_surveillance_captions_repeat_and_name_no_colour(mini: Path) -> None:
    captions = [line["caption"][0] for line in _lines(mini / "annotation/test/ucc.json")]
    assert len(set(captions)) < len(captions)
    for caption in captions:
        assert 25 <= len(caption.split()) <= 60
        assert not _words(caption) & {"red", "blue", "yellow", "orange", "purple", "pink"}


def test_no_test_layout_is_seen_in_training() -> None:
    assert not set(settings.TRAIN_LAYOUTS) & set(settings.TEST_LAYOUTS)
    for split, layouts in ((TRAIN, settings.TRAIN_LAYOUTS), (TEST, settings.TEST_LAYOUTS)):
        assert {draw_video(SEED, split, index).layout for index in range(60)} <= set(layouts)


def test_no_test_video_repeats_a_training_video() -> None:
    def captions_of(split: int, count: int) -> set[str]:
        videos = [draw_video(SEED, split, index) for index in range(count)]
        return {write_caption(SEED, video, video.shots[0]) for video in videos}

    assert not captions_of(TRAIN, 400) & captions_of(TEST, 400)


def test_near_miss_distractors_wear_other_colours() -> None:
    sources = {index: near_miss_of(SEED, index) for index in range(60)}
    near = {index: source for index, source in sources.items() if source is not None}
    assert 5 < len(near) < 30
    for index, source in near.items():
        video = video_of(Task(SEED, DISTRACTOR, index, ("x.jpg",)))
        shown = draw_video(SEED, TEST, source)
        assert (video.scene, video.layout, video.x) == (shown.scene, shown.layout, shown.x)
        assert video.person.upper_colour != shown.person.upper_colour
        assert video.person.lower_colour != shown.person.lower_colour


def test_every_action_and_scene_has_words() -> None:
    assert ACTION.keys() == ACTIONS.keys()
    assert SCENE.keys() == SCENES.keys()
    assert set(CUT_FIRST) <= set(OPTIONAL)
    assert set(OPTIONAL) == settings.TRAIN_OMIT.keys() == settings.TEST_OMIT.keys()
    assert len(NORMAL) >= 15
    assert len(ANOMALY) >= 10
    assert len({action.label for action in ACTIONS.values()}) == len(ACTIONS)


def test_a_posed_body_stands_on_the_ground_and_mirrors() -> None:
    pose = Pose(10, 0, (30, 40), (-20, 10), (20, 10), (-20, 10))
    right, left = solve(pose, 0.5, 0.9, 0.6, 1), solve(pose, 0.5, 0.9, 0.6, -1)
    assert max(y for _, y in right.toes) < 0.9 < max(y for _, y in right.toes) + 0.03
    for (x1, y1), (x2, y2) in zip(right.points(), left.points(), strict=True):
        assert x1 - 0.5 == pytest.approx(0.5 - x2)
        assert y1 == pytest.approx(y2)
    (ex, ey), (hx, hy) = right.elbows[0], right.hands[0]
    assert ((ex - hx) ** 2 + (ey - hy) ** 2) ** 0.5 == pytest.approx(FOREARM * 0.6)


def test_a_second_run_keeps_existing_splits(mini: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (mini / "test/0.jpg").stat().st_mtime_ns
    _build(mini)
    assert capsys.readouterr().out.count("already there") == 3
    assert (mini / "test/0.jpg").stat().st_mtime_ns == before


def test_another_size_replaces_the_split(tmp_path: Path) -> None:
    for pairs in ("6", "4"):
        main(["--out", str(tmp_path), "--test", pairs, "--ucc", "2", "--splits", "test",
              "--workers", "1"])  # fmt: skip
    assert len(list((tmp_path / "test").iterdir())) == 4
    assert not (tmp_path / "train").exists()


def test_foreign_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_text("mine")
    with pytest.raises(InputError, match=r"manifest\.json"):
        main(["--out", str(tmp_path), "--test", "2"])
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]


def test_distractors_need_their_test_split(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="add test to --splits"):
        main(["--out", str(tmp_path / "mini"), "--splits", "distractors"])
    assert not (tmp_path / "mini").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--splits", "test,val"], "found 'val'"),
        (["--train", "0"], "--train: expected at least 1"),
        (["--workers", "-1"], "--workers: expected at least 1"),
    ],
)
def test_bad_flags_are_named(tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        main(["--out", str(tmp_path / "mini"), *flags])


def test_contact_sheet_shows_twins_side_by_side(mini: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.png"
    contact_sheet(["--data", str(mini), "--count", "6", "--columns", "3", "--out", str(page)])
    with Image.open(page) as image:
        assert image.width == 930
        assert len(image.getcolors(1 << 20) or []) > 1000
