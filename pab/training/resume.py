"""Resume a training run: compare with the saved run, choose the checkpoint, read its state.

A run can be resumed only with the same data and, with some exceptions, the same settings. Settings
are compared by value, but data, initial weights, tokenizers and WordNet by content (not by path).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from pab.core import processes
from pab.core.checkpoints import (
    TrainingState,
    load_training_state,
    model_state,
    read_checkpoint,
)
from pab.core.config import as_plain
from pab.core.errors import InputError
from pab.core.files import sha256_of_file, sha256_of_lines
from pab.core.notices import notice
from pab.data.splits import TRAIN_IDS, VAL_IDS, VAL_PAIRS
from pab.data.training_index import SKIPPED
from pab.data.training_set import TrainingSet
from pab.training.config import TrainingConfig

LAST = "checkpoint-last.pth"  # training state to resume from
PREVIOUS = "checkpoint-previous.pth"  # previous training state, for `newest_good`
EPOCH = re.compile(r"checkpoint-(\d+)\.pth")  # weights of one epoch, counted from 0
# Files of a run besides its checkpoints; `model` is the folder of a tuned embedder or reranker.
OTHER_FILES = (TRAIN_IDS, VAL_IDS, VAL_PAIRS, SKIPPED, "model")
RESUME_KEY = "resume"  # metadata key in an epoch's weights: identity and position of the run

PAIRS = "training pairs"  # entry of the settings: number and fingerprint of the pairs
# Settings that are not compared, because they are not part of the recipe.
FREE_SETTINGS = frozenset((
    "task", "device", "log_dir", "output_dir", "cache_dir", "save_ckpt", "save_ckpt_freq",
    "keep_checkpoints", "save_every_steps", "auto_resume", "resume_from", "max_steps",
    "checkpoint_activations",
))  # fmt: skip
# Settings that can rescue a failing run: a change is allowed and recorded.
MENDING_SETTINGS = frozenset((
    "lr", "min_lr", "clip_grad", "dtype", "tf32", "deterministic", "compile", "grad_cache_chunk",
    "num_workers", "max_skipped_steps",
))  # fmt: skip
# Settings compared through PAIRS: the fingerprint covers the data that they select.
DATA_SETTINGS = frozenset((
    "data_path", "train_shards", "skip_bad_lines", "csv_image_key", "csv_caption_key",
    "csv_separator",
))  # fmt: skip
# Exceptions that zipfile raised in tests with damaged archives.
_DAMAGED = (
    zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError,
    RuntimeError, KeyError, IndexError, OverflowError,
)  # fmt: skip

# Function that returns the SHA-256 of a setting's files, or None if one of them is missing.
ContentHash = Callable[[], str | None]


@dataclass(frozen=True)
class RunIdentity:
    """Identity of a run, compared with that of a saved state.

    Attributes:
        settings: settings as plain values, and the entry :data:`PAIRS`.
        defaults: defaults of the settings, used for settings that an older state lacks.
        content: setting -> SHA-256 of its files; None if a file is missing.
    """

    settings: dict[str, Any]
    defaults: dict[str, Any]
    content: dict[str, str | None]


@dataclass(frozen=True)
class ResumePoint:
    """Checkpoint that the run resumes from.

    Attributes:
        path: file of the checkpoint.
        exact: true for a training state; false for the weights of an epoch.
        settings: settings of the run that wrote the checkpoint; an epoch's weights omit some.
        content: setting -> SHA-256 of its files.
        facts: metadata of the run's weight files, such as CLIP's preprocessing.
        changed: changed setting -> (old, new), for settings that may change.
    """

    path: Path
    exact: bool
    settings: Mapping[str, Any]
    content: Mapping[str, str]
    facts: Mapping[str, str]
    changed: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Return the entry for ``run.json``."""
        changed = {name: list(values) for name, values in self.changed.items()}
        return {"file": self.path.name, "exact": self.exact, "changed": changed}


