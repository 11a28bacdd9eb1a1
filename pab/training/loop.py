"""Training loop shared by all fine-tuning recipes: feed, update, validate, save.

A recipe sets up its model, optimizer and data in a :class:`Run` and calls :func:`fit` with two
functions: one accumulates the gradients of an update, the other validates. The same command,
started again, resumes from the last checkpoint (`pab/training/resume.py`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pab.core import processes
from pab.core.checkpoints import TrainingState, save_training_state, save_weights
from pab.core.devices import (
    autocast,
    dtype_of,
    keep_freed_memory,
    make_scaler,
    pick_device,
    rng_state,
    seed_everything,
)
from pab.core.errors import InputError
from pab.core.notices import notice
from pab.data.records import Retrieval
from pab.data.splits import write_split
from pab.metrics import evaluate_scores
from pab.scores import ScoreFile
from pab.training.config import TrainingConfig
from pab.training.data import TrainingData, checked, training_loader
from pab.training.optim import Ema, clip_and_step, make_adamw, set_lr
from pab.training.preflight import check_room
from pab.training.resume import (
    LAST,
    PREVIOUS,
    RESUME_KEY,
    Position,
    ResumePoint,
    RunIdentity,
    epoch_files,
    epoch_name,
    keep_previous,
    known_content,
    remove_older,
    replace_damaged_last,
    restore,
    resume_metadata,
)
from pab.training.run_log import RunLog
from pab.training.sampling import EpochBatches

BEST = "checkpoint-best.pth"  # weights of the best epoch on the validation split
FINAL = "checkpoint-final.pth"  # weights of the last epoch (the average, if the run keeps one)
# GradScaler starts at 2^16; after this many halvings the scale is below 1, which is of no use.
SCALE_SEARCH = 20

Start = TypeVar("Start")


def start_processes(config: TrainingConfig) -> tuple[torch.device, torch.dtype]:
    """Join torchrun's processes; return the device and number format of the run.

    Raises:
        InputError: the device does not exist or cannot train in the format.
    """
    device, dtype = pick_device(config.device), dtype_of(config.dtype)
    autocast(device, dtype)  # rejects a format that this device cannot train in
    processes.init_processes(device)
    keep_freed_memory(device)
    return device, dtype


@dataclass
class Run:
    """Objects of one training run; created by :func:`new_run`.

    Attributes:
        command: command of the recipe, such as ``python -m lhp.train``.
        argv: arguments of the command, as typed.
        rates: learning rate per update; the first ``warmup_steps`` are the warm-up.
        batches_per_update: loader batches accumulated per update.
        facts: metadata of weight files, besides the figures of their epoch.
        ema: average of the weights, if the run keeps one.
        released: function that maps the model to the weights in weight files.
        identity: identity of the run, compared with that of a saved run.
        resume: checkpoint to resume from; None for a new run.
        skipped_steps: steps skipped so far because loss or gradient was not finite.
        skipped_in_row: consecutive skipped steps up to now.
    """

    config: TrainingConfig
    command: str
    argv: list[str]
    device: torch.device
    data: TrainingData
    batches: EpochBatches
    loader: DataLoader[Any]
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    rates: Sequence[float]
    warmup_steps: int
    batches_per_update: int
    facts: Mapping[str, object]
    ema: Ema | None
    released: Callable[[nn.Module], Mapping[str, Tensor]]
    identity: RunIdentity
    resume: ResumePoint | None
    skipped_steps: int = 0
    skipped_in_row: int = 0

    def averaged(self) -> AbstractContextManager[None]:
        """Use the averaged weights inside the block, if the run keeps an average."""
        return nullcontext() if self.ema is None else self.ema.swapped(self.model)


def same_start(seed: int, build: Callable[[], Start]) -> Start:
    """Call ``build`` with the same seed in every process, so that all start with equal weights.

    Later draws (dropout, drop path) differ between processes.
    """
    seed_everything(seed)
    made = build()
    seed_everything(seed, processes.rank() + 1)
    return made


def weights_as_they_are(model: nn.Module) -> Mapping[str, Tensor]:
    """Return a model's state dict unchanged."""
    state: Mapping[str, Tensor] = model.state_dict()
    return state


