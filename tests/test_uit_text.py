"""UIT's captions: WordPiece ids, hidden words, EDA (easy data augmentation)."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from copy import copy
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pab.core.errors import InputError
from pab.data.wordpiece import SPECIAL, VOCABULARY, Tokenizer
from tests.conftest import GOLDEN, SHARED, needs_golden
from uit.eda import FUNCTION_WORDS, SYNONYM_FILES, WordNet, augment, letters
from uit.make_vocabulary import make_vocabulary
from uit.masking import NO_LABEL, WordMasking, hide_blocks, hide_words, labels_at

MINI = Path(__file__).parents[1] / "checkpoints/mini/bert"
PIECES = (MINI / VOCABULARY).read_text().split("\n")
CAPTION = "A woman in a T-shirt slips backwards near the flowerbed, holding an umbrella."


OWN = Tokenizer(MINI, max_words=56, max_length=56)


@pytest.fixture
def tokenizer() -> Tokenizer:
    return OWN


# ------------------------------------------------------------------------------------- tokenizer


@needs_golden
def test_ids_of_bert(tmp_path: Path) -> None:
    words = (SHARED / "tokenizers/bert-base-uncased-vocab.txt").read_bytes()
    (tmp_path / VOCABULARY).write_bytes(words)
    own = Tokenizer(tmp_path, max_words=56, max_length=56)
    rows = json.loads((GOLDEN / "tokens.json").read_text())
    assert len(rows) > 40
    for row in rows:
        ids, mask = own.pad_rows([own.encode(row["caption"])], own.max_length)
        assert ids[0].tolist() == row["bert_ids"], row["caption"]
        assert int(mask.sum()) == row["bert_length"]


def test_only_the_first_words_are_read() -> None:
    own = Tokenizer(MINI, max_words=3, max_length=56)
    assert own.encode("a man in a red coat") == own.encode("a man in")


@pytest.mark.parametrize("text", ["[SEP] [MASK]", "[PAD]", "[CLS]", "", "\u200b", "a" * 5000])
def test_no_text_can_contain_special_tokens(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert (ids[0], ids[-1]) == (tokenizer.cls, tokenizer.sep)
    special = {tokenizer.pad, tokenizer.cls, tokenizer.sep, tokenizer.mask}
    assert not special & set(ids[1:-1])
    assert len(ids) <= tokenizer.max_length


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (None, "vocab.txt"),
        (["[UNK]", "a"], r"no \[PAD\]"),
        (["a", *SPECIAL], "first piece"),
        ([*SPECIAL, "a", "a"], "line 7"),
        ([*SPECIAL], r"every caption would be \[UNK\]"),
        ([*SPECIAL, "Man", "##s", "1"], r"every caption would be \[UNK\]"),
    ],
)
def test_invalid_vocabularies_are_refused(
    tmp_path: Path, lines: list[str] | None, expected: str
) -> None:
    if lines is not None:
        (tmp_path / VOCABULARY).write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match=expected):
        Tokenizer(tmp_path, 56, 56)


def test_a_vocabulary_of_other_words(tmp_path: Path) -> None:
    (tmp_path / VOCABULARY).write_text("\n".join([*SPECIAL, "katze", "hund"]) + "\n")
    own = Tokenizer(tmp_path, 56, 56)
    own.check_known([own.encode("katze hund katze")])
    with pytest.raises(InputError, match=r"3 of 4 pieces"):
        own.check_known([own.encode("a man falls katze")])


def test_making_a_vocabulary(tmp_path: Path) -> None:
    captions = [CAPTION, "A man falls off a bicycle."] * 3
    found = make_vocabulary(captions, tmp_path, 80)
    pieces = (tmp_path / VOCABULARY).read_text().split()
    assert pieces[: len(SPECIAL)] == list(SPECIAL)
    assert len(pieces) == found <= 80
    own = Tokenizer(tmp_path, 56, 56)
    assert own.unk not in own.encode(CAPTION)
    make_vocabulary(captions, tmp_path / "again", 80)
    assert (tmp_path / "again" / VOCABULARY).read_text().split() == pieces


# --------------------------------------------------------------------------------- hidden words


def words_of(ids: list[int]) -> list[set[int]]:
    """Return the positions of each word's pieces, computed from the vocabulary file."""
    words: list[set[int]] = []
    for position, i in list(enumerate(ids))[1:-1]:
        if PIECES[i].startswith("##"):
            words[-1].add(position)
        else:
            words.append({position})
    return words


