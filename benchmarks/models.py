"""Create models with random weights and synthetic inputs for the speed benchmarks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
import torch
from machine import best_seconds, product_rate
from torch import Tensor

from lhp.beit3 import Beit3Config, Beit3Retrieval
from lhp.train_tokenizer import train_tokenizer
from pab.core.devices import DTYPES, cpu_has_bf16
from pab.data.wordpiece import Tokenizer
from pab.training.optim import clip_and_step, make_adamw, parameter_groups, set_lr
from uit.make_vocabulary import make_vocabulary
from uit.model import Uit

CPU = torch.device("cpu")
BERT_LENGTH = 56  # ids of a padded caption
BERT_WORDS = 1000, 30000  # range of ids of ordinary words in BERT's vocabulary
PIECES = 96  # size of the synthetic SentencePiece vocabulary
TEXT = (
    "a person in red green blue white black jacket coat dress walks runs falls lies sits along "
    "across beside the road park street station bench wall while holding umbrella bag phone"
)


def number_formats(*kinds: str) -> Iterator[tuple[str, torch.dtype, float]]:
    """Yield name, dtype and GFLOP/s of matrix products for each dtype the processor supports."""
    for kind in kinds or ("fp32", "bf16"):
        if kind == "bf16" and not cpu_has_bf16():
            print("  bf16: this processor has no bf16 units")
        else:
            yield kind, DTYPES[kind], product_rate(DTYPES[kind]) / 1e9


def samples_per_second(
    backward: Callable[[], Tensor],
    model: Beit3Retrieval | Uit,
    size: int,
    steps: int,
    scaler: torch.amp.GradScaler | None = None,
) -> float:
    """Measure samples per second of the fastest training step at batch ``size``, after one warm-up.

    The learning rate is 0, so that all variants use equal weights.
    """
    groups = parameter_groups(
        model.named_parameters(), weight_decay=0.01, no_decay=model.no_weight_decay
    )
    optimizer = make_adamw(groups, (0.9, 0.98), 1e-8)
    set_lr(optimizer, 0.0)

    def step() -> None:
        clip_and_step(optimizer, figures=backward(), scaler=scaler)
        optimizer.zero_grad(set_to_none=True)

    return size / best_seconds(step, steps)


def write_queries(folder: Path, count: int) -> list[str]:
    """Write random captions and a tokenizer for them; return their flags for `lhp.infer`."""
    rng = np.random.default_rng(0)
    captions = [" ".join(rng.choice(TEXT.split(), 40)) for _ in range(max(count, 500))]
    lines = [
        json.dumps({"query_index": f"q{number:04d}", "caption": caption}) + "\n"
        for number, caption in enumerate(captions[:count])
    ]
    (folder / "query.json").write_text("".join(lines), encoding="utf-8")
    train_tokenizer(captions, folder / "words.spm", PIECES)
    return ["--annotation", str(folder / "query.json"), "--tokenizer", str(folder / "words.spm")]


def write_lhp(folder: Path, name: str, config: Beit3Config) -> list[str]:
    """Write LHP with random weights in the released format; return its flags for `lhp.infer`."""
    torch.manual_seed(0)
    model = Beit3Retrieval(config)
    torch.save({"model": model.state_dict(), "epoch": 0}, folder / "model.pth")
    return ["--model", name, "--checkpoint", str(folder / "model.pth"), "--device", "cpu"]


def bert_tokenizer(folder: Path | None = None) -> Tokenizer:
    """Load a WordPiece tokenizer from a folder; None uses a synthetic vocabulary."""
    with TemporaryDirectory() as made:
        if folder is None:
            make_vocabulary(["a man in a red coat"], Path(made), 100)
        return Tokenizer(folder or made, BERT_LENGTH, BERT_LENGTH)


def bert_rows(tokenizer: Tokenizer, lengths: Iterable[int]) -> list[list[int]]:
    """Draw random ids of captions with these lengths, including special tokens."""
    return [
        [tokenizer.cls, *torch.randint(*BERT_WORDS, (n - 2,)).tolist(), tokenizer.sep]
        for n in lengths
    ]


@contextmanager
def released_way() -> Iterator[None]:
    """Context in which BEiT-3 computes as released: explicit attention, a complete last block."""
    with patch("lhp.beit3.attention", written_out_attention), patch("lhp.beit3.READ", None):
        yield


def written_out_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    """Compute attention with a stored matrix of all token pairs; shapes: `pab.core.devices`."""
    table = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if key_mask is not None:
        table = table.masked_fill(~key_mask, float("-inf"))
    return table.softmax(-1) @ v
