"""For any contents of a file, a reader returns valid data or raises an InputError."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from pab.core.errors import InputError
from pab.data.annotations import read_retrieval
from pab.data.captions import has_visible
from pab.data.id_lists import read_id_list
from pab.data.masked_queries import read_answers
from pab.data.records import Query, TrainPair
from pab.data.training_set import TrainingSet
from pab.formats.score_file import check_scores
from pab.ranking import read_ranked_list, write_ranked_list
from pab.scores import ScoreFile, load_scores, save_scores
from tests.conftest import write_lines
from tests.train_pairs import read_train_pairs

often = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # each example writes its own file
)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
PATHS = st.sampled_from(["../x.jpg", "/x.jpg", "C:\\x.jpg", "a/./b.jpg", "a\x00.jpg", "", "a//b"])
TROUBLE = [b"\x00", b"\xff\xfe", b"\n\n", b"\r", b'"', b"{", b"NaN", b"1e999", b"\xed\xa0\x80"]
INSERTED = st.binary(max_size=6) | st.sampled_from(TROUBLE)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Draw a file's bytes with a few ranges removed, inserted or replaced."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        stop = min(len(content), start + draw(st.integers(0, 12)))
        content = content[:start] + draw(INSERTED) + content[stop:]
    return content


@st.composite
def changed(draw: st.DrawFn, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Draw JSON rows with some fields removed, replaced by any value, or copied from other rows."""
    rows = [dict(row) for row in rows]
    for _ in range(draw(st.integers(1, 3))):
        row = draw(st.sampled_from(rows))
        name = draw(st.sampled_from(sorted(row)) | st.text(max_size=6)) if row else "image"
        other = draw(st.sampled_from(rows)).get(name)
        if draw(st.booleans()):
            row[name] = draw(VALUES | PATHS | st.just(other))
        else:
            row.pop(name, None)
    return rows


ANY_BYTES = st.binary(max_size=60) | st.text(max_size=60).map(str.encode)


def read_or_refused(read: Callable[[], Any]) -> Any:
    """Return a reader's result, or None for an InputError. Any other exception fails the test."""
    try:
        found = read()
    except InputError:
        event("refused")
        return None
    event("read")
    return found


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------ annotations


def check_retrieval(path: Path, root: Path) -> None:
    found = read_or_refused(lambda: read_retrieval(path, image_folder=root))
    if found is None:
        return
    ids = [query.query_id for query in found.queries]
    assert len(set(ids)) == len(ids) > 0
    assert all(query.caption.strip() for query in found.queries)
    if found.gallery is not None:
        names = [image.gallery_id for image in found.gallery]
        assert names == sorted(set(names))
        for image in found.gallery:
            assert image.path.resolve().is_relative_to(root.resolve())
        assert all(found.relevant[one] <= set(names) for one in ids)
    for text in ids:
        text.encode()  # no lone surrogates: they could not be written


LABELLED, MASKED = "annotation/test/pair.json", "name-masked_test-set/query.json"


@pytest.mark.parametrize("name", [LABELLED, MASKED])
@often
@given(data=st.data())
def test_damaged_annotations(tiny_data: Path, tmp_path: Path, name: str, data: Any) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(data.draw(damaged((tiny_data / name).read_bytes())))
    check_retrieval(path, tiny_data)


@pytest.mark.parametrize("name", [LABELLED, MASKED])
@often
@given(data=st.data())
def test_odd_values_in_annotations(tiny_data: Path, tmp_path: Path, name: str, data: Any) -> None:
    path = tmp_path / "a.json"
    write_lines(path, data.draw(changed(rows_of(tiny_data / name))))
    check_retrieval(path, tiny_data)


@often
@given(data=st.data())
def test_odd_values_in_training_shards(tiny_data: Path, tmp_path: Path, data: Any) -> None:
    path = tmp_path / "pair_0.json"
    write_lines(path, data.draw(changed(rows_of(tiny_data / "annotation/train/pair_0.json"))))
    found = read_or_refused(
        lambda: list(TrainingSet.open(tiny_data, [path], cache_dir=tmp_path / "cache"))
    )
    for pair in found or []:
        assert (tiny_data / pair.image).resolve().is_relative_to(tiny_data.resolve())
        assert pair.caption.strip()
        assert pair.image_id.strip()


def rows_and_forms(draw: st.DrawFn, row: Callable[[int], dict[str, Any]]) -> Any:
    """Draw rows, and the bytes of a file that stores them in one of the supported forms."""
    rows = [row(number) for number in range(draw(st.integers(1, 6)))]
    written = []
    for one in rows:
        line = {name: draw(OTHER_FORMS)(name, value) for name, value in one.items()}
        line |= draw(st.dictionaries(st.sampled_from(UNKNOWN), VALUES, max_size=2))
        absent = [name for name in OPTIONAL if name not in line]
        line |= draw(st.dictionaries(st.sampled_from(absent), USELESS)) if absent else {}
        names = draw(st.permutations(sorted(line)))
        written.append({name: line[name] for name in names})
    ascii_only, end = draw(st.booleans()), draw(st.sampled_from(["\n", "\r\n", "\n\n", "\n \r\n"]))
    indent = draw(st.sampled_from([None, 0, 1]))
    texts = [json.dumps(line, ensure_ascii=ascii_only) for line in written]
    spread = [json.dumps(line, ensure_ascii=ascii_only, indent=2) for line in written]
    text = draw(
        st.sampled_from(
            [
                end.join(texts),
                end.join(texts) + end,
                end.join(spread),
                "\n[" + ",".join(spread) + "]",
            ]
            + [json.dumps(written, ensure_ascii=ascii_only, indent=indent)]
        )
    )
    encodings = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"])
    return rows, text.encode(draw(encodings))


