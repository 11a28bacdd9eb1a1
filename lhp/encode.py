"""Encode images and captions to unit vectors, for scoring and validation."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lhp.beit3 import (
    OTHER_HEADS,
    POSITION_OFFSET,
    Beit3Config,
    Beit3Retrieval,
    adapt_state,
    config_of_state,
    model_config,
    tensor_names,
)
from lhp.tokenizer import Tokenizer, pad_batch
from pab.core.checkpoints import load_strict, model_state, read_checkpoint
from pab.core.errors import InputError
from pab.data.images import ImageRecipe, recipe
from pab.scoring.encoder import as_captions
from pab.scoring.encoding import BatchEncoder

CXX = os.environ.get("CXX", "g++")  # compiler that torch.compile calls on Linux


def load_model(
    name: str, input_size: int | None, checkpoint: str, tokenizer: Tokenizer
) -> Beit3Retrieval:
    """Load a fine-tuned model in evaluation mode on the CPU.

    Args:
        name: architecture, such as ``beit3_large_patch16_384``.
        input_size: resolution in pixels; None uses the resolution in the name.
        checkpoint: released weights or this project's; image position embeddings are resized to
            the resolution, and heads of other tasks are ignored.
        tokenizer: must not have more ids than the checkpoint's word embedding has rows.

    Raises:
        InputError: unknown name or invalid resolution, unreadable checkpoint, tensors that do not
            fit, or a tokenizer with too many ids or too large a ``max_length``.
    """
    sizes = model_config(name, input_size=input_size)
    state = model_state(read_checkpoint(checkpoint), checkpoint, tensor_names(sizes))
    sizes = config_of_state(state, sizes)
    if tokenizer.vocab_size > sizes.vocab_size:
        raise InputError(
            tokenizer.path,
            f"has {tokenizer.vocab_size} ids, {checkpoint} embeds only {sizes.vocab_size}",
            todo="use the tokenizer that the checkpoint was trained with",
        )
    check_text_length(tokenizer.max_length, sizes)
    with torch.device("meta"):  # no initialization: all weights come from the file
        model = Beit3Retrieval(sizes)
    model = model.to_empty(device="cpu")
    state = adapt_state(state, sizes, checkpoint)
    report = load_strict(model, state, checkpoint, allow_unexpected=OTHER_HEADS)
    report.warn(checkpoint)
    return model.eval()


def check_text_length(max_length: int, sizes: Beit3Config) -> None:
    """Reject a caption length above the model's number of text positions.

    Raises:
        InputError: the length is too large; the message names the flag.
    """
    most = sizes.text_positions - POSITION_OFFSET
    if max_length > most:
        raise InputError(
            "--max_text_length", f"expected at most {most} (text positions), found {max_length}"
        )


def check_compiler(device: torch.device) -> None:
    """Check that ``--compile`` can compile for a device.

    Raises:
        InputError: the device is the CPU, and there is no C++ compiler.
    """
    if device.type == "cpu" and shutil.which(CXX) is None:
        raise InputError("--compile", f"needs a C++ compiler on a CPU, found no {CXX}")


def compiled_image_encoder(model: Beit3Retrieval) -> Callable[[Tensor], Tensor]:
    """Compile ``model.encode_image`` for fixed batch shapes, with frozen weights.

    On two cores, compilation made the base model 2 to 12 % faster in fp32, and from 6 % slower to
    6 % faster in bf16 (`benchmarks/lhp_scoring.py`). GPUs were not measured.
    """
    compiled: Callable[[Tensor], Tensor] = torch.compile(
        model.encode_image, dynamic=False, options={"freezing": True}
    )
    return compiled


@dataclass(frozen=True)
class LhpEncoder(BatchEncoder):
    """BEiT-3 as an encoder.

    Attributes:
        model: model, with weights of the dtype ``compute.weights``.
        tokenizer: tokenizer of the model.
        compiled: image encoder from :func:`compiled_image_encoder`; None uses the model.
    """

    model: Beit3Retrieval
    tokenizer: Tokenizer
    compiled: Callable[[Tensor], Tensor] | None = None

    @property
    def full_batches(self) -> bool:
        """True for a compiled model, because each batch shape needs its own compilation."""
        return self.compiled is not None

    def image_encoder(self) -> tuple[Callable[[Tensor], Tensor], ImageRecipe]:
        """See :class:`BatchEncoder`; the vectors have unit length."""
        return self.compiled or self.model.encode_image, recipe("beit3", self.model.config.img_size)

    def encode_texts(self, captions: Sequence[str]) -> Tensor:
        """Encode captions to unit vectors, float32 [Q, D] on the CPU.

        Captions of similar length share a batch of at most as many tokens as an image batch.
        """
        rows = [self.tokenizer.encode(caption) for caption in as_captions(captions)]

        def encode(positions: list[int]) -> Tensor:
            return self.model.encode_text(*pad_batch([rows[i] for i in positions]))

        return self.compute.captions(encode, rows, longest=self.model.config.patches + 1)
