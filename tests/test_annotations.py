"""Annotation readers: the formats of PAB, image folders, and errors for bad lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pab.core.errors import InputError
from pab.data.annotations import read_retrieval, retrieval_of_pairs
from pab.data.id_lists import read_query_order
from pab.data.records import Query, TrainPair
from tests.train_pairs import read_train_pairs

PAIR = {
    "image": "train/imgs_0/goal/0.jpg",
    "caption": "A band plays under a tent.",
    "image_id": "0_0",
    "hard_i": "imgs_0/full/0.jpg",
    "hard_c": "A musician falls off the stage.",
    "hard_i_id": "0_1",
    "source_id": "1_0",
    "source_caption": "band was playing",
}
TWIN = {**PAIR, "image": "train/imgs_0/full/0.jpg", "image_id": "0_1", "hard_i_id": "0_0"}
TWIN |= {"caption": "A musician falls off the stage.", "hard_i": "imgs_0/goal/0.jpg"}


def lines(*objects: object) -> str:
    return "".join(json.dumps(value) + "\n" for value in objects)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "annotation" / "train").mkdir(parents=True)
    (tmp_path / "annotation" / "test").mkdir()
    (tmp_path / "test").mkdir()
    return tmp_path


def labelled(root: Path, *objects: object) -> Path:
    path = root / "annotation" / "test" / "pair.json"
    path.write_text(lines(*objects), encoding="utf-8")
    return path


def image(n: int, *captions: str, **more: Any) -> dict[str, Any]:
    return {"image": f"test/{n}.jpg", "image_id": f"id{n}", "caption": list(captions), **more}


# ------------------------------------------------------------------------------------ good files


def test_training_shard_is_read_field_by_field(root: Path) -> None:
    path = root / "annotation" / "train" / "attr_0.json"
    path.write_text(lines({**PAIR, "normal": "Performing", "scene": "outdoor concert"}))
    (pair,) = read_train_pairs(path)
    assert pair == TrainPair(**PAIR, normal="Performing", scene="outdoor concert")
    assert (pair.action, pair.is_normal, pair.source_video) == ("Performing", True, "1")


def test_only_three_fields_are_required_and_null_is_absent(root: Path) -> None:
    path = root / "pair_0.json"
    path.write_text(lines({"image": "a.jpg", "caption": "é", "image_id": "x", "hard_i": None}))
    (pair,) = read_train_pairs(path)
    assert pair == TrainPair("a.jpg", "é", "x")
    assert (pair.action, pair.is_normal, pair.source_video) == (None, None, None)


def test_labelled_file_with_several_captions(root: Path) -> None:
    path = labelled(root, image(10, "b", "c", anomaly="Falling"), image(2, "a", normal="Walking"))
    found = read_retrieval(path)
    assert found.queries == [
        Query("id10#0", "b", "id10", "Falling", False),
        Query("id10#1", "c", "id10", "Falling", False),
        Query("id2#0", "a", "id2", "Walking", True),
    ]
    assert found.gallery is not None
    assert [(g.gallery_id, g.path) for g in found.gallery] == [
        ("id10", root / "test" / "10.jpg"),
        ("id2", root / "test" / "2.jpg"),
    ]
    assert found.relevant == {
        q: frozenset({q.split("#")[0]}) for q in ("id10#0", "id10#1", "id2#0")
    }


def test_a_caption_is_relevant_to_its_own_image_as_published(root: Path) -> None:
    path = labelled(root, image(0, "same", "own"), image(1, "same"), image(2, "x"))
    found = read_retrieval(path)
    assert found.relevance == "image_id"
    assert found.relevant == {
        q: frozenset({q.split("#")[0]}) for q in ("id0#0", "id0#1", "id1#0", "id2#0")
    }
    found = read_retrieval(path, same_caption_counts=True)
    assert found.relevance == "same_caption"
    assert found.relevant is not None
    assert found.relevant["id0#0"] == found.relevant["id1#0"] == {"id0", "id1"}
    assert found.relevant["id0#1"] == {"id0"}


def test_training_shard_as_retrieval_with_twins(root: Path) -> None:
    path = root / "annotation" / "train" / "pair_0.json"
    path.write_text(lines(PAIR, TWIN, {**PAIR, "image_id": "0_2", "hard_i_id": "elsewhere"}))
    found = read_retrieval(path)
    assert [q.query_id for q in found.queries] == ["0_0#0", "0_1#0", "0_2#0"]
    # 0_2 repeats the caption of 0_0; the twin of 0_2 is not in the gallery.
    assert found.twins == {"0_0#0": "0_1", "0_1#0": "0_0"}
    assert retrieval_of_pairs(read_train_pairs(path), root) == found


def test_a_twin_with_the_same_caption_is_not_counted(root: Path) -> None:
    found = read_retrieval(labelled(root, image(0, "s", hard_i_id="id1"), image(1, "s")))
    assert found.twins == {}


def test_name_masked_queries_with_and_without_answers(tmp_path: Path) -> None:
    path = tmp_path / "query.json"
    path.write_text(
        lines({"query_index": "7", "caption": "a"}, {"query_index": "3", "caption": "b"})
    )
    found = read_retrieval(path)
    assert found.queries == [Query("7", "a"), Query("3", "b")]
    assert (found.gallery, found.relevant, found.twins) == (None, None, {})
    answers = tmp_path / "answers.json"
    key = {
        "3": {"gallery": "N3", "anomaly": "Falling"},
        "7": {"gallery": "N7", "normal": "Walking"},
    }
    answers.write_text(json.dumps(key))
    found = read_retrieval(path, answers=answers)
    assert found.queries == [
        Query("7", "a", "N7", "Walking", True),
        Query("3", "b", "N3", "Falling", False),
    ]
    assert found.relevant == {"7": frozenset({"N7"}), "3": frozenset({"N3"})}
    assert found.gallery is None


def test_real_photographs_in_the_name_masked_form() -> None:
    people = Path(__file__).resolve().parents[2] / "shared" / "people"
    if not people.is_dir():
        pytest.skip("needs the photographs of ../shared/people")
    found = read_retrieval(people / "query.json", answers=people / "answers.json")
    assert len(found.queries) == 36
    names = {path.stem for path in (people / "gallery").iterdir()}
    assert {query.image_id for query in found.queries} <= names


def test_blank_lines_and_windows_line_ends_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "query.json"
    first, second = (json.dumps({"query_index": str(n), "caption": "a"}) for n in (1, 2))
    path.write_bytes(f"{first}\r\n\r\n{second}\n\n".encode())
    assert [query.query_id for query in read_retrieval(path).queries] == ["1", "2"]


def test_query_order(tmp_path: Path) -> None:
    path = tmp_path / "query_index.txt"
    path.write_text("b\na\n\n10\n")
    assert read_query_order(path) == ["b", "a", "10"]
    path.write_text("b\na\nb\n")
    with pytest.raises(InputError, match=r"line 3: .*'b' already on line 1"):
        read_query_order(path)
    path.write_text("\n")
    with pytest.raises(InputError, match="found an empty file"):
        read_query_order(path)


# ------------------------------------------------------------------------------- image locations


@pytest.mark.parametrize(("folder", "below"), [(".", ""), ("train", "train"), ("x", None)])
def test_image_folder_drops_leading_folders(root: Path, folder: str, below: str | None) -> None:
    """The folder may be the data root, a folder in it, or a folder with the last parts of paths."""
    place = root / "x" / "imgs_0" / "goal" if below is None else root / "train" / "imgs_0" / "goal"
    place.mkdir(parents=True)
    (place / "0.jpg").touch()
    (place / "7.jpg").touch()
    path = labelled(root, PAIR, {**PAIR, "image": "train/imgs_0/goal/7.jpg", "image_id": "7"})
    found = read_retrieval(path, image_folder=root / folder)
    assert found.gallery is not None
    assert [g.path for g in found.gallery] == [place / "0.jpg", place / "7.jpg"]


def test_image_folder_of_bare_names(root: Path) -> None:
    (root / "flat").mkdir()
    (root / "flat" / "5.jpg").touch()
    # The first image is missing, so the second one determines the layout of the folder.
    found = read_retrieval(labelled(root, image(4, "a"), image(5, "b")), image_folder=root / "flat")
    assert found.gallery is not None
    assert [g.path for g in found.gallery] == [root / "flat" / "4.jpg", root / "flat" / "5.jpg"]


def test_two_images_with_the_same_file_are_refused(root: Path) -> None:
    (root / "flat").mkdir()
    (root / "flat" / "0.jpg").touch()
    other = {"image": "other/0.jpg", "image_id": "o", "caption": "b"}
    with pytest.raises(InputError, match=r"'test/0.jpg' and 'other/0.jpg' would both be"):
        read_retrieval(labelled(root, image(0, "a"), other), image_folder=root / "flat")


def test_dots_are_resolved_before_links(root: Path, tmp_path_factory: Any) -> None:
    """``link/../x`` means ``x`` in the root, not next to the link's target."""
    (root / "link").symlink_to(tmp_path_factory.mktemp("elsewhere"))
    sneaky = {"image": "link/../test/0.jpg", "image_id": "u", "caption": "a"}
    found = read_retrieval(labelled(root, sneaky))
    assert found.gallery is not None
    assert found.gallery[0].path == root / "test" / "0.jpg"


