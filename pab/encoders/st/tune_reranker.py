"""Tune a vision-language reranker on questions: a caption, its right image, and wrong ones.

The score of a pair is logit(yes) - logit(no), as in `scripts/rerank_infer.py`. Two losses are
offered. The pointwise loss is the cross entropy of "yes" for the right image and "no" for wrong
ones; the published rerankers use this loss. The pairwise loss is the negative log-likelihood of the
model of Bradley and Terry (1952): the right image must score above each wrong one.

Shape letters: `B` questions per batch, `C` images per question, the right one first.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F

from pab.core import processes
from pab.core.checkpoints import load_strict, model_state, read_checkpoint
from pab.core.config import flag, model_flag, speed_flag
from pab.core.devices import autocast, dtype_of
from pab.core.errors import InputError
from pab.core.files import write_folder, write_json
from pab.core.notices import notice
from pab.data.image_paths import ImageFinder
from pab.data.images import load_image
from pab.data.records import Retrieval
from pab.encoders.layer_numbers import no_weight_decay
from pab.encoders.st.folders import (
    LIBRARY_CONFIG,
    base_folder,
    folder_hash,
    model_folder,
    read_json,
)
from pab.encoders.st.pair_inputs import PROMPT, TUNED_PROMPT, PairModel, read_settings
from pab.encoders.st.pictures import REJECTIONS
from pab.encoders.st.questions import (
    Draws,
    PairQuestions,
    Question,
    QuestionSamples,
    Sample,
    check_images,
    check_twins,
    read_mined,
    without_held_out,
)
from pab.encoders.st.tune_config import (
    VlmTuneConfig,
    check_batches_fit,
    image_at_fault,
    plain_attention,
)
from pab.encoders.tuning import freeze, merged_state, with_lora
from pab.metrics import evaluate_scores, twin_preference
from pab.scores import ScoreFile
from pab.scoring.rerank import fill
from pab.training.data import epoch_batches, training_loader, validation_retrieval
from pab.training.loop import BEST, FINAL, Run, command_line
from pab.training.optim import make_adamw, parameter_groups, warmup_cosine
from pab.training.resume import ContentHash, named_files
from pab.training.setup import Setup, same_start, set_up, steps_per_epoch

VISION_TOWERS = ("visual", "vision_tower", "vision_model")  # attribute names in transformers
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")


@dataclass(frozen=True)
class TrainConfig(VlmTuneConfig):
    """Settings of the tuning; each field is a flag of `python scripts/finetune_reranker.py`."""

    # Data
    pairs: str | None = flag(
        None, "mined.jsonl of ensemble.mine; none: all training pairs, with twins as wrong images",
        group="data",
    )  # fmt: skip
    hard_negatives: int = flag(1, "mined wrong images (without --pairs: twins) per caption", ge=0)
    easy_negatives: int = flag(1, "random wrong images per caption", ge=0)
    hard_negatives_from: int = flag(
        0, "first epoch with hard negatives; earlier epochs use easy ones", ge=0
    )
    val_candidates: int = flag(
        10, "images per validation caption: the right one, its twin, random ones", ge=2
    )

    # Model
    model: str = model_flag("Qwen/Qwen3-VL-Reranker-2B", "folder or hub id of a reranker")
    prompt: str = model_flag(PROMPT, "instruction before every pair; empty for none")
    yes_token: str | None = model_flag(None, "text of the positive answer (default: the model's)")
    no_token: str | None = model_flag(None, "text of the negative answer (default: the model's)")
    lora_rank: int = model_flag(16, "rank of LoRA updates; 0: train all weights", ge=0)
    lora_alpha: int = model_flag(32, "LoRA: updates are scaled by alpha / rank", ge=1)
    dora: bool = model_flag(False, "also train the magnitude of each row of a matrix (DoRA)")
    freeze: Literal["none", "vision"] = model_flag("none", "tower whose weights are frozen")
    weights: Literal["fp32", "bf16"] = speed_flag(
        "fp32", "dtype of the loaded weights; bf16 needs LoRA, whose updates stay in fp32"
    )

    # Optimization
    loss: Literal["pointwise", "pairwise", "both"] = flag(
        "both", "yes/no cross entropy, Bradley-Terry, or the sum of both"
    )
    batch_size: int = flag(4, "captions per process and batch", ge=1)
    update_freq: int = flag(1, "batches whose gradients are accumulated per update", ge=1)
    lr: float = flag(1e-4, "peak learning rate; without LoRA, use about a tenth")
    clip_grad: float | None = flag(1.0, "maximum gradient norm; none: no clipping")
    output_dir: str = flag("output/reranker", "folder of the checkpoints, the log and the model")

    def check(self) -> None:
        """See :class:`pab.training.config.TrainingConfig`.

        Raises:
            InputError: a value is invalid; the message names the flag.
        """
        super().check()
        if self.hard_negatives + self.easy_negatives == 0:
            raise InputError("--easy_negatives", "expected a wrong image per caption, found none")
        if self.dora and not self.lora_rank:
            raise InputError("--dora", "needs --lora_rank above 0")
        if self.weights == "bf16" and not self.lora_rank:
            raise InputError("--weights", "bf16 loses small updates", todo="set --lora_rank 16")
        if self.twin_batches_from is not None:
            raise InputError(
                "--twin_batches_from", "a reranker has no in-batch negatives",
                todo="set --hard_negatives_from",
            )  # fmt: skip

    @property
    def draws(self) -> Draws:
        """Numbers of wrong images per question."""
        return Draws(self.hard_negatives, self.easy_negatives, self.hard_negatives_from)


class PairInputs(NamedTuple):
    """Model inputs of B questions with C images each, as B x C pairs, question by question."""

    tensors: dict[str, Tensor]
    questions: int


def collate(pair_model: PairModel, samples: list[Sample | InputError]) -> PairInputs | InputError:
    """Build the model inputs of a batch; return the first error, if any."""
    good = [sample for sample in samples if not isinstance(sample, InputError)]
    if len(good) < len(samples):
        return next(sample for sample in samples if isinstance(sample, InputError))
    try:
        return PairInputs(inputs_of(pair_model, good), len(good))
    except REJECTIONS as error:
        images = (pair for one in good for pair in zip(one.paths, one.images, strict=True))
        return image_at_fault(error, images, lambda image: pair_model.inputs(["a"], [image]))


def inputs_of(pair_model: PairModel, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Build the model inputs of all pairs of samples with equal numbers of images."""
    captions = [sample.caption for sample in samples for _ in sample.images]
    return pair_model.inputs(captions, [image for sample in samples for image in sample.images])


