"""Fine-tune LHP: `python -m lhp.train`. Setup, loop, save, in this order.

The recipe is the published one (see `lhp/config.py`); on several GPUs run it under torchrun. A run
that is started again with the same command goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lhp.beit3 import Beit3Retrieval, adapt_state, model_config, start_from_scratch
from lhp.config import TrainConfig
from lhp.data import BadSample, PairBatch, PairDataset, checked, collate
from lhp.encode import check_text_length, encode_captions, encode_images
from lhp.tokenizer import Tokenizer
from lhp.views import HybridView
from pab import processes
from pab.annotations import retrieval_of_pairs
from pab.checkpoints import (
    TrainingState,
    load_strict,
    load_training_state,
    model_state,
    read_checkpoint,
    rng_state,
    save_training_state,
    save_weights,
    set_rng_state,
)
from pab.config import as_plain, config_from_args
from pab.contrastive import cached_backward, gathered_infonce
from pab.devices import autocast, dtype_of, make_scaler, pick_device, seed_everything
from pab.errors import InputError, run_cli
from pab.images import verify_images
from pab.metrics import evaluate_scores
from pab.optim import (
    Ema,
    clip_and_step,
    make_adamw,
    parameter_groups,
    set_lr,
    warmup_cosine,
)
from pab.run_log import RunLog
from pab.sampling import EpochBatches
from pab.scores import ScoreFile
from pab.splits import validation_split, write_split
from pab.training_set import TrainingSet

LAST = "checkpoint-last.pth"  # everything a resumed run needs
BEST = "checkpoint-best.pth"  # weights of the best epoch on the validation split
FINAL = "checkpoint-final.pth"  # weights of the last epoch (the average, where one is kept)
DEBUG_CONFIG = "configs/lhp/debug.yaml"
# Settings that may differ between a run and its continuation: they do not change the result.
FREE_SETTINGS = {
    "task", "num_workers", "device", "log_dir", "output_dir", "cache_dir", "save_ckpt_freq",
    "save_every_steps", "auto_resume", "max_steps", "checkpoint_activations",
}  # fmt: skip


def train(config: TrainConfig, argv: list[str]) -> None:
    """Run the whole recipe.

    Raises:
        InputError: bad settings, data or checkpoint, before anything is written; a training image
            that cannot be read, or a loss that is not finite, when it is met.
    """
    # ---- Setup
    device = pick_device(config.device)
    dtype = dtype_of(config.dtype)
    autocast(device, dtype)  # refuses a format this device cannot train in
    processes.init_processes(device)
    rank, world = processes.rank(), processes.world_size()
    output = Path(config.output_dir)

    tokenizer = Tokenizer(config.sentencepiece_model, config.max_text_length)
    pairs = open_training_set(config)
    train_rows, val_rows = validation_split(pairs, config.val_pairs, config.val_seed)
    # Not the training images: decoding a million of them first would take hours.
    verify_images([pairs.image_path(pairs[int(i)]) for i in val_rows], config.num_workers)
    view = HybridView(config.input_size, config.local_prob, config.crop_scale, config.crop_ratio)
    dataset = PairDataset(pairs, train_rows, view, tokenizer, config.seed)
    batches = EpochBatches(len(dataset), config.batch_size, config.seed, rank, world)
    steps_per_epoch = batches.batches_per_epoch // config.update_freq
    if steps_per_epoch == 0:
        raise InputError(
            "--batch_size",
            f"{config.batch_size} x {world} processes x update_freq {config.update_freq} is more "
            f"than the {len(dataset)} training pairs",
        )
    loader: DataLoader[PairBatch | BadSample] = DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=batches,  # type: ignore[arg-type]
        collate_fn=collate,
        num_workers=config.num_workers,
        persistent_workers=config.num_workers > 0,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # loading draws nothing from the generator drop path uses
    )

    seed_everything(config.seed)  # the same first weights everywhere ...
    model = build_model(config, tokenizer).to(device)
    seed_everything(config.seed, rank + 1)  # ... and other drop path draws in every process
    layers = model.config.layers
    groups = parameter_groups(
        model.named_parameters(),
        weight_decay=config.weight_decay,
        no_decay=model.no_weight_decay,
        layer_of=lambda name: model.layer_of(name, layers),
        n_layers=layers,
        layer_decay=config.layer_decay,
    )
    optimizer = make_adamw(groups, config.opt_betas, config.opt_eps)
    total_steps = config.epochs * steps_per_epoch
    # A run shorter than its warm-up sees the beginning of it.
    scheduled_steps = max(total_steps, config.warmup_steps)
    rates = warmup_cosine(config.lr, config.min_lr, scheduled_steps, config.warmup_steps)
    scaler = make_scaler(device, dtype)
    ema = Ema(model, config.ema_decay, warmup=True) if config.ema_decay is not None else None

    step, first_epoch, skip_steps, best = 0, 0, 0, None
    resumed_at = None
    if config.auto_resume and (output / LAST).exists():
        state = load_training_state(output / LAST)
        check_same_settings(config, state.config, output / LAST)
        restore(state, model, optimizer, scaler, ema, device, output / LAST)
        step, first_epoch, skip_steps = state.step, state.epoch, state.step_in_epoch
        best, resumed_at = state.best_metric, step
        del state
        if 0 < config.max_steps <= step:
            print(f"{step} steps are done, --max_steps {config.max_steps}", file=sys.stderr)
            return

    def snapshot(epoch: int, step_in_epoch: int) -> None:
        """Write everything a resumed run needs; all processes take part, the main one writes."""
        generators = processes.gather_objects(rng_state(device))
        if processes.is_main() and config.save_ckpt:
            state = TrainingState(
                model=model.state_dict(),
                optimizer=optimizer.state_dict(),
                step=step,
                epoch=epoch,
                step_in_epoch=step_in_epoch,
                rng=generators,
                config=as_plain(config),
                scaler=scaler.state_dict(),
                ema=ema.state_dict() if ema else None,
                best_metric=best,
            )
            save_training_state(output / LAST, state)

    # ---- Loop
    with RunLog(
        output, config.log_dir, config, argv, command="python -m lhp.train", resumed_at=resumed_at
    ) as log:
        if processes.is_main() and config.val_pairs:
            write_split(output, pairs, train_rows, val_rows)
        log.message(
            f"{len(train_rows)} training pairs, {len(val_rows)} for validation; {total_steps} steps"
            + (f", going on after step {step}" if resumed_at is not None else "")
        )
        if total_steps < config.warmup_steps:
            log.message(
                f"the run ends within its warm-up of {config.warmup_steps} steps, at a rate of "
                f"{rates[total_steps - 1]:.3g} instead of {config.lr:g}: lower --warmup_steps?"
            )
        with log.progress(total_steps, "training", done=step) as progress:
            for epoch in range(first_epoch, config.epochs):
                model.train()
                batches.epoch = epoch
                if config.twin_batches_from is not None and epoch >= config.twin_batches_from:
                    batches.videos = pairs.videos[train_rows]
                batches.start_batch = skip_steps * config.update_freq
                feed = checked(loader)
                for step_in_epoch in range(skip_steps, steps_per_epoch):
                    started = time.perf_counter()
                    set_lr(optimizer, rates[step])
                    loss = torch.zeros((), device=device)
                    for _ in range(config.update_freq):
                        batch = PairBatch(*(t.to(device, non_blocking=True) for t in next(feed)))
                        loss += backward(model, batch, config, device, dtype, scaler)
                    processes.average_gradients(model.parameters())
                    loss = processes.reduce_mean(loss)
                    norm = take_step(optimizer, loss, step, config, scaler)
                    optimizer.zero_grad(set_to_none=True)
                    if ema is not None:
                        ema.update(model)
                    step += 1
                    figures = {
                        "epoch": epoch,
                        "loss": float(loss),
                        "lr": rates[step - 1],
                        "grad_norm": norm,
                        "logit_scale": float(model.logit_scale.detach().exp()),
                        "seconds": time.perf_counter() - started,
                    }
                    log.log(step, figures)
                    progress.update(loss=figures["loss"])
                    if config.save_every_steps and step % config.save_every_steps == 0:
                        snapshot(epoch, step_in_epoch + 1)
                    if step == config.max_steps:
                        snapshot(epoch, step_in_epoch + 1)
                        log.message(f"stopped after {step} steps, as --max_steps asks")
                        return
                skip_steps = 0

                # ---- Validate and save
                if len(val_rows):
                    figures = validate(
                        model, ema, tokenizer, pairs, val_rows, config, device, dtype
                    )
                    log.log(step, {"epoch": epoch, **figures}, kind="val")
                    log.message(
                        f"epoch {epoch}: " + ", ".join(f"{k} {v:.2f}" for k, v in figures.items())
                    )
                    key = figures["R@1"] + 1e-3 * figures["mAP"]  # R@1, mAP where R@1 ties
                    if best is None or key > best:
                        best = key
                        save_model(output / BEST, model, ema, config, {"epoch": epoch, **figures})
                if (epoch + 1) % config.save_ckpt_freq == 0 or epoch + 1 == config.epochs:
                    snapshot(epoch + 1, 0)
        save_model(output / FINAL, model, ema, config, {"epoch": config.epochs - 1})


def open_training_set(config: TrainConfig) -> TrainingSet:
    """The annotation shards that the pattern names, as one training set."""
    root = Path(config.data_path)
    if not root.is_dir():
        raise InputError("--data_path", f"expected the data's root folder, found no {root}")
    shards = sorted(root.glob(config.train_shards))
    if not shards:
        raise InputError(
            "--train_shards", f"no file under {root} matches {config.train_shards!r}",
            todo="check the data with: python -m pab.layout check " + str(root),
        )  # fmt: skip
    return TrainingSet.open(root, shards, Path(config.cache_dir) if config.cache_dir else None)


def build_model(config: TrainConfig, tokenizer: Tokenizer) -> Beit3Retrieval:
    """The model with weights for a start from scratch, or with those of ``--finetune``."""
    sizes = model_config(config.model, input_size=config.input_size)
    if "_mini_" in config.model or "_debug_" in config.model:  # from scratch, with own vocabulary
        sizes = dataclasses.replace(
            sizes, vocab_size=tokenizer.vocab_size, text_positions=config.max_text_length + 2
        )
    sizes = dataclasses.replace(
        sizes, drop_path=config.drop_path, checkpoint_activations=config.checkpoint_activations
    )
    check_text_length(config.max_text_length, sizes)
    model = Beit3Retrieval(sizes)
    if not config.finetune:
        start_from_scratch(model)
        return model
    state = adapt_state(model_state(read_checkpoint(config.finetune), config.finetune), sizes)
    load_strict(model, state, config.finetune)
    if tokenizer.vocab_size > sizes.vocab_size:
        raise InputError(
            config.sentencepiece_model,
            f"has {tokenizer.vocab_size} ids, the model's word table only {sizes.vocab_size}",
        )
    return model


def backward(
    model: Beit3Retrieval,
    batch: PairBatch,
    config: TrainConfig,
    device: torch.device,
    dtype: torch.dtype,
    scaler: torch.amp.GradScaler,
) -> Tensor:
    """Add one batch's gradient; its loss, as a share of the update's mean."""

    def scaled(loss: Tensor) -> Tensor:
        return scaler.scale(loss / config.update_freq)

    def encode(part: PairBatch) -> Tensor:
        with autocast(device, dtype):  # [b, 2, D]: image and text vectors side by side
            image = model.encode_image(part.image)
            text = model.encode_text(part.text_ids, part.padding_mask)
        return torch.stack([image, text], dim=1)

    def loss_of(parts: list[Tensor]) -> Tensor:
        image, text = torch.cat(parts).unbind(dim=1)
        return gathered_infonce(image, text, model.logit_scale)

    if config.grad_cache_chunk:
        size = config.grad_cache_chunk
        parts = [
            PairBatch(*columns) for columns in zip(*(t.split(size) for t in batch), strict=True)
        ]
        chunks = [lambda part=part: encode(part) for part in parts]  # type: ignore[misc]
        return cached_backward(chunks, loss_of, device=device, scale=scaled) / config.update_freq
    loss = loss_of([encode(batch)])
    scaled(loss).backward()
    return loss.detach() / config.update_freq


def take_step(
    optimizer: torch.optim.Optimizer,
    loss: Tensor,
    step: int,
    config: TrainConfig,
    scaler: torch.amp.GradScaler,
) -> float:
    """One update of the weights; the norm of all gradients before it.

    Raises:
        InputError: the training diverged: its settings are at fault, not this program.
    """
    try:
        return clip_and_step(
            optimizer, loss=loss, step=step, max_norm=config.clip_grad, scaler=scaler
        )
    except FloatingPointError as error:
        raise InputError(
            "training", f"diverged at {error}",
            todo=f"lower --lr (now {config.lr:g}), set --clip_grad (now "
            f"{config.clip_grad or 'none'}), or take --dtype fp32 or bf16 (now {config.dtype})",
        ) from error  # fmt: skip


def validate(
    model: Beit3Retrieval,
    ema: Ema | None,
    tokenizer: Tokenizer,
    pairs: TrainingSet,
    rows: Any,
    config: TrainConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, float]:
    """Retrieval metrics on the validation split, in percent; the averaged weights where kept."""
    retrieval = retrieval_of_pairs((pairs[int(i)] for i in rows), Path(config.data_path))
    assert retrieval.gallery is not None
    assert retrieval.relevant is not None
    model.eval()
    try:
        if ema is not None:
            with ema.swapped(model):
                scores = _scores(model, tokenizer, retrieval, config, device, dtype)
        else:
            scores = _scores(model, tokenizer, retrieval, config, device, dtype)
    finally:
        model.train()
    table = ScoreFile(
        scores,
        [query.query_id for query in retrieval.queries],
        [image.gallery_id for image in retrieval.gallery],
        {},
    )
    return evaluate_scores(table, retrieval.relevant).mean()


def _scores(
    model: Beit3Retrieval,
    tokenizer: Tokenizer,
    retrieval: Any,
    config: TrainConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    options: dict[str, Any] = {"batch_size": config.batch_size, "device": device, "dtype": dtype}
    images = encode_images(model, retrieval.gallery, num_workers=config.num_workers, **options)
    captions = [query.caption for query in retrieval.queries]
    return encode_captions(model, tokenizer, captions, **options) @ images.T


def restore(
    state: TrainingState,
    model: Beit3Retrieval,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    ema: Ema | None,
    device: torch.device,
    path: Path,
) -> None:
    """Put a saved state back into the run's objects and generators."""
    if len(state.rng) != processes.world_size():
        raise InputError(
            path,
            f"was written by {len(state.rng)} processes, this run has {processes.world_size()}",
            todo="start as many, or begin anew with another --output_dir",
        )
    load_strict(model, state.model, path)
    optimizer.load_state_dict(state.optimizer)
    scaler.load_state_dict(state.scaler)
    if ema is not None and state.ema is not None:
        ema.load_state_dict(state.ema)
    set_rng_state(state.rng[processes.rank()], device)