def test_a_file_outside_an_annotation_folder_needs_an_image_folder(tmp_path: Path) -> None:
    path = tmp_path / "pair.json"
    path.write_text(lines(image(0, "a")))
    with pytest.raises(InputError, match="--image_folder"):
        read_retrieval(path)
    assert len(read_retrieval(path, image_folder=tmp_path).queries) == 1


# ------------------------------------------------------------------------------------- bad lines


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in PAIR.items() if key != name}


BAD_PAIRS = {
    "missing caption": (
        without("caption"),
        "field 'caption': expected a string, found no such field",
    ),
    "missing image": (without("image"), "field 'image': .*no such field"),
    "missing image_id": (without("image_id"), "field 'image_id': .*no such field"),
    "number as caption": ({**PAIR, "caption": 5}, "field 'caption': .*found the number 5"),
    "boolean as caption": ({**PAIR, "caption": True}, "found the boolean true"),
    "null caption": ({**PAIR, "caption": None}, "field 'caption': .*found null"),
    "empty caption": ({**PAIR, "caption": ""}, "field 'caption': .*found an empty string"),
    "blank caption": ({**PAIR, "caption": " \t"}, "field 'caption': .*found an empty string"),
    "lone surrogate": ({**PAIR, "caption": "a \ud800"}, "field 'caption': .*surrogate"),
    "fraction as id": ({**PAIR, "image_id": 1.5}, "field 'image_id': .*the number 1.5"),
    "number too large to be exact": ({**PAIR, "image_id": 1e16}, "'image_id': .*the number 1e"),
    "boolean as id": ({**PAIR, "image_id": True}, "field 'image_id': .*the boolean true"),
    "caption of nothing visible": (
        {**PAIR, "caption": "\u200b\u2060 "},
        "field 'caption': expected a string with a visible character",
    ),
    "id on two lines": ({**PAIR, "image_id": "a\nb"}, "field 'image_id': .*one line"),
    "id with blanks around": ({**PAIR, "image_id": " a"}, "field 'image_id': .*without blanks"),
    "both kinds": ({**PAIR, "normal": "a", "anomaly": "b"}, "'normal' or .*'anomaly', found both"),
    "absolute": ({**PAIR, "image": "/etc/passwd"}, "field 'image': .*an absolute path outside it"),
    "leaves the root": ({**PAIR, "image": "train/../../x.jpg"}, "field 'image': .*leaves it"),
    "twin leaves the root": ({**PAIR, "hard_i": "../../x.jpg"}, "field 'hard_i': .*leaves it"),
    "a drive": ({**PAIR, "image": "C:\\0.jpg"}, "field 'image': .*an absolute path outside it"),
    "backslashes": ({**PAIR, "image": "a\\..\\..\\0.jpg"}, "field 'image': .*leaves it"),
    "nul": ({**PAIR, "image": "a\0.jpg"}, "field 'image': .*NUL"),
    "a list": ([PAIR], "expected a JSON object, found a list"),
    "a string": ("pair", "expected a JSON object, found the string 'pair'"),
}


