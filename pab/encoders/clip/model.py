"""CLIP and all other OpenCLIP architectures, with their tokenizers and preprocessing.

A model has an OpenCLIP name: an architecture (``ViT-L-14-336-quickgelu``), or ``local-dir:FOLDER``
for a folder with OpenCLIP's configuration, tokenizer and weights. The mini model is such a folder,
and so are OpenCLIP's models on the Hugging Face hub.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision"
(arXiv 2103.00020). The models are OpenCLIP's (MIT licence).

OpenAI's weights were trained with QuickGELU. An architecture with exact GELU loads them but outputs
other vectors, so this combination is rejected if it can be detected.

Shape letters: `B` batch, `N` text ids, `D` width of the vectors, `S` side of the image.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from torch import Tensor, nn
from torch.nn import functional as F

from pab.core.checkpoints import load_strict
from pab.core.errors import InputError
from pab.data.images import ImageTransform
from pab.encoders.clip.blocks import read_class_token_only, use_fused_blocks
from pab.encoders.clip.names import (
    FOLDER,
    architecture,
    first_line,
    folder_preprocessing,
    only_errors_logged,
)
from pab.encoders.clip.weights import PREPARED, fitted, read_weights


@dataclass(frozen=True)
class ClipModel:
    """OpenCLIP model with its preprocessing and tokenizer.

    Attributes:
        name: OpenCLIP name of the model.
        model: OpenCLIP's network.
        transform: RGB image -> float32 [3, S, S], from OpenCLIP.
        tokenize: captions -> int64 [B, N], from OpenCLIP, truncated to the model's length.
        weights_file: file of the weights; an empty path for random weights.
        preprocessing: description of the transform as JSON, to store in weight files.
    """

    name: str
    model: nn.Module
    transform: ImageTransform
    tokenize: Tokenize
    weights_file: Path
    preprocessing: str = "{}"

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Encode images [B, 3, S, S] to unit vectors [B, D]."""
        return F.normalize(self.model.encode_image(pixels).float(), dim=-1)  # type: ignore[operator]

    def encode_text(self, ids: Tensor) -> Tensor:
        """Encode ids [B, N] to unit vectors [B, D]; see :func:`encode_text`."""
        return F.normalize(encode_text(self.model, ids).float(), dim=-1)

    def lengths(self, ids: Tensor) -> list[int]:
        """Count the ids per row of [B, N] that the text tower must process."""
        if not reads_forward(self.model):
            return [ids.shape[1]] * len(ids)
        return (ids.argmax(dim=1) + 1).tolist()


def load_clip(
    name: str, pretrained: str | None = None, preprocess_as: str | None = None
) -> ClipModel:
    """Load a model in evaluation mode on the CPU, with weights by tag or from a local file.

    Args:
        name: an OpenCLIP architecture, such as ``ViT-L-14-336-quickgelu``, or
            ``local-dir:FOLDER``.
        pretrained: a tag of OpenCLIP for this model, such as ``openai``, or a weight file (see
            :mod:`pab.encoders.clip.weights`). None selects ``openai``, or the weights in the
            folder.
        preprocess_as: see :func:`pab.encoders.clip.weights.read_weights`.

    Raises:
        InputError: the name, the tag or the preprocessing is unknown or invalid, or the weights or
            the tokenizer cannot be loaded.
    """
    weights = read_weights(name, pretrained, architecture(name), preprocess_as)
    model = build(name)
    load_strict(model, fitted(model, weights.state, weights.path), weights.path)
    return encoder_of(name, model.eval(), weights.preprocess, weights.path)


def new_clip(name: str, preprocess: dict[str, Any] | None = None) -> ClipModel:
    """Create a model with random weights, for training from scratch or for a resumed run.

    Args:
        name: see :func:`load_clip`.
        preprocess: preprocessing settings that override those of the name.

    Raises:
        InputError: the name is unknown, the preprocessing settings are invalid, or the network or
            the tokenizer cannot be created.
    """
    architecture(name)
    settings = folder_preprocessing(name) if preprocess is None else preprocess
    return encoder_of(name, build(name), settings, Path())


