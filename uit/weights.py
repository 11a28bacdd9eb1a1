"""Sources of UIT's weights: a whole checkpoint, or Swin and BERT apart.

Holds every key map: Microsoft's and timm's names of Swin, Hugging Face's names of BERT, the
released UIT, CMP and person-search checkpoints. Loading is strict; a notice names the parts that
begin anew or are left out.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from pab.core.checkpoints import LoadReport, load_strict, model_state, read_checkpoint
from pab.core.notices import notice
from pab.core.weight_folders import Family, weights_of_folder
from uit.model import Uit, adapt_state

BIAS_TABLE = ".relative_position_bias_table"
# Follow from the sizes: the model's own are right, whatever the checkpoint's window was.
DERIVED = ("*.relative_position_index", "*.attn_mask")
# What a person-search checkpoint may lack or have in another shape; the towers it must have.
HEADS = (
    "vision_proj.*", "text_proj.*", "itm_head.*", "simmim.*", "text_encoder.cls.*", "temp",
)  # fmt: skip
# Parts that scoring never reads: the losses' heads and the temperature.
UNREAD = ("simmim.*", "text_encoder.cls.*", "temp")
# CMP's branch for pose images, which this model has no input for (Yang et al., arXiv 2411.17776).
POSE = ("pose_block.*", "pose_conv.*")
# Old BERT checkpoints call a norm's weight and bias so.
OLD_NORM = {".gamma": ".weight", ".beta": ".bias"}
BERT_UNUSED = re.compile(r"bert\.pooler\.|cls\.seq_relationship\.|.*\.position_ids$")


def load_uit(model: Uit, path: str | Path, *, start: bool = False) -> LoadReport:
    """Read a UIT checkpoint into a model: :func:`uit_state`, then :func:`load_uit_state`."""
    return load_uit_state(model, uit_state(path, model.state_dict().keys()), path, start=start)


def uit_state(path: str | Path, fits: Collection[str]) -> dict[str, Tensor]:
    """Read the weights of a UIT or CMP checkpoint, each once.

    Args:
        path: as released (``model`` with doubled tensors), or this project's own.
        fits: names of the model's tensors, which tell wrappers' prefixes from real names.

    Raises:
        InputError: no checkpoint, or doubled tensors that differ.
    """
    return adapt_state(model_state(read_checkpoint(path), path, fits), path)


def load_uit_state(
    model: Uit, state: dict[str, Tensor], path: str | Path, *, start: bool = False
) -> LoadReport:
    """Copy UIT's weights into a model, bias tables resized to the model's windows.

    To score, a checkpoint needs no :data:`UNREAD` parts, and CMP's pose branch is left out: images
    are then encoded without poses. Notices say so.

    Args:
        state: from :func:`uit_state`.
        path: where it came from, for the error.
        start: to start training from: heads that are missing or of another shape begin anew, and
            tensors the model has no place for are left out (a person-search checkpoint).

    Raises:
        InputError: its tensors do not fit.
    """
    state = resize_bias_tables(state, model, path)
    if not start:
        report = load_strict(
            model, state, path, ignore=DERIVED, allow_missing=UNREAD, allow_unexpected=POSE
        )
        _tell(report, path)
        return report
    own = model.state_dict()
    reshaped = [n for n, t in state.items() if n in own and own[n].shape != t.shape]
    heads = tuple(pattern.removesuffix("*") for pattern in HEADS)
    for name in [name for name in reshaped if name.startswith(heads)]:
        del state[name]
    return load_strict(
        model, state, path, ignore=DERIVED, allow_missing=HEADS, allow_unexpected=("*",)
    )


def _tell(report: LoadReport, path: str | Path) -> None:
    """Print notices about parts that scoring does without."""
    for names, text in (
        (report.missing, "lacks parts that scoring does not read"),
        (report.unexpected, "CMP's pose branch is left out, images are encoded without poses"),
    ):
        if names:
            groups = sorted({name.partition(".")[0] for name in names})
            notice(path, f"{text}: {len(names)} tensors ({', '.join(groups)})")


def load_swin(model: Uit, path: str | Path) -> LoadReport:
    """Read Swin's weights, in Microsoft's or timm's names, into the image encoder.

    Raises:
        InputError: no checkpoint, or its tensors do not fit.
    """
    tower = model.vision_encoder
    state = model_state(read_checkpoint(path), path, tower.state_dict().keys())
    state = {n: t for n, t in state.items() if not n.startswith("head.")}
    if "layers.0.downsample.reduction.weight" not in state:
        state = {_stage_before(name): tensor for name, tensor in state.items()}  # timm's
    prefix = "vision_encoder."
    state = resize_bias_tables({prefix + name: t for name, t in state.items()}, model, path)
    state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return load_strict(tower, state, path, ignore=DERIVED)


def bert_file(path: str | Path) -> Path:
    """Find the file of BERT's weights.

    Args:
        path: the file, or a folder that holds one, under any name.

    Raises:
        InputError: a folder without weights, or of another model.
    """
    path = Path(path)
    return weights_of_folder(path, Family.BERT) if path.is_dir() else path


def load_bert(model: Uit, path: str | Path) -> LoadReport:
    """Read BERT's weights, in Hugging Face's names, into the text tower and the cross encoder.

    The cross attention has no counterpart there and stays as it began.

    Args:
        path: see :func:`bert_file`.

    Raises:
        InputError: no checkpoint, or its tensors do not fit.
    """
    path = bert_file(path)
    state = model_state(read_checkpoint(path), path, model.text_encoder.state_dict().keys())
    if not any(name.startswith("bert.") for name in state):  # a BERT without its language head
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
    """Read the weights that a recipe starts from; with no path, :func:`start_from_scratch`.

    Notices name the parts that begin anew or are left out.

    Raises:
        InputError: see the functions for each kind.
    """
    if not (checkpoint or swin or bert):
        start_from_scratch(model)
    for path, load in (
        (checkpoint, lambda m, p: load_uit(m, p, start=True)), (swin, load_swin), (bert, load_bert)
    ):  # fmt: skip
        if path:
            load(model, path).tell(path)


def start_from_scratch(model: Uit) -> None:
    """Starting weights for training without a checkpoint, in place.

    The published start (normal, 0.02) is meant for the few parts a checkpoint lacks and for widths
    of 768 and more. In a small network it leaves every branch near 0 beside its residual, so that
    the cross encoder reads next to nothing of the image; matrices start by their own width instead
    (Glorot and Bengio, AISTATS 2010).
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight)


def resize_bias_tables(
    state: Mapping[str, Tensor], model: Uit, path: str | Path
) -> dict[str, Tensor]:
    """Resize relative position tables, bicubic, if the model's windows are of another size.

    Swin's authors do the same to fine-tune with larger windows. Tables of other heads stay as they
    are: strict loading names them.

    Args:
        path: where the state dict came from, for the notice.
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
            changed.add(f"{(old + 1) // 2} to {(new + 1) // 2}")
    if changed:
        windows = ", ".join(sorted(changed))
        notice(path, f"position tables are resized from windows of {windows} tokens")
    return resized


def _stage_before(name: str) -> str:
    """timm keeps the merging of patches with the stage after it, Microsoft with the one before."""
    return re.sub(
        r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) - 1}.downsample.", name
    )