def new_run(
    config: TrainingConfig,
    *,
    command: str,
    argv: list[str],
    device: torch.device,
    dtype: torch.dtype,
    data: TrainingData,
    dataset: Dataset[Any],
    batches: EpochBatches,
    collate: Callable[[list[Any]], Any],
    model: nn.Module,
    groups: list[dict[str, Any]],
    rates: Sequence[float],
    warmup_steps: int,
    batches_per_update: int = 1,
    facts: Mapping[str, object],
    identity: RunIdentity,
    resume: ResumePoint | None,
    released: Callable[[nn.Module], Mapping[str, Tensor]] = weights_as_they_are,
) -> Run:
    """Create a run with the loader, optimizer, loss scaler and average of the settings.

    Args:
        dataset, collate: source of the loader, and the function that batches its samples.
        groups: optimizer groups (:func:`pab.training.optim.parameter_groups`).

    For the other arguments, see :class:`Run`.

    Raises:
        InputError: the disk has too little space for the checkpoints.
    """
    check_room(config, model)
    return Run(
        config=config,
        command=command,
        argv=argv,
        device=device,
        data=data,
        batches=batches,
        loader=training_loader(dataset, batches, collate, config, device),
        model=model,
        optimizer=make_adamw(groups, config.opt_betas, config.opt_eps),
        scaler=make_scaler(device, dtype),
        rates=rates,
        warmup_steps=warmup_steps,
        batches_per_update=batches_per_update,
        facts=facts,
        ema=None if config.ema_decay is None else Ema(model, config.ema_decay, warmup=True),
        released=released,
        identity=identity,
        resume=resume,
    )


def steps_per_epoch(batches: EpochBatches, batches_per_update: int) -> int:
    """Number of updates per epoch.

    Raises:
        InputError: the data is too small for one update.
    """
    steps = batches.batches_per_epoch // batches_per_update
    if steps == 0:
        raise InputError(
            "--batch_size",
            f"{batches.batch_size} x {batches.world_size} processes x update_freq "
            f"{batches_per_update} is more than the {batches.n} training pairs",
        )
    return steps


