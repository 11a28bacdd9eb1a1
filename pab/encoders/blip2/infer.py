"""Settings and loading of the member `blip2`.

The model is LAVIS's `pretrain_vitL` as published, ViT-g (`--model pretrain`), or a small model
(`--model mini`). `--backend lavis` runs LAVIS's own code instead of the port, in the environment of
`scripts/setup_lavis.sh`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pab.core.checkpoints import checkpoint_hash
from pab.core.config import flag
from pab.core.devices import keep_freed_memory
from pab.core.errors import InputError
from pab.encoders.scoring import EncoderConfig
from pab.scoring.encoder import Encoder, Origin

if TYPE_CHECKING:
    from pab.encoders.blip2.model import Blip2
    from pab.encoders.blip2.vit_g import Blip2VitG
    from pab.scoring.encoding import Compute

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
        None, "ViT-L: a LAVIS or a fine-tuned checkpoint; ViT-g: a folder or a hub id "
        f"(default of each --model: {', '.join(DEFAULT_WEIGHTS.values())})"
    )  # fmt: skip
    image_weights: str = flag(
        "checkpoints/blip2/clip_vit_L.pth", "weights of the image tower if --pretrained lacks them"
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
            InputError: a value is invalid; the message names the flag.
        """
        super().check()
        if self.backend == "lavis" and self.model == "mini":
            raise InputError("--backend", "LAVIS has no mini model")
        if self.backend == "lavis" and self.dtype != "auto":
            raise InputError("--dtype", "expected auto: LAVIS chooses its own dtype")

    @classmethod
    def of_checkpoint(cls, path: str) -> dict[str, str]:
        """Map a file or folder of weights to settings."""
        return {"pretrained": path}

    def open(self) -> Encoder:
        """Load the model; see :meth:`pab.scoring.job.MemberConfig.open`."""
        return self.open_lavis() if self.backend == "lavis" else self.open_port()

    def origin(self, compute: Compute, source: str, sha256: str) -> Origin:
        """Create the origin of the vectors, with BLIP-2's pooling and backend."""
        more = {"query_pooling": self.query_pooling, "backend": self.backend}
        return compute.origin(self.model, source, sha256, **more)

    def open_port(self) -> Encoder:
        """Load the port, or ViT-g; vectors are cached only if the weights are given as a file."""
        from pab.data.images import recipe
        from pab.data.wordpiece import Tokenizer
        from pab.encoders.blip2.encoder import Blip2Encoder
        from pab.encoders.blip2.model import MODELS, Blip2Config, check_vocabulary, load_blip2
        from pab.encoders.blip2.vit_g import load_vit_g

        compute = self.compute()
        keep_freed_memory(compute.device)
        sizes = MODELS.get(self.model, Blip2Config())
        tokenizer = Tokenizer(
            self.text_encoder, max_words=sizes.positions, max_length=sizes.positions
        )
        check_vocabulary(tokenizer, sizes)
        source = self.pretrained or DEFAULT_WEIGHTS[self.model]
        sha256 = checkpoint_hash(source) if Path(source).is_file() else ""
        model: Blip2 | Blip2VitG
        tower = ""
        if self.model in MODELS:
            model = load_blip2(sizes, source, self.image_weights)
            if Path(self.image_weights).is_file():
                tower = checkpoint_hash(self.image_weights)
        else:
            model = load_vit_g(source)
        if not sha256:
            compute = replace(compute, cache_dir=None)
        images = recipe("blip2", sizes.image_size)
        facts = compute.fingerprint(
            model=self.model, preprocessing=images, checkpoint=sha256 or source, image_weights=tower
        )
        return Blip2Encoder(
            compute.with_cache(facts),
            model.to(compute.device, compute.dtype),
            tokenizer,
            images.transform(),
            self.query_pooling,
            origin=self.origin(compute, source, sha256),
            fingerprint=facts,
        )

    def open_lavis(self) -> Encoder:
        """Load the model in LAVIS, which chooses the dtype; vectors are not cached."""
        import torch

        from pab.encoders.blip2.lavis import LavisEncoder, load_lavis

        chosen = self.compute()
        keep_freed_memory(chosen.device)
        compute = replace(chosen, dtype=torch.float32, weights=torch.float32, cache_dir=None)
        model, transform, process = load_lavis(self.model, self.pretrained)
        source = f"LAVIS's {self.model}" if self.pretrained is None else self.pretrained
        sha256 = "" if self.pretrained is None else checkpoint_hash(self.pretrained)
        return LavisEncoder(
            compute,
            model.to(compute.device),
            transform,
            process,
            self.query_pooling,
            origin=self.origin(chosen, source, sha256),
            fingerprint=compute.fingerprint(model=source, checkpoint=sha256, backend="lavis"),
        )
