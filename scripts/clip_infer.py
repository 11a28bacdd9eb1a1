"""Score a gallery with CLIP, zero-shot: `python scripts/clip_infer.py`.

OpenAI's ViT-L/14@336px as published, or any OpenCLIP model by `--model` and `--pretrained`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own folder is not enough

from pab.config import config_from_args, flag
from pab.encoders.scoring import EncoderConfig
from pab.errors import run_cli
from pab.scoring import finish, prepare, score_file_of


@dataclass(frozen=True)
class InferConfig(EncoderConfig):
    """Scoring with CLIP; each field is a flag of `python scripts/clip_infer.py`."""

    model: str = flag("ViT-L-14-336-quickgelu", "architecture, any name of OpenCLIP")
    pretrained: str = flag("openai", "a tag of OpenCLIP for it, or a file of weights")
    save_score: str = flag("sims_score/score_clip_reproduce.pt", "score file to write")
    output_file: str = flag("predictions/score_clip_reproduce.txt", "ranked list to write")


def infer(config: InferConfig) -> None:
    """Score every image of the gallery against every caption.

    Raises:
        InputError: bad settings, data or weights; nothing is written.
    """
    from pab.checkpoints import checkpoint_hash
    from pab.encoders.clip import load_clip
    from pab.encoders.scoring import device_and_dtype
    from pab.encoding import caption_vectors, image_vectors

    device, dtype, dtype_name = device_and_dtype(config)
    job = prepare(config)
    clip = load_clip(config.model, config.pretrained)
    clip.model.to(device, dtype)
    images = image_vectors(
        clip.encode_image, job.gallery, clip.transform, batch_size=config.batch_size,
        num_workers=config.num_workers, device=device, dtype=dtype, weights=dtype,
    )  # fmt: skip
    ids = clip.tokenize([query.caption for query in job.retrieval.queries])
    texts = caption_vectors(
        lambda positions: clip.encode_text(ids[positions].to(device)),
        clip.lengths(ids),
        token_budget=config.batch_size * ids.shape[1],
        device=device,
        dtype=dtype,
    )
    score_file = score_file_of(
        replace(config, dtype=dtype_name),  # type: ignore[arg-type]
        job,
        texts @ images.T,  # cosine similarity, [queries, gallery]
        model=config.model,
        checkpoint=config.pretrained,
        checkpoint_sha256=checkpoint_hash(clip.weights_file),
    )
    finish(config, job, score_file)


def main(argv: list[str] | None = None) -> None:
    """Read the command line and score."""
    config, _ = config_from_args(
        InferConfig,
        argv,
        prog="python scripts/clip_infer.py",
        description="Score a gallery against captions with CLIP, zero-shot.",
    )
    infer(config)


if __name__ == "__main__":
    run_cli(main)