def fit(
    run: Run,
    update: Callable[[Iterator[Any]], dict[str, Tensor]],
    validate: Callable[[], dict[str, float]],
) -> None:
    """Train; validate after every epoch; save the last, the best and each epoch's weights.

    Args:
        run: objects of the run; a resumed state is restored into them.
        update: takes one update's batches from a loader's iterator and accumulates their gradients;
            returns this process's loss and other figures.
        validate: returns retrieval metrics of the current model in percent; called in evaluation
            mode if there is a validation split.

    Raises:
        InputError: the checkpoint to resume does not fit, a training image is unreadable, or loss
            or gradient was not finite in ``max_skipped_steps`` consecutive steps.
    """
    config, output = run.config, Path(run.config.output_dir)
    steps = steps_per_epoch(run.batches, run.batches_per_update)
    total_steps = config.epochs * steps
    start, resumed_at = Position(), None
    if run.resume is not None:
        start = restore(run, run.resume)
        resumed_at = start.step
        run.skipped_steps, run.skipped_in_row = start.skipped
        if 0 < config.max_steps <= start.step:
            print(f"{start.step} steps are done, --max_steps {config.max_steps}", file=sys.stderr)
            return
    step, skip_steps, best = start.step, start.step_in_epoch, start.best_metric

    saved_at = resumed_at  # step of the last saved state
    content = known_content(run.identity, run.resume)

    def snapshot(epoch: int, step_in_epoch: int) -> None:
        """Save the training state; all processes contribute, rank 0 writes."""
        nonlocal saved_at
        saved_at = step
        generators = processes.gather_objects(rng_state(run.device))
        if processes.is_main() and config.save_ckpt:
            state = TrainingState(
                model=run.model.state_dict(),
                optimizer=run.optimizer.state_dict(),
                step=step,
                epoch=epoch,
                step_in_epoch=step_in_epoch,
                rng=generators,
                config=run.identity.settings,
                scaler=run.scaler.state_dict(),
                ema=run.ema.state_dict() if run.ema else None,
                best_metric=best,
                skipped={"total": run.skipped_steps, "in_row": run.skipped_in_row},
                facts=_as_text(run.facts),
                content=content,
            )
            keep_previous(output)
            save_training_state(output / LAST, state)

    with RunLog(
        output,
        config.log_dir,
        config,
        run.argv,
        command=run.command,
        resumed_at=resumed_at,
        validates_again=skip_steps == steps,
        resumed_from=run.resume.record() if run.resume else None,
        skipped_steps=run.skipped_steps,
    ) as log:
        if processes.is_main() and config.save_ckpt:
            _prepare_folder(output, run.resume)
        if run.resume is not None and not run.resume.exact:
            snapshot(start.epoch, 0)  # replace a damaged state at once
        _announce(run, log, total_steps, resumed_at)
        with log.progress(total_steps, "training", done=step) as progress:
            for epoch in range(start.epoch, config.epochs):
                run.model.train()
                feed = _epoch_feed(run, epoch, skip_steps * run.batches_per_update)
                for step_in_epoch in range(skip_steps, steps):
                    started = time.perf_counter()
                    figures, problem = _one_update(run, update, feed, step)
                    step += 1
                    seconds = time.perf_counter() - started
                    log.log(step, {"epoch": epoch, **figures, "seconds": seconds})
                    if problem:
                        _report_skipped(run, log, step, problem)
                    skipped = {"skipped": run.skipped_steps} if run.skipped_steps else {}
                    progress.update(loss=figures["loss"], **skipped)
                    if config.save_every_steps and step % config.save_every_steps == 0:
                        snapshot(epoch, step_in_epoch + 1)
                    if step == config.max_steps:
                        snapshot(epoch, step_in_epoch + 1)
                        log.message(f"stopped after {step} steps, as --max_steps asks")
                        return
                skip_steps = 0
                saves = (epoch + 1) % config.save_ckpt_freq == 0 or epoch + 1 == config.epochs
                if len(run.data.val_rows):
                    if saves and saved_at != step:
                        snapshot(epoch, steps)  # a run stopped in validation repeats it
                    figures = _validated(run, validate)
                    log.log(step, {"epoch": epoch, **figures}, kind="val")
                    log.message(
                        f"epoch {epoch}: " + ", ".join(f"{k} {v:.2f}" for k, v in figures.items())
                    )
                    key = figures["R@1"] + 1e-3 * figures["mAP"]  # R@1, with mAP as the tie-breaker
                    if best is None or key > best:
                        best = key
                        save_model(run, output / BEST, {"epoch": epoch, **figures})
                if saves:
                    position = Position(step, epoch + 1, 0, best)
                    metadata = resume_metadata(run.identity, content, position)
                    save_model(
                        run, output / epoch_name(epoch), {"epoch": epoch, RESUME_KEY: metadata}
                    )
                    if processes.is_main() and config.save_ckpt:
                        remove_older(output, epoch, config.keep_checkpoints)
                    snapshot(epoch + 1, 0)
        save_model(run, output / FINAL, {"epoch": config.epochs - 1})


def _prepare_folder(output: Path, resume: ResumePoint | None) -> None:
    """Remove states that another start could resume by mistake."""
    if resume is not None:
        replace_damaged_last(resume)
        return
    for name in (LAST, PREVIOUS):
        (output / name).unlink(missing_ok=True)
    earlier = [path.name for _, path in epoch_files(output)]
    if earlier:
        notice(
            output,
            f"{', '.join(earlier)} of an earlier run stay until this run writes the same epochs",
        )


def _announce(run: Run, log: RunLog, total_steps: int, resumed_at: int | None) -> None:
    pairs, train_rows, val_rows = run.data
    if processes.is_main() and run.config.val_pairs:
        write_split(run.config.output_dir, pairs, train_rows, val_rows)
    if processes.is_main():
        pairs.write_skipped(run.config.output_dir)
    log.message(
        f"{len(train_rows)} training pairs, {len(val_rows)} for validation; {total_steps} steps"
        + (f", resumed after step {resumed_at}" if resumed_at is not None else "")
    )
    if total_steps < run.warmup_steps:
        log.message(
            f"the run ends within its warm-up of {run.warmup_steps} steps, at a rate of "
            f"{run.rates[total_steps - 1]:.3g} instead of {run.config.lr:g}: lower --warmup_steps?"
        )


def _epoch_feed(run: Run, epoch: int, start_batch: int) -> Iterator[Any]:
    """Batches of an epoch, from ``start_batch`` on."""
    twins_from = run.config.twin_batches_from
    run.batches.epoch, run.batches.start_batch = epoch, start_batch
    if twins_from is not None and epoch >= twins_from:
        run.batches.videos = run.data.pairs.videos[run.data.train_rows]
    return checked(run.loader)


