"""Score a gallery with LHP: `python -m lhp.infer` writes a score file and a ranked list."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pab.config import flag
from pab.devices import pick_device
from pab.errors import run_cli
from pab.scoring import (
    ScoringConfig,
    features_of,
    finish,
    prepare,
    score_file_of,
    scoring_command,
)


@dataclass(frozen=True)
class InferConfig(ScoringConfig):
    """Scoring with LHP; each field is a flag of `python -m lhp.infer`."""

    model: str = flag("beit3_large_patch16_384", "architecture, beit3_SIZE_patchP_RESOLUTION")
    input_size: int | None = flag(None, "side of the square input, pixels; none is the model's own")
    checkpoint: str = flag("checkpoints/lhp/lhp_beit3.pth", "fine-tuned weights")
    tokenizer: str = flag("checkpoints/lhp/beit3.spm", "SentencePiece model")
    max_text_length: int = flag(64, "token ids of a caption at most, both ends included")
    compile: bool = flag(
        False, "compile the image half first (see benchmarks/lhp_scoring.py for what it gains)"
    )
    save_score: str | None = flag("sims_score/score_beit3_reproduce.pt", "score file to write")
    output_file: str | None = flag("predictions/score_beit3_reproduce.txt", "ranked list to write")

    def check(self) -> None:
        """See :class:`ScoringConfig`; also refuses a caption length that holds no word."""
        super().check()
        self.check_least(3, "max_text_length")


def infer(config: InferConfig) -> None:
    """Score every image of the gallery against every caption.

    Raises:
        InputError: bad settings, data or checkpoint; nothing is written.
    """
    from lhp.encode import encode_captions, encode_images, load_model
    from lhp.tokenizer import Tokenizer
    from pab.checkpoints import checkpoint_hash
    from pab.devices import autocast, dtype_of, keep_freed_memory

    device, dtype = pick_device(config.device), dtype_of(config.dtype)
    autocast(device, dtype)  # refuses a format this device cannot run
    keep_freed_memory(device)
    job = prepare(config)
    tokenizer = Tokenizer(config.tokenizer, config.max_text_length)
    model = load_model(config.model, config.input_size, config.checkpoint, tokenizer)
    model = model.to(device, dtype)
    options: dict[str, Any] = {"batch_size": config.batch_size, "device": device, "dtype": dtype}
    sha256 = checkpoint_hash(config.checkpoint)
    with features_of(
        config, device=device, dtype=config.dtype, model=config.model, checkpoint=sha256,
        input_size=model.config.img_size,
    ) as cache:  # fmt: skip
        images = encode_images(
            model,
            job.gallery,
            num_workers=config.num_workers,
            compiled=config.compile,
            cache=cache,
            **options,
        )
        captions = [query.caption for query in job.retrieval.queries]
        texts = encode_captions(model, tokenizer, captions, cache=cache, **options)
    score_file = score_file_of(
        config,
        job,
        texts @ images.T,  # cosine similarity, [queries, gallery]
        model=config.model,
        checkpoint=config.checkpoint,
        checkpoint_sha256=sha256,
    )
    finish(config, job, score_file)


def main(argv: list[str] | None = None) -> None:
    """Read the command line and score."""
    scoring_command(
        InferConfig,
        infer,
        argv,
        prog="python -m lhp.infer",
        description="Score a gallery against captions with a fine-tuned BEiT-3.",
    )


if __name__ == "__main__":
    run_cli(main)