def encoder_of(
    name: str, model: nn.Module, preprocess: dict[str, Any], weights_file: Path
) -> ClipModel:
    """Combine a model with its tokenizer and preprocessing.

    Args:
        preprocess: preprocessing settings that override those of the model.

    Raises:
        InputError: the settings are invalid, or the tokenizer cannot be loaded.
    """
    own = merge_preprocess_dict(PreprocessCfg(), open_clip.get_model_preprocess_cfg(model))
    whole = merge_preprocess_dict(own, preprocess)
    try:
        transform = image_transform_v2(PreprocessCfg(**whole), is_train=False)
    except (TypeError, ValueError, AssertionError) as error:
        raise InputError(
            "--model", f"{name} has invalid preprocessing settings: {first_line(error)}"
        ) from error
    record = json.dumps({key: whole[key] for key in PREPARED})
    return ClipModel(name, model, transform, Tokenize(name), weights_file, record)


def build(name: str) -> nn.Module:
    """Create a model with random weights; suppress OpenCLIP's warning about missing weights.

    Raises:
        InputError: the network cannot be built, for instance because the text tower's settings are
            on a hub that cannot be reached.
    """
    try:
        with only_errors_logged():
            model = open_clip.create_model(name, load_weights=False, pretrained_text=False)
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AssertionError) as error:
        raise InputError(
            "--model", f"{name} cannot be built: {first_line(error)}",
            todo="run with access to the model hub, or use another architecture",
        ) from error  # fmt: skip
    use_fused_blocks(model)
    read_class_token_only(model)
    return model


class Tokenize:
    """Tokenizer of a model; pickling stores only the name of the model.

    Args:
        name: OpenCLIP's name of the model.

    Raises:
        InputError: the tokenizer cannot be loaded.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        try:
            with only_errors_logged():
                self._tokenizer = open_clip.get_tokenizer(name)
        except Exception as error:  # the library has no specific error for damaged files
            raise InputError(
                "--model", f"the tokenizer of {name} cannot be loaded: {first_line(error)}",
                todo="recreate the tokenizer files" if name.startswith(FOLDER)
                else "run once with access to the model hub",
            ) from error  # fmt: skip

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Convert B captions to ids, int64 [B, N]."""
        ids: Tensor = self._tokenizer(list(captions))
        return ids

    def ids_of(self, caption: str) -> list[int]:
        """Return the ids of a caption."""
        return self([caption])[0].tolist()

    def __reduce__(self) -> tuple[type[Tokenize], tuple[str]]:
        return Tokenize, (self.name,)


def reads_forward(model: nn.Module) -> bool:
    """Return true if the text vector is a causal tower's output at the end token, as in CLIP.

    Tokens after the end token (padding) then have no effect and need not be computed.
    """
    return (
        isinstance(model, open_clip.CLIP)
        and model.text_pool_type == "argmax"
        and model.attn_mask is not None
    )


def encode_text(model: nn.Module, ids: Tensor) -> Tensor:
    """Encode ids [B, N] to vectors [B, D], not normalized.

    A tower as in CLIP (:func:`reads_forward`) skips columns that are all padding. Pass ids on the
    CPU, because the host reads their lengths.
    """
    device = next(model.parameters()).device
    if not reads_forward(model):
        return model.encode_text(ids.to(device, non_blocking=True))  # type: ignore[operator]
    assert isinstance(model, open_clip.CLIP)
    end = ids.argmax(dim=1)  # the end token has the largest id
    length = int(end.max()) + 1
    ids, end = (part.to(device, non_blocking=True) for part in (ids[:, :length], end))
    x = model.token_embedding(ids) + model.positional_embedding[:length]
    mask = model.attn_mask[:length, :length]
    x = model.ln_final(model.transformer(x, attn_mask=mask))
    x = x[torch.arange(len(x), device=device), end]
    if isinstance(model.text_projection, nn.Linear):
        return model.text_projection(x)
    return x if model.text_projection is None else x @ model.text_projection
