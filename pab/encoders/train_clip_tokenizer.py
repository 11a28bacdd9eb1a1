"""Train a tokenizer for a small CLIP model: `python -m pab.encoders.train_clip_tokenizer`.

OpenAI's vocabulary has 49,408 tokens, and their embeddings would be larger than a small model.
The command writes the tokenizer files that OpenCLIP expects in a model folder.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import NFC, Lowercase, Sequence
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from pab.core.errors import InputError, run_cli
from pab.core.files import write_text
from pab.core.progress import write_line
from pab.data.vocabulary import vocabulary_command

START, END = "<start_of_text>", "<end_of_text>"
BYTES = 256


def train_clip_tokenizer(captions: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train byte-pair encoding on lower-cased captions; CLIP's two special tokens come last.

    The end token has the largest id, because OpenCLIP finds it by this property. It is also the
    padding token, because the model ignores ids after the first end token.

    Args:
        captions: training text.
        vocab_size: maximum number of tokens, including the two special tokens.

    Raises:
        InputError: ``vocab_size`` is less than the number of bytes and special tokens.
    """
    if vocab_size < BYTES + 2:
        raise InputError("--vocab_size", f"must be at least {BYTES + 2}, found {vocab_size}")
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = Sequence([NFC(), Lowercase()])
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)
    trainer = BpeTrainer(
        vocab_size=vocab_size - 2, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    write_line(f"training a tokenizer of at most {vocab_size} tokens")
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.add_special_tokens([START, END])
    ends = [(word, tokenizer.token_to_id(word)) for word in (START, END)]
    tokenizer.post_processor = TemplateProcessing(single=f"{START} $A {END}", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=START, eos_token=END, pad_token=END
    )


def write_clip_tokenizer(captions: Iterable[str], folder: Path, vocab_size: int) -> int:
    """Write the files of :func:`train_clip_tokenizer` to a folder; return the number of tokens."""
    made = train_clip_tokenizer(captions, vocab_size)
    with TemporaryDirectory() as temporary:
        for name in made.save_pretrained(temporary):
            file = Path(name)
            write_text(folder / file.name, file.read_text(encoding="utf-8"))
    return len(made)


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and train a tokenizer."""
    vocabulary_command(
        write_clip_tokenizer, argv, prog="python -m pab.encoders.train_clip_tokenizer",
        out="model folder that receives the tokenizer files", pieces=1500,
    )  # fmt: skip


if __name__ == "__main__":
    run_cli(main)
