"""What every fine-tuning recipe does around its model and its losses: feed, loop, save, resume.

A recipe sets up its model, optimizer and data, puts them into a :class:`Run`, and calls :func:`fit`
with two functions of its own: one that adds the gradients of an update, one that validates. A run
that is started again with the same command goes on from its last checkpoint.
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

from pab import processes
from pab.annotations import Retrieval
from pab.checkpoints import (
    TrainingState,
    load_strict,
    load_training_state,
    rng_state,
    save_training_state,
    save_weights,
    set_rng_state,
)
from pab.config import as_plain
from pab.devices import (
    autocast,
    dtype_of,
    keep_freed_memory,
    make_scaler,
    pick_device,
    seed_everything,
)
from pab.errors import InputError
from pab.metrics import evaluate_scores
from pab.optim import Ema, clip_and_step, make_adamw, set_lr
from pab.preflight import check_room
from pab.run_log import RunLog
from pab.sampling import EpochBatches
from pab.scores import ScoreFile
from pab.splits import write_split
from pab.training_config import TrainingConfig
from pab.training_data import TrainingData, checked, training_loader

LAST = "checkpoint-last.pth"  # everything a resumed run needs
BEST = "checkpoint-best.pth"  # weights of the best epoch on the validation split
FINAL = "checkpoint-final.pth"  # weights of the last epoch (the average, where one is kept)
PAIRS = "training pairs"  # what a state says of them among its settings
# Settings that may differ between a run and its continuation: they do not change the result.
FREE_SETTINGS = frozenset((
    "task", "num_workers", "device", "log_dir", "output_dir", "cache_dir", "save_ckpt_freq",
    "save_every_steps", "auto_resume", "max_steps", "checkpoint_activations",
))  # fmt: skip

Start = TypeVar("Start")


def start_processes(config: TrainingConfig) -> tuple[torch.device, torch.dtype]:
    """The run's device and number format, with the processes of torchrun joined.

    Raises:
        InputError: a device that is not there, or a format it cannot train in.
    """
    device, dtype = pick_device(config.device), dtype_of(config.dtype)
    autocast(device, dtype)  # refuses a format this device cannot train in
    processes.init_processes(device)
    keep_freed_memory(device)
    return device, dtype


@dataclass
class Run:
    """The objects of one training run; :func:`new_run` makes them.

    Attributes:
        command: how the recipe is called, such as ``python -m lhp.train``.
        argv: its arguments, as typed.
        rates: learning rate of every update; ``warmup_steps`` of them are the warm-up.
        batches_per_update: loader batches whose gradients make one update.
        facts: written into weight files beside the figures of their epoch.
        ema: the average of the weights, where one is kept.
        released: the model's weights as weight files hold them.
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

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the model has the averaged weights where an average is kept."""
        return nullcontext() if self.ema is None else self.ema.swapped(self.model)


def same_start(seed: int, build: Callable[[], Start]) -> Start:
    """What ``build`` makes, with the same first weights in every process.

    What is drawn afterwards (dropout, drop path) differs between processes.
    """
    seed_everything(seed)
    made = build()
    seed_everything(seed, processes.rank() + 1)
    return made


def weights_as_they_are(model: nn.Module) -> Mapping[str, Tensor]:
    """A model's weights under its own names."""
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
    released: Callable[[nn.Module], Mapping[str, Tensor]] = weights_as_they_are,
) -> Run:
    """A run with its loader, optimizer, loss scaler and average as the settings ask.

    Args:
        dataset, collate: what the loader reads, and how samples become a batch.
        groups: of the optimizer (:func:`pab.optim.parameter_groups`).

    The others are as in :class:`Run`.

    Raises:
        InputError: the disk has no room for the checkpoints.
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
    )


def steps_per_epoch(batches: EpochBatches, batches_per_update: int) -> int:
    """Updates of one epoch.

    Raises:
        InputError: there is not one.
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
    """Train, validate after every epoch, keep the last and the best state, resume.

    Args:
        run: the objects; a run that goes on is put back into them.
        update: takes one update's batches from a loader's iterator and adds their gradients;
            returns the loss and other figures, of this process.
        validate: retrieval metrics of the model as it is, in percent; called in evaluation mode,
            where there is a validation split.

    Raises:
        InputError: a checkpoint of another run; a training image that cannot be read, or a loss
            that is not finite, when it is met.
    """
    config, output = run.config, Path(run.config.output_dir)
    settings = settings_of(run)
    steps = steps_per_epoch(run.batches, run.batches_per_update)
    total_steps = config.epochs * steps
    step, first_epoch, skip_steps = 0, 0, 0
    best: float | None = None
    resumed_at: int | None = None
    if config.auto_resume and (output / LAST).exists():
        state = load_training_state(output / LAST)
        check_same_settings(settings, state.config, output / LAST)
        restore(run, state, output / LAST)
        step, first_epoch, skip_steps = state.step, state.epoch, state.step_in_epoch
        best, resumed_at = state.best_metric, step
        del state
        if 0 < config.max_steps <= step:
            print(f"{step} steps are done, --max_steps {config.max_steps}", file=sys.stderr)
            return

    saved_at = resumed_at  # step of the last state

    def snapshot(epoch: int, step_in_epoch: int) -> None:
        """Write everything a resumed run needs; all processes take part, the main one writes."""
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
                config=settings,
                scaler=run.scaler.state_dict(),
                ema=run.ema.state_dict() if run.ema else None,
                best_metric=best,
            )
            save_training_state(output / LAST, state)

    with RunLog(
        output,
        config.log_dir,
        config,
        run.argv,
        command=run.command,
        resumed_at=resumed_at,
        validates_again=skip_steps == steps,
    ) as log:
        if resumed_at is None and processes.is_main() and config.save_ckpt:
            (output / LAST).unlink(missing_ok=True)  # another run's, which would be gone on with
        _announce(run, log, total_steps, resumed_at)
        with log.progress(total_steps, "training", done=step) as progress:
            for epoch in range(first_epoch, config.epochs):
                run.model.train()
                feed = _epoch_feed(run, epoch, skip_steps * run.batches_per_update)
                for step_in_epoch in range(skip_steps, steps):
                    started = time.perf_counter()
                    figures = _one_update(run, update, feed, step)
                    step += 1
                    seconds = time.perf_counter() - started
                    log.log(step, {"epoch": epoch, **figures, "seconds": seconds})
                    progress.update(loss=figures["loss"])
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
                        snapshot(epoch, steps)  # what ends in validation begins there again
                    figures = _validated(run, validate)
                    log.log(step, {"epoch": epoch, **figures}, kind="val")
                    log.message(
                        f"epoch {epoch}: " + ", ".join(f"{k} {v:.2f}" for k, v in figures.items())
                    )
                    key = figures["R@1"] + 1e-3 * figures["mAP"]  # R@1, mAP where R@1 ties
                    if best is None or key > best:
                        best = key
                        save_model(run, output / BEST, {"epoch": epoch, **figures})
                if saves:
                    snapshot(epoch + 1, 0)
        save_model(run, output / FINAL, {"epoch": config.epochs - 1})


