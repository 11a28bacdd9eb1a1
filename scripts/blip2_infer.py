"""Score a gallery with BLIP-2, zero-shot: `python scripts/blip2_infer.py`.

Uses LAVIS's `pretrain_vitL` as published, or ViT-g (`--model pretrain`), without LAVIS. `--backend
lavis` runs LAVIS itself, in the environment of `scripts/setup_lavis.sh`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's path lacks the root

from pab.core.config import flag
from pab.core.errors import InputError, run_cli
from pab.encoders.scoring import EncoderConfig
from pab.scoring.encoder import OpenEncoder
from pab.scoring.job import features_of, finish, prepare, score_file_of, scoring_command

DEFAULT_WEIGHTS = {
    "pretrain_vitL": "checkpoints/blip2/blip2_pretrained_vitL.pth",
    "pretrain": "Salesforce/blip2-itm-vit-g",
    "mini": "checkpoints/mini/blip2.safetensors",
}


@dataclass(frozen=True)
class InferConfig(EncoderConfig):
    """Settings of scoring with BLIP-2; each field is a flag of `python scripts/blip2_infer.py`."""

    model: Literal["pretrain_vitL", "pretrain", "mini"] = flag(
        "pretrain_vitL", "ViT-L as published, ViT-g, or the small model of configs/blip2/mini.yaml"
    )
    pretrained: str | None = flag(
        None, "ViT-L: a LAVIS checkpoint or a fine-tuned one; ViT-g: a folder or a hub id "
        f"(default: {', '.join(DEFAULT_WEIGHTS.values())})"
    )  # fmt: skip
    image_weights: str = flag(
        "checkpoints/blip2/clip_vit_L.pth", "weights of the image tower, if --pretrained lacks them"
    )
    backend: Literal["port", "lavis"] = flag("port", "this project's model, or LAVIS")
    text_encoder: str = flag("checkpoints/uit/bert-base-uncased", "folder with BERT's vocab.txt")
    query_pooling: Literal["first", "max"] = flag(
        "first", "query tokens of the image: only the first (published), or the best"
    )
    save_score: str | None = flag("sims_score/score_blip2_reproduce.pt", "score file to write")
    output_file: str | None = flag("predictions/score_blip2_reproduce.txt", "ranked list to write")

    def check(self) -> None:
        """See :class:`EncoderConfig`.

        Raises:
            InputError: naming the flag.
        """
        super().check()
        if self.backend == "lavis" and self.model == "mini":
            raise InputError("--backend", "LAVIS does not know the mini model")
        if self.backend == "lavis" and self.dtype != "auto":
            raise InputError("--dtype", "LAVIS chooses its own number format: leave it at auto")


def infer(config: InferConfig) -> None:
    """Score every image of the gallery against every caption.

    Raises:
        InputError: settings, data or weights are invalid; nothing is written.
    """
    from pab.encoders.scoring import device_and_dtype

    device_and_dtype(config)  # rejects unsupported settings before the data is read
    job = prepare(config)
    with open_encoder(config) as opened:
        scores = opened.encoder.scores([q.caption for q in job.retrieval.queries], job.gallery)
    score_file = score_file_of(
        replace(config, dtype=opened.dtype),  # type: ignore[arg-type]
        job,
        scores,
        model=config.model,
        checkpoint=opened.checkpoint,
        checkpoint_sha256=opened.checkpoint_sha256,
        query_pooling=config.query_pooling,
        backend=config.backend,
    )
    finish(config, job, score_file)


def open_encoder(config: InferConfig) -> AbstractContextManager[OpenEncoder]:
    """Load the model and open its cache; ignores settings for data and outputs.

    Raises:
        InputError: settings, vocabulary or weights are invalid.
    """
    return open_lavis(config) if config.backend == "lavis" else open_port(config)


@contextmanager
def open_port(config: InferConfig) -> Iterator[OpenEncoder]:
    """Open this project's model."""
    from pab.core.checkpoints import checkpoint_hash
    from pab.data.images import recipe
    from pab.data.wordpiece import Tokenizer
    from pab.encoders.blip2.model import MODELS, Blip2, Blip2Config, check_vocabulary, load_blip2
    from pab.encoders.blip2.vit_g import Blip2VitG, load_vit_g
    from pab.encoders.compute import Compute
    from pab.encoders.scoring import device_and_dtype
    from pab.encoders.similarity import blip2_encoder

    device, dtype, dtype_name = device_and_dtype(config)
    sizes = MODELS.get(config.model, Blip2Config())
    tokenizer = Tokenizer(
        config.text_encoder, max_words=sizes.positions, max_length=sizes.positions
    )
    check_vocabulary(tokenizer, sizes)
    source = config.pretrained or DEFAULT_WEIGHTS[config.model]
    model: Blip2 | Blip2VitG
    if config.model in MODELS:
        model = load_blip2(sizes, source, config.image_weights)
    else:
        model = load_vit_g(source)
    transform = recipe("blip2", sizes.image_size)
    sha256 = checkpoint_hash(source) if Path(source).is_file() else ""
    tower = ""
    kept = config
    if config.model not in MODELS:  # weights from a folder or hub id are not hashed
        kept = replace(config, feature_cache=False)
    elif config.feature_cache and Path(config.image_weights).is_file():
        tower = checkpoint_hash(config.image_weights)
    with features_of(
        kept, device=device, dtype=dtype_name, model=config.model, preprocessing=transform,
        checkpoint=sha256, image_weights=tower,
    ) as cache:  # fmt: skip
        encoder = blip2_encoder(
            model.to(device, dtype),
            tokenizer,
            transform.transform(),
            config.query_pooling,
            Compute(device, dtype, dtype, config.batch_size, config.num_workers, cache),
        )
        yield OpenEncoder(encoder, config.model, source, sha256, dtype_name)


@contextmanager
def open_lavis(config: InferConfig) -> Iterator[OpenEncoder]:
    """Open LAVIS's own model, which chooses its number format."""
    import torch

    from pab.core.checkpoints import checkpoint_hash
    from pab.encoders.blip2.lavis import lavis_encoder, load_lavis
    from pab.encoders.compute import Compute
    from pab.encoders.scoring import device_and_dtype

    device, _, _ = device_and_dtype(config)
    model, transform, process = load_lavis(config.model, config.pretrained)
    compute = Compute(device, torch.float32, torch.float32, config.batch_size, config.num_workers)
    encoder = lavis_encoder(model.to(device), transform, process, config.query_pooling, compute)
    source = f"LAVIS's {config.model}" if config.pretrained is None else config.pretrained
    sha256 = "" if config.pretrained is None else checkpoint_hash(config.pretrained)
    dtype_name = "fp16" if device.type == "cuda" else "fp32"
    yield OpenEncoder(encoder, config.model, source, sha256, dtype_name)


def main(argv: list[str] | None = None) -> None:
    """Read the command line and score."""
    scoring_command(
        InferConfig,
        infer,
        argv,
        prog="python scripts/blip2_infer.py",
    )


if __name__ == "__main__":
    run_cli(main)
