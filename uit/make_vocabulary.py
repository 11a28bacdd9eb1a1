"""Make a small WordPiece vocabulary from captions: `python -m uit.make_vocabulary`.

For models trained from scratch on few different words; those that start from BERT take BERT's own
vocabulary. Frequent words become pieces of their own, all others are spelt in single characters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from pab.config import CommandParser
from pab.errors import InputError, run_cli
from pab.files import write_text
from pab.training_set import TrainingSet
from pab.wordpiece import CONTINUES, SPECIAL, VOCABULARY


def make_vocabulary(captions: Iterable[str], folder: Path, pieces: int) -> Path:
    """Write ``FOLDER/vocab.txt``: special pieces, characters, words from the most frequent on.

    Args:
        captions: text to count words in.
        folder: is made where it is missing.
        pieces: of the vocabulary at most.

    Raises:
        InputError: the characters alone are more.
    """
    normalise, split = BertNormalizer(lowercase=True), BertPreTokenizer()
    counts: Counter[str] = Counter()
    for caption in captions:
        split_words = split.pre_tokenize_str(normalise.normalize_str(caption))
        counts.update(word for word, _ in split_words)
    characters = sorted({character for word in counts for character in word})
    vocabulary = [*SPECIAL, *characters, *(CONTINUES + c for c in characters if c.isalnum())]
    if len(vocabulary) > pieces:
        raise InputError(
            "--pieces", f"{pieces} are less than the {len(vocabulary)} that characters alone need"
        )
    by_count = sorted(counts, key=lambda word: (-counts[word], word))
    words = [word for word in by_count if len(word) > 1]
    vocabulary += words[: pieces - len(vocabulary)]
    path = folder / VOCABULARY
    write_text(path, "".join(f"{piece}\n" for piece in vocabulary))
    return path


def main(argv: list[str] | None = None) -> None:
    """Read the command line and make the vocabulary."""
    parser = CommandParser(
        prog="python -m uit.make_vocabulary", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--data_path", type=Path, required=True, help="root of PAB-shaped data")
    parser.add_argument("--out", type=Path, required=True, help="folder for vocab.txt")
    parser.add_argument("--pieces", type=int, default=2000, help="at most (default 2000)")
    args = parser.parse_args(argv)
    pairs = TrainingSet.open(args.data_path)
    path = make_vocabulary((pair.caption for pair in pairs), args.out, args.pieces)
    print(f"pieces from {len(pairs)} captions -> {path}")


if __name__ == "__main__":
    run_cli(main)
