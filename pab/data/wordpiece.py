"""BERT's WordPiece tokenizer for captions.

The pieces come from a `vocab.txt` as published with `bert-base-uncased`, or from
`uit.make_vocabulary`. The `tokenizers` library is used directly, without registered special tokens.
The text `[SEP]` in a caption is therefore tokenized as ordinary text, not as a separator.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer as WordPieceTokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from torch import Tensor

from pab.core.errors import InputError
from pab.core.files import existing_file, existing_folder

PAD, UNK, CLS, SEP, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
SPECIAL = (PAD, UNK, CLS, SEP, MASK)
CONTINUES = "##"  # prefix of a piece that continues a word
VOCABULARY = "vocab.txt"
MAX_UNKNOWN = 0.5  # reject the vocabulary if a larger fraction of the pieces is [UNK]


class Tokenizer:
    """Convert captions to token ids.

    Args:
        folder: folder with BERT's ``vocab.txt``.
        max_words: maximum number of words per caption, split at white space.
        max_length: maximum number of ids, including both special tokens.

    Attributes:
        pad, unk, cls, sep, mask: ids of the special tokens.
        continues: bool [vocab_size], true for pieces that continue a word.
        ordinary: int64, ids of all pieces except special tokens.

    Raises:
        InputError: the folder or ``vocab.txt`` is missing or unreadable, or the file is not the
            vocabulary of an uncased BERT.
    """

    def __init__(self, folder: str | Path, max_words: int, max_length: int) -> None:
        self.path = existing_file(
            existing_folder(folder, "the folder of BERT's vocabulary") / VOCABULARY,
            "BERT's vocabulary, one piece per line",
        )
        self.max_words, self.max_length = max_words, max_length
        pieces = _read_vocabulary(self.path)
        ids = {piece: i for i, piece in enumerate(pieces)}
        self.vocab_size = len(pieces)
        self.pad, self.unk, self.cls, self.sep, self.mask = (ids[name] for name in SPECIAL)
        self.continues = np.array([piece.startswith(CONTINUES) for piece in pieces])
        self.ordinary = np.array([i for i, piece in enumerate(pieces) if piece not in SPECIAL])
        self._tokenizer = WordPieceTokenizer(WordPiece(ids, unk_token=UNK))
        self._tokenizer.normalizer = BertNormalizer(lowercase=True)
        self._tokenizer.pre_tokenizer = BertPreTokenizer()
        self._check_a_known_word(pieces)

    def encode(self, caption: str) -> list[int]:
        """Convert a caption to ids with both special tokens, truncated to ``max_length``."""
        words = " ".join(caption.split()[: self.max_words])
        ids = self._tokenizer.encode(words, add_special_tokens=False).ids
        return [self.cls, *ids[: self.max_length - 2], self.sep]

    def pad_rows(self, rows: list[list[int]], length: int | None = None) -> tuple[Tensor, Tensor]:
        """Pad rows of ids to a batch.

        Args:
            length: length of every row; None uses the longest row.

        Returns:
            ids int64 [B, N] and mask int64 [B, N] (1: token, 0: padding) of B rows of length N.
        """
        length = length or max(map(len, rows))
        ids = torch.full((len(rows), length), self.pad, dtype=torch.int64)
        mask = torch.zeros(len(rows), length, dtype=torch.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        return ids, mask

    def check_known(self, rows: list[list[int]]) -> None:
        """Reject a vocabulary that lacks too many of the captions' words.

        Raises:
            InputError: more than :data:`MAX_UNKNOWN` of the pieces are unknown.
        """
        unknown = sum(row.count(self.unk) for row in rows)
        pieces = sum(len(row) - 2 for row in rows)
        if unknown > MAX_UNKNOWN * pieces:
            problem = f"{UNK} in this vocabulary: {unknown} of {pieces} pieces of the captions"
            todo = "use the vocabulary that the model was trained with (lower case for -uncased)"
            raise InputError(self.path, problem, todo=todo)

    def _check_a_known_word(self, pieces: list[str]) -> None:
        """Check that the longest word of the vocabulary is tokenized as itself."""
        words = (p for p in pieces if p.isascii() and p.isalpha() and p.islower())
        word = max(words, key=len, default=None)
        if word is None or self.encode(word) != [self.cls, pieces.index(word), self.sep]:
            problem = f"expected lower-case words, found none: every caption would be {UNK}"
            raise InputError(self.path, problem, todo="use the vocabulary of an uncased BERT")


def _read_vocabulary(path: Path) -> list[str]:
    try:
        pieces = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(path, f"expected UTF-8 text, found: {error}") from error
    pieces = [piece.rstrip("\r") for piece in pieces]
    if pieces and not pieces[-1]:
        pieces.pop()
    missing = [name for name in SPECIAL if name not in pieces]
    if missing:
        raise InputError(path, f"expected BERT's vocabulary, found no {missing[0]} in it")
    if pieces[0] != PAD:  # the word embedding reserves row 0 for padding
        raise InputError(path, f"expected {PAD} as the first piece, found {pieces[0]!r}")
    seen: dict[str, int] = {}
    for number, piece in enumerate(pieces, start=1):
        if piece in seen:
            problem = f"expected distinct pieces, found {piece!r} already on line {seen[piece]}"
            raise InputError(path, problem, item=f"line {number}")
        seen[piece] = number
    return pieces
