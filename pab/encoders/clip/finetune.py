"""Fine-tune CLIP with the contrastive recipe: settings, initial weights, vectors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from pab.core.adapters import own_name
from pab.core.config import flag, model_flag
from pab.core.errors import InputError
from pab.core.weight_folders import weights_or_path
from pab.encoders.clip.encoder import ClipEncoder
from pab.encoders.clip.identity import ARCHITECTURE, CONFIGURATION
from pab.encoders.clip.model import ClipModel, load_clip, new_clip
from pab.encoders.clip.names import FOLDER, architecture, label
from pab.encoders.clip.weights import PREPROCESSING, is_tag, prepared
from pab.encoders.layer_numbers import no_weight_decay, two_tower_layers
from pab.encoders.tuning import SCRATCH, FinetuneConfig, MakeView, adapted, merged_state
from pab.training.loop import command_line
from pab.training.pair_data import PairBatch
from pab.training.pairs import PairModel
from pab.training.resume import ContentHash, hash_of_files, named_files

TEXT_ENDINGS = (".json", ".txt", ".model")  # of a folder's configuration and tokenizer
LARGEST_SCALE = math.log(100)  # upper bound of CLIP's logit scale (a logarithm)


@dataclass(frozen=True)
class TrainConfig(FinetuneConfig):
    """Settings of CLIP's fine-tuning; each field is a flag of `python scripts/finetune_clip.py`."""

    model: str = model_flag("ViT-L-14-336-quickgelu", "OpenCLIP's name, or local-dir:FOLDER")
    pretrained: str | None = model_flag(
        None, "OpenCLIP tag, weight file, or random (default: openai, or the folder's weights)"
    )
    preprocess_as: str | None = model_flag(
        None,
        "OpenCLIP tag whose preprocessing a weight file needs; required if nothing else "
        "determines it",
    )
    output_dir: str = flag("output/clip", "folder of the checkpoints and the log")


def files_of(config: TrainConfig) -> dict[str, ContentHash]:
    """Map settings to functions that hash their files: weights, configuration, tokenizer."""
    files: dict[str, ContentHash] = {}
    folder = Path(config.model.removeprefix(FOLDER)) if config.model.startswith(FOLDER) else None
    if folder is not None:
        others = sorted(path for path in folder.glob("*") if path.suffix in TEXT_ENDINGS)
        files["model"] = partial(hash_of_files, *others)
    if config.pretrained is None and folder is not None:
        files["pretrained"] = partial(hash_of_files, weights_or_path(folder))
    elif config.pretrained != SCRATCH and not is_tag(config.model, config.pretrained):
        files |= named_files(pretrained=config.pretrained or "")
    return files


def pair_model(
    config: TrainConfig,
    view: MakeView,
    device: torch.device,
    resumed: Mapping[str, str] | None = None,
) -> PairModel:
    """Build the :class:`PairModel` of CLIP; see :func:`pab.training.pairs.train_pairs`.

    If ``resumed`` records the preprocessing, no initial weights are loaded.
    """
    recorded = (resumed or {}).get(PREPROCESSING)
    if recorded is not None:
        clip = new_clip(config.model, prepared(json.loads(recorded)))
    elif config.pretrained == SCRATCH:
        clip = new_clip(config.model)
    else:  # also for states of an earlier version, which lack the preprocessing
        clip = load_clip(config.model, config.pretrained, config.preprocess_as)
    model = clip.model.to(device)
    if config.checkpoint_activations:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    scale = model.get_parameter("logit_scale")
    # Only SigLIP's own loss uses the bias.
    unused = [p for n, p in model.named_parameters() if n == "logit_bias"]
    layers, layer_of = two_tower_layers(
        (name for name, _ in model.named_parameters()), lambda name: name.startswith("visual.")
    )
    frozen = [*unused, *towers(model)[config.freeze]]
    module = adapted(model, config, frozen=frozen, temperature=scale)
    scoring = command_line("python scripts/clip_infer.py", model=config.model)
    return PairModel(
        module=module,
        view=view(
            image_side(clip), config.local_prob, config.crop_scale, config.crop_ratio,
            whole=clip.transform,
        ),
        encode_ids=clip.tokenize.ids_of,
        pad=rows_and_mask,
        vectors=partial(pair_vectors, clip),
        logit_scale=partial(bounded, scale),
        encoder=lambda compute: ClipEncoder(compute=compute, clip=clip),
        layers=layers,
        layer_of=lambda name: layer_of(own_name(name)),
        no_decay=no_weight_decay,
        facts={
            ARCHITECTURE: label(config.model),
            CONFIGURATION: json.dumps(architecture(config.model), sort_keys=True),
            PREPROCESSING: clip.preprocessing,
            "lora_rank": config.lora_rank,
        },
        scoring=f"{scoring} --pretrained",
        released=merged_state,
    )  # fmt: skip


def bounded(scale: nn.Parameter) -> Tensor:
    """Clamp the logit scale (a logarithm) to its bound, and return it.

    The clamp is in place, as in CLIP. Within the graph, a scale above the bound would have no
    gradient and would never change.
    """
    with torch.no_grad():
        scale.clamp_(max=LARGEST_SCALE)
    return scale


def towers(model: nn.Module) -> dict[str, list[nn.Module | nn.Parameter]]:
    """Map each value of ``--freeze`` to the modules and parameters to freeze."""
    children = [child for name, child in model.named_children() if name != "visual"]
    alone = [p for name, p in model.named_parameters(recurse=False) if "logit" not in name]
    return {
        "none": [],
        "image": [model.get_submodule("visual")],
        "text": [*children, *alone],
    }


def image_side(clip: ClipModel) -> int:
    """Return the side of the model's square input in pixels.

    Raises:
        InputError: the input is not square.
    """
    size = clip.model.visual.image_size  # type: ignore[union-attr]
    sides = (size, size) if isinstance(size, int) else tuple(size)  # type: ignore[arg-type]
    if sides[0] != sides[1]:
        raise InputError("--model", f"expected a square input, but {clip.name} has {sides}")
    return int(sides[0])


def rows_and_mask(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Stack rows of ids, already padded, as [B, N]; the mask [B, N] is all ones."""
    ids = torch.tensor(rows)
    return ids, torch.ones_like(ids)


def pair_vectors(clip: ClipModel, pairs: PairBatch) -> Tensor:
    """Encode B pairs; return image and text vectors stacked as [B, 2, D], with D their width."""
    return torch.stack([clip.encode_image(pairs.image), clip.encode_text(pairs.text_ids)], 1)
