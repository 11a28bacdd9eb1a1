"""Encode images and captions to unit vectors, for scoring and validation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
from pab.data.images import ImageReader, recipe
from pab.data.records import GalleryImage
from pab.scoring.encoding import caption_vectors, image_vectors
from pab.scoring.feature_cache import FeatureCache


def load_model(
    name: str, input_size: int | None, checkpoint: str, tokenizer: Tokenizer
) -> Beit3Retrieval:
    """Load a fine-tuned model in evaluation mode on the CPU.

    Args:
        name: architecture, such as ``beit3_large_patch16_384``.
        input_size: resolution in pixels; None uses the resolution in the name.
        checkpoint: released weights or this project's; positions are resized to the resolution,
            and heads of other tasks are ignored.
        tokenizer: must not have more ids than the checkpoint's word embedding.
        tokenizer: must not have more ids than the checkpoint has word vectors.

    Raises:
        InputError: unknown name, unreadable checkpoint, tensors that do not fit, or a vocabulary
            that is too large.
    """
    sizes = model_config(name, input_size=input_size)
    state = model_state(read_checkpoint(checkpoint), checkpoint, tensor_names(sizes))
    sizes = config_of_state(state, sizes)
    if tokenizer.vocab_size > sizes.vocab_size:
        raise InputError(
            tokenizer.path,
            f"has {tokenizer.vocab_size} ids, {checkpoint} only {sizes.vocab_size} word vectors",
            todo="give the tokenizer the checkpoint was trained with",
        )
    check_text_length(tokenizer.max_length, sizes)
    with torch.device("meta"):  # no initialization: all weights come from the file
        model = Beit3Retrieval(sizes)
    model = model.to_empty(device="cpu")
    state = adapt_state(state, sizes, checkpoint)
    report = load_strict(model, state, checkpoint, allow_unexpected=OTHER_HEADS)
    report.tell(checkpoint)
    return model.eval()


def check_text_length(max_length: int, sizes: Beit3Config) -> None:
    """Reject a caption length above the model's number of text positions.

    Raises:
        InputError: naming the flag.
    """
    most = sizes.text_positions - POSITION_OFFSET
    if max_length > most:
        raise InputError(
            "--max_text_length", f"the model has {most} text positions, found {max_length}"
        )


def encode_images(
    model: Beit3Retrieval,
    images: Sequence[GalleryImage],
    *,
    batch_size: int,
    num_workers: int,
    device: torch.device,
    dtype: torch.dtype,
    compiled: bool = False,
    cache: FeatureCache | None = None,
    reader: ImageReader | None = None,
) -> Tensor:
    """Encode a gallery; only one batch of images (plus prefetched ones) is in memory.

    Args:
        model: weights in float32 (matrix products then use autocast) or already in ``dtype``.
        images: the gallery.
        batch_size: images per batch.
        num_workers: loader processes.
        device: device of the model.
        dtype: number format of matrix products.
        compiled: compile the image encoder first (:func:`compiled_image_encoder`).
        cache: cache of this model's vectors.
        reader: see :func:`pab.scoring.encoding.image_vectors`.

    Returns:
        float32 [G, D] on the CPU, in the order of ``images``.
    """
    return image_vectors(
        compiled_image_encoder(model) if compiled else model.encode_image,
        images,
        recipe("beit3", model.config.img_size).transform(),
        batch_size=batch_size,
        num_workers=num_workers,
        device=device,
        dtype=dtype,
        weights=model.vision_head.weight.dtype,
        full_batches=compiled,  # one shape, so one compilation
        cache=cache,
        reader=reader,
    )


def compiled_image_encoder(model: Beit3Retrieval) -> Callable[[Tensor], Tensor]:
    """Compile ``model.encode_image`` for one batch shape, with frozen weights.

    A CPU requires a C++ compiler. On two cores, compilation made the base model 2 to 12 % faster in
    fp32 and no faster in bf16 (`benchmarks/lhp_scoring.py`). GPUs were not measured.
    """
    compiled: Callable[[Tensor], Tensor] = torch.compile(
        model.encode_image, dynamic=False, options={"freezing": True}
    )
    return compiled


def encode_captions(
    model: Beit3Retrieval,
    tokenizer: Tokenizer,
    captions: Sequence[str],
    *,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    cache: FeatureCache | None = None,
) -> Tensor:
    """Encode captions; captions of similar length share a batch, so that padding is minimal.

    Args:
        batch_size: images per batch; a text batch holds as many tokens as such an image batch.
        cache: cache of this model's vectors.

    Returns:
        float32 [Q, D] on the CPU, in the order of ``captions``.
    """
    rows = [tokenizer.encode(caption) for caption in captions]

    def encode(positions: list[int]) -> Tensor:
        ids, mask = pad_batch([rows[i] for i in positions])
        return model.encode_text(ids.to(device), mask.to(device))

    return caption_vectors(
        encode,
        rows,
        token_budget=batch_size * (model.config.patches + 1),
        device=device,
        dtype=dtype,
        cache=cache,
    )