def losses(scores: Tensor, kind: Literal["pointwise", "pairwise", "both"]) -> dict[str, Tensor]:
    """Compute the loss of scores [B, C], with the right image in column 0.

    Right and wrong images have equal weight in the pointwise loss, whatever C is.

    Returns:
        The chosen ``loss``, both losses, and ``right``: share of wrong images below the right one.
    """
    right, wrong = scores[:, :1], scores[:, 1:]
    pointwise = (F.softplus(-right).mean() + F.softplus(wrong).mean()) / 2
    pairwise = F.softplus(wrong - right).mean()
    chosen = {"pointwise": pointwise, "pairwise": pairwise, "both": pointwise + pairwise}[kind]
    above = (right > wrong).float().mean()
    return {"loss": chosen, "pointwise": pointwise, "pairwise": pairwise, "right": above}


def train(config: TrainConfig, command: str) -> None:
    """Run the recipe from data to the folder of the tuned model.

    Raises:
        InputError: settings, data, model or checkpoint are invalid, an image cannot be read or
            processed, a file cannot be written, or too many consecutive steps are skipped because
            the loss or a gradient is not finite.
    """
    # ---- Data and model
    folder, target = model_folder(config.model), config.tuned_folder()
    setup = set_up(config, command, files_of(config, folder), config.update_freq)
    device = setup.device
    questions = choose_questions(config, setup)
    batches = epoch_batches(config, len(questions))
    steps = steps_per_epoch(batches, config.update_freq)
    pair_model = same_start(config.seed, partial(open_model, config, folder, device))
    dataset = QuestionSamples(
        questions, setup.data.pairs, setup.data.train_rows, config.draws, config.seed,
        config.random_crop(),
    )  # fmt: skip
    loader = training_loader(dataset, batches, partial(collate, pair_model), config, device)
    first = collate(pair_model, [dataset[(0, 0)]])
    if isinstance(first, PairInputs):  # an unreadable image is reported with its batch
        check_batches_fit(loader, first.tensors, config.batch_size)

    # ---- Optimizer and schedule
    groups = parameter_groups(
        pair_model.model.named_parameters(), weight_decay=config.weight_decay,
        no_decay=no_weight_decay,
    )  # fmt: skip
    total = max(config.epochs * steps, config.warmup_steps)
    run = Run(
        setup,
        model=pair_model.model,
        optimizer=make_adamw(groups, config.opt_betas, config.opt_eps),
        batches=batches,
        loader=loader,
        rates=warmup_cosine(config.lr, config.min_lr, total, config.warmup_steps),
        warmup_steps=config.warmup_steps,
        facts={"architecture": config.model, "lora_rank": config.lora_rank},
        scoring=scoring_command(config, target),
        scored=target,
        released=merged_state,
        update_freq=config.update_freq,
        samples="questions",
    )
    run.resume()
    if run.stopped:  # the resumed state has already reached --max_steps
        return

    # ---- Loop
    with run.recorded(), plain_attention(device):
        for _ in range(run.place.epoch, config.epochs):
            feed = run.feed()
            for _ in range(run.place.step_in_epoch, steps):
                run.step(accumulate(run, feed, pair_model, config))
                if run.stopped:
                    return
            if run.validates:
                with run.validating():
                    metrics = validation_metrics(pair_model, setup, config)
                run.validated(metrics)
            run.end_epoch()
        run.finish()
        if config.save_ckpt:
            processes.on_main(partial(write_model, run, pair_model, folder, target))


