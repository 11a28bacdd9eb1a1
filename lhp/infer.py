"""Score a gallery with LHP: `python -m lhp.infer` writes a score file and a ranked list."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pab.core.config import flag, speed_flag
from pab.core.devices import pick_device
from pab.core.errors import run_cli
from pab.scoring.encoder import Encoder, OpenEncoder
from pab.scoring.job import (
    ScoringConfig,
    features_of,
    finish,
    prepare,
    score_file_of,
    scoring_command,
)

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class InferConfig(ScoringConfig):
    """Settings of scoring with LHP; each field is a flag of `python -m lhp.infer`."""

    model: str = flag("beit3_large_patch16_384", "architecture, beit3_SIZE_patchP_RESOLUTION")
    input_size: int | None = flag(
        None, "side of the square input, pixels; none: the model's own", ge=1
    )
    checkpoint: str = flag("checkpoints/lhp/lhp_beit3.pth", "fine-tuned weights")
    tokenizer: str = flag("checkpoints/lhp/beit3.spm", "SentencePiece model")
    max_text_length: int = flag(
        64, "maximum token ids per caption, including both special tokens", ge=3
    )
    compile: bool = speed_flag(
        False, "compile the image encoder first (benchmarks/lhp_scoring.py measures the gain)"
    )
    save_score: str | None = flag("sims_score/score_beit3_reproduce.pt", "score file to write")
    output_file: str | None = flag("predictions/score_beit3_reproduce.txt", "ranked list to write")


def infer(config: InferConfig) -> None:
    """Score every image of the gallery against every caption.

    Raises:
        InputError: settings, data or checkpoint are invalid; nothing is written.
    """
    device_and_dtype(config)  # rejects unsupported settings before the data is read
    job = prepare(config)
    with open_encoder(config) as opened:
        scores = opened.encoder.scores([q.caption for q in job.retrieval.queries], job.gallery)
    score_file = score_file_of(
        config,
        job,
        scores,
        model=config.model,
        checkpoint=config.checkpoint,
        checkpoint_sha256=opened.checkpoint_sha256,
    )
    finish(config, job, score_file)


def device_and_dtype(config: InferConfig) -> tuple[torch.device, torch.dtype]:
    """Select the device and number format of the model.

    Raises:
        InputError: the device does not exist or cannot run the format.
    """
    from pab.core.devices import autocast, dtype_of

    device, dtype = pick_device(config.device), dtype_of(config.dtype)
    autocast(device, dtype)
    return device, dtype


@contextmanager
def open_encoder(config: InferConfig) -> Iterator[OpenEncoder]:
    """Load the model and open its cache; ignores settings for data and outputs.

    Raises:
        InputError: settings, tokenizer or checkpoint are invalid.
    """
    from lhp.encode import encode_captions, encode_images, load_model
    from lhp.tokenizer import Tokenizer
    from pab.core.checkpoints import checkpoint_hash
    from pab.core.devices import keep_freed_memory

    device, dtype = device_and_dtype(config)
    keep_freed_memory(device)
    tokenizer = Tokenizer(config.tokenizer, config.max_text_length)
    model = load_model(config.model, config.input_size, config.checkpoint, tokenizer)
    model = model.to(device, dtype)
    sha256 = checkpoint_hash(config.checkpoint)
    with features_of(
        config, device=device, dtype=config.dtype, model=config.model, checkpoint=sha256,
        input_size=model.config.img_size,
    ) as cache:  # fmt: skip
        options: dict[str, Any] = {
            "batch_size": config.batch_size, "device": device, "dtype": dtype, "cache": cache,
        }  # fmt: skip
        images = partial(
            encode_images, model, num_workers=config.num_workers, compiled=config.compile, **options
        )
        texts = partial(encode_captions, model, tokenizer, **options)
        yield OpenEncoder(
            Encoder(images, texts), config.model, config.checkpoint, sha256, config.dtype
        )


def main(argv: list[str] | None = None) -> None:
    """Read the command line and score."""
    scoring_command(
        InferConfig,
        infer,
        argv,
        prog="python -m lhp.infer",
    )


if __name__ == "__main__":
    run_cli(main)
