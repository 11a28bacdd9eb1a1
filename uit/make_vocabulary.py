"""Create a small WordPiece vocabulary from captions: `python -m uit.make_vocabulary`.

Use it to train a model from scratch on captions with few distinct words; models that start from
BERT need BERT's vocabulary. Frequent words become single pieces. Any other word is split into its
longest known prefix, followed by single characters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from pab.core.errors import InputError, run_cli
from pab.core.files import write_text
from pab.core.progress import progress
from pab.data.vocabulary import vocabulary_command
from pab.data.wordpiece import CONTINUES, SPECIAL, VOCABULARY


def make_vocabulary(captions: Iterable[str], folder: Path, vocab_size: int) -> int:
    """Write ``FOLDER/vocab.txt``: special tokens, characters, then words by frequency.

    Args:
        captions: captions whose words are counted.
        folder: output folder, created if missing.
        vocab_size: maximum number of pieces.

    Returns:
        Number of pieces written.

    Raises:
        InputError: special tokens and characters alone exceed the limit, or the file cannot be
            written.
    """
    normalizer, split = BertNormalizer(lowercase=True), BertPreTokenizer()
    counts: Counter[str] = Counter()
    for caption in progress(captions, "counting words", "captions"):
        split_words = split.pre_tokenize_str(normalizer.normalize_str(caption))
        counts.update(word for word, _ in split_words)
    characters = sorted({character for word in counts for character in word})
    vocabulary = [*SPECIAL, *characters, *(CONTINUES + c for c in characters if c.isalnum())]
    if len(vocabulary) > vocab_size:
        raise InputError(
            "--vocab_size",
            f"expected at least {len(vocabulary)} (special tokens, characters), found {vocab_size}",
        )
    by_count = sorted(counts, key=lambda word: (-counts[word], word))
    words = [word for word in by_count if len(word) > 1]
    vocabulary += words[: vocab_size - len(vocabulary)]
    write_text(folder / VOCABULARY, "".join(f"{piece}\n" for piece in vocabulary))
    return len(vocabulary)


def main(argv: list[str] | None = None) -> None:
    """Read the command line and write the vocabulary."""
    vocabulary_command(
        make_vocabulary, argv, prog="python -m uit.make_vocabulary",
        out="folder for vocab.txt", pieces=2000,
    )  # fmt: skip


if __name__ == "__main__":
    run_cli(main)