def accumulate(
    run: Run, feed: Iterator[Any], pair_model: PairModel, config: TrainConfig
) -> dict[str, Tensor]:
    """Add the gradients of one update's batches; return the means of :func:`losses`."""
    totals: dict[str, Tensor] = {}
    for number in range(1, config.update_freq + 1):
        batch = PairInputs(*next(feed))
        with autocast(run.setup.device, run.setup.dtype, dtype_of(config.weights)):
            scores = pair_model.scores(batch.tensors)  # [B C]
        found = losses(scores.view(batch.questions, -1), config.loss)
        is_last = number == config.update_freq
        with run.gradients.last_backward() if is_last else nullcontext():
            run.scaler.scale(found["loss"] / config.update_freq).backward()
        for name, value in found.items():
            share = value.detach() / config.update_freq
            totals[name] = totals[name] + share if name in totals else share
    return totals


def files_of(config: TrainConfig, folder: Path) -> dict[str, ContentHash]:
    """Map settings to functions that hash their files."""
    return {"model": partial(folder_hash, folder), **named_files(pairs=config.pairs or "")}


def choose_questions(config: TrainConfig, setup: Setup) -> Sequence[Question]:
    """Return the training questions, without validation images.

    Raises:
        InputError: the file of mined questions is invalid, an image is missing, no question
            remains, or the training set has too few pairs to draw wrong images from.
    """
    pairs, train_rows, val_rows = setup.data
    held_out = frozenset(pairs.image_path(pairs[int(row)]) for row in val_rows)
    questions: Sequence[Question]
    if config.pairs is None:
        questions, longest = PairQuestions(pairs, train_rows, held_out), 1
        if config.hard_negatives and config.hard_negatives_from < config.epochs:
            processes.on_all(partial(check_twins, questions))
    else:
        mined = read_mined(config.pairs, pairs.root)
        questions = without_held_out(mined, held_out, ImageFinder(pairs.root), config.pairs)
        names = (name for question in questions for name in (question.image, *question.wrong))
        todo = "set --data_path to the data root of the questions"
        check_images(names, pairs.root, config.pairs, todo)
        left_out = len(mined) - len(questions)
        shown = f"; left out because of validation images: {left_out}" if left_out else ""
        notice(config.pairs, f"questions for training: {len(questions)}{shown}")
        longest = max(len(question.wrong) for question in questions)
    needed = 1 + longest + config.draws.total
    if len(train_rows) < needed:
        found = f"found {len(train_rows)}"
        problem = f"needs {needed} training pairs to draw wrong images from, {found}"
        raise InputError("--easy_negatives", problem)
    return questions


def open_model(config: TrainConfig, folder: Path, device: torch.device) -> PairModel:
    """Load the reranker; if requested, freeze its vision tower and add low-rank updates.

    Raises:
        InputError: the folder holds adapters, :meth:`PairModel.open` fails, or ``--freeze`` finds
            no vision tower.
    """
    if base_folder(folder) != folder:
        raise InputError(
            folder, "expected a full model, found only adapters (adapter_config.json)",
            todo="merge them with peft's merge_and_unload, and save the model",
        )  # fmt: skip
    pair_model = PairModel.open(
        folder, prompt=config.prompt, yes_token=config.yes_token, no_token=config.no_token,
        dtype=dtype_of(config.weights), device=device,
    )  # fmt: skip
    model = pair_model.model
    if config.checkpoint_activations:
        # Frozen inputs of a block have no gradient, which the re-entrant variant would need.
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    if config.freeze == "vision":
        towers = [
            module for name, module in model.named_modules()
            if name.rpartition(".")[2] in VISION_TOWERS
        ]  # fmt: skip
        if not towers:
            names = " or ".join(VISION_TOWERS)
            raise InputError("--freeze", f"{folder} has no vision tower named {names}")
        freeze(towers)
    if config.lora_rank:
        pair_model.model = with_lora(
            model, config.lora_rank, config.lora_alpha, also=[], dora=config.dora
        )
    return pair_model