def check_same_settings(config: TrainConfig, saved: dict[str, Any], path: Path) -> None:
    """Refuse to continue a run under other settings.

    Raises:
        InputError: naming the settings that differ.
    """
    now = as_plain(config)
    differing = [
        f"{name} (was {saved.get(name)}, now {value})"
        for name, value in now.items()
        if name not in FREE_SETTINGS and saved.get(name) != value
    ]
    if differing:
        raise InputError(
            path,
            f"belongs to a run with other settings: {', '.join(differing)}",
            todo="take those settings, another --output_dir, or --no_auto_resume to overwrite it",
        )


def save_model(
    path: Path, model: Beit3Retrieval, ema: Ema | None, config: TrainConfig, facts: dict[str, Any]
) -> None:
    """Write weights in the released form (``model``); averaged ones where an average is kept."""
    if not (processes.is_main() and config.save_ckpt):
        return
    metadata = {"architecture": config.model, "input_size": config.input_size, **facts}
    facts_text = {key: str(value) for key, value in metadata.items()}
    if ema is None:
        save_weights(path, model.state_dict(), facts_text)
    else:
        with ema.swapped(model):
            save_weights(path, model.state_dict(), facts_text)


def _add_debug_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help=f"short for --config {DEBUG_CONFIG}")


def main(argv: list[str] | None = None) -> None:
    """Read the command line and train."""
    argv = list(sys.argv[1:] if argv is None else argv)
    given = argv
    if "--debug" in argv:
        if any(word.split("=")[0] == "--config" for word in argv):
            raise InputError("--debug", f"contradicts --config: it stands for {DEBUG_CONFIG}")
        given = ["--config", DEBUG_CONFIG, *(word for word in argv if word != "--debug")]
    config, _ = config_from_args(
        TrainConfig,
        given,
        prog="python -m lhp.train",
        description="Fine-tune BEiT-3 with the local-global hybrid perspective.",
        extra=_add_debug_flag,
    )
    try:
        train(config, argv)
    finally:
        processes.close()


if __name__ == "__main__":
    run_cli(main)
