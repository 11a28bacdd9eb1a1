"""Encode texts for a search, and check how the vectors of an encoder are compared.

Shape letters: `n` texts, `D` width of the vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pab.core.errors import InputError
from pab.core.notices import notice
from pab.data.json_lines import shortened
from pab.data.wordpiece import Tokenizer
from pab.scoring.encoder import Encoder
from pab.scoring.encoding import BatchEncoder

FEWEST_WORDS = 10  # shorter texts are not checked: each check encodes the text again


def text_vectors(encoder: Encoder, texts: Sequence[str]) -> Tensor:
    """Encode texts, float32 [n, D]; whether a text is accepted does not depend on the others.

    A member with BERT's tokenizer rejects captions of mostly unknown words, all together. In a
    search, each text is therefore encoded alone.

    Raises:
        InputError: the encoder rejects a text.
    """
    if not isinstance(getattr(encoder, "tokenizer", None), Tokenizer):
        return encoder.encode_texts(texts)
    found = []
    for text in texts:
        try:
            found.append(encoder.encode_texts([text]))
        except InputError as error:
            item = f"text {shortened(text)}"
            raise InputError(error.where, error.problem, item=item, todo=error.todo) from error
    return torch.cat(found)


def report_ignored_ends(encoders: Mapping[str, Encoder], texts: Sequence[str]) -> None:
    """Print a notice for each text that is longer than a member's token limit.

    Tokenizers cut such a text silently. A text without its last words then has the same vector.

    Args:
        encoders: name of each member -> its encoder.
        texts: texts that the encoders accept.
    """
    for text in dict.fromkeys(texts):
        # Words of punctuation alone may not be read at all.
        words = [word for word in text.split() if any(map(str.isalnum, word))]
        if len(words) < FEWEST_WORDS:
            continue
        for name, encoder in encoders.items():
            count = _words_read(encoder, words)
            if count < len(words):
                read = f"member {name} reads only its first {count} of {len(words)} words"
                notice(f"query {shortened(text)}", f"{read}: the rest is ignored")


def _words_read(encoder: Encoder, words: Sequence[str]) -> int:
    """Return the smallest number of first words that have the vector of all words."""

    def vector(count: int) -> Tensor | None:
        try:
            return encoder.encode_texts([" ".join(words[:count])])
        except InputError:  # mostly unknown words
            return None

    whole, low, high = vector(len(words)), 0, len(words)
    middle = high - 1  # most texts are read to their end
    while whole is not None and low + 1 < high:
        part = vector(middle)
        equal = part is not None and torch.equal(part, whole)
        low, high = (low, middle) if equal else (middle, high)
        middle = (low + high) // 2
    return high


def has_one_vector(encoder: Encoder) -> bool:
    """Return true if an encoder compares by the dot product of one vector per image.

    An encoder that overrides ``similarity`` with a dot product sets the attribute
    ``compares_by_dot_product``.
    """
    if type(encoder).similarity in (Encoder.similarity, BatchEncoder.similarity):
        return True
    return bool(getattr(encoder, "compares_by_dot_product", False))


def check_ann_member(name: str, encoder: Encoder) -> None:
    """Reject a member that an approximate index cannot serve.

    Raises:
        InputError: :func:`has_one_vector` is false.
    """
    if not has_one_vector(encoder):
        problem = f"member {name} has several vectors per image"
        raise InputError("--ann", problem, todo="leave out --ann")
