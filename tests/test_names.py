"""Spellings of names: equivalent ones match, and distinct names are never merged."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pab.core.errors import InputError
from pab.data.names import one_spelling, plain_names, respelt, without_ending


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("a.jpg", "a"), ("a.b.JPEG", "a.b"), ("a.heic", "a"), ("a", "a"), ("a.b", "a.b"),
        ("a.pt", "a.pt"), (".jpg", ".jpg"), ("a.jpg.png", "a.jpg"), ("v1.0", "v1.0"),
        ("two words.webp", "two words"), ("folder/a.png", "folder/a"),
    ],
)  # fmt: skip
def test_extensions_are_removed(name: str, plain: str) -> None:
    assert without_ending(name) == plain


def test_names_that_differ_only_in_the_extension_are_refused() -> None:
    assert plain_names(["a.jpg", "b.png", "c"], "f") == ["a", "b", "c"]
    with pytest.raises(InputError, match=r"f: .*found 'a\.jpg' and 'a\.png'; rename one"):
        plain_names(["a.jpg", "b", "a.png"], "f")


def test_a_known_name_keeps_its_spelling(capsys: pytest.CaptureFixture[str]) -> None:
    assert respelt(["a.jpg", "b"], ["a.jpg", "b"], "f") == {"a.jpg": "a.jpg", "b": "b"}
    assert capsys.readouterr().err == ""
    assert respelt(["a", "b.png", "z"], ["a.jpg", "b"], "f") == {
        "a": "a.jpg", "b.png": "b", "z": "z",
    }  # fmt: skip
    assert capsys.readouterr().err == ""
    respelt(["Cafe\u0301.jpg", "b.png"], ["Caf\u00e9", "b"], "f")
    assert capsys.readouterr().err == (
        "note: f: names matched to the gallery in another Unicode form: 1, such as "
        "'Cafe\\u0301.jpg' to 'Caf\\xe9'\n"
    )


def test_ambiguous_names_are_not_resolved() -> None:
    known = ["a.jpg", "a.png", "b"]
    assert respelt(["a"], known, "f") == {"a": "a"}  # ambiguous, so not changed
    with pytest.raises(InputError, match=r"found 'b' and 'b\.jpg', which both match 'b'"):
        respelt(["b", "b.jpg"], known, "f")
    assert respelt(["q.jpg"], ["q"], "f", endings=False) == {"q.jpg": "q.jpg"}


@given(st.lists(st.text(st.sampled_from("eé\u0301aå\u212b1ﬁ"), min_size=1, max_size=4), max_size=6))
def test_either_unicode_form_finds_the_other(names: list[str]) -> None:
    known = sorted({unicodedata.normalize("NFC", name) for name in names})
    apart = [unicodedata.normalize("NFD", name) + ".jpg" for name in known]
    assert list(respelt(apart, known, "f").values()) == known
    assert one_spelling([*known, *apart]) == known
