"""BEiT-3's tokenizer: ids, special tokens, truncation, padding, and training a small model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
import torch

from lhp.tokenizer import BOS, EOS, PAD, UNK, Tokenizer, pad_batch
from lhp.train_tokenizer import main, train_tokenizer
from pab.core.errors import InputError

SHARED = Path(__file__).resolve().parents[2] / "shared"
CAPTION = "A woman in a red coat is falling in the park."


def test_ids_are_sentencepieces_plus_one(tokenizer: Tokenizer, tokenizer_file: Path) -> None:
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_file))
    own = pieces.EncodeAsIds(CAPTION)
    assert 0 not in own
    assert tokenizer.encode(CAPTION) == [BOS, *(i + 1 for i in own), EOS]
    assert tokenizer.vocab_size == pieces.GetPieceSize() + 1


def test_unknown_characters_become_unk(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("A 猫 coat")
    assert UNK in ids
    assert PAD not in ids
    assert max(ids) < tokenizer.vocab_size


@pytest.mark.parametrize("text", ["<s> </s> <pad>", "</s>", "   ", "\u200b", "a" * 5000])
def test_no_text_can_contain_special_tokens(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert (ids[0], ids[-1]) == (BOS, EOS)
    assert not {BOS, PAD, EOS} & set(ids[1:-1])
    assert len(ids) <= tokenizer.max_length


def test_truncated_captions_keep_the_end_token(tokenizer_file: Path, tokenizer: Tokenizer) -> None:
    short = Tokenizer(tokenizer_file, max_length=8).encode(CAPTION)
    assert len(short) == 8
    assert short == [*tokenizer.encode(CAPTION)[:7], EOS]


def test_batches_are_padded_to_the_longest(tokenizer: Tokenizer) -> None:
    rows = [tokenizer.encode("A man"), tokenizer.encode(CAPTION)]
    ids, mask = tokenizer.batch(["A man", CAPTION])
    assert ids.dtype == mask.dtype == torch.int64
    assert ids.shape == mask.shape == (2, len(rows[1]))
    assert ids[0].tolist() == rows[0] + [PAD] * (len(rows[1]) - len(rows[0]))
    assert mask.tolist() == [[int(i >= len(row)) for i in range(len(rows[1]))] for row in rows]
    wide, wide_mask = pad_batch(rows, pad_to=64)
    assert wide.shape == (2, 64)
    assert torch.equal(wide[:, : len(rows[1])], ids)
    assert int((wide_mask == 0).sum()) == sum(map(len, rows))


def test_the_same_captions_give_the_same_model(tmp_path: Path, tiny_data: Path) -> None:
    outputs = [tmp_path / "a.spm", tmp_path / "b.spm"]
    for path in outputs:
        main(["--data_path", str(tiny_data), "--out", str(path), "--vocab_size", "60"])
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    assert Tokenizer(outputs[0]).vocab_size == 61


def test_a_vocabulary_too_large_for_the_captions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--vocab_size"):
        train_tokenizer(["one two", "two three"], tmp_path / "a.spm", 5000)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"no model at all", bytes(range(256)) * 8])
def test_files_that_are_not_a_model_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "wrong.spm"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"wrong\.spm: expected a SentencePiece model"):
        Tokenizer(path)


def test_another_order_of_special_pieces_is_refused(tmp_path: Path, tiny_data: Path) -> None:
    lines = (tiny_data / "annotation/train/pair_0.json").read_text().splitlines()
    with (tmp_path / "other.spm").open("wb") as handle:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(json.loads(line)["caption"] for line in lines),
            model_writer=handle,
            vocab_size=60,
            model_type="bpe",
            unk_id=3,
            bos_id=1,
            eos_id=2,
            pad_id=0,
            minloglevel=2,
        )
    with pytest.raises(InputError, match="piece 0"):
        Tokenizer(tmp_path / "other.spm")


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"published tokenizer not found ({SHARED})")
def test_published_model() -> None:
    tokenizer = Tokenizer(SHARED / "tokenizers" / "beit3.spm")
    assert tokenizer.vocab_size <= 64010
    assert UNK not in tokenizer.encode(CAPTION)
