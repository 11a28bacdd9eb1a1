"""CLIP and every other architecture of OpenCLIP, with its own tokenizer and preprocessing.

A model is named as OpenCLIP does: by an architecture (``ViT-L-14-336-quickgelu``), or as
``local-dir:FOLDER``, a folder with OpenCLIP's own configuration, tokenizer and weights: the hub's
models, downloaded by hand, and the mini model are such folders.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision"
(arXiv 2103.00020); the models are those of OpenCLIP, MIT licence.

OpenAI's weights were trained with QuickGELU; an architecture with the exact GELU accepts them and
gives other vectors, so that pairing is refused wherever it can be seen.

Shape letters: `B` batch, `N` text ids, `D` width of the vectors, `S` side of the image.
"""

from __future__ import annotations

import difflib
import json
import logging
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.factory import get_model_config
from open_clip.model import convert_to_custom_text_state_dict
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor, nn
from torch.nn import functional as F

from pab.checkpoints import load_strict, model_state, read_checkpoint
from pab.errors import InputError
from pab.files import existing_file, existing_folder
from pab.images import ImageTransform

OPENAI_FACTS = ("input_resolution", "context_length", "vocab_size")  # numbers in OpenAI's archives
ARCHITECTURE = "architecture"  # key of a checkpoint's metadata: the name it was made with
PUBLISHED_TAG = "openai"
FOLDER = "local-dir:"  # OpenCLIP's word for a model that a folder describes
FOLDER_CONFIG = "open_clip_config.json"
FOLDER_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
NAMES_SHOWN = 5


@dataclass(frozen=True)
class ClipEncoder:
    """A model with what turns files and captions into its inputs.

    Attributes:
        name: OpenCLIP's name of the architecture.
        model: ready to score, on the CPU.
        transform: RGB image -> float32 [3, S, S], OpenCLIP's own.
        tokenize: captions -> int64 [B, N], OpenCLIP's own, cut to the model's length.
        weights_file: where the weights came from.
    """

    name: str
    model: nn.Module
    transform: ImageTransform
    tokenize: Callable[[Sequence[str]], Tensor]
    weights_file: Path

    def encode_image(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] -> unit vectors [B, D]."""
        return F.normalize(self.model.encode_image(pixels).float(), dim=-1)  # type: ignore[operator]

    def encode_text(self, ids: Tensor) -> Tensor:
        """[B, N] -> unit vectors [B, D]."""
        return F.normalize(encode_text(self.model, ids).float(), dim=-1)

    def lengths(self, ids: Tensor) -> list[int]:
        """How many ids of each row [B, N] the text tower has to read."""
        if not reads_forward(self.model):
            return [ids.shape[1]] * len(ids)
        return (ids.argmax(dim=1) + 1).tolist()


def load_clip(name: str, pretrained: str | None = None) -> ClipEncoder:
    """A model by name, with weights by tag or from a local file.

    Args:
        name: an OpenCLIP architecture, such as ``ViT-L-14-336-quickgelu``, or
            ``local-dir:FOLDER``.
        pretrained: a tag of OpenCLIP for it, such as ``openai``, or a file: OpenAI's archive, a
            plain state dict, or an OpenCLIP checkpoint. None is ``openai``, or a folder's own
            weights.

    Raises:
        InputError: unknown name or tag, weights that cannot be fetched or do not fit, or a
            tokenizer that cannot be fetched.
    """
    config = architecture(name)
    path, preprocess = find_weights(name, pretrained, config)
    model = build(name)
    state = clip_state(path, name, config)
    load_strict(model, fitted(model, state), path)
    return encoder_of(name, model.eval(), preprocess, path)


def new_clip(name: str) -> ClipEncoder:
    """A model with OpenCLIP's random weights for a start from scratch.

    Raises:
        InputError: unknown name, or a tokenizer that cannot be fetched.
    """
    architecture(name)
    return encoder_of(name, build(name), folder_preprocessing(name), Path())


def encoder_of(
    name: str, model: nn.Module, preprocess: dict[str, Any], weights_file: Path
) -> ClipEncoder:
    """A model with its tokenizer and preprocessing.

    Args:
        preprocess: settings that replace those the model carries.
    """
    settings = PreprocessCfg(**{**open_clip.get_model_preprocess_cfg(model), **preprocess})
    transform = image_transform_v2(settings, is_train=False)
    return ClipEncoder(name, model, transform, tokenizer(name), weights_file)


def architecture(name: str) -> dict[str, Any]:
    """OpenCLIP's configuration of a model.

    Raises:
        InputError: no such model; the nearest names are suggested. Or no such folder.
    """
    if name.startswith(FOLDER):
        found = folder_config(name).get("model_cfg")
        if not isinstance(found, dict):
            raise InputError(name.removeprefix(FOLDER), f"its {FOLDER_CONFIG} has no model_cfg")
        return found
    config = get_model_config(name)
    if config is None:
        near = difflib.get_close_matches(name, open_clip.list_models(), NAMES_SHOWN, cutoff=0.3)
        raise InputError(
            "--model", f"OpenCLIP has no architecture {name!r}",
            todo=f"the nearest names are {', '.join(near)}" if near else "see its list of models",
        )  # fmt: skip
    return dict(config)


def folder_config(name: str) -> dict[str, Any]:
    """What a folder's configuration says.

    Raises:
        InputError: no folder, no configuration in it, or no JSON object.
    """
    path = existing_file(
        existing_folder(name.removeprefix(FOLDER), "the folder of an OpenCLIP model")
        / FOLDER_CONFIG,
        "OpenCLIP's configuration of a model",
    )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(path, f"expected JSON, found: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise InputError(path, f"expected a JSON object, found {type(found).__name__}")
    return found


def folder_preprocessing(name: str) -> dict[str, Any]:
    """Preprocessing that a folder asks for; nothing for an architecture of OpenCLIP's."""
    return dict(folder_config(name).get("preprocess_cfg", {})) if name.startswith(FOLDER) else {}


