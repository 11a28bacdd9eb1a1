"""Tune a late-interaction embedder with a contrastive loss of MaxSim similarities.

The similarity of a caption and an image is, per vector of the caption, the largest product with a
vector of the image; the mean over the caption's vectors is the logit. The mean ranks images as the
sum does, and its scale does not depend on the caption's length.

Shape letters: `B` pairs, `Q` captions, `G` images, `N` vectors of a caption, `K` vectors of an
image, `D` their width.

Sources: ColBERT (Khattab and Zaharia 2020, arXiv 2004.12832), ColPali (Faysse et al. 2024, arXiv
2407.01449).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from pab.core import processes
from pab.core.checkpoints import load_strict, model_state, read_checkpoint
from pab.core.config import flag, model_flag
from pab.core.devices import autocast
from pab.core.errors import InputError
from pab.data.images import load_image
from pab.data.records import TrainPair
from pab.encoders.layer_numbers import no_weight_decay
from pab.encoders.st.folders import folder_hash, model_folder
from pab.encoders.st.library import sentence_transformers
from pab.encoders.st.tune_config import (
    RandomCrop,
    VlmTuneConfig,
    check_batches_fit,
    image_at_fault,
    plain_attention,
)
from pab.encoders.st.tuned_folder import check_model_folder, write_folder
from pab.training.contrastive import cross_entropies
from pab.training.data import (
    TrainingSamples,
    retrieval_metrics,
    training_loader,
    validation_retrieval,
)
from pab.training.loop import BEST, FINAL, Run
from pab.training.optim import make_adamw, parameter_groups, warmup_cosine
from pab.training.setup import Setup, same_start, set_up, steps_per_epoch

LARGEST_SCALE = 100.0  # upper bound of the scale of similarities, as in CLIP
BLOCK = 64  # captions whose similarities are computed at once, in validation


@dataclass(frozen=True)
class TrainConfig(VlmTuneConfig):
    """Settings of the tuning; each field is a flag of `python scripts/finetune_embedder.py`."""

    model: str = model_flag("output/small_late", "folder or hub id of a late-interaction model")
    initial_scale: float = flag(20.0, "initial scale of the similarities", gt=0, le=LARGEST_SCALE)
    lr: float = flag(1e-5, "peak learning rate")
    weight_decay: float = flag(0.05, "AdamW weight decay")
    opt_betas: tuple[float, float] = flag((0.9, 0.98), "AdamW betas")
    output_dir: str = flag("output/embedder", "folder of the checkpoints, the log and the model")


class Features(NamedTuple):
    """Model inputs of B captions and their images, and the identities of the pairs [B]."""

    captions: dict[str, Any]
    images: dict[str, Any]
    identity: Tensor


class Sample(NamedTuple):
    """Image, its file for errors, its caption, and the identity of the pair."""

    image: Image.Image
    path: Path
    caption: str
    identity: int


class EmbedderSamples(TrainingSamples):
    """Dataset of training pairs; yields :class:`Sample`, or an error."""

    def __init__(self, *args: Any, crop: RandomCrop) -> None:
        super().__init__(*args)
        self.crop = crop

    def sample(self, index: int, pair: TrainPair, image: Image.Image) -> Sample:
        """See :class:`pab.training.data.TrainingSamples`."""
        path = self.pairs.image_path(pair)
        return Sample(self.crop(image), path, pair.caption, self.pairs.identity(index))


class LateEmbedder(nn.Module):
    """Late-interaction model of sentence-transformers with a trained scale of similarities.

    Args:
        encoder: a ``MultiVectorEncoder``.
        scale: initial scale.
    """

    def __init__(self, encoder: Any, scale: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)))

    def captions(self, texts: Sequence[str]) -> dict[str, Any]:
        """Build the inputs of captions; as messages, because a text could be read as a path."""
        found: dict[str, Any] = self.encoder.preprocess([{"text": t} for t in texts], task="query")
        return found

    def images(self, images: Sequence[Image.Image]) -> dict[str, Any]:
        """Build the inputs of images."""
        found: dict[str, Any] = self.encoder.preprocess(
            [{"image": image} for image in images], task="document"
        )
        return found

    def vectors(self, features: Mapping[str, Any], task: str) -> tuple[Tensor, Tensor]:
        """Encode inputs; return unit vectors [B, N, D] and the mask of those that count [B, N]."""
        device = self.logit_scale.device
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in features.items()}
        found = self.encoder(moved, task=task)
        return found["token_embeddings"].float(), found["attention_mask"].bool()

    def scale(self) -> Tensor:
        """Return the scale of the similarities, after bounding its logarithm in place."""
        with torch.no_grad():
            self.logit_scale.clamp_(max=math.log(LARGEST_SCALE))
        return self.logit_scale.exp()


def collate(model: LateEmbedder, samples: list[Sample | InputError]) -> Features | InputError:
    """Build the model inputs of a batch; return the first error, if any."""
    good = [sample for sample in samples if not isinstance(sample, InputError)]
    if len(good) < len(samples):
        return next(sample for sample in samples if isinstance(sample, InputError))
    captions = model.captions([sample.caption for sample in good])
    try:
        images = model.images([sample.image for sample in good])
    except ValueError as error:
        named = ((sample.path, sample.image) for sample in good)
        return image_at_fault(error, named, lambda image: model.images([image]))
    return Features(captions, images, torch.tensor([sample.identity for sample in good]))


def mean_maxsim(text: Tensor, text_mask: Tensor, image: Tensor, image_mask: Tensor) -> Tensor:
    """Compute mean MaxSim similarities, float32 [Q, G].

    Args:
        text: [Q, N, D].
        text_mask: bool [Q, N], true for vectors that count.
        image: [G, K, D].
        image_mask: bool [G, K].
    """
    queries, length, _ = text.shape
    products = text.flatten(0, 1) @ image.flatten(0, 1).T  # [Q N, G K]
    products = products.view(queries, length, *image.shape[:2])  # [Q, N, G, K]
    best = products.masked_fill(~image_mask, -torch.inf).amax(dim=-1)  # [Q, N, G]
    weights = text_mask / text_mask.sum(dim=1, keepdim=True)  # [Q, N]
    return torch.einsum("qng,qn->qg", best, weights)


def train(config: TrainConfig, command: str) -> None:
    """Run the recipe from data to the folder of the tuned model.

    In several processes, the negatives of a caption are the images of its own process.

    Raises:
        InputError: before the first step: bad settings, data, model or checkpoint. During training:
            an unreadable training image, or too many consecutive steps that are not finite.
    """
    # ---- Data and model
    folder = model_folder(config.model)
    target = Path(config.output_dir) / "model"
    check_model_folder(target)
    setup = set_up(config, command, {"model": partial(folder_hash, folder)})
    data, device, batches = setup.data, setup.device, setup.batches
    steps = steps_per_epoch(batches)
    model = same_start(config.seed, partial(open_embedder, config, folder)).to(device)
    crop = RandomCrop(config.crop_prob, config.crop_scale, config.crop_ratio)
    dataset = EmbedderSamples(data.pairs, data.train_rows, config.seed, crop=crop)
    loader = training_loader(dataset, batches, partial(collate, model), config, device)
    first = collate(model, [dataset[(0, 0)]])
    if isinstance(first, Features):  # an image that cannot be read is reported by its batch
        check_batches_fit(loader, {**first.captions, **first.images}, config.batch_size)

    # ---- Optimizer and schedule
    groups = parameter_groups(
        model.named_parameters(), weight_decay=config.weight_decay, no_decay=no_weight_decay
    )
    total = max(config.epochs * steps, config.warmup_steps)
    run = Run(
        setup,
        model=model,
        optimizer=make_adamw(groups, config.opt_betas, config.opt_eps),
        batches=batches,
        loader=loader,
        rates=warmup_cosine(config.lr, config.min_lr, total, config.warmup_steps),
        warmup_steps=config.warmup_steps,
        facts={"architecture": config.model},
        scoring="python scripts/embed_infer.py --model",
        scored=target,
    )
    run.resume()
    if run.stopped:  # the resumed state has already reached --max_steps
        return

    # ---- Loop
    with run.recorded(), plain_attention(device):
        for _ in range(run.place.epoch, config.epochs):
            feed = run.feed()
            for _ in range(run.place.step_in_epoch, steps):
                batch = Features(*next(feed))
                with autocast(device, setup.dtype):
                    image, image_mask = model.vectors(batch.images, "document")
                    text, text_mask = model.vectors(batch.captions, "query")
                scale = model.scale()
                logits = scale * mean_maxsim(text, text_mask, image, image_mask)
                loss = cross_entropies(logits, batch.identity.to(device))
                with run.gradients.last_backward():
                    run.scaler.scale(loss).backward()
                run.step({"loss": loss, "scale": scale})
                if run.stopped:
                    return
            if run.validates:
                with run.validating():
                    figures = validation_metrics(model, setup)
                run.validated(figures)
            run.end_epoch()
        run.finish()
        if config.save_ckpt:
            path = run.output / (BEST if run.validates else FINAL)
            load_strict(model, model_state(read_checkpoint(path), path), path)
            processes.on_main(partial(write_folder, target, model.encoder.save))


def open_embedder(config: TrainConfig, folder: Path) -> LateEmbedder:
    """Load a late-interaction model.

    Raises:
        InputError: sentence-transformers is not installed, or the folder holds another model.
    """
    library = sentence_transformers()
    try:
        encoder = library.MultiVectorEncoder(str(folder), trust_remote_code=False, device="cpu")
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(
            "--model", f"{folder} cannot be read as a late-interaction model: {error}"
        ) from error
    if config.checkpoint_activations:
        encoder[0].model.gradient_checkpointing_enable({"use_reentrant": False})
    return LateEmbedder(encoder.float(), config.initial_scale)


@torch.no_grad()
def validation_metrics(model: LateEmbedder, setup: Setup) -> dict[str, float]:
    """Compute the retrieval metrics of the validation pairs, in percent."""
    retrieval = validation_retrieval(setup.data)
    assert retrieval.gallery is not None
    size, device = setup.config.batch_size, setup.device

    def encoded(features: list[dict[str, Any]], task: str) -> tuple[Tensor, Tensor]:
        vectors, masks = [], []
        for batch in features:
            with autocast(device, setup.dtype), plain_attention(device):
                found, mask = model.vectors(batch, task)
            vectors += list(found)
            masks += list(mask)
        padded = (pad_sequence(rows, batch_first=True) for rows in (vectors, masks))
        return tuple(padded)  # type: ignore[return-value]

    captions = [query.caption for query in retrieval.queries]
    paths = [image.path for image in retrieval.gallery]
    text, text_mask = encoded([model.captions(part) for part in _parts(captions, size)], "query")
    image, image_mask = encoded(
        [model.images([load_image(p) for p in part]) for part in _parts(paths, size)], "document"
    )
    scores = [
        mean_maxsim(text[i : i + BLOCK], text_mask[i : i + BLOCK], image, image_mask).cpu()
        for i in range(0, len(text), BLOCK)
    ]
    return retrieval_metrics(retrieval, torch.cat(scores))


def _parts(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