@dataclass
class Position:
    """Position of a run, updated at every step; the defaults are those of a new run.

    Attributes:
        step: optimizer steps done, including skipped ones.
        epoch: current epoch, from 0.
        step_in_epoch: steps done in the current epoch.
        best_metric: best validation result so far.
        skipped: number of skipped steps, in total and consecutive.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    best_metric: float | None = None
    skipped: tuple[int, int] = (0, 0)


# ------------------------------------------------------------------------------------ comparison


def hash_of_files(*paths: Path) -> str | None:
    """Return the SHA-256 of a file, or of several files' hashes.

    Return None if a file is missing or no path is given.
    """
    if not paths or not all(path.is_file() for path in paths):
        return None
    hashes = [sha256_of_file(path) for path in paths]
    return hashes[0] if len(hashes) == 1 else sha256_of_lines(hashes)


def named_files(**settings: str | Path) -> dict[str, ContentHash]:
    """Map each setting that names a file to a function that hashes it; omit empty settings."""
    return {name: partial(hash_of_files, Path(path)) for name, path in settings.items() if path}


def identify(
    config: TrainingConfig, pairs: TrainingSet, files: Mapping[str, ContentHash]
) -> RunIdentity:
    """Compute the identity of the run that the settings describe.

    One process per machine hashes the files; rank 0's hashes are used.

    Args:
        config: settings of the run.
        pairs: the training set.
        files: setting -> function that hashes its files.

    Raises:
        InputError: the machines have different files; raised in every process.
    """

    def hashed() -> dict[str, str | None] | None:
        first = processes.first_on_machine()
        return {name: found() for name, found in files.items()} if first else None

    own = processes.on_all(hashed)
    content = processes.broadcast_object(own) or {}
    known = {name: value for name, value in content.items() if value is not None}
    # A missing file is not compared: a resumed run does not need its initial weights.
    processes.check_equal(
        {f"--{name}": f"SHA-256 {((own or content)[name] or known[name])[:12]}" for name in known},
        todo="use the same files on every machine",
    )
    settings = {**as_plain(config), PAIRS: f"{len(pairs)}, {pairs.fingerprint()[:12]}"}
    return RunIdentity(settings, as_plain(type(config)()), content)


def changed_settings(
    now: RunIdentity, saved: Mapping[str, Any], content: Mapping[str, str], path: Path
) -> dict[str, tuple[Any, Any]]:
    """Return the changes of :data:`MENDING_SETTINGS`, as name -> (old, new).

    Files are compared by hash, or by path if the saved state has no hash. If the saved state has a
    file's hash but the file is missing, the file is not compared.

    Args:
        now: identity of the run to resume.
        saved: settings of the saved run.
        content: hashes of the saved run.
        path: file of the saved state, for the error message.

    Raises:
        InputError: settings, data or files differ; the message names all of them.
    """
    changed: dict[str, tuple[Any, Any]] = {}
    differing = []
    for name, value in now.settings.items():
        if name in FREE_SETTINGS or (name == PAIRS and PAIRS not in saved):
            continue
        if name in DATA_SETTINGS and PAIRS in saved:
            continue
        if name in content and name in now.content:
            found = now.content[name]
            if found is None:
                notice(f"--{name}", f"{value} is missing; it is neither compared nor needed")
            elif found != content[name]:
                differing.append(
                    f"{name} (was SHA-256 {content[name][:12]}, now {found[:12]}: {value})"
                )
            continue
        was = saved.get(name, "a file" if name in content else now.defaults.get(name))
        if name in MENDING_SETTINGS:
            if name in saved and was != value:
                changed[name] = (was, value)
        elif was != value:
            differing.append(f"{name} (was {was}, now {value})")
    if differing:
        problem = f"belongs to a run with other settings: {', '.join(differing)}"
        todo = "use those settings, another --output_dir, or --no_auto_resume to overwrite it"
        raise InputError(path, problem, todo=todo)
    return changed


# -------------------------------------------------------------------------------- choice of a file


def find_resume_point(config: TrainingConfig, identity: RunIdentity) -> ResumePoint | None:
    """Find the checkpoint to resume from; return None for a new run.

    The default is ``checkpoint-last.pth``. With ``--resume_from newest_good``, the checkpoint is
    the first readable file of ``checkpoint-last.pth``, ``checkpoint-previous.pth`` and the epochs'
    weights, newest first.

    Raises:
        InputError: the file is damaged or belongs to another run; with ``newest_good``, no file is
            readable.
    """
    return processes.on_main(partial(_find, config, identity))


def resumable_files(config: TrainingConfig) -> list[Path]:
    """List the files that a run may resume from, best first; empty for a new run."""
    if not config.auto_resume:
        return []
    output = Path(config.output_dir)
    if config.resume_from == "last":
        return [output / LAST] if (output / LAST).exists() else []
    states = [output / name for name in (LAST, PREVIOUS) if (output / name).exists()]
    return states + [path for _, path in reversed(epoch_files(output))]


def _find(config: TrainingConfig, identity: RunIdentity) -> ResumePoint | None:
    newest_first = resumable_files(config)
    if config.resume_from == "last":
        return _compared(_read_last(newest_first[0]), identity) if newest_first else None
    for path in newest_first:
        try:
            point = _read_point(path)
        except InputError as error:
            notice(path, f"skipped: {error.problem}")
            continue
        return _compared(point, identity)
    if newest_first:
        raise InputError(
            config.output_dir, f"none of its checkpoints is usable ({len(newest_first)})",
            todo="use --no_auto_resume to start over",
        )  # fmt: skip
    return None


def _read_last(path: Path) -> ResumePoint:
    try:
        return _read_point(path)
    except InputError as error:
        raise InputError(
            path, error.problem, item=error.item,
            todo="use --resume_from newest_good to resume from the newest undamaged checkpoint, "
            "or --no_auto_resume to start over",
        ) from error  # fmt: skip


def _compared(point: ResumePoint, identity: RunIdentity) -> ResumePoint:
    """Compare the run with a resume point, and add the changed settings to it."""
    changed = changed_settings(identity, point.settings, point.content, point.path)
    if changed:
        listed = ", ".join(f"{name} {was} -> {value}" for name, (was, value) in changed.items())
        notice(point.path, f"resumed with other settings: {listed}")
    if not point.exact:
        notice(
            point.path,
            "weights only: optimizer, average and random states are reset, so the result is not "
            "that of an uninterrupted run",
        )
    return replace(point, changed=changed)


def _read_point(path: Path) -> ResumePoint:
    """Verify the checksums of a checkpoint, and read its run metadata but not its tensors.

    Raises:
        InputError: the file is damaged or is not a checkpoint of a training run.
    """
    check_whole(path)
    if EPOCH.fullmatch(path.name) is None:
        state = load_training_state(path, mmap=True)
        return ResumePoint(path, True, state.config, state.content, state.facts)
    metadata = read_checkpoint(path).get("metadata", {})
    if RESUME_KEY not in metadata:
        raise InputError(path, "has no record of the run that wrote it")
    saved = json.loads(metadata[RESUME_KEY])
    return ResumePoint(path, False, saved["settings"], saved["content"], metadata)


def check_whole(path: Path) -> None:
    """Read a whole checkpoint and verify its checksums, because torch does not verify them.

    Raises:
        InputError: the file is truncated or altered.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except _DAMAGED as error:
        raise InputError(path, f"expected a checkpoint, found a damaged file ({error})") from error
    if bad is not None:
        raise InputError(path, f"expected a checkpoint, found a damaged file (part {bad})")