def label(name: str) -> str:
    """What checkpoints call a model: its architecture's name, or its folder's without the path."""
    return Path(name.removeprefix(FOLDER)).name if name.startswith(FOLDER) else name


def build(name: str) -> nn.Module:
    """A model without its weights, of which OpenCLIP would warn.

    Raises:
        InputError: its text tower's settings lie on a hub that cannot be reached.
    """
    try:
        with only_errors_logged():
            return open_clip.create_model(name, load_weights=False, pretrained_text=False)
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise InputError(
            "--model", f"{name} cannot be built: {first_line(error)}",
            todo="run where the model hub can be reached, or take another architecture",
        ) from error  # fmt: skip


def find_weights(
    name: str, pretrained: str | None, config: dict[str, Any]
) -> tuple[Path, dict[str, Any]]:
    """The weights' file, and what their tag or folder says of preprocessing.

    Raises:
        InputError: no such tag or file, a tag of another activation, or no way to fetch it.
    """
    if name.startswith(FOLDER):
        return folder_weights(name, pretrained), folder_preprocessing(name)
    pretrained = pretrained or PUBLISHED_TAG
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not open_clip.is_pretrained_cfg(name, pretrained):
        if Path(pretrained).is_file():
            return Path(pretrained), {}
        raise InputError(
            "--pretrained", f"{pretrained!r} is no file and no tag of {name}",
            todo=f"its tags are {', '.join(tags)}" if tags else f"{name} has no tags: give a file",
        )  # fmt: skip
    tag = open_clip.get_pretrained_cfg(name, pretrained)
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
    keys = {"mean", "std", "interpolation", "resize_mode"}
    return path, {key: value for key, value in tag.items() if key in keys}


def folder_weights(name: str, pretrained: str | None) -> Path:
    """The given file, or the weights in a model's folder.

    Raises:
        InputError: there are none.
    """
    if pretrained is not None:
        return existing_file(pretrained, "weights of the model")
    folder = Path(name.removeprefix(FOLDER))
    for file in FOLDER_WEIGHTS:
        if (folder / file).is_file():
            return folder / file
    raise InputError(
        folder, f"holds no weights ({' or '.join(FOLDER_WEIGHTS)})",
        todo="name their file with --pretrained",
    )  # fmt: skip


def clip_state(path: Path, name: str, config: dict[str, Any]) -> dict[str, Tensor]:
    """The weights in a file of any of the three formats.

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
        return {key: value for key, value in state.items() if key not in OPENAI_FACTS}
    checkpoint = read_checkpoint(path)
    metadata = checkpoint.get("metadata")
    made_as = metadata.get(ARCHITECTURE) if isinstance(metadata, dict) else None
    if made_as not in (None, label(name)):
        raise InputError(
            path, f"was made as {made_as}, not {label(name)}", todo=f"take --model {made_as}"
        )
    return model_state(checkpoint, path)


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive, which `weights_only` reading refuses."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(part.endswith("/constants.pkl") for part in archive.namelist())


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


def fitted(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under OpenCLIP's names for this model: other publishers', and its older ones."""
    state = dict(convert_state_dict(model, state))
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    state.pop("text.transformer.embeddings.position_ids", None)  # 0, 1, 2, ...
    own = model.state_dict()
    for scalar in ("logit_scale", "logit_bias"):
        if scalar in state and scalar in own:
            state[scalar] = state[scalar].reshape(own[scalar].shape)
    return state


def tokenizer(name: str) -> Callable[[Sequence[str]], Tensor]:
    """Captions -> int64 [B, N] by the model's own tokenizer.

    Raises:
        InputError: its vocabulary lies on a hub that cannot be reached.
    """
    try:
        with only_errors_logged():
            found = open_clip.get_tokenizer(name)
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(
            "--model", f"the tokenizer of {name} cannot be fetched: {first_line(error)}",
            todo="run once where the model hub can be reached",
        ) from error  # fmt: skip

    def tokenize(captions: Sequence[str]) -> Tensor:
        ids: Tensor = found(list(captions))
        return ids

    return tokenize


def reads_forward(model: nn.Module) -> bool:
    """Whether the text vector is that of the end token of a causal tower, as in OpenAI's CLIP.

    What follows the end token, padding, then has no effect and need not be computed.
    """
    return (
        isinstance(model, open_clip.CLIP)
        and model.text_pool_type == "argmax"
        and model.attn_mask is not None
    )


def encode_text(model: nn.Module, ids: Tensor) -> Tensor:
    """[B, N] -> [B, D], not normalised; padding behind the longest caption is left out."""
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


@contextmanager
def only_errors_logged() -> Iterator[None]:
    """Inside, OpenCLIP and the hub's client log no warnings: what fails is raised and said once."""
    loggers = [logging.getLogger(name) for name in (None, "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def first_line(error: Exception) -> str:
    """An error of a library in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