UNKNOWN = ["camera", "quality", "change", "weather"]
OPTIONAL = ["hard_c", "hard_i_id", "source_caption", "normal", "scene"]
USELESS = st.sampled_from([None, "", "  ", [], {}, True, ["a"]])


def same(_: str, value: Any) -> Any:
    return value


def number_id(name: str, value: Any) -> Any:
    """Return an id as a number if its text is a plain decimal number."""
    if name.endswith(("_id", "_index")) and str(value).isdecimal() and str(int(value)) == value:
        return int(value)
    return value


def float_id(name: str, value: Any) -> Any:
    found = number_id(name, value)
    return float(found) if type(found) is int else found


def listed_caption(name: str, value: Any) -> Any:
    return [value] if name == "caption" and type(value) is str else value


OTHER_FORMS = st.sampled_from([same, same, number_id, float_id, listed_caption])


@often
@given(data=st.data())
def test_every_mixture_of_forms_gives_the_same_training_pairs(
    tiny_data: Path, tmp_path: Path, data: Any
) -> None:
    def row(number: int) -> dict[str, Any]:
        fields = {"image": f"train/{number}.jpg", "caption": f"é {number}", "image_id": str(number)}
        return fields | {"source_id": f"{number // 2}_{number % 2}", "hard_i_id": str(number + 1)}

    rows, content = rows_and_forms(data.draw, row)
    path = tmp_path / "pair_0.json"
    path.write_bytes(content)
    found = TrainingSet.open(tiny_data, [path], cache_dir=tmp_path / "cache")
    assert list(found) == [TrainPair(**row) for row in rows]
    assert list(read_train_pairs(path)) == list(found)
    assert found.videos.tolist() == [number // 2 for number in range(len(rows))]


@often
@given(data=st.data())
def test_every_mixture_of_forms_gives_the_same_queries(tmp_path: Path, data: Any) -> None:
    rows, content = rows_and_forms(
        data.draw, lambda number: {"query_index": f"{number}", "caption": f"é {number}"}
    )
    path = tmp_path / "query.json"
    path.write_bytes(content)
    assert read_retrieval(path).queries == [Query(r["query_index"], r["caption"]) for r in rows]


FAULTS: dict[str, Callable[[dict[str, Any]], bytes]] = {
    "cut short": lambda row: json.dumps(row).encode()[:-4],
    "no caption": lambda row: json.dumps({**row, "caption": "\u200b"}).encode(),
    "no id": lambda row: json.dumps({k: v for k, v in row.items() if k != "image_id"}).encode(),
    "half an id": lambda row: json.dumps({**row, "image_id": 0.5}).encode(),
    "two captions": lambda row: json.dumps({**row, "caption": ["a", "b"]}).encode(),
    "outside": lambda row: json.dumps({**row, "image": "../x.jpg"}).encode(),
    "a field twice": lambda row: json.dumps(row).encode()[:-1] + b', "image": "b.jpg"}',
    "another encoding": lambda row: (
        json.dumps({**row, "caption": "?"}).encode().replace(b"?", b"\xe9")
    ),
    "not an object": lambda row: json.dumps([row]).encode(),
}


@often
@given(data=st.data())
def test_bad_lines_are_reported_by_number(tiny_data: Path, tmp_path: Path, data: Any) -> None:
    rows = rows_of(tiny_data / "annotation/train/pair_0.json")
    wrong = data.draw(st.sets(st.integers(1, len(rows)), min_size=1, max_size=4))
    # A list in line 1 would turn the file into a JSON array, so use another fault there.
    kinds = {n: data.draw(st.sampled_from(sorted(FAULTS))) for n in wrong}
    kinds = {
        n: "no id" if n == 1 and kind == "not an object" else kind for n, kind in kinds.items()
    }
    written = [
        FAULTS[kinds[n]](row) if n in wrong else json.dumps(row).encode()
        for n, row in enumerate(rows, start=1)
    ]
    mark, end = data.draw(st.sampled_from([(b"", b"\n"), (b"\xef\xbb\xbf", b"\r\n")]))
    path = tmp_path / "pair_0.json"
    path.write_bytes(mark + end.join(written))
    with pytest.raises(InputError) as caught:
        TrainingSet.open(tiny_data, [path], cache_dir=tmp_path / "cache")
    named = [int(n) for n in re.findall(r"pair_0\.json, line (\d+): ", str(caught.value))]
    assert named == sorted(wrong)
    left = TrainingSet.open(tiny_data, [path], tmp_path / "cache", skip_bad_lines=True)
    kept = [row["image_id"] for n, row in enumerate(rows, start=1) if n not in wrong]
    assert left.image_ids() == kept
    with pytest.raises(InputError):
        list(read_train_pairs(path))


@often
@given(
    captions=st.lists(st.text(max_size=15).filter(has_visible), min_size=1, max_size=5),
    separator=st.sampled_from("\t,;"),
    end=st.sampled_from(["\n", "\r\n"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_tables_round_trip(
    tmp_path: Path, captions: list[str], separator: str, end: str, encoding: str
) -> None:
    path = tmp_path / "pairs.csv"
    with path.open("w", encoding=encoding, newline="") as handle:
        rows = csv.writer(handle, delimiter=separator, lineterminator=end, quoting=csv.QUOTE_ALL)
        rows.writerow(["filepath", "title"])
        rows.writerows((f"{number}.jpg", text) for number, text in enumerate(captions))
    found = TrainingSet.open(path, cache_dir=tmp_path / "cache")
    assert [pair.caption for pair in found] == captions


@often
@given(data=st.data())
def test_damaged_tables(tmp_path: Path, data: Any) -> None:
    path = tmp_path / "pairs.csv"
    good = b'filepath,title\na.jpg,"a man, who falls"\nb.jpg,a woman\n'
    path.write_bytes(data.draw(damaged(good)))
    for read in (read_retrieval, lambda p: list(TrainingSet.open(p, cache_dir=tmp_path / "cache"))):
        read_or_refused(lambda read=read: read(path))


@often
@given(data=st.data())
def test_odd_values_in_answer_keys(tiny_data: Path, tmp_path: Path, data: Any) -> None:
    key = json.loads((tiny_data / "name-masked_test-set/answers.json").read_text())
    names = sorted(key)
    rows = data.draw(changed([key[name] for name in names]))
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(dict(zip(names, rows, strict=True))))
    for gallery, *_ in (read_or_refused(lambda: read_answers(path)) or {}).values():
        assert gallery.strip()


# ---------------------------------------------------------------------------- score files and lists

SCORES = ScoreFile(
    torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
    ["q2", "q1", "q3"], ["a", "b", "c", "d"], {"model": "test", "nested": {"epochs": [1, 2]}},
)  # fmt: skip


@often
@given(data=st.data(), mmap=st.booleans())
def test_damaged_score_files(tmp_path: Path, data: Any, mmap: bool) -> None:
    path = tmp_path / "s.pt"
    save_scores(path, SCORES)
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    found = read_or_refused(lambda: load_scores(path, mmap=mmap))
    if found is not None:
        check_scores(found, path)
        assert found.scores.shape == (len(found.query_ids), len(found.gallery_ids))


@often
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "scores": st.sampled_from([
                torch.ones(2, 2), torch.ones(2), torch.ones(0, 2), torch.ones(2, 2).double(),
                torch.eye(2).to_sparse(), torch.full((2, 2), float("nan")), torch.ones(2, 2) > 0,
            ]) | VALUES,
            "query_ids": st.lists(st.text(max_size=3), max_size=3) | VALUES,
            "gallery_ids": st.lists(st.sampled_from(["a", "b", "", " b", "b\n"]), max_size=3),
            "meta": st.dictionaries(st.text(max_size=3), VALUES, max_size=2) | VALUES,
        },
    )
)  # fmt: skip
def test_odd_contents_of_score_files(tmp_path: Path, content: dict[str, Any]) -> None:
    path = tmp_path / "s.pt"
    complete = {"scores": torch.ones(2, 2), "query_ids": ["p", "q"], "gallery_ids": ["a", "b"]}
    torch.save({**complete, "meta": {}, **content}, path)
    found = read_or_refused(lambda: load_scores(path))
    if found is not None:
        assert len(set(found.query_ids)) == len(found.query_ids) == len(found.scores)
        assert found.gallery_ids == sorted(set(found.gallery_ids))


NAMES = st.text(min_size=1, max_size=6).filter(lambda name: name.split() == [name])


@often
@given(names=st.integers(1, 4).flatmap(
    lambda k: st.lists(st.lists(NAMES, min_size=k, max_size=k, unique=True), min_size=1, max_size=4)
))  # fmt: skip
def test_ranked_lists_round_trip(tmp_path: Path, names: list[list[str]]) -> None:
    path = tmp_path / "l.txt"
    write_ranked_list(path, names)
    assert read_ranked_list(path) == names


@often
@given(ANY_BYTES)
def test_any_bytes_as_a_ranked_list(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "l.txt"
    path.write_bytes(content)
    found = read_or_refused(lambda: read_ranked_list(path))
    if found is not None:
        assert len({len(line) for line in found}) == 1
        assert all(len(set(line)) == len(line) for line in found)


@often
@given(ANY_BYTES)
def test_any_bytes_as_a_list_of_ids(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "ids.txt"
    path.write_bytes(content)
    found = read_or_refused(lambda: read_id_list(path))
    if found is not None:
        assert len(set(found)) == len(found) > 0
        assert all(one == one.strip() for one in found)
