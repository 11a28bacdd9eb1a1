"""Training run shared by all fine-tuning recipes: steps, validation, checkpoints, log.

A recipe (such as `pab/training/pairs.py`) creates a :class:`Run` and calls its methods in a loop
over epochs and steps. The run holds the model, optimizer and position. The same command, started
again, resumes from the last checkpoint (`pab/training/resume.py`).
"""

from __future__ import annotations

import shlex
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pab.core import processes
from pab.core.checkpoints import (
    TrainingState,
    load_strict,
    read_checkpoint,
    save_training_state,
    save_weights,
)
from pab.core.devices import make_scaler, rng_state, set_rng_state
from pab.core.errors import InputError
from pab.core.gradients import GradientAverage
from pab.core.progress import Progress, write_line
from pab.data.loader import Loader
from pab.data.splits import write_split
from pab.data.tree import labelled_test
from pab.training.config import TrainingConfig
from pab.training.data import checked
from pab.training.optim import Ema, batch_statistics, clip_and_step, set_lr
from pab.training.preflight import check_room
from pab.training.resume import (
    LAST,
    RESUME_KEY,
    Position,
    epoch_name,
    keep_previous,
    known_content,
    prepare_folder,
    read_state,
    remove_older,
    resume_metadata,
)
from pab.training.run_log import RunLog
from pab.training.sampling import EpochBatches
from pab.training.setup import Setup, steps_per_epoch

BEST = "checkpoint-best.pth"  # weights of the best epoch on the validation split
FINAL = "checkpoint-final.pth"  # weights of the last epoch (averaged with --ema_decay)
# GradScaler starts at 2^16. After this many halvings, its scale is below 1 and cannot help.
SCALE_SEARCH = 20
SUMMARY_METRICS = ("R@1", "R@5", "R@10", "mAP")  # of the best epoch, printed at the end


def weights_as_they_are(model: nn.Module) -> Mapping[str, Tensor]:
    """Return a model's state dict unchanged."""
    state: Mapping[str, Tensor] = model.state_dict()
    return state


