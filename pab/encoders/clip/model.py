"""CLIP and all other OpenCLIP architectures, with their own tokenizers and preprocessing.

A model has an OpenCLIP name: an architecture (``ViT-L-14-336-quickgelu``), or ``local-dir:FOLDER``
for a folder with OpenCLIP's configuration, tokenizer and weights. Models downloaded from the hub
and the mini model are such folders.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision"
(arXiv 2103.00020). The models are OpenCLIP's (MIT licence).

OpenAI's weights were trained with QuickGELU. An architecture with exact GELU accepts them but gives
other vectors, so this combination is rejected where it can be detected.

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
    """Model with its preprocessing and tokenizer.

    Attributes:
        name: OpenCLIP's name of the architecture.
        model: network in evaluation mode, on the CPU.
        transform: RGB image -> float32 [3, S, S], from OpenCLIP.
        tokenize: captions -> int64 [B, N], from OpenCLIP, truncated to the model's length.
        weights_file: source of the weights.
        preprocessing: description of the transform as JSON, stored in weight files of this model.
    """

    name: str
    model: nn.Module
    transform: ImageTransform
    tokenize: Tokenize
    weights_file: Path
    preprocessing: str = "{}"

    def encode_image(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] -> unit vectors [B, D]."""
        return F.normalize(self.model.encode_image(pixels).float(), dim=-1)  # type: ignore[operator]

    def encode_text(self, ids: Tensor) -> Tensor:
        """[B, N] -> unit vectors [B, D]."""
        return F.normalize(encode_text(self.model, ids).float(), dim=-1)

    def lengths(self, ids: Tensor) -> list[int]:
        """Number of ids that the text tower has to read, per row of [B, N]."""
        if not reads_forward(self.model):
            return [ids.shape[1]] * len(ids)
        return (ids.argmax(dim=1) + 1).tolist()


def load_clip(
    name: str, pretrained: str | None = None, preprocess_as: str | None = None
) -> ClipModel:
    """Load a model by name, with weights by tag or from a local file.

    Args:
        name: an OpenCLIP architecture, such as ``ViT-L-14-336-quickgelu``, or
            ``local-dir:FOLDER``.
        pretrained: a tag of OpenCLIP for it, such as ``openai``, or a file: OpenAI's archive, a
            plain state dict, or an OpenCLIP checkpoint. None selects ``openai``, or the weights in
            the folder.
        preprocess_as: see :func:`pab.encoders.clip.weights.read_weights`.

    Raises:
        InputError: unknown name or tag, weights or tokenizer that cannot be downloaded, or weights
            that do not fit.
    """
    weights = read_weights(name, pretrained, architecture(name), preprocess_as)
    model = build(name)
    load_strict(model, fitted(model, weights.state, weights.path), weights.path)
    return encoder_of(name, model.eval(), weights.preprocess, weights.path)


def new_clip(name: str, preprocess: dict[str, Any] | None = None) -> ClipModel:
    """Create a model with random weights, for training from scratch or for a resumed run.

    Args:
        name: see :func:`load_clip`.
        preprocess: settings that override those of the name.

    Raises:
        InputError: unknown name, or a tokenizer that cannot be downloaded.
    """
    architecture(name)
    settings = folder_preprocessing(name) if preprocess is None else preprocess
    return encoder_of(name, build(name), settings, Path())


def encoder_of(
    name: str, model: nn.Module, preprocess: dict[str, Any], weights_file: Path
) -> ClipModel:
    """Combine a model with its tokenizer and preprocessing.

    Args:
        preprocess: settings that override those of the model.
    """
    own = merge_preprocess_dict(PreprocessCfg(), open_clip.get_model_preprocess_cfg(model))
    whole = merge_preprocess_dict(own, preprocess)
    try:
        transform = image_transform_v2(PreprocessCfg(**whole), is_train=False)
    except (TypeError, ValueError, AssertionError) as error:
        raise InputError(
            "--model", f"{name} asks for preprocessing that is none: {first_line(error)}"
        ) from error
    record = json.dumps({key: whole[key] for key in PREPARED})
    return ClipModel(name, model, transform, Tokenize(name), weights_file, record)


def build(name: str) -> nn.Module:
    """Create a model without weights, and suppress OpenCLIP's warning about it.

    Raises:
        InputError: the text tower's settings are on a hub that cannot be reached.
    """
    try:
        with only_errors_logged():
            model = open_clip.create_model(name, load_weights=False, pretrained_text=False)
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AssertionError) as error:
        raise InputError(
            "--model", f"{name} cannot be built: {first_line(error)}",
            todo="run where the model hub can be reached, or take another architecture",
        ) from error  # fmt: skip
    use_fused_blocks(model)
    read_class_token_only(model)
    return model


class Tokenize:
    """Tokenizer of a model; loader processes receive only its name.

    Args:
        name: OpenCLIP's name of the model.

    Raises:
        InputError: the vocabulary is damaged, or on a hub that cannot be reached.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        try:
            with only_errors_logged():
                self._tokenizer = open_clip.get_tokenizer(name)
        except Exception as error:  # the library has no specific errors for a damaged file
            raise InputError(
                "--model", f"the tokenizer of {name} cannot be had: {first_line(error)}",
                todo="make its files again" if name.startswith(FOLDER)
                else "run once where the model hub can be reached",
            ) from error  # fmt: skip

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Captions -> int64 [B, N]."""
        ids: Tensor = self._tokenizer(list(captions))
        return ids

    def ids_of(self, caption: str) -> list[int]:
        """Ids of one caption."""
        return self([caption])[0].tolist()

    def __reduce__(self) -> tuple[type[Tokenize], tuple[str]]:
        return Tokenize, (self.name,)


def reads_forward(model: nn.Module) -> bool:
    """Return true if the text vector is a causal tower's end token, as in OpenAI's CLIP.

    Tokens after the end token (padding) then have no effect and need not be computed.
    """
    return (
        isinstance(model, open_clip.CLIP)
        and model.text_pool_type == "argmax"
        and model.attn_mask is not None
    )


def encode_text(model: nn.Module, ids: Tensor) -> Tensor:
    """[B, N] -> [B, D], not normalised; padding after the longest caption is cut off."""
    if not reads_forward(model):
        return model.encode_text(ids)  # type: ignore[operator]
    assert isinstance(model, open_clip.CLIP)
    end = ids.argmax(dim=1)  # the end token has the largest id
    length = int(end.max()) + 1
    x = model.token_embedding(ids[:, :length]) + model.positional_embedding[:length]
    mask = model.attn_mask[:length, :length]
    x = model.ln_final(model.transformer(x, attn_mask=mask))
    x = x[torch.arange(len(x), device=x.device), end]
    if isinstance(model.text_projection, nn.Linear):
        return model.text_projection(x)
    return x if model.text_projection is None else x @ model.text_projection