@given(st.integers(0, 2**32), st.integers(1, 40))
@settings(max_examples=300, deadline=None)
def test_hidden_pieces_are_whole_words(seed: int, count: int) -> None:
    draw = Random(seed)
    vocabulary = ["umbrella", "xylophone", "man", "unbelievable", "coat", "zigzagging", "a", ","]
    ids = OWN.encode(" ".join(draw.choice(vocabulary) for _ in range(count)))
    before = list(ids)
    masking = WordMasking()
    hidden, chosen = hide_words(ids, OWN, masking, draw)
    assert ids == before
    real = len(ids) - 2
    assert chosen == sorted(set(chosen))
    assert all(1 <= position <= real for position in chosen)
    assert len(chosen) <= min(10, max(1, round(0.25 * real)))
    for word in words_of(ids):
        assert word <= set(chosen) or not word & set(chosen)
    assert all(hidden[i] == ids[i] for i in range(len(ids)) if i not in chosen)


def test_shares_of_the_masked_language_model(tokenizer: Tokenizer) -> None:
    caption = "A man in a red coat is sitting near a bicycle on the road in the park, in the rain."
    ids, draw = tokenizer.encode(caption), Random(0)
    real, cap = len(ids) - 2, round(0.25 * (len(ids) - 2))
    kinds: Counter[str] = Counter()
    where: Counter[int] = Counter()
    total = 0
    for _ in range(10_000):
        hidden, chosen = hide_words(ids, tokenizer, WordMasking(), draw)
        total += len(chosen)
        where.update(chosen)
        for position in chosen:
            new = hidden[position]
            special = new in (tokenizer.pad, tokenizer.cls, tokenizer.sep, tokenizer.unk)
            assert not special
            kinds[
                "mask" if new == tokenizer.mask else "same" if new == ids[position] else "other"
            ] += 1
    assert set(where) == set(range(1, real + 1))  # every piece is hidden at least once
    assert total / 10_000 == pytest.approx(cap, rel=0.05)
    assert kinds["mask"] / total == pytest.approx(0.8, abs=0.01)
    assert kinds["same"] / total == pytest.approx(0.1, abs=0.01)
    assert kinds["other"] / total == pytest.approx(0.1, abs=0.01)


