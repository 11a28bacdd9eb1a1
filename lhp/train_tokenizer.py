"""Train a small SentencePiece model on training captions: `python -m lhp.train_tokenizer`.

To train LHP from scratch on your own data, use the result instead of `beit3.spm`. The special
tokens are in the order that `lhp/tokenizer.py` expects.
"""

from __future__ import annotations

import io
from pathlib import Path

import sentencepiece

from pab.core.errors import InputError, run_cli
from pab.core.files import atomic_path
from pab.core.progress import write_line
from pab.data.vocabulary import vocabulary_command


def train_tokenizer(captions: list[str], path: Path, vocab_size: int) -> int:
    """Train a byte-pair SentencePiece model and write it; equal captions produce equal bytes.

    Returns:
        Number of pieces, which is ``vocab_size``.

    Raises:
        InputError: ``vocab_size`` is too large for the captions or too small for their characters,
            or the file cannot be written.
    """
    model = io.BytesIO()
    write_line(f"training a tokenizer of {vocab_size} pieces on {len(captions)} captions")
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(captions),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            character_coverage=1.0,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=1,
        )
    except RuntimeError as error:
        raise InputError(
            "--vocab_size", f"no model of {vocab_size} pieces can be trained ({error})"
        ) from error
    with atomic_path(path) as temporary:
        temporary.write_bytes(model.getvalue())
    return vocab_size


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and train."""
    vocabulary_command(
        train_tokenizer, argv, prog="python -m lhp.train_tokenizer",
        out="model file to write (.spm)", pieces=2000,
    )  # fmt: skip


if __name__ == "__main__":
    run_cli(main)
