"""Read the weights of OpenCLIP models, by tag or from a file.

A file is OpenAI's TorchScript archive, an OpenCLIP checkpoint or a plain state dict. Checkpoints of
this project and the configurations of model folders contain the preprocessing. OpenAI's archives
use the architecture's default. For other files, the preprocessing of the architecture's tags is
used if all tags agree.
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

OPENAI_FACTS = ("input_resolution", "context_length", "vocab_size")  # integers in OpenAI's archives
PREPROCESSING = "preprocessing"  # key of the preprocessing settings in a checkpoint's metadata
PREPARED = ("mean", "std", "interpolation", "resize_mode")  # settings that the weights depend on
PUBLISHED_TAG = "openai"


@dataclass(frozen=True)
class ClipWeights:
    """Weights as read from a file.

    Attributes:
        path: weight file.
        state: tensor name -> tensor, under the publisher's names.
        preprocess: preprocessing settings that override the architecture's.
    """

    path: Path
    state: dict[str, Tensor]
    preprocess: dict[str, Any]


def read_weights(
    name: str, pretrained: str | None, config: dict[str, Any], preprocess_as: str | None
) -> ClipWeights:
    """Read the weights of a model and its preprocessing settings.

    Args:
        name: OpenCLIP name of the model.
        pretrained: a tag, a file, or None (``openai``, or the weights in a folder).
        config: configuration of the model.
        preprocess_as: tag with the preprocessing that a weight file was trained with; None if the
            file or the architecture's tags determine it.

    Raises:
        InputError: the weights cannot be found or read, they are of another model or activation, or
            their preprocessing is unknown.
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
    """Return the weight file, and the settings of the tag if ``pretrained`` is a tag.

    Raises:
        InputError: there is no such tag or file, the tag has another activation, or the download
            fails.
    """
    if not open_clip.is_pretrained_cfg(name, pretrained) and Path(pretrained).is_file():
        return Path(pretrained), None
    tag = tag_of(name, pretrained, "--pretrained")
    if bool(tag.get("quick_gelu")) != bool(config.get("quick_gelu")):
        other = f"{name}-quickgelu" if tag.get("quick_gelu") else name.removesuffix("-quickgelu")
        raise InputError(
            "--model", f"{name} and the weights {pretrained!r} have different activations",
            todo=f"use --model {other}" if other != name else "set --pretrained to a file",
        )  # fmt: skip
    try:
        with only_errors_logged():
            path = Path(open_clip.download_pretrained(tag))
    except Exception as error:  # errors of HTTP clients share no base class
        where = tag.get("url") or tag.get("hf_hub")
        raise InputError(
            "--pretrained", f"the weights {pretrained!r} of {name} cannot be downloaded: "
            f"{first_line(error)}",
            todo=f"download {where} on a machine with internet, and set --pretrained to the file",
        ) from error  # fmt: skip
    return path, tag


def tag_of(name: str, tag: str, flag: str) -> dict[str, Any]:
    """Return the settings of a tag.

    Raises:
        InputError: the model has no such tag; the message lists the existing tags.
    """
    if not open_clip.is_pretrained_cfg(name, tag):
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise InputError(
            flag, f"{tag!r} is not a {'file or ' if flag == '--pretrained' else ''}tag of {name}",
            todo=f"the tags are {', '.join(tags)}" if tags else f"{name} has no tags: "
            + ("use a file" if flag == "--pretrained" else f"leave out {flag}"),
        )  # fmt: skip
    return dict(open_clip.get_pretrained_cfg(name, tag))


def is_tag(name: str, pretrained: str | None) -> bool:
    """Return true if ``--pretrained`` is one of a model's tags rather than a file."""
    return bool(open_clip.is_pretrained_cfg(name, pretrained or PUBLISHED_TAG))


def prepared(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of :data:`PREPARED`, completed with OpenCLIP's defaults."""
    whole = merge_preprocess_dict(PreprocessCfg(), settings)
    return {key: whole[key] for key in PREPARED}


def way_of_the_tags(name: str, path: Path) -> dict[str, Any]:
    """Return the preprocessing shared by all tags of an architecture; empty if it has no tags.

    Raises:
        InputError: the tags differ.
    """
    ways = {
        tag: prepared(tag_of(name, tag, "--preprocess_as"))
        for tag in open_clip.list_pretrained_tags_by_model(name)
    }
    # As JSON, tuples and lists compare equal.
    if len({json.dumps(way, sort_keys=True) for way in ways.values()}) > 1:
        raise InputError(
            path, f"does not record its preprocessing, which differs between the tags of {name}",
            todo=f"set --preprocess_as to one of them: {', '.join(ways)}",
        )  # fmt: skip
    return next(iter(ways.values()), {})


def folder_weights(name: str, pretrained: str | None) -> Path:
    """Return the file ``pretrained``, or find the weight file in a model folder.

    Raises:
        InputError: the file or folder is missing, or the folder has no weight file or several, none
            of them with a usual name.
    """
    if pretrained is not None:
        return existing_file(pretrained, "weights of the model")
    return only_weights(weight_folder(name.removeprefix(FOLDER)))


def clip_state(
    path: Path, name: str, config: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the weights and the metadata of a file in any of the three formats.

    Raises:
        InputError: the file is missing, damaged or of an unknown format, or its weights are of
            another activation or model.
    """
    if is_torchscript(path):
        state = torchscript_state(path)
        if OPENAI_FACTS[0] in state and not config.get("quick_gelu"):
            raise InputError(
                path, f"OpenAI's weights were trained with QuickGELU, but {name} computes GELU",
                todo="set quick_gelu to true in the folder's open_clip_config.json"
                if name.startswith(FOLDER) else f"use --model {name}-quickgelu",
            )  # fmt: skip
        return {key: value for key, value in state.items() if key not in OPENAI_FACTS}, {}
    checkpoint = read_checkpoint(path)
    metadata = checkpoint.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    check_made_as(metadata, name, config, path)
    return model_state(checkpoint, path), metadata


def is_torchscript(path: Path) -> bool:
    """Return true for a TorchScript archive, which ``torch.load(weights_only=True)`` rejects."""
    return file_kind(existing_file(path, "a checkpoint")).kind is Kind.TORCHSCRIPT


def torchscript_state(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a TorchScript archive.

    TorchScript runs no pickled Python, but loading may call the archive's own TorchScript methods,
    and the reader is native code: use only archives from a source you trust.

    Raises:
        InputError: the archive is damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # TorchScript is deprecated
            state: dict[str, Tensor] = torch.jit.load(path, map_location="cpu").state_dict()
    except RuntimeError as error:
        raise InputError(path, f"cannot be read as TorchScript: {first_line(error)}") from error
    return state


def fitted(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """Rename weights to OpenCLIP's names, and resize the position embeddings for a model.

    Args:
        model: model that will load the weights.
        state: weights under other publishers' names, or OpenCLIP's older ones.
        path: file of the weights, for notices and the error.

    Raises:
        InputError: two tensors would get the same name.
    """
    own = model.state_dict()
    state = dict(convert_state_dict(model, fit_names(state, own.keys(), path)))
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    state.pop("text.transformer.embeddings.position_ids", None)  # position ids 0, 1, 2, ...
    for scalar in ("logit_scale", "logit_bias"):
        if scalar in state and scalar in own:
            state[scalar] = state[scalar].reshape(own[scalar].shape)
    return resized_positions(model, state, path)
