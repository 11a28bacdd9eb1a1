"""Score a gallery with UIT: `python -m uit.infer` writes a score file and a ranked list.

Each query's candidates come from a score file or a ranked list (`--candidates`; the paper uses
LHP's scores), or from UIT's ITC similarities. The cross encoder then scores the candidates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pab.core.config import data_flag, flag, output_flag, speed_flag
from pab.core.errors import InputError, run_cli
from pab.core.outputs import check_inputs_are_kept, check_output_folder, check_outputs
from pab.scoring.job import MemberConfig, scoring_command
from pab.scoring.rerank import Reranker, score_candidates
from uit.outputs import AUTO, LIST, PUBLISHED_K, SCORES, output_path

if TYPE_CHECKING:
    from uit.encode import UitEncoder


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
        None,
        "score file or ranked list, in any supported format, that selects the candidates (none: "
        "UIT's ITC similarities)",
    )
    k_test: int = flag(PUBLISHED_K, "candidates per query that the cross encoder scores", ge=1)
    feature_cache: bool = flag(
        False, "cache image tokens and vectors on disk for later runs (0.2 MB per image)"
    )
    save_itc: str | None = output_flag(None, "score file for the ITC similarities")
    cache_dtype: Literal["fp32", "bf16"] = speed_flag("fp32", "dtype of the gallery's image tokens")
    cache_dir: str | None = speed_flag(
        None, "folder for a temporary file of image tokens (default: the system's)"
    )
    save_score: str | None = flag(
        AUTO,
        f"score file to write; auto: {SCORES.format(k='')}, or {SCORES.format(k='_kN')} for "
        "another --k_test N",
    )
    output_file: str | None = flag(
        AUTO,
        f"ranked list to write; auto: {LIST.format(k='')}, or {LIST.format(k='_kN')} for "
        "another --k_test N",
    )

    def check(self) -> None:
        """See :class:`MemberConfig`.

        Raises:
            InputError: a value is invalid; the message names the flag.
        """
        super().check()
        if self.save_itc and self.candidates:
            raise InputError("--save_itc", "contradicts --candidates, which replaces ITC")
        outputs = self.with_outputs()
        written = {"save_score": outputs.save_score, "output_file": outputs.output_file}
        check_inputs_are_kept(written, {"--candidates": self.candidates})
        others = [Path(path) for path in written.values() if path]
        if self.save_itc and Path(self.save_itc) in others:
            raise InputError("--save_itc", f"{self.save_itc} is also the path of another output")

    def with_outputs(self) -> InferConfig:
        """Replace ``auto`` with the default output paths for this number of candidates."""
        return replace(
            self,
            save_score=output_path(self.save_score, SCORES, self.k_test),
            output_file=output_path(self.output_file, LIST, self.k_test),
        )

    def open(self) -> UitEncoder:
        """Load the model for ITC similarities; see :meth:`MemberConfig.open`."""
        from uit.encode import load_encoder

        encoder = load_encoder(self)
        return replace(encoder, compute=encoder.compute.with_cache(encoder.fingerprint))

    def open_reranker(self) -> Reranker:
        """Load the model with its cross encoder.

        Raises:
            InputError: settings or weights are invalid.
        """
        from uit.rerank import open_reranker

        return open_reranker(self)

    def score(self) -> None:
        """Score each query's candidates; see :meth:`MemberConfig.score`."""
        self.compute()  # reject unsupported settings before the data is read
        check_outputs({"save_itc": self.save_itc})
        if self.cache_dir:
            check_output_folder("--cache_dir", self.cache_dir)
        score_candidates(
            self.with_outputs(), self.open_reranker, candidates=self.candidates,
            k=self.k_test, save_first=self.save_itc,
        )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Read the command line and score."""
    scoring_command(InferConfig, argv, prog="python -m uit.infer")


if __name__ == "__main__":
    run_cli(main)
