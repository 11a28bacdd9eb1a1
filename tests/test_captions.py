"""Captions without visible characters are rejected; all others yield tokens in every tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lhp.tokenizer
import pab.data.wordpiece
from lhp.train_tokenizer import train_tokenizer
from pab.data.captions import has_visible
from tests.conftest import SHARED
from uit.eda import augment
from uit.make_vocabulary import make_vocabulary

EMPTY = {
    "zero width space": "\u200b",
    "word joiner and blanks": "\u200b\u2060 ",
    "control characters": "\x00\x07\x1f",
    "soft hyphens": "\xad\xad",
    "blanks of all widths": "\u00a0\u2003\u3000\u202f",
    "line separators": "\u2028\u2029",
    "a lone accent": "\u0301",
    "variation selectors": "\ufe0f\ufe0e",
    "replacement characters": "\ufffd\ufffd",
    "private use": "\ue000",
    "Hangul fillers": "\u3164\u115f",
    "Braille blank": "\u2800",
    "byte-order mark": "\ufeff",
    "entity of a blank": "&nbsp;",
    "entity of an entity": "&amp;#8203;",
    "terminal colours": "\x1b[31m\x1b[0m",
    "blank of a broken encoding": "Â\xa0",
    "visible only from the 51st word on": "\u200b " * 50 + "man",
}
SHOWN = [
    "a man", "...", "7", "é", "e\u0301", "男が倒れる", "رجل يسقط", "🚲", "👨‍👩‍👧", "&",
    "AT&T", "&lt;b&gt;",
    "\u200ba\u200b", "\x1b[31mred\x1b[0m", "<s> [SEP]", "½", "ﬁ", "¨", " " * 300 + "man",
    "\u200b " * 49 + "man", "x" * 5000, "'s", "\U0001fae8",
]  # fmt: skip


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable[[str], int]]:
    """Map a tokenizer's name to a function that counts tokens, special tokens excluded."""
    from open_clip.tokenizer import SimpleTokenizer

    folder = tmp_path_factory.mktemp("tokenizers")
    captions = ["a man in a red coat is walking in the park", "a woman falls on the street"] * 8
    pieces, words = folder / "small.spm", folder / "bert"
    train_tokenizer(captions, pieces, 40)
    make_vocabulary(captions, words, 200)
    made = {
        "SentencePiece": lhp.tokenizer.Tokenizer(pieces),
        "BERT": pab.data.wordpiece.Tokenizer(words, 50, 50),
    }
    if (SHARED / "tokenizers").is_dir():
        published = folder / "bert-base-uncased"
        published.mkdir()
        text = (SHARED / "tokenizers/bert-base-uncased-vocab.txt").read_text(encoding="utf-8")
        (published / "vocab.txt").write_text(text, encoding="utf-8")
        made["BERT, published"] = pab.data.wordpiece.Tokenizer(published, 50, 50)
        made["BEiT-3"] = lhp.tokenizer.Tokenizer(SHARED / "tokenizers/beit3.spm")
    counts: dict[str, Callable[[str], int]] = {
        name: lambda caption, one=one: len(one.encode(caption)) - 2  # type: ignore[misc]
        for name, one in made.items()
    }
    clip = SimpleTokenizer()
    return {**counts, "CLIP": lambda caption: len(clip.encode(caption))}


@pytest.mark.parametrize("what", EMPTY)
def test_a_caption_without_visible_characters_is_rejected(what: str) -> None:
    assert not has_visible(EMPTY[what])
    assert has_visible("a man " + EMPTY[what])


@pytest.mark.parametrize("caption", SHOWN)
def test_odd_captions_with_visible_characters(
    caption: str, encoders: dict[str, Callable[[str], int]]
) -> None:
    assert has_visible(caption)
    assert [name for name, count in encoders.items() if count(caption) < 1] == []


ODD = st.text(
    st.sampled_from("aé0 .&;#x8203\u200b\u0301\ufffd\xa0Â\x1b[m\u3164男👨\u2028\x00\u2581nbsp")
    | st.characters(exclude_categories=["Cs"]),
    max_size=12,
)


@settings(max_examples=400, deadline=None)
@given(caption=ODD)
def test_accepted_captions_yield_a_token_in_every_tokenizer(
    encoders: dict[str, Callable[[str], int]], caption: str
) -> None:
    if has_visible(caption):
        assert [name for name, count in encoders.items() if count(caption) < 1] == []


class _Synonyms:
    """Thesaurus with one synonym for every word."""

    def of(self, word: str) -> list[str]:
        return ["other words"]


@settings(max_examples=200, deadline=None)
@given(caption=ODD, seed=st.integers(0, 1000), share=st.sampled_from([0.1, 0.9, 1.0]))
def test_an_augmented_caption_is_never_empty(caption: str, seed: int, share: float) -> None:
    if has_visible(caption):
        for synonyms in (None, _Synonyms()):
            assert has_visible(augment(caption, share, synonyms, Random(seed)))


def test_captions_of_a_file_are_checked(tmp_path: Path) -> None:
    from pab.core.errors import InputError
    from pab.data.annotations import read_retrieval

    path = tmp_path / "query.json"
    path.write_text('{"query_index": "1", "caption": "&nbsp;"}\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"line 1: field 'caption': .*a visible character"):
        read_retrieval(path)
