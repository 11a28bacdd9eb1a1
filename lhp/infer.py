"""Score a gallery with LHP: `python -m lhp.infer` writes a score file and a ranked list."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pab.core.checkpoints import checkpoint_hash
from pab.core.config import flag, speed_flag
from pab.core.devices import keep_freed_memory
from pab.core.errors import run_cli
from pab.scoring.job import MemberConfig, scoring_command

if TYPE_CHECKING:
    from lhp.encode import LhpEncoder


@dataclass(frozen=True)
class InferConfig(MemberConfig):
    """Settings of scoring with LHP; each field is a flag of `python -m lhp.infer`."""

    model: str = flag("beit3_large_patch16_384", "architecture, beit3_SIZE_patchP_RESOLUTION")
    input_size: int | None = flag(
        None, "side of the square input, pixels; none: as in the model's name", ge=1
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

    def open(self) -> LhpEncoder:
        """Load the model; see :meth:`MemberConfig.open`."""
        from lhp.encode import LhpEncoder, check_compiler, compiled_image_encoder, load_model
        from lhp.tokenizer import Tokenizer

        compute = self.compute()
        if self.compile:
            check_compiler(compute.device)
        keep_freed_memory(compute.device)
        tokenizer = Tokenizer(self.tokenizer, self.max_text_length)
        model = load_model(self.model, self.input_size, self.checkpoint, tokenizer)
        model = model.to(compute.device, compute.dtype)
        sha256 = checkpoint_hash(self.checkpoint)
        facts = compute.fingerprint(
            model=self.model, checkpoint=sha256, input_size=model.config.img_size
        )
        return LhpEncoder(
            compute.with_cache(facts),
            model,
            tokenizer,
            compiled_image_encoder(model) if self.compile else None,
            origin=compute.origin(self.model, self.checkpoint, sha256),
            fingerprint=facts,
        )


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and score the gallery."""
    scoring_command(InferConfig, argv, prog="python -m lhp.infer")


if __name__ == "__main__":
    run_cli(main)
