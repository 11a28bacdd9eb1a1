"""Fine-tune UIT: prepare the data and the model, then train.

`python -m uit.run` calls this module, for several GPUs through torchrun. The same command, started
again, resumes from the last checkpoint.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace

from pab.core.devices import autocast
from pab.core.errors import InputError, run_cli
from pab.core.outputs import check_free_space
from pab.core.weight_folders import weights_or_path
from pab.data.wordpiece import Tokenizer
from pab.scoring.rerank import rerank_best
from pab.training.command import training_command
from pab.training.data import retrieval_metrics, training_loader, validation_retrieval
from pab.training.loop import Run, command_line
from pab.training.optim import make_adamw, parameter_groups
from pab.training.resume import ContentHash, named_files
from pab.training.setup import Setup, same_start, set_up, steps_per_epoch
from uit.augment import Augmentation, TrainingView
from uit.config import TrainConfig
from uit.data import Collate, TextDraws, UitDataset, finisher
from uit.eda import WordNet
from uit.encode import UitEncoder, with_vocabulary
from uit.masking import WordMasking
from uit.model import Uit, model_config
from uit.objective import LossWeights, UitBatch, draw_any, draw_negatives, uit_losses
from uit.rerank import UitReranker
from uit.schedules import COSINE_WARMUP_SHARE, multiplier
from uit.weights import start_weights


def train(config: TrainConfig, command: str) -> None:
    """Run the recipe from the data to the final checkpoint.

    Raises:
        InputError: the settings, the data or a checkpoint is invalid, a file cannot be read or
            written, or too many consecutive steps are skipped.
    """
    # ---- Data and model
    tokenizer = Tokenizer(config.text_encoder, config.max_words, config.max_text_length)
    draws = text_draws(config)
    setup = set_up(config, command, content_of(config, tokenizer, draws))
    data, device, dtype, batches = setup.data, setup.device, setup.dtype, setup.batches
    tokenizer.check_known([tokenizer.encode(data.pairs[int(i)].caption) for i in data.val_rows])
    steps = steps_per_epoch(batches)
    model = same_start(
        config.seed, lambda: build_model(config, tokenizer, start=setup.resume is None)
    ).to(device)
    values = (1 + model.config.swin.grids[-1] ** 2) * model.config.swin.width  # numbers per image
    check_free_space(
        "TMPDIR", tempfile.gettempdir(), 4 * len(data.val_rows) * values,
        "the features of the validation images",
        todo="free disk space, or set TMPDIR to another folder for temporary files",
    )  # fmt: skip
    augmentation = Augmentation(config.flip_prob, config.augment_level, config.erasing_prob)
    view = TrainingView(config.input_size, augmentation)
    finish = finisher(view, device)
    dataset = UitDataset(data.pairs, data.train_rows, view, tokenizer, draws, config.seed)
    blocks = config.input_size // config.mim_block if config.mim_weight else 0
    collate = Collate(tokenizer, config.mlm_most, blocks, config.mim_ratio)
    weights = LossWeights(
        config.eda_weight, config.mlm_weight, config.mim_weight, config.label_smoothing
    )

    # ---- Optimizer and schedule
    groups = parameter_groups(
        model.named_parameters(),
        weight_decay=config.weight_decay,
        no_decay=model.no_weight_decay,
        lr_scale_of=model.rate_scale,
    )
    total_steps, warmup = config.epochs * steps, config.warmup_steps
    if config.schedule == "cosine":
        warmup = int(COSINE_WARMUP_SHARE * total_steps)
    # A run shorter than its warm-up uses only the beginning of the warm-up.
    at = multiplier(config.schedule, max(total_steps, warmup), warmup)
    scoring = command_line(
        "python -m uit.infer", model=config.model, input_size=config.input_size,
        window=config.window, text_encoder=config.text_encoder, max_words=config.max_words,
        max_text_length=config.max_text_length,
    )  # fmt: skip
    run = Run(
        setup,
        model=model,
        optimizer=make_adamw(groups, config.opt_betas, config.opt_eps),
        batches=batches,
        loader=training_loader(dataset, batches, collate, config, device),
        rates=[config.lr * at(step) for step in range(total_steps)],
        warmup_steps=warmup,
        facts={"architecture": config.model, "input_size": config.input_size},
        scoring=f"{scoring} --checkpoint",
    )
    run.resume()
    if run.stopped:  # the resumed state has already reached --max_steps
        return

    # ---- Loop
    with run.recorded():
        for epoch in range(run.place.epoch, config.epochs):
            draw = draw_negatives if epoch >= config.hard_negatives_from else draw_any
            feed = run.feed()
            for _ in range(run.place.step_in_epoch, steps):
                batch: UitBatch = finish(next(feed).to(device))
                with autocast(device, dtype):
                    losses = uit_losses(model, batch, weights, draw)
                with run.gradients.last_backward():
                    run.scaler.scale(losses["loss"]).backward()
                run.step({**losses, "temperature": model.temp})
                if run.stopped:
                    return
            if run.validates:
                with run.validating():
                    figures = validation_metrics(model, tokenizer, setup, config.k_val)
                run.validated(figures)
            run.end_epoch()
        run.finish()


def text_draws(config: TrainConfig) -> TextDraws:
    """Create the settings of the random choices for a caption.

    Raises:
        InputError: WordNet is needed, but missing or unreadable.
    """
    masking = WordMasking(config.mlm_share, config.mlm_most, config.ngram_share, config.ngram_words)
    return TextDraws(
        eda_share=config.eda_share if config.eda_weight else None,
        synonyms=WordNet(config.wordnet) if config.eda_weight and config.synonyms else None,
        masking=masking if config.mlm_weight else None,
    )


def content_of(
    config: TrainConfig, tokenizer: Tokenizer, draws: TextDraws
) -> dict[str, ContentHash]:
    """Map settings to functions that hash their files: initial weights, vocabulary, WordNet."""
    files = named_files(
        checkpoint=config.checkpoint,
        swin=config.swin,
        bert=config.bert and weights_or_path(config.bert),
        text_encoder=tokenizer.path,
    )
    if isinstance(draws.synonyms, WordNet):
        files["wordnet"] = draws.synonyms.fingerprint
    return files


def build_model(config: TrainConfig, tokenizer: Tokenizer, *, start: bool = True) -> Uit:
    """Create the model with the recipe's initial weights.

    With ``start=False``, the weights are arbitrary, because a resumed checkpoint replaces them.

    Raises:
        InputError: a checkpoint is unreadable, or sizes, vocabulary or tensors do not fit.
    """
    sizes = with_vocabulary(model_config(config.model, config.input_size, config.window), tokenizer)
    stride = config.input_size // sizes.swin.grids[0]
    if config.mim_weight and config.mim_block % stride:
        raise InputError(
            "--mim_block", f"{config.mim_block} px is not a multiple of the patch size, {stride} px"
        )
    saving = config.checkpoint_activations
    model = Uit(
        replace(
            sizes,
            swin=replace(sizes.swin, drop_path=config.drop_path, checkpoint_activations=saving),
            bert=replace(sizes.bert, dropout=config.dropout, checkpoint_activations=saving),
            temperature=config.temperature,
            proj_dropout=config.proj_dropout,
            sync_batch_norm=config.sync_batch_norm,
        )
    )
    if start:
        start_weights(model, checkpoint=config.checkpoint, swin=config.swin, bert=config.bert)
    return model


def validation_metrics(model: Uit, tokenizer: Tokenizer, setup: Setup, k: int) -> dict[str, float]:
    """Compute validation metrics of the ITC ranking, and after re-ranking its k best images.

    Metrics are in percent. Names of the ITC ranking's metrics begin with "itc".
    """
    retrieval = validation_retrieval(setup.data)
    assert retrieval.gallery is not None
    captions = [query.caption for query in retrieval.queries]
    encoder = UitEncoder(compute=setup.compute, model=model, tokenizer=tokenizer)
    reranker = UitReranker(encoder, setup.compute)
    itc = reranker.first_scores(captions, retrieval.gallery)
    match = rerank_best(reranker, captions, retrieval.gallery, itc, k, "--k_val")
    figures = retrieval_metrics(retrieval, match)
    itc_figures = retrieval_metrics(retrieval, itc)
    return {**figures, **{f"itc {name}": value for name, value in itc_figures.items()}}


def main(argv: list[str] | None = None) -> None:
    """Read the command line and train."""
    training_command(
        TrainConfig,
        train,
        argv,
        prog="python -m uit.train",
    )


if __name__ == "__main__":
    run_cli(main)
