"""Load UIT's weights from one checkpoint, or from Swin and BERT checkpoints.

This module maps the parameter names of Swin (Microsoft, timm), BERT (Hugging Face) and the released
UIT, CMP and person-search checkpoints. Loading is strict; a notice lists newly initialized or
ignored parts.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from pab.core.checkpoints import LoadReport, load_strict, model_state, read_checkpoint
from pab.core.counts import counted
from pab.core.notices import notice
from pab.core.weight_folders import Family, weights_of_folder
from uit.model import Uit, adapt_state
from uit.swin import Swin

BIAS_TABLE = ".relative_position_bias_table"
# Buffers derived from the sizes; the model computes them, whatever the checkpoint's window size.
DERIVED = ("*.relative_position_index", "*.attn_mask")
# Heads that a person-search checkpoint may lack or store in other shapes; towers are required.
HEADS = (
    "vision_proj.*", "text_proj.*", "itm_head.*", "simmim.*", "text_encoder.cls.*", "temp",
)  # fmt: skip
# Parts that scoring never uses: the heads of MIM and MLM, and the temperature.
UNREAD = ("simmim.*", "text_encoder.cls.*", "temp")
# CMP's branch for pose images, an input that this model lacks (Yang et al., arXiv 2411.17776).
POSE = ("pose_block.*", "pose_conv.*")
# Names of a norm's weight and bias in old BERT checkpoints.
OLD_NORM = {".gamma": ".weight", ".beta": ".bias"}
BERT_UNUSED = re.compile(r"bert\.pooler\.|cls\.seq_relationship\.|.*\.position_ids$")


def load_uit(model: Uit, path: str | Path, *, start: bool = False) -> LoadReport:
    """Load a UIT checkpoint into a model: :func:`uit_state`, then :func:`load_uit_state`."""
    return load_uit_state(model, uit_state(path, model.state_dict().keys()), path, start=start)


def uit_state(path: str | Path, fits: Collection[str]) -> dict[str, Tensor]:
    """Read the weights of a UIT, CMP or person-search checkpoint, without duplicate tensors.

    Args:
        path: a released checkpoint (its ``model`` has duplicate tensors), or one of this project.
        fits: names of the model's tensors, to distinguish wrapper prefixes from parameter names.

    Raises:
        InputError: not a checkpoint, or duplicate tensors that differ.
    """
    return adapt_state(model_state(read_checkpoint(path), path, fits), path)


def load_uit_state(
    model: Uit, state: dict[str, Tensor], path: str | Path, *, start: bool = False
) -> LoadReport:
    """Copy UIT's weights into a model; resize bias tables to the model's windows.

    For scoring, a checkpoint may lack the :data:`UNREAD` parts, and CMP's pose branch is ignored
    (images are encoded without poses). A notice reports either case.

    Args:
        state: result of :func:`uit_state`.
        path: file of the weights, for messages.
        start: load initial weights for training, such as a person-search checkpoint: heads that are
            missing or have other shapes are newly initialized, and extra tensors are ignored.

    Raises:
        InputError: the tensors do not match the model.
    """
    state = resize_bias_tables(state, model, path)
    if not start:
        report = load_strict(
            model, state, path, ignore=DERIVED, allow_missing=UNREAD, allow_unexpected=POSE
        )
        _warn(report, path)
        return report
    own = model.state_dict()
    reshaped = [n for n, t in state.items() if n in own and own[n].shape != t.shape]
    heads = tuple(pattern.removesuffix("*") for pattern in HEADS)
    for name in [name for name in reshaped if name.startswith(heads)]:
        del state[name]
    return load_strict(
        model, state, path, ignore=DERIVED, allow_missing=HEADS, allow_unexpected=("*",)
    )


def _warn(report: LoadReport, path: str | Path) -> None:
    """Print notices about parts that scoring does not need."""
    for names, text in (
        (report.missing, "lacks parts that scoring does not use"),
        (report.unexpected, "CMP's pose branch is ignored, so images are encoded without poses"),
    ):
        if names:
            groups = sorted({name.partition(".")[0] for name in names})
            notice(path, f"{text}: {counted(len(names), 'tensor')} ({', '.join(groups)})")


def load_swin(model: Uit, path: str | Path) -> LoadReport:
    """Load Swin's weights, with Microsoft's or timm's names, into the image encoder.

    Raises:
        InputError: not a checkpoint, or its tensors do not fit.
    """
    tower = model.vision_encoder
    state = model_state(read_checkpoint(path), path, tower.state_dict().keys())
    state = {n: t for n, t in state.items() if not n.startswith("head.")}
    if "layers.0.downsample.reduction.weight" not in state:
        state = {_stage_before(name): tensor for name, tensor in state.items()}  # timm's names
    state = resize_bias_tables(state, tower, path)
    return load_strict(tower, state, path, ignore=DERIVED)


def bert_file(path: str | Path) -> Path:
    """Find the file with BERT's weights.

    Args:
        path: the file, or a folder that contains it under any name.

    Raises:
        InputError: the folder has no weights, those of another model, or several files without a
            usual name.
    """
    path = Path(path)
    return weights_of_folder(path, Family.BERT) if path.is_dir() else path


def load_bert(model: Uit, path: str | Path) -> LoadReport:
    """Load BERT's weights, with Hugging Face's names, into UIT's text tower and cross encoder.

    Cross-attention, and a language-model head that the file lacks, keep their initialization.

    Args:
        path: see :func:`bert_file`.

    Raises:
        InputError: not a checkpoint, or its tensors do not fit.
    """
    path = bert_file(path)
    state = model_state(read_checkpoint(path), path, model.text_encoder.state_dict().keys())
    if not any(name.startswith("bert.") for name in state):  # a BERT without language-model head
        state = {f"bert.{name}": tensor for name, tensor in state.items()}
    renamed = {}
    for name, tensor in state.items():
        if BERT_UNUSED.match(name):
            continue
        ending = next((old for old in OLD_NORM if name.endswith(old)), "")
        renamed[name.removesuffix(ending) + OLD_NORM.get(ending, "")] = tensor
    prefix = "text_encoder."
    state = adapt_state({prefix + name: tensor for name, tensor in renamed.items()}, path)
    state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return load_strict(
        model.text_encoder, state, path, allow_missing=("*.crossattention.*", "cls.*")
    )


def start_weights(model: Uit, *, checkpoint: str, swin: str, bert: str) -> None:
    """Load a recipe's initial weights; if all paths are empty, use :func:`start_from_scratch`.

    Notices name parts that are newly initialized or ignored.

    Raises:
        InputError: see :func:`load_uit`, :func:`load_swin` and :func:`load_bert`.
    """
    if not (checkpoint or swin or bert):
        start_from_scratch(model)
    for path, load in (
        (checkpoint, lambda m, p: load_uit(m, p, start=True)), (swin, load_swin), (bert, load_bert)
    ):  # fmt: skip
        if path:
            load(model, path).warn(path)


def start_from_scratch(model: Uit) -> None:
    """Initialize a model in place for training without a checkpoint.

    The published initialization (standard deviation 0.02) is meant for the few parts that a
    checkpoint lacks, and for widths of 768 and more. In a small network, branch outputs would be
    tiny compared with the residuals, and the cross encoder would hardly use the image. Here, the
    matrices of linear layers are scaled by their width (Glorot and Bengio, AISTATS 2010).
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight)