def _one_update(
    run: Run,
    update: Callable[[Iterator[Any]], dict[str, Tensor]],
    feed: Iterator[Any],
    step: int,
) -> tuple[dict[str, float], str]:
    """Update the weights once; skip the step if its loss or gradient is not finite.

    All processes take the same decision, because they see the same mean loss and gradients.

    Returns:
        Figures averaged over all processes, and the reason for a skip (empty if none).
    """
    set_lr(run.optimizer, run.rates[step])
    statistics = [(buffer, buffer.clone()) for buffer in batch_statistics(run.model)]
    found = update(feed)
    processes.average_gradients(run.model.parameters())
    together = torch.stack([value.detach().float() for value in found.values()])
    figures = dict(zip(found, processes.reduce_mean(together).tolist(), strict=True))
    norm, problem = clip_and_step(
        run.optimizer, loss=figures["loss"], max_norm=run.config.clip_grad, scaler=run.scaler
    )
    run.optimizer.zero_grad(set_to_none=True)
    if problem:
        for buffer, before in statistics:
            buffer.copy_(before)
    elif run.ema is not None:
        run.ema.update(run.model)
    figures |= {"lr": run.rates[step], "grad_norm": norm}
    if problem:
        run.skipped_steps += 1
        run.skipped_in_row += 1
        figures["skipped"] = run.skipped_steps
    else:
        run.skipped_in_row = 0
    return figures, problem


def batch_statistics(model: nn.Module) -> list[Tensor]:
    """Buffers changed by a training forward pass: running statistics of batch norm."""
    return [
        buffer
        for module in model.modules()
        if getattr(module, "running_mean", None) is not None
        for buffer in module.buffers(recurse=False)
    ]


def _report_skipped(run: Run, log: RunLog, step: int, problem: str) -> None:
    """Report a skipped step; stop the run after too many consecutive ones.

    Raises:
        InputError: too many consecutive skipped steps, which points to the settings.
    """
    config = run.config
    log.count_skipped(run.skipped_steps)
    log.message(
        f"step {step} skipped, {run.skipped_in_row} in a row, {run.skipped_steps} in all: {problem}"
    )
    # In fp16, the scaler also skips steps while it searches for a scale; allow time for that.
    scaling = run.scaler.is_enabled()
    limit = max(config.max_skipped_steps, SCALE_SEARCH) if scaling else config.max_skipped_steps
    if run.skipped_in_row >= limit:
        raise InputError(
            "training",
            f"{run.skipped_in_row} steps in a row were skipped, the last at step {step}: {problem}",
            todo=f"lower --lr (now {config.lr:g}), set --clip_grad (now "
            f"{config.clip_grad or 'none'}), or take --dtype fp32 or bf16 (now {config.dtype}); "
            "the run may be resumed with these changed",
        )


def _validated(run: Run, validate: Callable[[], dict[str, float]]) -> dict[str, float]:
    run.model.eval()
    try:
        with run.averaged():
            processes.share_buffers(run.model)  # the average's buffers, if the run keeps one
            return validate()
    finally:
        run.model.train()


# ------------------------------------------------------------------------------ metrics and weights


def retrieval_metrics(retrieval: Retrieval, scores: Tensor) -> dict[str, float]:
    """Metrics of a labelled retrieval, in percent.

    Args:
        retrieval: queries with a gallery and labels.
        scores: [queries, gallery].
    """
    assert retrieval.gallery is not None
    assert retrieval.relevant is not None
    queries = [query.query_id for query in retrieval.queries]
    gallery = [image.gallery_id for image in retrieval.gallery]
    return evaluate_scores(ScoreFile(scores, queries, gallery, {}), retrieval.relevant).mean()


def save_model(run: Run, path: Path, figures: Mapping[str, object]) -> None:
    """Write the weights in released form (key ``model``); averaged weights if there are any."""
    if not (processes.is_main() and run.config.save_ckpt):
        return
    with run.averaged():
        save_weights(path, run.released(run.model), _as_text({**run.facts, **figures}))


def _as_text(facts: Mapping[str, object]) -> dict[str, str]:
    return {key: str(value) for key, value in facts.items()}