# ------------------------------------------------------------------------------- files of a run


def epoch_name(epoch: int) -> str:
    """Return the file name of an epoch's weights; epochs count from 0, as in the release."""
    return f"checkpoint-{epoch}.pth"


def epoch_files(output: Path) -> list[tuple[int, Path]]:
    """List the epoch weights in a folder as (epoch, path), sorted by epoch."""
    if not output.is_dir():
        return []
    found = ((EPOCH.fullmatch(path.name), path) for path in output.iterdir())
    return sorted((int(match[1]), path) for match, path in found if match)


def remove_older(output: Path, newest: int, keep: int | None) -> None:
    """Remove all but the ``keep`` newest epoch weights up to ``newest``; None keeps all."""
    if keep is not None:
        files = [path for epoch, path in epoch_files(output) if epoch <= newest]
        for path in files[: max(0, len(files) - keep)]:
            path.unlink()


def keep_previous(output: Path) -> None:
    """Hard-link the last training state as the previous one, before a new state replaces it.

    On file systems without hard links, no previous state is kept.
    """
    if not (output / LAST).exists():
        return
    (output / PREVIOUS).unlink(missing_ok=True)
    try:
        os.link(output / LAST, output / PREVIOUS)
    except OSError as error:
        notice(output, f"{PREVIOUS} is not kept: {error.strerror or error}")


