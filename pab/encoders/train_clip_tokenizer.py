"""Make a small tokenizer for a CLIP from scratch: `python -m pab.encoders.train_clip_tokenizer`.

OpenAI's vocabulary has 49,408 pieces, whose vectors alone would outweigh a small model. The files
are those that OpenCLIP looks for in a model's folder.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import NFC, Lowercase, Sequence
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from pab.config import CommandParser
from pab.errors import InputError, run_cli
from pab.training_set import TrainingSet

START, END = "<start_of_text>", "<end_of_text>"
BYTES = 256


def train_clip_tokenizer(captions: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte pairs of lower-cased captions, and CLIP's two ends as the largest ids.

    The end token has the largest id because OpenCLIP looks for it there; it also pads, as in
    OpenAI's model: what follows the first end token is never read.

    Args:
        captions: what pieces are counted in.
        vocab_size: pieces, the two ends included.

    Raises:
        InputError: fewer pieces than bytes and ends.
    """
    if vocab_size < BYTES + 2:
        raise InputError("--vocab_size", f"must be at least {BYTES + 2}, found {vocab_size}")
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = Sequence([NFC(), Lowercase()])
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)
    trainer = BpeTrainer(
        vocab_size=vocab_size - 2, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.add_special_tokens([START, END])
    ends = [(word, tokenizer.token_to_id(word)) for word in (START, END)]
    tokenizer.post_processor = TemplateProcessing(single=f"{START} $A {END}", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=START, eos_token=END, pad_token=END
    )


def main(argv: list[str] | None = None) -> None:
    """Read the command line and train."""
    parser = CommandParser(
        prog="python -m pab.encoders.train_clip_tokenizer", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--data_path", type=Path, required=True, help="root of PAB-shaped data")
    parser.add_argument("--out", type=Path, required=True, help="the model's folder")
    parser.add_argument("--vocab_size", type=int, default=1500, help="pieces (default 1500)")
    args = parser.parse_args(argv)
    pairs = TrainingSet.open(args.data_path)
    made = train_clip_tokenizer((pair.caption for pair in pairs), args.vocab_size)
    made.save_pretrained(args.out)
    print(f"{len(made)} pieces from {len(pairs)} captions -> {args.out}")


if __name__ == "__main__":
    run_cli(main)
