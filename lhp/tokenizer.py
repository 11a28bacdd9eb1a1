"""Tokenizer of BEiT-3: a SentencePiece model with the ids of XLM-RoBERTa.

The published models use `beit3.spm` (64,000 pieces). The ids 0 to 3 are `<s>`, `<pad>`, `</s>` and
`<unk>`. These four replace SentencePiece's first three entries (`<unk>`, `<s>`, `</s>`), so every
other id is SentencePiece's plus one. Plain `sentencepiece` is used because the tokenizer class of
recent `transformers` releases returns different ids for unusual Unicode.
"""

from __future__ import annotations

from pathlib import Path

import sentencepiece
import torch
from torch import Tensor

from pab.core.errors import InputError
from pab.core.files import existing_file

BOS, PAD, EOS, UNK = 0, 1, 2, 3
MAX_TEXT_LENGTH = 64  # ids, including both special tokens; from the published recipe


class Tokenizer:
    """Convert captions to ids.

    Args:
        path: SentencePiece model file.
        max_length: maximum ids per caption, including both special tokens.

    Raises:
        InputError: the file is missing or not a SentencePiece model with ``<unk>`` as piece 0.
    """

    def __init__(self, path: str | Path, max_length: int = MAX_TEXT_LENGTH) -> None:
        self.path = existing_file(path, "a SentencePiece model (beit3.spm)")
        self.max_length = max_length
        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            self._pieces.LoadFromSerializedProto(self.path.read_bytes())
        except RuntimeError as error:
            raise InputError(path, "expected a SentencePiece model, found another file") from error
        if self._pieces.unk_id() != 0:
            raise InputError(path, "expected <unk> as piece 0, as the ids of fairseq require")

    @property
    def vocab_size(self) -> int:
        """Largest possible id plus one."""
        return self._pieces.GetPieceSize() + 1

    def encode(self, caption: str) -> list[int]:
        """Return the ids of a caption with both special tokens, truncated to ``max_length``."""
        ids = [i + 1 if i else UNK for i in self._pieces.EncodeAsIds(caption)]
        return [BOS, *ids[: self.max_length - 2], EOS]

    def batch(self, captions: list[str], *, pad_to: int | None = None) -> tuple[Tensor, Tensor]:
        """Encode and pad B captions.

        Args:
            captions: B captions.
            pad_to: N, ids per row; None uses the length of the longest caption.

        Returns:
            ids, int64 [B, N], and padding mask, int64 [B, N] (1 = padding).
        """
        return pad_batch([self.encode(caption) for caption in captions], pad_to)


def pad_batch(rows: list[list[int]], pad_to: int | None = None) -> tuple[Tensor, Tensor]:
    """Pad B rows to N ids each; return ids [B, N] and padding mask [B, N] (1 = padding)."""
    width = pad_to or max(map(len, rows))
    ids = torch.full((len(rows), width), PAD, dtype=torch.int64)
    mask = torch.ones((len(rows), width), dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 0
    return ids, mask