def test_runs_of_words(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a man in a red coat and a hat is near a car in a park at night")
    always = WordMasking(share=0.2, ngram_share=1.0)
    never = WordMasking(share=0.2, ngram_share=0.0)

    def neighbours(masking: WordMasking) -> int:
        draw, found = Random(1), 0
        for _ in range(500):
            chosen = hide_words(ids, tokenizer, masking, draw)[1]
            found += sum(b - a == 1 for a, b in pairwise(chosen))
        return found

    assert neighbours(always) > 2 * neighbours(never)


def test_a_word_longer_than_the_limit_is_not_hidden(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("zigzagging")
    assert len(ids) > 4  # several pieces, of which one may be hidden
    assert hide_words(ids, tokenizer, WordMasking(), Random(0)) == (ids, [])


def test_labels() -> None:
    positions, labels = labels_at([[1, 5, 6, 2], [1, 7, 2]], [[1, 2], []], 3)
    assert positions.tolist() == [[1, 2, 0], [0, 0, 0]]
    assert labels.tolist() == [[5, 6, NO_LABEL], [NO_LABEL] * 3]


@pytest.mark.parametrize(("blocks", "ratio", "hidden"), [(7, 0.5, 25), (4, 0.5, 8), (4, 0.0, 0)])
def test_hidden_blocks(blocks: int, ratio: float, hidden: int) -> None:
    mask = hide_blocks(blocks, ratio, Random(0))
    assert mask.shape == (blocks, blocks)
    assert set(mask.flatten().tolist()) <= {0.0, 1.0}
    assert int(mask.sum()) == hidden
    if hidden:
        assert not mask.equal(hide_blocks(blocks, ratio, Random(1)))


# ------------------------------------------------------------------------------------------- EDA


class FewSynonyms:
    """Synonyms of two words only."""

    def of(self, word: str) -> list[str]:
        return {"woman": ["adult female", "lady"], "slips": ["skids"]}.get(word, [])


@given(st.text(max_size=80), st.integers(0, 2**32), st.booleans())
@settings(max_examples=300, deadline=None)
def test_augmented_captions_hold_letters_only(text: str, seed: int, synonyms: bool) -> None:
    found = augment(text, 0.1, FewSynonyms() if synonyms else None, Random(seed))
    if letters(text):
        assert re.fullmatch(r"[a-z]+( [a-z]+)*", found)
    else:
        assert found == text


def test_operations_of_eda() -> None:
    plain = letters(CAPTION).split()
    assert "tshirt" not in plain
    assert plain[4:6] == ["t", "shirt"]
    found = [augment(CAPTION, 0.1, FewSynonyms(), Random(seed)).split() for seed in range(400)]
    kinds = Counter(
        "swap" if sorted(words) == sorted(plain) else
        "synonym" if {"lady", "female", "skids"} & set(words) else
        "delete"
        for words in found
    )  # fmt: skip
    assert set(kinds) == {"swap", "synonym", "delete"}
    assert 150 < kinds["synonym"] < 250  # two of four operations use synonyms
    replaced = [words for words in found if "skids" in words and "slips" not in words]
    inserted = [words for words in found if "skids" in words and "slips" in words]
    assert replaced
    assert inserted
    without = [augment(CAPTION, 0.1, None, Random(seed)).split() for seed in range(200)]
    assert all(set(words) <= set(plain) for words in without)


def test_deletion_never_deletes_everything() -> None:
    assert all(augment("a man", 1.0, None, Random(seed)) for seed in range(50))


def test_function_words_get_no_synonyms() -> None:
    class Everything:
        def of(self, word: str) -> list[str]:
            return ["x" + word]

    for seed in range(100):
        words = augment("the man is in a red coat", 0.5, Everything(), Random(seed)).split()
        assert not {"x" + word for word in FUNCTION_WORDS} & set(words)


def test_missing_wordnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    with pytest.raises(InputError, match="no_synonyms"):
        WordNet(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "corpora" / "wordnet").mkdir(parents=True)
    monkeypatch.setattr(nltk.data, "path", [str(elsewhere)])
    with pytest.raises(
        InputError, match=f"{tmp_path}/corpora/wordnet: WordNet's files are missing"
    ):
        WordNet(tmp_path)  # does not use the files of NLTK's search path


def small_wordnet(folder: Path) -> None:
    """Write the files of a WordNet with one synset: bike and bicycle."""
    folder.mkdir(parents=True)
    for name in (*SYNONYM_FILES, "index.sense", "cntlist.rev"):
        (folder / name).write_text("")
    (folder / "lexnames").write_text("00\tnoun.artifact\t1\n")
    header = "  1 a line of the licence\n"
    offset = f"{len(header):08}"
    synset = "00 n 02 bike 0 bicycle 0 000 | a vehicle"
    (folder / "data.noun").write_text(f"{header}{offset} {synset}\n")
    words = [f"{word} n 1 0 1 0 {offset}  \n" for word in ("bicycle", "bike")]
    (folder / "index.noun").write_text(header + "".join(words))


@pytest.mark.parametrize("is_zip", [False, True])
def test_a_folder_with_wordnet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_zip: bool
) -> None:
    """NLTK's downloader leaves the archive packed in the folder of a user without root rights."""
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    small_wordnet(tmp_path / "made" / "wordnet")
    corpora = tmp_path / "nltk" / "corpora"
    if is_zip:
        shutil.make_archive(str(corpora / "wordnet"), "zip", tmp_path / "made")
    else:
        shutil.copytree(tmp_path / "made" / "wordnet", corpora / "wordnet")
    words = WordNet(tmp_path / "nltk")
    assert words.of("bike") == ["bicycle"]
    assert words.of("person") == []
    assert len(words.fingerprint()) == 64
    copied = copy(words)  # keeps the picklable state, as for a loader's process
    assert copied.of("bicycle") == ["bike"]


def test_the_fingerprint_of_wordnet_depends_on_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nltk
    from nltk.corpus.reader.api import CorpusReader

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])  # the only folder that NLTK reads

    def fingerprint(folder: Path) -> str:
        words = WordNet.__new__(WordNet)
        words._reader = CorpusReader(str(folder), SYNONYM_FILES)
        return words.fingerprint()

    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for file in SYNONYM_FILES:
            (tmp_path / name / file).write_text(file)
    assert len(SYNONYM_FILES) == 12
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "two")
    (tmp_path / "two" / "verb.exc").write_text("other")
    assert fingerprint(tmp_path / "one") != fingerprint(tmp_path / "two")


def test_installed_wordnet() -> None:
    try:
        words = WordNet()
    except InputError as error:
        pytest.skip(f"WordNet's data not found: {error}")
    assert "bike" in words.of("bicycle")
    assert words.of("bicycle") == sorted(words.of("bicycle"))
    assert words.of("qqqq") == []
    assert len(words.fingerprint()) == 64
