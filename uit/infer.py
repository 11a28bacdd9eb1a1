"""Score a gallery with UIT: `python -m uit.infer` writes a score file and a ranked list.

Each query's candidates come from a score file (`--candidates`; LHP's as published) or from UIT's
own ITC similarity. The cross encoder then scores them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pab.core import processes
from pab.core.checkpoints import checkpoint_hash
from pab.core.config import data_flag, flag, output_flag, speed_flag
from pab.core.devices import dtype_of
from pab.core.errors import InputError, run_cli
from pab.core.outputs import check_output_folder, check_outputs
from pab.scores import save_scores
from pab.scoring.encoder import Origin
from pab.scoring.job import MemberConfig, finish, prepare, score_file_of, scoring_command
from pab.scoring.rerank import read_candidates, rerank_best

if TYPE_CHECKING:
    from uit.encode import UitEncoder
    from uit.rerank import UitReranker

PUBLISHED_K = 10  # candidates per query in the only scoring configuration of the release
# Default outputs; k is empty for the published number of candidates, otherwise _kN.
SCORES, LIST = "sims_score/score_uit{k}_reproduce.pt", "predictions/score_uit{k}_reproduce.txt"
AUTO = "auto"


def name_part(k: int) -> str:
    """Part of a default file name that identifies another number of candidates."""
    return "" if k == PUBLISHED_K else f"_k{k}"


@dataclass(frozen=True)
class InferConfig(MemberConfig):
    """Settings of scoring with UIT; each field is a flag of `python -m uit.infer`."""

    scoring_only: ClassVar[tuple[str, ...]] = (
        "candidates", "k_test", "save_itc", "cache_dtype", "cache_dir",
    )  # fmt: skip

    model: Literal["uit_base", "uit_mini", "uit_debug"] = flag("uit_base", "architecture")
    input_size: int = flag(224, "side of the square input, pixels", ge=1)
    window: int = flag(7, "side of Swin's attention windows, tokens", ge=1)
    checkpoint: str = flag("checkpoints/uit/uit.pth", "fine-tuned weights")
    text_encoder: str = flag("checkpoints/uit/bert-base-uncased", "folder with BERT's vocab.txt")
    max_words: int = flag(56, "maximum words read per caption", ge=1)
    max_text_length: int = flag(56, "token ids per caption, with special tokens and padding", ge=3)
    candidates: str | None = data_flag(
        None, "scores or ranked list that select candidates, in any form (none: UIT's own ITC)"
    )
    k_test: int = flag(PUBLISHED_K, "candidates per query that the cross encoder scores", ge=1)
    feature_cache: bool = flag(
        False, "cache image tokens and vectors on disk for later runs (0.2 MB per image)"
    )
    save_itc: str | None = output_flag(None, "score file for the ITC similarities")
    cache_dtype: Literal["fp32", "bf16"] = speed_flag(
        "fp32", "number format of the gallery's features"
    )
    cache_dir: str | None = speed_flag(
        None, "temporary folder of the gallery's features (default: temp)"
    )
    save_score: str | None = flag(
        AUTO, f"score file to write; auto: {SCORES.format(k='')}, with _kN after uit for another N"
    )
    output_file: str | None = flag(AUTO, f"ranked list to write; auto: {LIST.format(k='')}")

    def check(self) -> None:
        """See :class:`MemberConfig`.

        Raises:
            InputError: naming the flag.
        """
        super().check()
        if self.save_itc and self.candidates:
            raise InputError(
                "--save_itc", "contradicts --candidates: ITC is not computed where a file chooses"
            )
        outputs = self.with_outputs()
        others = [Path(other) for other in (outputs.save_score, outputs.output_file) if other]
        if self.save_itc and Path(self.save_itc) in others:
            raise InputError("--save_itc", f"{self.save_itc} is given as another output too")

    def with_outputs(self) -> InferConfig:
        """Replace ``auto`` by the default output paths.

        The paths depend on the number of candidates, so other numbers never overwrite the published
        one.
        """
        k = name_part(self.k_test)
        return replace(
            self,
            save_score=SCORES.format(k=k) if self.save_score == AUTO else self.save_score,
            output_file=LIST.format(k=k) if self.output_file == AUTO else self.output_file,
        )

    def load(self) -> UitEncoder:
        """Load the model without a feature cache."""
        from pab.data.wordpiece import Tokenizer
        from uit.encode import UitEncoder, load_model

        compute = self.compute()
        tokenizer = Tokenizer(self.text_encoder, self.max_words, self.max_text_length)
        model = load_model(self.model, self.input_size, self.window, self.checkpoint, tokenizer)
        sha256 = checkpoint_hash(self.checkpoint)
        sizes = f"{self.model}, {self.input_size} px, windows of {self.window}"
        return UitEncoder(
            model.to(compute.device, compute.dtype),
            tokenizer,
            compute,
            Origin(self.model, self.checkpoint, sha256, compute.dtype_name),
            compute.fingerprint(weights=sha256, model=sizes),
        )

    def open(self) -> UitEncoder:
        """Load the model for its ITC; see :meth:`MemberConfig.open`."""
        encoder = self.load()
        return replace(encoder, compute=encoder.compute.with_cache(encoder.fingerprint))

    def open_reranker(self) -> UitReranker:
        """Load the model for its cross encoder, whose cache also holds image tokens."""
        from uit.rerank import UitReranker

        encoder = self.load()
        compute = encoder.compute.with_cache({**encoder.fingerprint, "features": "with tokens"})
        return UitReranker(
            encoder, cache=compute.cache, cache_dtype=dtype_of(self.cache_dtype),
            cache_dir=self.cache_dir,
        )  # fmt: skip

    def score(self) -> None:
        """Score each query's candidates; see :meth:`MemberConfig.score`."""
        self.compute()  # rejects unsupported settings before the data is read
        check_outputs({"save_itc": self.save_itc})
        if self.cache_dir:
            check_output_folder("--cache_dir", self.cache_dir)
        config = self.with_outputs()
        job = prepare(config)
        chosen = read_candidates(self.candidates, job, self.k_test) if self.candidates else None
        reranker = self.open_reranker()
        origin = reranker.encoder.origin
        if chosen is None:
            itc = score_file_of(job, origin, reranker.itc(job.captions, job.gallery), kind="itc")
            if self.save_itc and processes.is_main():
                save_scores(self.save_itc, itc)
            chosen = itc.scores
        scores = rerank_best(reranker, job.captions, job.gallery, chosen, self.k_test)
        facts: dict[str, Any] = {"k_test": self.k_test, "candidates": self.candidates or "itc"}
        finish(config, job, score_file_of(job, origin, scores, kind="itm", **facts))


def main(argv: list[str] | None = None) -> None:
    """Read the command line and score."""
    scoring_command(
        InferConfig,
        argv,
        prog="python -m uit.infer",
    )


if __name__ == "__main__":
    run_cli(main)