@pytest.mark.parametrize("name", BAD_PAIRS)
@pytest.mark.parametrize("reader", [read_retrieval, lambda path: list(read_train_pairs(path))])
def test_bad_lines_are_named(root: Path, name: str, reader: Callable[[Path], object]) -> None:
    bad, message = BAD_PAIRS[name]
    path = labelled(root, *({**PAIR, "image_id": str(n)} for n in range(16)), bad)
    with pytest.raises(InputError, match=rf"pair.json, line 17: .*{message}"):
        reader(path)


def test_paths_that_stay_inside_are_allowed(root: Path) -> None:
    path = labelled(root, {**PAIR, "image": "train/../test/0.jpg", "hard_i": "../test/1.jpg"})
    assert len(read_retrieval(path).queries) == 1


RAW = {
    "broken JSON": (b'{"image": ', "broken JSON at column 10: Expecting value"),
    "not UTF-8": (b'{"image": "\xff"}', "expected UTF-8 text, found byte 0xff at column 12"),
    "endless nesting": (b"[" * 100_000, "broken JSON"),
    "endless number": (b'{"image": ' + b"9" * 5000 + b"}", "broken JSON"),
}


@pytest.mark.parametrize("name", RAW)
def test_lines_that_are_not_json_are_named(root: Path, name: str) -> None:
    raw, message = RAW[name]
    path = labelled(root, *({**PAIR, "image_id": str(n)} for n in range(16)))
    path.write_bytes(path.read_bytes() + raw + b"\n")
    with pytest.raises(InputError, match=f"line 17: .*{message}") as caught:
        read_retrieval(path)
    assert len(str(caught.value)) < 400


