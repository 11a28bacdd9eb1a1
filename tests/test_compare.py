"""Comparison of two ranked lists, with and without labels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pab.compare import compare, main
from pab.core.errors import InputError
from pab.ranking import read_ranked_list, write_ranked_list

PUBLISHED = Path(__file__).parents[2] / "shared" / "predictions"

A = [["a", "b", "c"], ["a", "c", "b"], ["c", "a", "b"], ["b", "c", "d"]]
B = [["a", "b", "c"], ["b", "a", "d"], ["c", "b", "a"], ["d", "c", "a"]]
KEY = {
    "1": {"gallery": "a", "normal": "Walking"},
    "2": {"gallery": "b", "anomaly": "Falling"},
    "3": {"gallery": "c", "normal": "Waiting"},
    "4": {"gallery": "a", "anomaly": "Lying"},
}


@pytest.fixture
def lists(tmp_path: Path) -> list[str]:
    write_ranked_list(tmp_path / "a.txt", A)
    write_ranked_list(tmp_path / "b.txt", B)
    return [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]


def test_figures_by_hand() -> None:
    found = compare(A, B)
    assert (found.lines, found.depth) == (4, 3)
    assert (found.same_first, found.same_set, found.same_order) == (2, 2, 1)
    assert found.overlap == pytest.approx((3 + 2 + 3 + 2) / 4)
    assert found.distinct_first == (3, 4)
    assert found.duplicate_top1 == (2, 0)
    assert found.differing == [2, 4]


def test_only_ten_ranks_count() -> None:
    names = [f"n{i}" for i in range(20)]
    found = compare([names], [names[:10] + names[:9:-1]])
    assert (found.depth, found.same_order, found.overlap) == (10, 1, 10)


def test_output_without_labels(lists: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main([*lists, "--show", "1"])
    out = capsys.readouterr().out
    assert "same first image             2 (50.0%)" in out
    assert "queries with duplicate top-1 A 2, B 0" in out
    assert "first images differ in 2 lines; the first 1:\nline 2  A a  B b\n" in out
    assert "right" not in out


def test_names_in_two_spellings_are_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("M\u00fcller.jpg b.jpg\nb.jpg c.jpg\n")
    (tmp_path / "b.txt").write_text("Mu\u0308ller b\nb c\n")
    main([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")])
    printed = capsys.readouterr()
    assert "same 2, same order           2" in printed.out
    assert "names matched to" in printed.err


def test_output_with_answers(
    lists: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "key.json").write_text(json.dumps(KEY))
    out = tmp_path / "c.json"
    main([*lists, "--answers", str(tmp_path / "key.json"), "--json", str(out)])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["all", "4", "2", "0", "1", "1"] in lines
    assert ["abnormal", "2", "0", "0", "1", "1"] in lines
    assert ["all", "R@1", "50.00", "75.00", "+25.00", "[+0.00,", "+75.00]"] in lines
    assert ["line", "2", "A", "a", "B", "b", "right:", "b"] in lines
    figures = json.loads(out.read_text())
    assert figures["same_first"] == 2
    assert figures["b"]["all"]["R@1"] == 75


def test_query_order_names_the_lines(
    lists: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "key.json").write_text(json.dumps(dict(reversed(KEY.items()))))
    (tmp_path / "order.txt").write_text("1\n2\n3\n4\n")
    answers = ["--answers", str(tmp_path / "key.json")]
    main([*lists, *answers, "--query_order", str(tmp_path / "order.txt")])
    ordered = capsys.readouterr().out.split()
    query = tmp_path / "query.json"
    query.write_text("".join(f'{{"query_index": "{n}", "caption": "c"}}\n' for n in "1234"))
    main([*lists, *answers, "--annotation", str(query)])
    assert capsys.readouterr().out.split() == ordered
    with pytest.raises(InputError, match="--query_order: expected --answers"):
        main([*lists, "--query_order", str(tmp_path / "order.txt")])


def test_lists_of_unequal_length_are_refused(lists: list[str], tmp_path: Path) -> None:
    write_ranked_list(tmp_path / "b.txt", B[:3])
    with pytest.raises(InputError, match=r"b\.txt: expected 4 lines as in .*a\.txt, found 3"):
        main(lists)


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="needs the published lists of ../shared")
def test_published_lists() -> None:
    lhp = read_ranked_list(PUBLISHED / "score_beit3_reproduce.txt")
    clip = read_ranked_list(PUBLISHED / "score_clip_reproduce.txt")
    found = compare(lhp, clip)
    assert found.lines == 1978
    assert found.distinct_first[0] == 1746  # distinct first images of the published list


def test_an_output_cannot_replace_a_list(lists: list[str]) -> None:
    with pytest.raises(InputError, match=r"is the file of the argument B\.txt: it would be"):
        main([*lists, "--json", lists[1]])
