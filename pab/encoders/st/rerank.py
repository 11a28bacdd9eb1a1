"""Settings and loading of rerankers: vision-language models that score pairs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, ClassVar, Literal

from pab.core.config import data_flag, flag, model_flag, output_flag, speed_flag
from pab.core.devices import keep_freed_memory
from pab.core.errors import InputError
from pab.core.files import existing_file, sha256_of_file
from pab.core.outputs import check_inputs_are_kept
from pab.encoders.st.extra import sentence_transformers
from pab.encoders.st.pair_inputs import PROMPT
from pab.formats.parts import Part
from pab.scoring.job import ScoringCommand
from pab.scoring.rerank import score_candidates

if TYPE_CHECKING:
    from pab.encoders.st.reranker import VlmReranker

AUTO = "auto"  # value of a path flag that stands for the default path
SCORES = "sims_score/score_rerank{part}_reproduce.pt"
LIST = "predictions/score_rerank_reproduce.txt"


@dataclass(frozen=True)
class RerankConfig(ScoringCommand):
    """Settings of re-ranking; each field is a flag of `python scripts/rerank_infer.py`."""

    auto_dtype: ClassVar[str] = "bf16"

    model: str = model_flag(
        "Qwen/Qwen3-VL-Reranker-2B", "folder of a vision-language model, or its id on the hub"
    )
    prompt: str | None = model_flag(
        None, "instruction; empty for none (default: the one that the model was tuned with, else: "
        f"{PROMPT})",
    )  # fmt: skip
    prompt_file: str | None = model_flag(None, "text file with the instruction")
    yes_token: str | None = model_flag(
        None, 'text of the positive answer, one token (default: the model\'s, else "yes")'
    )
    no_token: str | None = model_flag(
        None, 'text of the negative answer, one token (default: the model\'s, else "no")'
    )
    backend: Literal["sentence_transformers", "transformers"] = model_flag(
        "sentence_transformers", "library that computes the scores; both give the same scores"
    )
    candidates: str | None = data_flag(
        None, "score file or ranked list that selects the candidates, in any form (required)"
    )
    k_test: int = model_flag(50, "candidates per query to score", ge=1)
    part: str | None = data_flag(
        None,
        "I/N: score only part I of N of the queries; join them with python -m pab.scores merge",
    )
    save_score: str | None = output_flag(
        AUTO, f"score file to write; auto: {SCORES.format(part='')}, or with _IofN for a part"
    )
    output_file: str | None = output_flag(
        AUTO, f"ranked list to write; auto: {LIST}, or none for a part"
    )
    batch_size: int = speed_flag(8, "pairs per batch")
    dtype: Literal["auto", "fp32", "bf16", "fp16", "fastest"] = flag(  # type: ignore[assignment]
        "auto", "dtype of the model; auto: bf16 on a CUDA GPU, else fp32"
    )
    feature_cache: bool = speed_flag(True, "cache scores on disk, to resume an interrupted run")

    def check(self) -> None:
        """See :class:`pab.scoring.job.ScoringConfig`.

        Raises:
            InputError: a value is missing or invalid, or ``--backend`` needs sentence-transformers,
                which is not installed.
        """
        super().check()
        if self.candidates is None:
            raise InputError(
                "--candidates", "expected a score file or a ranked list, found none",
                todo="pass the scores of another member, or fused scores",
            )  # fmt: skip
        if self.prompt is not None and self.prompt_file is not None:
            raise InputError("--prompt_file", "contradicts --prompt", todo="use one of them")
        outputs = self.with_outputs()
        written = {"save_score": outputs.save_score, "output_file": outputs.output_file}
        check_inputs_are_kept(written, {"--candidates": self.candidates})
        if self.backend == "sentence_transformers":
            sentence_transformers()

    def instruction(self) -> str | None:
        """Return the text of ``--prompt`` or ``--prompt_file``; None without these flags.

        Raises:
            InputError: the file is missing, not UTF-8 text, or empty.
        """
        if self.prompt_file is None:
            return self.prompt
        path = existing_file(self.prompt_file, "a text file with the instruction")
        try:
            text = path.read_text(encoding="utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(path, f"expected UTF-8 text, found: {error}") from error
        if not text:
            raise InputError(path, "expected an instruction, found no text")
        return text

    def chosen_part(self) -> Part | None:
        """Return the part that ``--part`` selects, or None for all queries.

        Raises:
            InputError: the flag is invalid.
        """
        return None if self.part is None else Part.parse(self.part)

    def with_outputs(self) -> RerankConfig:
        """Replace ``auto`` with default paths; a part gets its own score file and no list."""
        part = self.chosen_part()
        suffix = "" if part is None else f"_{part.number}of{part.count}"
        scores, ranked = SCORES.format(part=suffix), LIST if part is None else None
        return replace(
            self,
            save_score=scores if self.save_score == AUTO else self.save_score,
            output_file=ranked if self.output_file == AUTO else self.output_file,
        )

    def open(self) -> VlmReranker:
        """Load the model; its origin contains the hash of the candidates.

        Raises:
            InputError: see :meth:`open_reranker`.
        """
        from pab.encoders.st.reranker import VlmReranker

        assert self.candidates is not None, "check() has been called"
        reranker = self.open_reranker()
        lists = {"candidates_sha256": sha256_of_file(self.candidates)}
        origin = replace(reranker.origin, more={**reranker.origin.more, **lists})
        return VlmReranker(reranker.model, reranker.compute, origin)

    def open_reranker(self) -> VlmReranker:
        """Load the model.

        Raises:
            InputError: a setting is invalid, or the model or the feature cache cannot be opened.
        """
        from pab.encoders.st.folders import folder_hash, model_folder
        from pab.encoders.st.pair_inputs import PairModel, read_settings
        from pab.encoders.st.reranker import LibraryPairModel, VlmReranker

        prompt, compute = self.instruction(), self.compute()
        keep_freed_memory(compute.device)
        folder = model_folder(self.model)
        if prompt is None:
            tuned = read_settings(folder).prompt
            prompt = PROMPT if tuned is None else tuned
        backend = LibraryPairModel if self.backend == "sentence_transformers" else PairModel
        model = backend.open(
            folder, prompt=prompt, yes_token=self.yes_token, no_token=self.no_token,
            dtype=compute.dtype, device=compute.device,
        )  # fmt: skip
        sha256 = folder_hash(folder)
        facts = {
            "prompt": prompt, "yes_token_id": model.tokens.yes, "no_token_id": model.tokens.no,
            "backend": self.backend, "pair_roles": model.pair_roles,
        }  # fmt: skip
        library = version("sentence-transformers") if backend is LibraryPairModel else ""
        key = compute.fingerprint(kind="pairs", checkpoint=sha256, library=library, **facts)
        origin = compute.origin(self.model, self.model, sha256, **facts)
        return VlmReranker(model, compute.with_cache(key), origin)

    def score(self) -> None:
        """Score each query's candidates; see :meth:`pab.scoring.job.ScoringCommand.score`."""
        self.compute()  # reject unsupported settings before the data is read
        self.instruction()
        score_candidates(
            self.with_outputs(), self.open, candidates=self.candidates, k=self.k_test,
            part=self.chosen_part(),
        )  # fmt: skip