def test_bad_labelled_files_are_refused(root: Path) -> None:
    with pytest.raises(InputError, match=r"line 2: field 'caption': .*empty list"):
        read_retrieval(labelled(root, image(0, "a"), image(1)))
    with pytest.raises(InputError, match=r"line 1: .*caption, entry 2.*found the number 3"):
        read_retrieval(labelled(root, {**image(0), "caption": ["a", 3]}))
    with pytest.raises(InputError, match=r"line 2: expected every image_id once, .*on line 1"):
        read_retrieval(labelled(root, image(0, "a"), image(0, "b")))
    with pytest.raises(InputError, match="found no queries"):
        read_retrieval(labelled(root))
    with pytest.raises(InputError, match=r"line 1: field 'image': .*no such field"):
        read_retrieval(labelled(root, {}))


def test_a_training_pair_has_one_caption(root: Path) -> None:
    (pair,) = read_train_pairs(labelled(root, image(0, "a")))
    assert pair.caption == "a"
    with pytest.raises(InputError, match=r"line 1: field 'caption': .*found a list of 2"):
        list(read_train_pairs(labelled(root, image(0, "a", "b"))))


def test_unusable_optional_fields_are_treated_as_absent(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = {**PAIR, "hard_i_id": 8954, "scene": "", "normal": None, "anomaly": "Falling"}
    odd |= {"hard_c": ["a", "b"], "source_id": 17, "quality": 0.9, "camera": "c3"}
    other = {**PAIR, "image_id": 2.0, "quality": 1, "source_id": "v_7", "scene": "street"}
    first, second = read_train_pairs(labelled(root, odd, other))
    assert (first.hard_i_id, first.scene, first.hard_c) == ("8954", None, None)
    assert (first.action, first.is_normal, first.source_video) == ("Falling", False, "17")
    assert (second.image_id, second.source_video, second.scene) == ("2", "v", "street")
    notes = capsys.readouterr().err.splitlines()
    assert [note.partition("pair.json: ")[2] for note in notes] == [
        "unknown fields are ignored: quality (2 lines), camera (1 line)",
        "optional fields are treated as absent: hard_c of another type (1 line), "
        "normal null (1 line), scene empty (1 line)",
        "source_id is not VIDEO_NUMBER (1 line): all of it names the video",
    ]


def test_all_bad_lines_are_counted_at_once(root: Path) -> None:
    good = [{**PAIR, "image_id": str(n)} for n in range(30)]
    bad = [{**pair, "caption": ""} for pair in good[:22]] + [without("image"), good[29]]
    path = labelled(root, *good, *bad)
    path.write_bytes(path.read_bytes() + b'{"image": \n')
    with pytest.raises(InputError) as caught:
        list(read_train_pairs(path))
    message = str(caught.value)
    assert "found 24 bad ones (22 x field 'caption': expected a non-empty string; " in message
    assert "1 x field 'image': expected a string; 1 x expected a JSON object): " in message
    assert all(f"line {n}: " in message for n in range(31, 51))
    assert message.endswith("; and 4 more")
    with pytest.raises(InputError, match=r"found 25 bad ones .*1 x expected every image_id once"):
        read_retrieval(path)


def test_broken_json_in_an_array_ends_the_reading(tmp_path: Path) -> None:
    path = tmp_path / "query.json"
    path.write_text('[{"query_index": 1, "caption": "a"},\n{"query_index": 2,, "caption": "b"}]')
    with pytest.raises(InputError, match="line 2: expected a JSON object, found broken JSON at"):
        read_retrieval(path)


def test_a_duplicate_field_is_found_in_every_form(tmp_path: Path) -> None:
    path = tmp_path / "query.json"
    twice = '{"query_index": "1",\n "caption": "a", "caption": "b"}'
    for text in (twice.replace("\n", ""), f"[{twice}]", twice):
        path.write_text(text)
        with pytest.raises(InputError, match=r"line 1: expected every key once, found 'caption'"):
            read_retrieval(path)
    path.write_text('{"Q1": "a",\n"Q1": "b"}')
    with pytest.raises(InputError, match="expected every key once, found 'Q1' twice"):
        read_retrieval(path)


def test_captions_by_query_id(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "query_text.json"
    path.write_text('{"Q2": "a",\n "Q1": ["b"]}')
    assert read_retrieval(path).queries == [Query("Q2", "a"), Query("Q1", "b")]
    assert "is read as one object {query id: caption} with 2 queries" in capsys.readouterr().err
    path.write_text('{"Q2": "", "Q1": 7, "Q3": "c"}')
    with pytest.raises(InputError, match=r"found 2 bad ones .*query 'Q2': .*query 'Q1': "):
        read_retrieval(path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_other_encodings_with_a_byte_order_mark(
    tmp_path: Path, encoding: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "query.json"
    path.write_text(lines({"query_index": "é", "caption": "a"}), encoding=encoding)
    assert read_retrieval(path).queries == [Query("é", "a")]
    assert f"query.json: is read as {encoding.upper()}" in capsys.readouterr().err
    path.write_text("b\n\xa0\na\n", encoding=encoding)
    assert read_query_order(path) == ["b", "a"]
    path.write_bytes(path.read_bytes() + b"\x00")
    with pytest.raises(
        InputError, match=f"expected UTF-8 text, found the byte-order mark of {encoding.upper()}"
    ):
        read_query_order(path)


def test_missing_files_and_directories_are_refused(root: Path) -> None:
    for reader in (read_retrieval, read_query_order, lambda path: list(read_train_pairs(path))):
        with pytest.raises(InputError, match="no such file"):
            reader(root / "missing.json")
        with pytest.raises(InputError, match="found a directory"):
            reader(root)


def test_bad_queries_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "query.json"
    good = {"query_index": "1", "caption": "a"}
    for bad, message in (
        (good, "line 2: expected every query id once, found '1' already on line 1"),
        ({"query_index": "2"}, "line 2: field 'caption': .*no such field"),
        ({"query_index": 2.5, "caption": "a"}, "line 2: field 'query_index': .*the number 2.5"),
        ({"query_index": 2, "caption": ["a", "b"]}, "line 2: field 'caption': .*a list of 2"),
    ):
        path.write_text(lines(good, bad))
        with pytest.raises(InputError, match=message):
            read_retrieval(path)


BAD_ANSWERS = {
    "unknown id": (
        '{"1": {"gallery": "A"}, "9": {"gallery": "B"}}',
        "query '9': answers for queries that are not in ",
    ),
    "no answer": ("{}", "query '1': queries of .* without an answer: 1"),
    "no gallery": ('{"1": {"normal": "a"}}', "query '1': field 'gallery': .*no such field"),
    "both kinds": ('{"1": {"gallery": "A", "normal": "a", "anomaly": "b"}}', "found both"),
    "twice": ('{"1": {"gallery": "A"}, "1": {"gallery": "B"}}', "found '1' twice"),
    "a string": ('{"1": "A"}', "query '1': expected an object, found the string 'A'"),
    "a list": ("[1]", "found a list"),
    "broken": ('{"1":\n', "line 2: .*broken JSON"),
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_bad_answers_are_refused(tmp_path: Path, name: str) -> None:
    text, message = BAD_ANSWERS[name]
    (tmp_path / "query.json").write_text(lines({"query_index": "1", "caption": "a"}))
    (tmp_path / "answers.json").write_text(text)
    with pytest.raises(InputError, match=rf"answers.json.*{message}"):
        read_retrieval(tmp_path / "query.json", answers=tmp_path / "answers.json")


def test_answers_for_a_labelled_file_are_refused(root: Path) -> None:
    with pytest.raises(InputError, match="has its own labels"):
        read_retrieval(labelled(root, image(0, "a")), answers=root / "answers.json")
