"""Easy data augmentation (EDA) of captions.

Source: Wei and Zou, "EDA: Easy Data Augmentation Techniques for Boosting Performance on Text
Classification Tasks" (arXiv 1901.11196). One of four operations is chosen at random: replace words
with synonyms, insert synonyms, swap words, or delete words.

Synonyms come from WordNet through NLTK, which does not include WordNet's files. Missing files
raise an error. Without synonyms (`--no_synonyms`), EDA only swaps or deletes words.
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from pathlib import Path
from random import Random
from typing import Any, Protocol

from pab.core.errors import InputError

# WordNet has no suitable synonyms for function words ("in" is an inch, "he" is helium).
_FUNCTION_WORDS = """
    a about above after again against all am an and any are as at be because been before being
    below between both but by can could did do does doing down during each few for from further had
    has have having he her here hers herself him himself his how i if in into is it its itself just
    me might more most must my myself no nor not now of off on once only or other our ours out over
    own same shall she should so some such than that the their theirs them themselves then there
    these they this those through to too under until up very was we were what when where which while
    who whom why will with without would you your yours"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
SYNONYM_FILES = tuple(  # WordNet's files, by part of speech
    name
    for part in ("adj", "adv", "noun", "verb")
    for name in (f"data.{part}", f"index.{part}", f"{part}.exc")
)
GET_WORDNET = (
    "download them with python -m nltk.downloader wordnet, set --wordnet to the folder that holds "
    "corpora/wordnet, or disable synonyms with --no_synonyms"
)


class Synonyms(Protocol):
    """Source of synonyms."""

    def of(self, word: str) -> list[str]:
        """Return synonyms (words or phrases) in lower-case letters and spaces, sorted."""


class WordNet:
    """Synonyms from WordNet: all lemmas of all senses of a word.

    Each process opens its own files, because loader workers must not share file positions.

    Args:
        folder: NLTK data folder with ``corpora/wordnet``; None uses NLTK's search path.

    Raises:
        InputError: the files are missing or cannot be read.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self._folder = folder
        self._process: int | None = os.getpid()
        self._reader = self._open()
        self._known: dict[str, list[str]] = {}

    def _open(self) -> Any:
        import nltk
        from nltk.corpus.reader.wordnet import WordNetCorpusReader

        try:
            if self._folder is not None and str(self._folder) not in nltk.data.path:
                nltk.data.path.append(str(self._folder))  # NLTK refuses files of other folders
            folders = nltk.data.path if self._folder is None else [str(self._folder)]
            try:
                root = nltk.data.find("corpora/wordnet", folders)
            except LookupError:  # NLTK's downloader may leave the archive as it is
                root = nltk.data.find("corpora/wordnet.zip/wordnet/", folders)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # other languages are not needed
                reader = WordNetCorpusReader(root, None)
            reader.synsets("person")
        except (LookupError, OSError) as error:
            # NLTK's own message for missing data is very long.
            reason = f"cannot be read: {error}" if isinstance(error, OSError) else "are missing"
            where = f"{self._folder or 'NLTK data'}/corpora/wordnet"
            raise InputError(where, f"WordNet's files {reason}", todo=GET_WORDNET) from error
        return reader

    def of(self, word: str) -> list[str]:
        """See :class:`Synonyms`."""
        if self._process != os.getpid():
            self._process, self._reader = os.getpid(), self._open()
        if word not in self._known:
            meanings = self._reader.synsets(word)
            lemmas = {letters(lemma) for meaning in meanings for lemma in meaning.lemma_names()}
            self._known[word] = sorted(lemmas - {word, ""})
        return self._known[word]

    def fingerprint(self) -> str:
        """Return the SHA-256 of the synonym files, as 64 hex digits."""
        digest = hashlib.sha256()
        for name in SYNONYM_FILES:
            with self._reader.abspath(name).open() as file:  # may be inside NLTK's zip archive
                digest.update(file.read())
        return digest.hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {"_folder": self._folder, "_process": None, "_reader": None, "_known": {}}


def letters(text: str) -> str:
    """Convert to lower case, and replace each run of characters other than a to z with a space.

    Apostrophes are removed, so that "man's" stays one word.
    """
    return " ".join(re.sub(r"[^a-z]+", " ", re.sub("['’]", "", text.lower())).split())


def augment(caption: str, share: float, synonyms: Synonyms | None, draw: Random) -> str:
    """Apply one random operation to a caption.

    Args:
        caption: any text.
        share: maximum number of replaced words, insertions or swaps as a fraction of the words (one
            is always allowed), and the probability of deleting a word. All occurrences of a
            replaced word are replaced.
        synonyms: source of synonyms; None disables the two operations that need them.
        draw: random generator.

    Returns:
        Letters a to z and spaces; the unchanged caption if it has none of these letters.
    """
    words = letters(caption).split()
    if not words:
        return caption
    count = max(1, int(share * len(words)))
    operation = draw.randrange(4 if synonyms is not None else 2)
    if operation == 0:
        words = _swap(words, count, draw)
    elif synonyms is None or operation == 1:
        words = [word for word in words if draw.random() >= share] or [draw.choice(words)]
    elif operation == 2:
        new = dict(_with_synonyms(words, count, synonyms, draw))
        words = [new.get(word, word) for word in words]
    else:
        for _, synonym in _with_synonyms(words, count, synonyms, draw):
            words.insert(draw.randrange(len(words) + 1), synonym)
    return " ".join(words)


def _swap(words: list[str], count: int, draw: Random) -> list[str]:
    words = list(words)
    if len(words) > 1:
        for _ in range(count):
            i, j = draw.sample(range(len(words)), 2)
            words[i], words[j] = words[j], words[i]
    return words


def _with_synonyms(
    words: list[str], count: int, synonyms: Synonyms, draw: Random
) -> list[tuple[str, str]]:
    """Choose up to ``count`` distinct content words with synonyms, and a synonym for each."""
    candidates = sorted(set(words) - FUNCTION_WORDS)
    draw.shuffle(candidates)
    found: list[tuple[str, str]] = []
    for word in candidates:
        others = synonyms.of(word)
        if others:
            found.append((word, draw.choice(others)))
        if len(found) == count:
            break
    return found
