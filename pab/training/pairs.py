"""Fine-tune an image-text model with a contrastive loss: data, model, loop.

LHP, CLIP and BLIP-2 share this recipe; a :class:`PairModel` defines what differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from pab.core.devices import autocast
from pab.data.images import ImageTransform, in_two_parts
from pab.data.pixels import normalizer
from pab.scoring.encoder import Encoder, scores_of
from pab.scoring.encoding import Compute
from pab.training.config import ContrastiveConfig
from pab.training.contrastive import pair_backward
from pab.training.data import retrieval_metrics, training_loader, validation_retrieval
from pab.training.loop import Run, weights_as_they_are
from pab.training.optim import make_adamw, parameter_groups, warmup_cosine
from pab.training.pair_data import PairBatch, PairCollate, PairDataset
from pab.training.resume import ContentHash
from pab.training.setup import same_start, set_up, steps_per_epoch


@dataclass(frozen=True)
class PairModel:
    """Image-text model, with the functions and facts that the recipe needs.

    Shape letters: `B` batch, `K` vectors per image, `D` vector width, `N` text ids, `S` image side.

    Attributes:
        module: the network, with its initial weights.
        view: maps a training image to pixels [3, S, S]; may be random. If it is a transform in two
            parts (:func:`pab.data.images.in_two_parts`), the pixels are normalized on the device.
        encode_ids: maps a caption to ids.
        pad: pads B rows of ids to equal length; returns the ids [B, N] and their mask [B, N].
        vectors: maps pairs (ids and mask on the CPU) to unit vectors [B, K + 1, D], with the
            text's vector last.
        logit_scale: returns the logarithm of the scale of similarities, a scalar with gradient.
        encoder: creates the encoder of the network, for validation.
        layers: number of blocks, for layer-wise learning-rate decay.
        layer_of: maps a parameter's name to its layer, 0 to ``layers + 1``.
        no_decay: returns true for a parameter (name, value) without weight decay.
        facts: metadata of weight files.
        scoring: command that scores with a weight file; the file's path is appended.
        released: returns the weights to write, by name.
    """

    module: nn.Module
    view: ImageTransform
    encode_ids: Callable[[str], list[int]]
    pad: Callable[[list[list[int]]], tuple[Tensor, Tensor]]
    vectors: Callable[[PairBatch], Tensor]
    logit_scale: Callable[[], Tensor]
    encoder: Callable[[Compute], Encoder]
    layers: int
    layer_of: Callable[[str], int]
    no_decay: Callable[[str, Tensor], bool]
    facts: Mapping[str, object]
    scoring: str
    released: Callable[[nn.Module], Mapping[str, Tensor]] = weights_as_they_are

    def parameter_groups(self, config: ContrastiveConfig) -> list[dict[str, Any]]:
        """Group the parameters; see :func:`pab.training.optim.parameter_groups`."""
        return parameter_groups(
            self.module.named_parameters(),
            weight_decay=config.weight_decay,
            no_decay=self.no_decay,
            layer_of=self.layer_of,
            n_layers=self.layers,
            layer_decay=config.layer_decay,
        )


def train_pairs(
    config: ContrastiveConfig,
    command: str,
    files: Mapping[str, ContentHash],
    build: Callable[[torch.device, Mapping[str, str] | None], PairModel],
) -> None:
    """Run the recipe from the data to the final checkpoint.

    Args:
        config: settings of the recipe.
        command: command line, for the log.
        files: setting -> function that hashes its files (initial weights, tokenizer).
        build: creates the model on a device, after the data is checked and the generators are
            seeded. The second argument is None for a new run. For a resumed run, it holds the
            checkpoint's facts, and the checkpoint then replaces all initial weights.

    Raises:
        InputError: the settings, the data or a checkpoint is invalid, a file cannot be read or
            written, or too many consecutive steps are skipped.
    """
    # ---- Data and model
    setup = set_up(config, command, files, config.update_freq)
    data, device, resume, batches = setup.data, setup.device, setup.resume, setup.batches
    steps = steps_per_epoch(batches, config.update_freq)
    facts = None if resume is None else resume.facts
    model = same_start(config.seed, lambda: build(device, facts))
    view = in_two_parts(model.view)
    normalize = normalizer(view.normalization, device)
    dataset = PairDataset(data.pairs, data.train_rows, view.pixels, model.encode_ids, config.seed)

    def vectors(pairs: PairBatch) -> Tensor:
        with autocast(device, setup.dtype):
            return model.vectors(pairs)

    # ---- Optimizer and schedule
    groups = model.parameter_groups(config)
    # A run shorter than its warm-up uses only the beginning of the warm-up.
    scheduled_steps = max(config.epochs * steps, config.warmup_steps)
    run = Run(
        setup,
        model=model.module,
        optimizer=make_adamw(groups, config.opt_betas, config.opt_eps),
        batches=batches,
        loader=training_loader(dataset, batches, PairCollate(model.pad), config, device),
        rates=warmup_cosine(config.lr, config.min_lr, scheduled_steps, config.warmup_steps),
        warmup_steps=config.warmup_steps,
        facts=model.facts,
        scoring=model.scoring,
        released=model.released,
        update_freq=config.update_freq,
    )
    run.resume()
    if run.stopped:  # the resumed state has already reached --max_steps
        return

    # ---- Loop
    with run.recorded():
        for _ in range(run.place.epoch, config.epochs):
            feed = run.feed()
            for _ in range(run.place.step_in_epoch, steps):
                loss = torch.zeros((), device=device)
                for number, loaded in enumerate(islice(feed, config.update_freq), 1):
                    batch = PairBatch(*loaded).on(device)
                    batch = batch._replace(image=normalize(batch.image))
                    loss += pair_backward(
                        vectors, batch, model.logit_scale(), chunk=config.grad_cache_chunk,
                        share=config.update_freq, scaler=run.scaler, device=device,
                        last_backward=run.gradients.last_backward
                        if number == config.update_freq
                        else nullcontext,
                    )  # fmt: skip
                run.step({"loss": loss, "logit_scale": model.logit_scale().exp()})
                if run.stopped:
                    return
            if run.validates:
                with run.validating():
                    retrieval = validation_retrieval(data)
                    assert retrieval.gallery is not None
                    captions = [query.caption for query in retrieval.queries]
                    scores = scores_of(model.encoder(setup.compute), captions, retrieval.gallery)
                    figures = retrieval_metrics(retrieval, scores)
                run.validated(figures)
            run.end_epoch()
        run.finish()
