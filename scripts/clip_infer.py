"""Score a gallery with CLIP, zero-shot: `python scripts/clip_infer.py`.

Uses OpenAI's ViT-L/14@336px as published, or any OpenCLIP model (`--model`, `--pretrained`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's path lacks the root

from pab.core.config import flag
from pab.core.errors import run_cli
from pab.encoders.scoring import EncoderConfig
from pab.scoring.encoder import OpenEncoder
from pab.scoring.job import features_of, finish, prepare, score_file_of, scoring_command


@dataclass(frozen=True)
class InferConfig(EncoderConfig):
    """Settings of scoring with CLIP; each field is a flag of `python scripts/clip_infer.py`."""

    model: str = flag("ViT-L-14-336-quickgelu", "OpenCLIP's name, or local-dir:FOLDER")
    pretrained: str | None = flag(
        None, "OpenCLIP tag of the weights, or a file (default: openai, or the folder's weights)"
    )
    preprocess_as: str | None = flag(
        None, "tag with the preprocessing of a weight file; required if nothing else determines it"
    )
    save_score: str | None = flag("sims_score/score_clip_reproduce.pt", "score file to write")
    output_file: str | None = flag("predictions/score_clip_reproduce.txt", "ranked list to write")


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
    )
    finish(config, job, score_file)


@contextmanager
def open_encoder(config: InferConfig) -> Iterator[OpenEncoder]:
    """Load the model and open its cache; ignores settings for data and outputs.

    Raises:
        InputError: settings or weights are invalid.
    """
    from pab.core.checkpoints import checkpoint_hash
    from pab.encoders.clip.model import load_clip
    from pab.encoders.clip.names import architecture
    from pab.encoders.compute import Compute
    from pab.encoders.scoring import device_and_dtype
    from pab.encoders.similarity import clip_encoder

    device, dtype, dtype_name = device_and_dtype(config)
    clip = load_clip(config.model, config.pretrained, config.preprocess_as)
    clip.model.to(device, dtype)
    sha256 = checkpoint_hash(clip.weights_file)
    with features_of(
        config, device=device, dtype=dtype_name, model=config.model, checkpoint=sha256,
        preprocessing=clip.transform,
        architecture=json.dumps(architecture(config.model), sort_keys=True),
    ) as cache:  # fmt: skip
        compute = Compute(device, dtype, dtype, config.batch_size, config.num_workers, cache)
        source = config.pretrained or str(clip.weights_file)
        yield OpenEncoder(clip_encoder(clip, compute), config.model, source, sha256, dtype_name)


def main(argv: list[str] | None = None) -> None:
    """Read the command line and score."""
    scoring_command(
        InferConfig,
        infer,
        argv,
        prog="python scripts/clip_infer.py",
    )


if __name__ == "__main__":
    run_cli(main)
