"""Score a gallery with BLIP-2, zero-shot: `python scripts/blip2_infer.py`.

LAVIS's `pretrain_vitL` as published, or ViT-g (`--model pretrain`). No LAVIS is needed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own folder is not enough

from pab.config import config_from_args, flag
from pab.encoders.scoring import EncoderConfig
from pab.errors import run_cli
from pab.scoring import finish, prepare, score_file_of

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_WEIGHTS = {
    "pretrain_vitL": "checkpoints/blip2/blip2_pretrained_vitL.pth",
    "pretrain": "Salesforce/blip2-itm-vit-g",
}

CAPTION_IDS = 64  # ids a caption of the processor's 50 words may have: what a batch makes room for


@dataclass(frozen=True)
class InferConfig(EncoderConfig):
    """Scoring with BLIP-2; each field is a flag of `python scripts/blip2_infer.py`."""

    model: Literal["pretrain_vitL", "pretrain"] = flag(
        "pretrain_vitL", "ViT-L as published, or ViT-g"
    )
    pretrained: str | None = flag(
        None, "ViT-L: a LAVIS checkpoint; ViT-g: a folder or a hub id "
        f"(default: {', '.join(DEFAULT_WEIGHTS.values())})"
    )  # fmt: skip
    text_encoder: str = flag("checkpoints/uit/bert-base-uncased", "folder of BERT's vocab.txt")
    query_pooling: Literal["first", "max"] = flag(
        "first", "image's query tokens: the first alone (published) or the best one"
    )
    save_score: str = flag("sims_score/score_blip2_reproduce.pt", "score file to write")
    output_file: str = flag("predictions/score_blip2_reproduce.txt", "ranked list to write")


def infer(config: InferConfig) -> None:
    """Score every image of the gallery against every caption.

    Raises:
        InputError: bad settings, data or weights; nothing is written.
    """
    from pab.checkpoints import checkpoint_hash
    from pab.encoders.blip2 import Blip2Config, load_blip2, similarity
    from pab.encoders.blip2_vit_g import load_vit_g
    from pab.encoders.captions import blip_caption
    from pab.encoders.scoring import device_and_dtype
    from pab.encoding import caption_vectors, image_vectors
    from pab.images import recipe
    from pab.wordpiece import Tokenizer

    device, dtype, dtype_name = device_and_dtype(config)
    job = prepare(config)
    sizes = Blip2Config()
    tokenizer = Tokenizer(
        config.text_encoder, max_words=sizes.positions, max_length=sizes.positions
    )
    rows = [tokenizer.encode(blip_caption(query.caption)) for query in job.retrieval.queries]
    tokenizer.check_known(rows)
    source = config.pretrained or DEFAULT_WEIGHTS[config.model]
    vit_l = config.model == "pretrain_vitL"
    model = (load_blip2(sizes, source) if vit_l else load_vit_g(source)).to(device, dtype)
    queries = image_vectors(
        lambda pixels: model.encode_queries(pixels).flatten(1),
        job.gallery,
        recipe("blip2", sizes.image_size).transform(),
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        device=device,
        dtype=dtype,
        weights=dtype,
    )

    def encode(positions: list[int]) -> Tensor:
        ids, mask = tokenizer.pad_rows([rows[i] for i in positions])
        return model.encode_text(ids.to(device), mask.to(device))

    texts = caption_vectors(
        encode,
        [len(row) for row in rows],
        token_budget=config.batch_size * CAPTION_IDS,
        device=device,
        dtype=dtype,
    )
    score_file = score_file_of(
        replace(config, dtype=dtype_name),  # type: ignore[arg-type]
        job,
        similarity(queries.view(len(queries), -1, texts.shape[1]), texts, config.query_pooling),
        model=config.model,
        checkpoint=source,
        checkpoint_sha256=checkpoint_hash(source) if vit_l else "",
        query_pooling=config.query_pooling,
    )
    finish(config, job, score_file)


def main(argv: list[str] | None = None) -> None:
    """Read the command line and score."""
    config, _ = config_from_args(
        InferConfig,
        argv,
        prog="python scripts/blip2_infer.py",
        description="Score a gallery against captions with BLIP-2, zero-shot.",
    )
    infer(config)


if __name__ == "__main__":
    run_cli(main)
