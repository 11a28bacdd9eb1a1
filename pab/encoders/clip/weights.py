"""Weights of OpenCLIP models: by tag or from a file of any of the three formats.

A file of others does not tell how its images were prepared. Weights that this project wrote do; for
other files the architecture's tags decide, if they agree.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from torch import Tensor, nn

from pab.core.checkpoints import read_checkpoint
from pab.core.errors import InputError
from pab.core.file_kinds import Kind, file_kind
from pab.core.files import existing_file
from pab.core.state_dicts import fit_names, model_state
from pab.core.weight_folders import only_weights, weight_folder
from pab.encoders.clip.identity import check_made_as
from pab.encoders.clip.names import FOLDER, first_line, folder_preprocessing, only_errors_logged
from pab.encoders.clip.positions import resized_positions

OPENAI_FACTS = ("input_resolution", "context_length", "vocab_size")  # numbers in OpenAI's archives
PREPROCESSING = "preprocessing"  # key of a checkpoint's metadata: how its images were prepared
PREPARED = ("mean", "std", "interpolation", "resize_mode")  # what weights depend on
PUBLISHED_TAG = "openai"


@dataclass(frozen=True)
class ClipWeights:
    """Weights as a file has them.

    Attributes:
        path: of the file.
        state: tensor name -> tensor, under the publisher's names.
        preprocess: settings of preprocessing that replace the architecture's.
    """

    path: Path
    state: dict[str, Tensor]
    preprocess: dict[str, Any]


def read_weights(
    name: str, pretrained: str | None, config: dict[str, Any], preprocess_as: str | None
) -> ClipWeights:
    """Read the weights of a model and the preprocessing of its images.

    Args:
        name: OpenCLIP's.
        pretrained: a tag, a file, or None (``openai``; a folder's own).
        config: the model's configuration.
        preprocess_as: tag whose preprocessing a file of weights was trained with; None where the
            file or the architecture's tags tell.

    Raises:
        InputError: no such tag or file, weights of another activation or name, no way to fetch
            them, or preprocessing that nothing tells.
    """
    if name.startswith(FOLDER):
        path, tag = folder_weights(name, pretrained), None
    else:
        path, tag = tagged_or_file(name, pretrained or PUBLISHED_TAG, config)
    state, metadata = clip_state(path, name, config)
    if tag is not None:
        return ClipWeights(path, state, prepared(tag))
    if preprocess_as is not None:
        return ClipWeights(path, state, prepared(tag_of(name, preprocess_as, "--preprocess_as")))
    recorded = metadata.get(PREPROCESSING)
    if recorded is not None:
        return ClipWeights(path, state, prepared(json.loads(recorded)))
    if name.startswith(FOLDER):
        return ClipWeights(path, state, folder_preprocessing(name))
    return ClipWeights(path, state, {} if is_torchscript(path) else way_of_the_tags(name, path))


def tagged_or_file(
    name: str, pretrained: str, config: dict[str, Any]
) -> tuple[Path, dict[str, Any] | None]:
    """The weights' file, and their tag's settings where they were given by tag.

    Raises:
        InputError: no such tag or file, a tag of another activation, or no way to fetch it.
    """
    if not open_clip.is_pretrained_cfg(name, pretrained) and Path(pretrained).is_file():
        return Path(pretrained), None
    tag = tag_of(name, pretrained, "--pretrained")
    if bool(tag.get("quick_gelu")) != bool(config.get("quick_gelu")):
        other = f"{name}-quickgelu" if tag.get("quick_gelu") else name.removesuffix("-quickgelu")
        raise InputError(
            "--model", f"{name} and the weights {pretrained!r} have different activations",
            todo=f"take --model {other}",
        )  # fmt: skip
    try:
        with only_errors_logged():
            path = Path(open_clip.download_pretrained(tag))
    except (OSError, RuntimeError) as error:
        where = tag.get("url") or tag.get("hf_hub")
        raise InputError(
            "--pretrained", f"the weights {pretrained!r} of {name} cannot be fetched: "
            f"{first_line(error)}",
            todo=f"fetch {where} on a machine with internet and give the file with --pretrained",
        ) from error  # fmt: skip
    return path, tag


def tag_of(name: str, tag: str, flag: str) -> dict[str, Any]:
    """A tag's settings.

    Raises:
        InputError: the model has no such tag; those it has are named.
    """
    if not open_clip.is_pretrained_cfg(name, tag):
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise InputError(
            flag, f"{tag!r} is no {'file and no ' if flag == '--pretrained' else ''}tag of {name}",
            todo=f"its tags are {', '.join(tags)}" if tags else f"{name} has no tags: give a file",
        )  # fmt: skip
    return dict(open_clip.get_pretrained_cfg(name, tag))


def is_tag(name: str, pretrained: str | None) -> bool:
    """Return true if ``--pretrained`` is one of a model's tags rather than a file."""
    return bool(open_clip.is_pretrained_cfg(name, pretrained or PUBLISHED_TAG))


def prepared(settings: dict[str, Any]) -> dict[str, Any]:
    """Preprocessing settings, completed with OpenCLIP's defaults."""
    whole = merge_preprocess_dict(PreprocessCfg(), settings)
    return {key: whole[key] for key in PREPARED}


def way_of_the_tags(name: str, path: Path) -> dict[str, Any]:
    """The preprocessing that all tags of an architecture share.

    Raises:
        InputError: they differ.
    """
    ways = {
        tag: prepared(tag_of(name, tag, "--preprocess_as"))
        for tag in open_clip.list_pretrained_tags_by_model(name)
    }
    first = next(iter(ways.values()), {})
    if any(_plain(way) != _plain(first) for way in ways.values()):
        raise InputError(
            path, f"does not say how its images were prepared, and the tags of {name} differ in it",
            todo=f"say whose way it is with --preprocess_as: {', '.join(ways)}",
        )  # fmt: skip
    return first


def _plain(way: dict[str, Any]) -> str:
    return json.dumps(way, sort_keys=True)  # tuples and lists alike


def folder_weights(name: str, pretrained: str | None) -> Path:
    """Find the given file, or the weights in a model's folder.

    Raises:
        InputError: there are none, or several without a usual name.
    """
    if pretrained is not None:
        return existing_file(pretrained, "weights of the model")
    return only_weights(weight_folder(name.removeprefix(FOLDER)))


def clip_state(
    path: Path, name: str, config: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the weights in a file of any of the three formats, and the metadata it carries.

    Raises:
        InputError: none of them, or weights that were made with another activation.
    """
    if is_torchscript(path):
        state = torchscript_state(path)
        if OPENAI_FACTS[0] in state and not config.get("quick_gelu"):
            raise InputError(
                path, f"OpenAI's weights were trained with QuickGELU, {name} computes GELU",
                todo=f"take --model {name}-quickgelu",
            )  # fmt: skip
        return {key: value for key, value in state.items() if key not in OPENAI_FACTS}, {}
    checkpoint = read_checkpoint(path)
    metadata = checkpoint.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    check_made_as(metadata, name, config, path)
    return model_state(checkpoint, path), metadata


def is_torchscript(path: Path) -> bool:
    """Return true if a file is a TorchScript archive, which `weights_only` reading rejects."""
    return file_kind(existing_file(path, "a checkpoint")).kind is Kind.TORCHSCRIPT


def torchscript_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a TorchScript archive; its code is loaded but never called.

    TorchScript runs no pickled Python, but its reader is native code: take archives only from a
    source you trust.

    Raises:
        InputError: a damaged archive.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch deprecates what OpenAI chose
            state: dict[str, Tensor] = torch.jit.load(path, map_location="cpu").state_dict()
    except RuntimeError as error:
        raise InputError(path, f"cannot be read as TorchScript: {first_line(error)}") from error
    return state


def fitted(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """Put weights under OpenCLIP's names for this model, position tables in its sizes.

    Args:
        model: the model that is to hold them.
        state: under other publishers' names, or OpenCLIP's older ones.
        path: their file, for notices.
    """
    own = model.state_dict()
    state = dict(convert_state_dict(model, fit_names(state, own.keys(), path)))
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    state.pop("text.transformer.embeddings.position_ids", None)  # 0, 1, 2, ...
    for scalar in ("logit_scale", "logit_bias"):
        if scalar in state and scalar in own:
            state[scalar] = state[scalar].reshape(own[scalar].shape)
    return resized_positions(model, state, path)