@dataclass
class Run:
    """Training run: model, optimizer, position, checkpoints and log.

    Attributes:
        model: network to train; a resume restores its weights.
        rates: learning rate per update; the first ``warmup_steps`` are the warm-up.
        update_freq: loader batches accumulated per update.
        facts: metadata of weight files, in addition to the metrics of the epoch.
        scoring: command that scores with a weight file; the file's path is appended.
        samples: what the batches hold, for the start line.
        scored: path appended instead of the weight file's; for recipes that write a model folder.
        released: maps the model to the weights to write, by name.
        ema: average of the weights; None without ``ema_decay``.
        gradients: averages the gradients over processes.
        place: position of the run; see :class:`pab.training.resume.Position`.
        saved_at: step of the last saved training state, or of the resumed checkpoint.
        interrupted: true after Ctrl-C; the next step then stops the run.
    """

    setup: Setup
    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: EpochBatches
    loader: Loader
    rates: Sequence[float]
    warmup_steps: int
    facts: Mapping[str, object]
    scoring: str
    released: Callable[[nn.Module], Mapping[str, Tensor]] = weights_as_they_are
    update_freq: int = 1
    samples: str = "pairs"
    scored: Path | None = None
    scaler: torch.amp.GradScaler = field(init=False)
    ema: Ema | None = field(init=False)
    gradients: GradientAverage = field(init=False)
    place: Position = field(init=False, default_factory=Position)
    saved_at: int | None = field(init=False, default=None)
    interrupted: bool = field(init=False, default=False)
    log: RunLog = field(init=False)
    progress: Progress = field(init=False)

    def __post_init__(self) -> None:
        """Check the free disk space; create the loss scaler and the averages of the run.

        Raises:
            InputError: the disk has too little space for the checkpoints.
        """
        setup = self.setup
        self.config, self.output = setup.config, Path(setup.config.output_dir)
        self.steps = steps_per_epoch(self.batches, self.update_freq)
        self.content = known_content(setup.identity, setup.resume)
        processes.on_main(partial(check_room, self.config, self.model))
        self.scaler = make_scaler(setup.device, setup.dtype)
        decay = self.config.ema_decay
        self.ema = None if decay is None else Ema(self.model, decay, warmup=True)
        self.gradients = GradientAverage(self.model.parameters())

    # ---- Steps

    @property
    def stopped(self) -> bool:
        """True once ``--max_steps`` updates are done."""
        return 0 < self.config.max_steps <= self.place.step

    def feed(self) -> Iterator[Any]:
        """Start or continue the current epoch; return its remaining batches."""
        twins_from, epoch = self.config.twin_batches_from, self.place.epoch
        self.batches.epoch = epoch
        self.batches.start_batch = self.place.step_in_epoch * self.update_freq
        if twins_from is not None and epoch >= twins_from:
            data = self.setup.data
            self.batches.videos = data.pairs.videos[data.train_rows]
        self.model.train()
        self._before_step()
        return checked(self.loader)

    def _before_step(self) -> None:
        """Start the clock of a step; save the batch statistics, which a skipped step restores."""
        self._began = time.perf_counter()
        self._statistics = [(buffer, buffer.clone()) for buffer in batch_statistics(self.model)]

    def step(self, losses: Mapping[str, Tensor]) -> None:
        """Update the weights with the accumulated gradients, log, and save a state if it is due.

        The update is skipped if the loss or a gradient is not finite. All processes make the same
        decision, because they see the same mean loss and gradients.

        Args:
            losses: ``loss`` first, then other values; their means over processes are logged.

        Raises:
            InputError: too many consecutive steps were skipped, or a state cannot be written.
        """
        if self.interrupted:
            raise KeyboardInterrupt
        config, place = self.config, self.place
        rate = self.rates[place.step]
        set_lr(self.optimizer, rate)
        means = self.gradients.finish(torch.stack([v.detach().float() for v in losses.values()]))
        norm, problem, values = clip_and_step(
            self.optimizer, figures=means, max_norm=config.clip_grad, scaler=self.scaler,
            gradients=self.gradients,
        )  # fmt: skip
        figures = dict(zip(losses, values, strict=True))
        self.optimizer.zero_grad(set_to_none=True)
        total, in_row = place.skipped
        place.skipped = (total + 1, in_row + 1) if problem else (total, 0)
        place.step += 1
        place.step_in_epoch += 1
        if problem:
            for buffer, before in self._statistics:
                buffer.copy_(before)
        elif self.ema is not None:
            self.ema.update(self.model)

        figures |= {"lr": rate, "grad_norm": norm}
        if problem:
            figures["skipped"] = place.skipped[0]
        seconds = time.perf_counter() - self._began
        self.log.log(place.step, {"epoch": place.epoch, **figures, "seconds": seconds})
        if problem:
            self._report_skipped(problem)
        skipped = {"skipped": place.skipped[0]} if place.skipped[0] else {}
        self.progress.update(loss=figures["loss"], **skipped)
        every = config.save_every_steps
        if self.stopped or (every and place.step % every == 0):
            self.save_state()
        if self.stopped:
            write_line(f"stopped after step {place.step} (--max_steps)")
        self._before_step()

    def _report_skipped(self, problem: str) -> None:
        """Report a skipped step; stop the run after too many consecutive ones."""
        config, step, (total, in_row) = self.config, self.place.step, self.place.skipped
        self.log.count_skipped(total)
        write_line(f"step {step} skipped, {in_row} in a row, {total} in all: {problem}")
        # In fp16, steps are also skipped while the scaler searches for a scale, so allow more.
        scaling = self.scaler.is_enabled()
        limit = max(config.max_skipped_steps, SCALE_SEARCH) if scaling else config.max_skipped_steps
        if in_row >= limit:
            raise InputError(
                "training",
                f"skipped steps in a row: {in_row}, the last at step {step}: {problem}",
                todo=f"lower --lr (now {config.lr:g}), set --clip_grad (now "
                f"{config.clip_grad or 'none'}), or use --dtype fp32 or bf16 (now {config.dtype});"
                " these settings may differ when the run is resumed",
            )

    # ---- Validation

    @property
    def validates(self) -> bool:
        """True if the run has a validation split."""
        return len(self.setup.data.val_rows) > 0

    def averaged(self) -> AbstractContextManager[None]:
        """Use the averaged weights inside the block, if the run has an average."""
        return nullcontext() if self.ema is None else self.ema.swapped(self.model)

    @contextmanager
    def validating(self) -> Iterator[None]:
        """Use evaluation mode inside the block, and averaged weights if the run has an average.

        If the epoch ends with a save, the training state is also saved before the validation.
        """
        if self._saves_epoch and self.saved_at != self.place.step:
            self.save_state()
        self.model.eval()
        try:
            with self.averaged():
                processes.share_buffers(self.model)
                yield
        finally:
            self.model.train()

    def validated(self, figures: Mapping[str, float]) -> None:
        """Log an epoch's validation metrics; save the weights if it is the best epoch so far."""
        epoch, best = self.place.epoch, self.place.best_metric
        self.log.log(self.place.step, {"epoch": epoch, **figures}, kind="val")
        write_line(f"epoch {epoch}: " + _listed(figures))
        if best is None or _quality(figures) > best:
            self.place.best_metric = _quality(figures)
            self.save(BEST, {"epoch": epoch, **figures})

    # ---- Checkpoints

    @property
    def _saves_epoch(self) -> bool:
        """True if the current epoch ends with checkpoints."""
        ended = self.place.epoch + 1
        return ended % self.config.save_ckpt_freq == 0 or ended == self.config.epochs

    def end_epoch(self) -> None:
        """Advance to the next epoch; save weights and training state if a save is due."""
        epoch, saves = self.place.epoch, self._saves_epoch
        self.place.epoch, self.place.step_in_epoch = epoch + 1, 0
        if not saves:
            return
        metadata = resume_metadata(self.setup.identity, self.content, self.place)
        self.save(epoch_name(epoch), {"epoch": epoch, RESUME_KEY: metadata})
        if processes.is_main() and self.config.save_ckpt:
            remove_older(self.output, epoch, self.config.keep_checkpoints)
        self.save_state()

    def save(self, name: str, figures: Mapping[str, object]) -> None:
        """Write the weights in rank 0 (averaged with ``--ema_decay``), unless saving is off."""
        if not (processes.is_main() and self.config.save_ckpt):
            return
        with self.averaged():
            weights = self.released(self.model)
            save_weights(self.output / name, weights, _as_text({**self.facts, **figures}))

    def save_state(self) -> None:
        """Save the training state; every process must call this method, but only rank 0 writes."""
        place = self.place
        generators = processes.gather_objects(rng_state(self.setup.device))
        state = TrainingState(
            model=self.model.state_dict(), optimizer=self.optimizer.state_dict(), step=place.step,
            epoch=place.epoch, step_in_epoch=place.step_in_epoch, rng=generators,
            config=self.setup.identity.settings, scaler=self.scaler.state_dict(),
            ema=self.ema.state_dict() if self.ema else None, best_metric=place.best_metric,
            skipped={"total": place.skipped[0], "in_row": place.skipped[1]},
            facts=_as_text(self.facts), content=self.content,
        )  # fmt: skip
        if processes.is_main() and self.config.save_ckpt:
            keep_previous(self.output)
            save_training_state(self.output / LAST, state)
        self.saved_at = place.step

    # ---- Beginning and end

    def resume(self) -> None:
        """Restore the checkpoint, if any: a whole training state, or weights and position only.

        Raises:
            InputError: the checkpoint cannot be read or does not fit this run.
        """
        point, model = self.setup.resume, self.model
        if point is None:
            return
        state = read_state(point, model.state_dict().keys())
        load_strict(model, state.model, point.path)
        # Changed settings start a new attempt, so the count of consecutive skipped steps restarts.
        skipped = (
            state.skipped.get("total", 0),
            state.skipped.get("in_row", 0) * (not point.changed),
        )
        self.place = Position(
            state.step, state.epoch, state.step_in_epoch, state.best_metric, skipped
        )
        self.saved_at = state.step
        if point.exact:
            self.optimizer.load_state_dict(state.optimizer)
            if state.scaler:  # empty if the saved run had no loss scaling
                self.scaler.load_state_dict(state.scaler)
            if self.ema is not None and state.ema is not None:
                self.ema.load_state_dict(state.ema)
            set_rng_state(state.rng[processes.rank()], self.setup.device)
        elif self.ema is not None:
            self.ema = Ema(model, self.ema.decay, warmup=self.ema.warmup)
        if self.stopped:
            write_line(f"step {state.step} done; --max_steps is {self.config.max_steps}")

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Write the log and show the progress inside the block; on Ctrl-C, report how to resume.

        Raises:
            InputError: the output folder is not writable, or its earlier record cannot be read.
        """
        config, setup, resume = self.config, self.setup, self.setup.resume
        total = config.epochs * self.steps
        with RunLog(
            self.output, config.log_dir, config, setup.command, resumed_at=self.saved_at,
            validates_again=self.place.step_in_epoch == self.steps,
            resumed_from=resume.record() if resume else None, skipped_steps=self.place.skipped[0],
            computed_in=setup.compute.number_format(),
        ) as self.log:  # fmt: skip
            if processes.is_main() and config.save_ckpt:
                prepare_folder(self.output, resume)
            if resume is not None and not resume.exact:
                self.save_state()  # replaces a damaged state at once
            self._announce(total)
            before = signal.signal(signal.SIGINT, self._interrupt)
            with Progress(total, "training", "steps", self.place.step) as self.progress:
                try:
                    yield
                except KeyboardInterrupt as stop:
                    raise KeyboardInterrupt(self._interrupted()) from stop
                finally:
                    signal.signal(signal.SIGINT, before)

    def _interrupt(self, *_: object) -> None:
        """Stop at the next step after the first Ctrl-C, and at once after the second.

        The first only sets a flag: an exception raised while loaders start or end would be lost.
        """
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True

    def _announce(self, total: int) -> None:
        pairs, train_rows, val_rows = self.setup.data
        if processes.is_main():
            if self.config.val_pairs:
                write_split(self.output, pairs, train_rows, val_rows)
            pairs.write_skipped(self.output)
        resumed = f", resumed after step {self.place.step}" if self.setup.resume else ""
        write_line(
            f"training {self.samples}: {self.batches.n}, validation pairs: {len(val_rows)}, "
            f"steps: {total}{resumed}"
        )
        if total < self.warmup_steps:
            write_line(
                f"the run ends in its warm-up of {self.warmup_steps} steps, at a learning rate of "
                f"{self.rates[total - 1]:.3g} instead of {self.config.lr:g}: lower --warmup_steps?"
            )

    def _interrupted(self) -> str:
        """Describe which state is saved, and how to resume from it."""
        stopped = f"interrupted after step {self.place.step}"
        if not self.config.save_ckpt:
            return f"{stopped}: nothing is saved (--no_save_ckpt)"
        if self.saved_at is None:
            return (
                f"{stopped}: nothing is saved yet, so the same command starts over; "
                "--save_every_steps N saves within an epoch"
            )
        wanted = "" if self.config.auto_resume else ", with --auto_resume"
        return (
            f"{stopped}: {self.output / LAST} holds step {self.saved_at}; "
            f"resume with the same command{wanted}"
        )

    def finish(self) -> None:
        """Save the final weights; print the paths of the weights and the scoring command."""
        self.save(FINAL, {"epoch": self.config.epochs - 1})
        self.progress.close()
        if processes.is_main():
            write_line(self._summary())

    def _summary(self) -> str:
        if not self.config.save_ckpt:
            return "finished; no checkpoint was written (--no_save_ckpt)"
        name, text = FINAL, f"finished: {self.output / FINAL} holds the last epoch"
        if self.validates and (self.output / BEST).is_file():
            best = read_checkpoint(self.output / BEST)["metadata"]
            figures = _listed({metric: float(best[metric]) for metric in SUMMARY_METRICS})
            name = BEST
            text += f", {self.output / BEST} the best, epoch {best['epoch']} ({figures})"
        command = f"{self.scoring} {shlex.quote(str(self.scored or self.output / name))}"
        return f"{text}\nscore with: {command}{_test_of(self.config)}"


def command_line(program: str, **flags: object) -> str:
    """Format a command and its flags for a shell."""
    return " ".join([program, *(shlex.join([f"--{k}", str(v)]) for k, v in flags.items())])


def _quality(figures: Mapping[str, float]) -> float:
    """Return the value by which epochs are compared: R@1, plus a little mAP to break ties."""
    return figures["R@1"] + 1e-3 * figures["mAP"]


def _test_of(config: TrainingConfig) -> str:
    """Return the flag of the labelled test set; for own data without one, a placeholder."""
    test = labelled_test(config.data_path)
    if test.is_file():
        return " " + command_line("", annotation=test).strip()
    return "" if config.data_path == TrainingConfig.data_path else " --annotation FILE"


def _listed(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in figures.items())


def _as_text(facts: Mapping[str, object]) -> dict[str, str]:
    return {key: str(value) for key, value in facts.items()}