def _announce(run: Run, log: RunLog, total_steps: int, resumed_at: int | None) -> None:
    pairs, train_rows, val_rows = run.data
    if processes.is_main() and run.config.val_pairs:
        write_split(run.config.output_dir, pairs, train_rows, val_rows)
    if processes.is_main():
        pairs.write_skipped(run.config.output_dir)
    log.message(
        f"{len(train_rows)} training pairs, {len(val_rows)} for validation; {total_steps} steps"
        + (f", going on after step {resumed_at}" if resumed_at is not None else "")
    )
    if total_steps < run.warmup_steps:
        log.message(
            f"the run ends within its warm-up of {run.warmup_steps} steps, at a rate of "
            f"{run.rates[total_steps - 1]:.3g} instead of {run.config.lr:g}: lower --warmup_steps?"
        )


def _epoch_feed(run: Run, epoch: int, start_batch: int) -> Iterator[Any]:
    """The batches of an epoch from ``start_batch`` on."""
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
) -> dict[str, float]:
    """One update of the weights; its figures, over all processes.

    Raises:
        InputError: the training diverged: its settings are at fault, not this program.
    """
    config = run.config
    set_lr(run.optimizer, run.rates[step])
    found = update(feed)
    processes.average_gradients(run.model.parameters())
    together = torch.stack([value.detach().float() for value in found.values()])
    figures = dict(zip(found, processes.reduce_mean(together).tolist(), strict=True))
    try:
        norm = clip_and_step(
            run.optimizer, loss=figures["loss"], step=step, max_norm=config.clip_grad,
            scaler=run.scaler,
        )  # fmt: skip
    except FloatingPointError as error:
        raise InputError(
            "training", f"diverged at {error}",
            todo=f"lower --lr (now {config.lr:g}), set --clip_grad (now "
            f"{config.clip_grad or 'none'}), or take --dtype fp32 or bf16 (now {config.dtype})",
        ) from error  # fmt: skip
    run.optimizer.zero_grad(set_to_none=True)
    if run.ema is not None:
        run.ema.update(run.model)
    return {**figures, "lr": run.rates[step], "grad_norm": norm}