def resize_bias_tables(
    state: Mapping[str, Tensor], model: Uit | Swin, path: str | Path
) -> dict[str, Tensor]:
    """Resize relative position bias tables (bicubic) to the model's window sizes.

    Swin's authors do the same for fine-tuning with larger windows. Tables with another number of
    heads are unchanged; strict loading then raises.

    Args:
        path: file of the state dict, for the notice.
    """
    own, resized = model.state_dict(), dict(state)
    changed = set()
    for name, table in state.items():
        if not name.endswith(BIAS_TABLE) or name not in own or table.ndim != 2:
            continue
        rows, heads = own[name].shape
        old, new = round(len(table) ** 0.5), round(rows**0.5)
        if old != new and old**2 == len(table) and heads == table.shape[1]:
            square = table.float().T.reshape(1, heads, old, old)
            larger = F.interpolate(square, size=(new, new), mode="bicubic", align_corners=False)
            resized[name] = larger.reshape(heads, rows).T.contiguous().to(table.dtype)
            before, after = (old + 1) // 2, (new + 1) // 2
            changed.add(f"{before} x {before} to {after} x {after}")
    if changed:
        windows = ", ".join(sorted(changed))
        notice(path, f"relative position biases are resized from windows of {windows} tokens")
    return resized


def _stage_before(name: str) -> str:
    """Rename patch merging from timm's stage to the stage before, where Microsoft stores it."""
    return re.sub(
        r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) - 1}.downsample.", name
    )
