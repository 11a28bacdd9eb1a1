"""Tune a late-interaction embedder with a contrastive loss on MaxSim similarities.

Each vector of a caption is matched to the image vector with the largest dot product. The similarity
of a caption and an image is the mean of these products over the caption's vectors. The mean ranks
images as the sum does, and its scale does not depend on the caption's length.

Shape letters: `B` pairs, `Q` captions, `G` images, `N` vectors of a caption, `K` vectors of an
image, `D` width of a vector.

Sources: ColBERT (Khattab and Zaharia 2020, arXiv 2004.12832), ColPali (Faysse et al. 2024, arXiv
2407.01449).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from pab.core import processes
from pab.core.checkpoints import load_strict, model_state, read_checkpoint
from pab.core.config import flag, model_flag
from pab.core.devices import autocast
from pab.core.errors import InputError
from pab.core.files import write_folder
from pab.data.images import load_image
from pab.data.records import TrainPair
from pab.encoders.layer_numbers import no_weight_decay
from pab.encoders.st.folders import KIND_NAMES, folder_hash, model_folder
from pab.encoders.st.loading import check_reads_images, kind_of, load_model
from pab.encoders.st.maxsim import maxsim, pad_caption, pad_image
from pab.encoders.st.pictures import REJECTIONS
from pab.encoders.st.tune_config import (
    RandomCrop,
    VlmTuneConfig,
    check_batches_fit,
    image_at_fault,
    plain_attention,
)
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
ALIASES = {"document": ("passage", "corpus")}  # other names of the prompt for images


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
    """Model inputs of B captions and their images, and the identities of the pairs [B].

    Pairs with equal identities match.
    """

    captions: dict[str, Any]
    images: dict[str, Any]
    identity: Tensor


class Sample(NamedTuple):
    """Image with its file (for error messages) and caption, and the identity of the pair."""

    image: Image.Image
    path: Path
    caption: str
    identity: int


class EmbedderSamples(TrainingSamples):
    """Dataset of training pairs; an item is a :class:`Sample` or an :class:`InputError`."""

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
        """Build the model inputs of captions.

        Captions are passed in dictionaries, because the library would open a plain string that
        looks like the address or path of an image.
        """
        return self._inputs([{"text": text} for text in texts], "query")

    def images(self, images: Sequence[Image.Image]) -> dict[str, Any]:
        """Build the model inputs of images."""
        return self._inputs([{"image": image} for image in images], "document")

    def _inputs(self, items: Sequence[Any], task: str) -> dict[str, Any]:
        """Build model inputs with the prompt that sentence-transformers uses for a task."""
        prompts, usual = self.encoder.prompts, self.encoder.default_prompt_name
        names = [task, *ALIASES.get(task, ())]
        prompt = next((prompts[name] for name in names if name in prompts), prompts.get(usual))
        found: dict[str, Any] = self.encoder.preprocess(items, prompt=prompt, task=task)
        return found

    def vectors(self, features: Mapping[str, Any], task: str) -> tuple[Tensor, Tensor]:
        """Encode model inputs.

        Returns:
            Vectors, float32 [B, N, D], and their mask [B, N], true for those that MaxSim compares.
        """
        device = self.logit_scale.device
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in features.items()}
        found = self.encoder(moved, task=task)
        return found["token_embeddings"].float(), found["attention_mask"].bool()

    def scale(self) -> Tensor:
        """Return the scale of the similarities, after clamping its logarithm in place."""
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
    except REJECTIONS as error:
        named = ((sample.path, sample.image) for sample in good)
        return image_at_fault(error, named, lambda image: model.images([image]))
    return Features(captions, images, torch.tensor([sample.identity for sample in good]))


def mean_maxsim(text: Tensor, text_mask: Tensor, image: Tensor, image_mask: Tensor) -> Tensor:
    """Compute mean MaxSim similarities, float32 [Q, G].

    Args:
        text: [Q, N, D].
        text_mask: bool [Q, N], true for the vectors to compare.
        image: [G, K, D].
        image_mask: bool [G, K], true for the vectors to compare.
    """
    queries, length, _ = text.shape
    products = text.flatten(0, 1) @ image.flatten(0, 1).T  # [Q N, G K]
    products = products.view(queries, length, *image.shape[:2])  # [Q, N, G, K]
    best = products.masked_fill(~image_mask, -torch.inf).amax(dim=-1)  # [Q, N, G]
    weights = text_mask / text_mask.sum(dim=1, keepdim=True)  # [Q, N]
    return torch.einsum("qng,qn->qg", best, weights)


def train(config: TrainConfig, command: str) -> None:
    """Run the recipe from data to the folder of the tuned model.

    With several processes, the negatives of a caption come from the batch of its process.

    Raises:
        InputError: settings, data, model or checkpoint are invalid, an image cannot be read or
            processed, a file cannot be written, or too many consecutive steps are skipped because
            the loss or a gradient is not finite.
    """
    # ---- Data and model
    folder, target = model_folder(config.model), config.tuned_folder()
    setup = set_up(config, command, {"model": partial(folder_hash, folder)})
    data, device, batches = setup.data, setup.device, setup.batches
    steps = steps_per_epoch(batches)
    model = same_start(config.seed, partial(open_embedder, config, folder)).to(device)
    dataset = EmbedderSamples(data.pairs, data.train_rows, config.seed, crop=config.random_crop())
    loader = training_loader(dataset, batches, partial(collate, model), config, device)
    first = collate(model, [dataset[(0, 0)]])
    if isinstance(first, Features):  # an unreadable image is reported with its batch
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
        InputError: sentence-transformers is not installed, the folder holds a model of another kind
            or without image input, or one of its files is missing or damaged.
    """
    kind = kind_of(folder)
    if kind != "late":
        raise InputError(
            folder, f"expected {KIND_NAMES['late']}, found {KIND_NAMES[kind]}",
            todo="use a folder in the format of sentence-transformers (MultiVectorEncoder)",
        )  # fmt: skip
    encoder = load_model("MultiVectorEncoder", folder, torch.device("cpu"), torch.float32)
    check_reads_images(encoder, folder)
    if config.checkpoint_activations:
        encoder[0].model.gradient_checkpointing_enable({"use_reentrant": False})
    return LateEmbedder(encoder, config.initial_scale)


