"""Describe checkpoints and folders of weights; the model is detected from the content."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pab.core.weight_folders import Family, weight_folder
from pab.layout.found import Found, count, quoted

_FACT_WIDTH = 100  # maximum number of characters shown per metadata value


def known_model(names: Iterable[str]) -> str | None:
    """Name the model that has these tensor names; None if they fit no known model.

    Args:
        names: tensor names of a checkpoint, without wrapper prefixes.
    """
    bare = set(names)

    def some(*starts: str) -> bool:
        return any(name.startswith(starts) for name in bare)

    if some("beit3."):
        return "beit3" if some("vision_head.", "language_head.") else "beit3 without heads"
    if some("text_encoder.") and some("vision_encoder."):
        return "uit"
    if some("qformer.", "Qformer."):
        return "blip2"
    if some("visual."):
        return "clip"
    if some("vision_model.") and some("text_model."):
        return "transformers clip"
    if some("layers.0.blocks.0.", "layers_0.blocks.0."):
        return "swin"
    if some("bert.", "encoder.layer.0.attention."):
        return "bert"
    return None


def explain_checkpoint(path: Path, checkpoint: dict[str, Any]) -> Found | None:
    """Describe a checkpoint; return None if its tensors fit no known model.

    Args:
        path: the file.
        checkpoint: content as returned by :func:`pab.core.checkpoints.read_checkpoint`.

    Raises:
        InputError: the weights cannot be extracted (:func:`pab.core.checkpoints.model_state`).
    """
    from pab.core.checkpoints import STATE_MARK, model_state  # imports torch

    state = model_state(checkpoint, path)
    model = known_model(state)
    if model is None:
        return None
    weights = sum(tensor.numel() for tensor in state.values())
    facts = [f"{count(len(state), 'tensor')}, {count(weights, 'weight')}"]
    metadata = checkpoint.get("metadata")
    if isinstance(metadata, dict):
        facts += [
            f"{key}: {textwrap.shorten(str(value), _FACT_WIDTH, placeholder=' ...')}"
            for key, value in sorted(metadata.items())
        ]
    if STATE_MARK in checkpoint:
        training = f"a training state after step {checkpoint['step']}"
        facts.append(f"{training}: the command that started the run resumes it")
    what, *commands = _MODELS[model]
    file = quoted(path)
    made = [command.format(file=file) for command in commands]
    architecture = metadata.get("architecture") if isinstance(metadata, dict) else None
    if architecture is not None:
        name = f"--model {shlex.quote(_model_of_run(path) or str(architecture))}"
        if model in ("beit3", "beit3 without heads", "uit"):  # default: the published model
            made = [f"{command} {name}" for command in made]
        made = [command.replace("--model NAME", name) for command in made]
    return Found(what, tuple(facts), tuple(made))


def _model_of_run(path: Path) -> str | None:
    """Read ``--model`` from the config beside a checkpoint, if the model is a ``local-dir:FOLDER``.

    The metadata of such a checkpoint has only the last part of the folder's path.
    """
    config = path.with_name("config.yaml")
    if not config.is_file():
        return None
    lines = config.read_text(encoding="utf-8", errors="replace").splitlines()
    start = "model: "
    models = (line.removeprefix(start) for line in lines if line.startswith(f"{start}local-dir:"))
    return next(models, None)


# Model -> description of a checkpoint, and the commands that accept it.
_MODELS = {
    "beit3": (
        "a checkpoint of BEiT-3 for retrieval (LHP)",
        "python -m lhp.infer --checkpoint {file}",
    ),
    "beit3 without heads": (
        "a checkpoint of BEiT-3 without retrieval heads: to be fine-tuned",
        "python -m lhp.train --config configs/lhp/finetune.yaml --finetune {file}",
    ),
    "uit": (
        "a checkpoint of UIT",
        "python -m uit.infer --checkpoint {file} --candidates SCORES.pt",
        "python -m uit.run --task cmp --checkpoint {file}",
    ),
    "blip2": ("a checkpoint of BLIP-2", "python scripts/blip2_infer.py --pretrained {file}"),
    "clip": (
        "a checkpoint of CLIP",
        "python scripts/clip_infer.py --model NAME --pretrained {file}",
    ),
    "transformers clip": (
        "a CLIP checkpoint in the format of transformers; no command reads this format",
    ),
    "swin": (
        "weights of a Swin Transformer, which initialize UIT's image encoder",
        "python -m uit.run --task cmp --checkpoint '' --swin {file} --bert BERT",
    ),
    "bert": (
        "weights of BERT, which initialize UIT's text encoder",
        "python -m uit.run --task cmp --checkpoint '' --swin SWIN --bert {file}",
    ),
}  # fmt: skip


def explain_weight_folder(folder: Path) -> Found | None:
    """Describe a folder of weights or of a vocabulary.

    Returns:
        The description. None for any other folder, and for a folder with several weight files but
        no model configuration.
    """
    found = weight_folder(folder)
    place, vocabulary = quoted(folder), (folder / "vocab.txt").is_file()
    match found.family:
        case Family.OPENCLIP:
            command = f"python scripts/clip_infer.py --model local-dir:{place}"
            return Found("a folder of OpenCLIP weights", (), (command,))
        case Family.BERT | Family.VOCABULARY:
            facts = ("vocab.txt: " + ("present" if vocabulary else "missing"),)
            commands = []
            if found.weights:
                start = f"--checkpoint '' --swin SWIN --bert {place}"
                commands.append(f"python -m uit.run --task cmp {start}")
            if vocabulary:
                commands.append(f"python -m uit.infer --text_encoder {place} --checkpoint UIT")
            return Found("a BERT folder (vocabulary, weights or both)", facts, tuple(commands))
        case Family.WEIGHTS if len(found.weights) == 1:
            command = f"python -m pab.layout check {quoted(found.weights[0])}"
            return Found("a folder with one file of weights", (), (command,))
        case Family.NONE | Family.WEIGHTS:
            return None
    return Found(f"a folder with {found.family.value}")
