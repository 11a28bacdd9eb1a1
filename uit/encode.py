"""Encode images to tokens and vectors, and captions to vectors, with UIT.

Shape letters: `G` images, `Q` captions, `M` image tokens (including the mean token), `C` width of
the image tokens, `E` width of the retrieval vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pab.core import processes
from pab.core.checkpoints import checkpoint_hash
from pab.core.errors import InputError
from pab.core.progress import progress
from pab.data.images import ImageReader, ImageRecipe, recipe
from pab.data.records import GalleryImage
from pab.data.wordpiece import Tokenizer
from pab.scoring.encoder import as_captions
from pab.scoring.encoding import BatchEncoder, Compute
from pab.scoring.mapped_rows import mapped_rows
from uit.model import Uit, UitConfig, model_config, tensor_names
from uit.weights import load_uit_state, uit_state

if TYPE_CHECKING:
    from uit.infer import InferConfig

WORD_TABLE = "text_encoder.bert.embeddings.word_embeddings.weight"


class GalleryFeatures(NamedTuple):
    """Stored features of a gallery.

    Attributes:
        tokens: [G, M, C], memory-mapped from a file that is already unlinked.
        vectors: float32 [G, E].
    """

    tokens: Tensor
    vectors: Tensor


def load_model(
    name: str, input_size: int, window: int, checkpoint: str, tokenizer: Tokenizer
) -> Uit:
    """Load a fine-tuned model in evaluation mode on the CPU.

    Args:
        name: architecture, such as ``uit_base``.
        input_size: side of the square input, pixels.
        window: side of Swin's attention windows, tokens.
        checkpoint: weights of the release, of this project or of CMP; see
            :func:`uit.weights.load_uit_state`.
        tokenizer: tokenizer with the vocabulary size of the checkpoint.

    Raises:
        InputError: unknown name, unreadable checkpoint, or sizes or tensors that do not fit.
    """
    sizes = model_config(name, input_size, window)
    state = uit_state(checkpoint, tensor_names(sizes))
    words = state.get(WORD_TABLE)
    if words is not None and len(words) != tokenizer.vocab_size:
        raise InputError(
            tokenizer.path,
            f"has {tokenizer.vocab_size} pieces, but {checkpoint} has {len(words)} word vectors",
            todo="set --text_encoder to the vocabulary that the checkpoint was trained with",
        )
    model = Uit(with_vocabulary(sizes, tokenizer))
    load_uit_state(model, state, checkpoint)
    return model.eval()


def with_vocabulary(sizes: UitConfig, tokenizer: Tokenizer) -> UitConfig:
    """Adapt the sizes to a tokenizer's vocabulary.

    Raises:
        InputError: captions may exceed the model's number of positions.
    """
    if tokenizer.max_length > sizes.bert.positions:
        raise InputError(
            "--max_text_length",
            f"expected at most {sizes.bert.positions} positions, found {tokenizer.max_length}",
        )
    return replace(sizes, bert=replace(sizes.bert, vocab_size=tokenizer.vocab_size))


def encode_gallery(
    model: Uit,
    images: Sequence[GalleryImage],
    compute: Compute,
    *,
    cache_dtype: torch.dtype = torch.float32,
    cache_dir: str | Path | None = None,
) -> GalleryFeatures:
    """Encode a gallery to tokens and vectors, with one batch of images in memory at a time.

    With several processes, each process encodes some of the images and receives all features.

    Args:
        model: model, with weights of the dtype ``compute.weights``.
        images: images of the gallery.
        compute: device, dtype and batching; its cache, if any, holds vectors and tokens.
        cache_dtype: dtype of the stored tokens.
        cache_dir: folder of the temporary token file; None uses the system's temporary folder.

    Raises:
        InputError: an image cannot be read, or the token file cannot be created.
    """
    swin, width = model.config.swin, model.config.embed_dim
    shape = (len(images), 1 + swin.grids[-1] ** 2, swin.width)
    tokens = mapped_rows(shape, cache_dtype, cache_dir)

    def encode(pixels: Tensor) -> Tensor:
        found = model.vision_encoder(pixels)
        return torch.cat([model.image_vector(found).float(), found.float().flatten(1)], dim=1)

    order: list[int] = []
    vectors = [torch.empty(0, width)]
    rows_of = compute.image_rows(encode, images, recipe("uit", swin.image_size), ImageReader())
    for places, rows in rows_of:
        order += places
        vectors.append(rows[:, :width].clone())
        tokens.rows[places] = rows[:, width:].view(-1, *shape[1:]).to(cache_dtype)
    found = processes.assemble(order, torch.cat(vectors), len(images), compute.device)
    tokens.complete(compute.device)
    return GalleryFeatures(tokens.rows, found)


@dataclass(frozen=True)
class UitEncoder(BatchEncoder):
    """UIT's image and text towers as an encoder, whose scores are ITC similarities.

    Attributes:
        model: model, with weights of the dtype ``compute.weights``.
        tokenizer: tokenizer of the model.
    """

    model: Uit
    tokenizer: Tokenizer

    def image_encoder(self) -> tuple[Callable[[Tensor], Tensor], ImageRecipe]:
        """See :class:`BatchEncoder`; the vectors have unit length."""
        recipe_of_size = recipe("uit", self.model.config.swin.image_size)
        return lambda x: self.model.image_vector(self.model.vision_encoder(x)), recipe_of_size

    def ids(self, captions: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each caption.

        Raises:
            InputError: there is no caption, or more than half of the captions' pieces are unknown.
        """
        rows = [self.tokenizer.encode(caption) for caption in as_captions(captions)]
        self.tokenizer.check_known(rows)
        return rows

    def encode_texts(self, captions: Sequence[str]) -> Tensor:
        """Encode captions to unit vectors, float32 [Q, E] on the CPU.

        Each caption is padded to the tokenizer's ``max_length``, as published.

        Raises:
            InputError: see :meth:`ids`.
        """
        rows, size, device = self.ids(captions), self.compute.batch_size, self.compute.device
        padded = self.tokenizer.pad_rows(rows, self.tokenizer.max_length)
        ids, mask = (part.to(device) for part in padded)
        vectors = torch.empty(len(rows), self.model.config.embed_dim, device=device)
        for start in progress(range(0, len(rows), size), "encoding captions", "batches"):
            batch = slice(start, start + size)
            with self.compute.running("encoding captions"):
                text = self.model.text_encoder.encode_text(ids[batch], mask[batch])
                vectors[batch] = self.model.text_vector(text)
        return vectors.cpu()  # copied once at the end, so that the device never waits for the host


def load_encoder(config: InferConfig) -> UitEncoder:
    """Load the model specified by the settings, without a feature cache.

    Raises:
        InputError: settings, vocabulary or checkpoint are invalid.
    """
    compute = config.compute()
    tokenizer = Tokenizer(config.text_encoder, config.max_words, config.max_text_length)
    model = load_model(config.model, config.input_size, config.window, config.checkpoint, tokenizer)
    sha256 = checkpoint_hash(config.checkpoint)
    sizes = f"{config.model}, {config.input_size} px, windows of {config.window}"
    return UitEncoder(
        compute,
        model.to(compute.device, compute.dtype),
        tokenizer,
        origin=compute.origin(config.model, config.checkpoint, sha256),
        fingerprint=compute.fingerprint(weights=sha256, model=sizes),
    )
