"""Make a small WordPiece vocabulary from captions: `python -m uit.train_tokenizer`.

For models trained from scratch; those that start from BERT take BERT's own vocabulary.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer as WordPieceTokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.trainers import WordPieceTrainer

from pab.config import CommandParser
from pab.errors import run_cli
from pab.files import write_text
from pab.training_set import TrainingSet
from uit.tokenizer import CONTINUES, SPECIAL, UNK, VOCABULARY


def train_tokenizer(captions: Iterable[str], folder: Path, pieces: int) -> Path:
    """Write ``FOLDER/vocab.txt``.

    Args:
        captions: text to learn from.
        folder: is made where it is missing.
        pieces: of the vocabulary at most, the special ones included.
    """
    tokenizer = WordPieceTokenizer(WordPiece(unk_token=UNK))
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.train_from_iterator(
        captions,
        WordPieceTrainer(
            vocab_size=pieces, special_tokens=list(SPECIAL), continuing_subword_prefix=CONTINUES,
            show_progress=False,
        ),
    )  # fmt: skip
    path = folder / VOCABULARY
    by_id = sorted((i, piece) for piece, i in tokenizer.get_vocab().items())
    write_text(path, "".join(f"{piece}\n" for _, piece in by_id))
    return path


def main(argv: list[str] | None = None) -> None:
    """Read the command line and make the vocabulary."""
    parser = CommandParser(
        prog="python -m uit.train_tokenizer", description=main.__doc__, allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--data_path", type=Path, default=Path("data/mini"), help="data root")
    parser.add_argument("--out", type=Path, required=True, help="folder for vocab.txt")
    parser.add_argument("--pieces", type=int, default=1000, help="size of the vocabulary at most")
    args = parser.parse_args(argv)
    pairs = TrainingSet.open(args.data_path)
    path = train_tokenizer((pairs[i].caption for i in range(len(pairs))), args.out, args.pieces)
    print(path)


if __name__ == "__main__":
    run_cli(main)