def _validated(run: Run, validate: Callable[[], dict[str, float]]) -> dict[str, float]:
    run.model.eval()
    try:
        with run.averaged():
            processes.share_buffers(run.model)  # the average's, where one is kept
            return validate()
    finally:
        run.model.train()


# --------------------------------------------------------------------------- saving and resuming


def retrieval_metrics(retrieval: Retrieval, scores: Tensor) -> dict[str, float]:
    """Metrics of a labelled retrieval in percent.

    Args:
        retrieval: with a gallery and labels.
        scores: [queries, gallery].
    """
    assert retrieval.gallery is not None
    assert retrieval.relevant is not None
    queries = [query.query_id for query in retrieval.queries]
    gallery = [image.gallery_id for image in retrieval.gallery]
    return evaluate_scores(ScoreFile(scores, queries, gallery, {}), retrieval.relevant).mean()


def settings_of(run: Run) -> dict[str, Any]:
    """What a run's continuation has to share: its settings, and the pairs it draws from."""
    pairs = run.data.pairs
    return {**as_plain(run.config), PAIRS: f"{len(pairs)}, {pairs.fingerprint()[:12]}"}


def check_same_settings(now: Mapping[str, Any], saved: Mapping[str, Any], path: Path) -> None:
    """Refuse to continue a run under other settings or on other data.

    Raises:
        InputError: naming the settings that differ.
    """
    unknown = FREE_SETTINGS | ({PAIRS} - saved.keys())  # states of earlier versions have no pairs
    differing = [
        f"{name} (was {saved.get(name)}, now {value})"
        for name, value in now.items()
        if name not in unknown and saved.get(name) != value
    ]
    if differing:
        raise InputError(
            path,
            f"belongs to a run with other settings: {', '.join(differing)}",
            todo="take those settings, another --output_dir, or --no_auto_resume to overwrite it",
        )


def restore(run: Run, state: TrainingState, path: Path) -> None:
    """Put a saved state back into the run's objects and generators.

    Raises:
        InputError: it was written by another number of processes, or its tensors do not fit.
    """
    if len(state.rng) != processes.world_size():
        raise InputError(
            path,
            f"was written by {len(state.rng)} processes, this run has {processes.world_size()}",
            todo="start as many, or begin anew with another --output_dir",
        )
    load_strict(run.model, state.model, path)
    run.optimizer.load_state_dict(state.optimizer)
    run.scaler.load_state_dict(state.scaler)
    if run.ema is not None and state.ema is not None:
        run.ema.load_state_dict(state.ema)
    set_rng_state(state.rng[processes.rank()], run.device)


def save_model(run: Run, path: Path, figures: Mapping[str, object]) -> None:
    """Write weights in the released form (``model``); averaged ones where an average is kept."""
    if not (processes.is_main() and run.config.save_ckpt):
        return
    facts = {key: str(value) for key, value in {**run.facts, **figures}.items()}
    with run.averaged():
        save_weights(path, run.released(run.model), facts)