def scoring_command(config: TrainConfig, target: Path) -> str:
    """Format the command that scores with the tuned model; :class:`Run` appends the folder."""
    flags = {"yes_token": config.yes_token, "no_token": config.no_token}
    changed = {
        name: value for name, value in flags.items()
        if value != getattr(TrainConfig, name)
    }  # fmt: skip
    return command_line("python scripts/rerank_infer.py --candidates FILE", **changed) + " --model"


def write_model(run: Run, pair_model: PairModel, source: Path, target: Path) -> None:
    """Write the best weights, or without validation the last ones, to a model folder.

    Low-rank updates are merged. The processor, the chat template and the settings are copied from
    the source, and the instruction is added to the settings.

    Args:
        run: finished run.
        pair_model: model of the run; its updates are merged in place.
        source: folder that the run started from.
        target: folder to write.

    Raises:
        InputError: the folder cannot be written.
    """
    path = run.output / (BEST if run.validates else FINAL)
    model: Any = pair_model.model
    if isinstance(model, PeftModel):
        model = pair_model.model = model.merge_and_unload()
    load_strict(model, model_state(read_checkpoint(path), path), path)

    def write(folder: str) -> None:
        ignored = shutil.ignore_patterns(*WEIGHT_FILES)
        shutil.copytree(source, folder, ignore=ignored)
        inside = read_settings(source).folder.relative_to(source)
        model.save_pretrained(Path(folder) / inside)
        settings = Path(folder) / LIBRARY_CONFIG
        known = read_json(settings)
        known["prompts"] = {**(known.get("prompts") or {}), TUNED_PROMPT: pair_model.prompt}
        known["default_prompt_name"] = TUNED_PROMPT
        write_json(settings, known)

    write_folder(target, write)


def validation_candidates(retrieval: Retrieval, count: int, seed: int) -> Tensor:
    """Choose the images that each validation caption is compared with.

    Args:
        retrieval: labelled retrieval task of Q captions and G images.
        count: images per caption, K; at most G.
        seed: seed of the random images.

    Returns:
        int64 [Q, K], positions in the gallery: the right image, the twin if any, random others.
    """
    assert retrieval.gallery is not None
    assert retrieval.relevant is not None
    position = {image.gallery_id: i for i, image in enumerate(retrieval.gallery)}
    draw = np.random.default_rng(seed)
    rows = []
    for query in retrieval.queries:
        right = sorted(position[name] for name in retrieval.relevant[query.query_id])
        twin = retrieval.twins.get(query.query_id)
        first = [right[0], *([] if twin is None else [position[twin]])]
        others = [i for i in draw.permutation(len(position)).tolist() if i not in (*right, *first)]
        rows.append([*first, *others][:count])
    return torch.tensor(rows)


@torch.no_grad()
def validation_metrics(
    pair_model: PairModel, setup: Setup, config: TrainConfig
) -> dict[str, float]:
    """Compute metrics over each validation caption's candidates, in percent.

    ``over twin`` is the share of captions with a twin whose right image scores above it.
    """
    retrieval = validation_retrieval(setup.data)
    assert retrieval.gallery is not None
    assert retrieval.relevant is not None
    gallery, queries = retrieval.gallery, retrieval.queries
    count = min(config.val_candidates, len(gallery))
    candidates = validation_candidates(retrieval, count, config.val_seed)
    found = []
    for row, query in enumerate(queries):
        paths = [gallery[i].path for i in candidates[row].tolist()]
        sample = Sample(query.caption, [load_image(path) for path in paths], paths)
        weights = dtype_of(config.weights)
        with autocast(setup.device, setup.dtype, weights), plain_attention(setup.device):
            found.append(pair_model.scores(inputs_of(pair_model, [sample])).cpu())
    scores = fill(torch.stack(found), candidates, len(gallery))
    file = ScoreFile(scores, [q.query_id for q in queries], [i.gallery_id for i in gallery], {})
    metrics = evaluate_scores(file, retrieval.relevant)
    over_twin = twin_preference(file, metrics, retrieval.twins)
    figures = metrics.mean()
    if not np.isnan(over_twin).all():
        figures["over twin"] = float(np.nanmean(over_twin))
    return figures