@torch.no_grad()
def validation_metrics(model: LateEmbedder, setup: Setup) -> dict[str, float]:
    """Compute the retrieval metrics of the validation pairs, in percent."""
    retrieval = validation_retrieval(setup.data)
    assert retrieval.gallery is not None
    size, device = setup.config.batch_size, setup.device

    def encoded(features: Iterable[dict[str, Any]], task: str) -> list[Tensor]:
        rows: list[Tensor] = []
        for batch in features:
            with autocast(device, setup.dtype), plain_attention(device):
                vectors, masks = model.vectors(batch, task)
            rows += [one[mask].cpu() for one, mask in zip(vectors, masks, strict=True)]
        return rows

    captions = [query.caption for query in retrieval.queries]
    paths = [image.path for image in retrieval.gallery]
    # Generators keep the pixels of only one batch in memory.
    texts = encoded((model.captions(part) for part in _parts(captions, size)), "query")
    images = encoded(
        (model.images([load_image(path) for path in part]) for part in _parts(paths, size)),
        "document",
    )
    scores = maxsim(
        _rows(texts, pad_caption), _rows(images, pad_image), texts[0].shape[1], mean=True,
        device=device,
    )  # fmt: skip
    return retrieval_metrics(retrieval, scores)


def _rows(vectors: Sequence[Tensor], pad: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Pad vectors [N, D] of captions or images to rows of equal width."""
    longest = max(map(len, vectors))
    return torch.stack([pad(one, longest) for one in vectors])


def _parts(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