def replace_damaged_last(point: ResumePoint) -> None:
    """Replace ``checkpoint-last.pth`` with the previous state, if the run resumed from that state.

    Otherwise, the next save would make the damaged file the previous state.
    """
    if point.path.name == PREVIOUS:
        copy = point.path.parent / f".{LAST}.copy"
        shutil.copyfile(point.path, copy)  # not a link: some file systems have none
        copy.replace(point.path.parent / LAST)


def prepare_folder(output: Path, point: ResumePoint | None) -> None:
    """Remove or replace states that a later start could resume by mistake; name other files."""
    if point is not None:
        replace_damaged_last(point)
        return
    for name in (LAST, PREVIOUS):
        (output / name).unlink(missing_ok=True)
    found = [path.name for path in output.glob("checkpoint-*.pth")]
    earlier = sorted(found, key=lambda name: (len(name), name))  # 2 before 10 before best
    earlier += [name for name in OTHER_FILES if (output / name).exists()]
    if earlier:
        notice(output, f"files of an earlier run remain until overwritten: {', '.join(earlier)}")


# --------------------------------------------------------------------------------- reading a state


def resume_metadata(identity: RunIdentity, content: Mapping[str, str], position: Position) -> str:
    """Return the entry :data:`RESUME_KEY` of an epoch's weights, for resuming from them.

    Settings that may change or are compared by content are omitted.
    """
    left_out = FREE_SETTINGS | MENDING_SETTINGS | DATA_SETTINGS | content.keys()
    return json.dumps({
        "settings": {k: v for k, v in identity.settings.items() if k not in left_out},
        "content": dict(sorted(content.items())),
        "step": position.step,
        "epoch": position.epoch,
        "best_metric": position.best_metric,
    })  # fmt: skip


def known_content(identity: RunIdentity, point: ResumePoint | None) -> dict[str, str]:
    """Return the saved hashes, updated with those of the files that exist now."""
    known = {name: value for name, value in identity.content.items() if value is not None}
    return {**(point.content if point else {}), **known}


def read_state(point: ResumePoint, names: Set[str]) -> TrainingState:
    """Read the state to resume; an epoch's weights have no optimizer or generator states.

    Args:
        point: checkpoint to resume from.
        names: names of the model's tensors.

    Raises:
        InputError: the file cannot be read or does not fit this run.
    """
    if point.exact:
        state = load_training_state(point.path)
        if len(state.rng) != processes.world_size():
            numbers = f"{len(state.rng)}, not {processes.world_size()}"
            problem = f"was written by another number of processes: {numbers}"
            todo = "use as many processes, or start a new run with another --output_dir"
            raise InputError(point.path, problem, todo=todo)
        return state
    checkpoint = read_checkpoint(point.path)
    weights = model_state(checkpoint, point.path)
    if weights.keys() != names:
        raise InputError(
            point.path,
            "its weights do not fit the model in training; with --lora_rank, they contain the "
            "merged updates, so that training cannot continue from them",
            todo="start a new run with --pretrained set to this file and another --output_dir",
        )
    saved = json.loads(checkpoint["metadata"][RESUME_KEY])
    step, epoch, best = saved["step"], saved["epoch"], saved["best_metric"]
    return TrainingState(weights, {}, step, epoch, 0, [], {}, best_metric=best)
