"""Settings and loading of the member `embed`: an embedder read with sentence-transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pab.core.config import data_flag, flag, speed_flag
from pab.core.devices import dtype_of
from pab.core.errors import InputError
from pab.core.notices import notice
from pab.core.outputs import check_output_folder
from pab.core.precision import FASTEST_HELP
from pab.encoders.st.extra import sentence_transformers
from pab.encoders.st.folders import KIND_NAMES, Kind
from pab.scoring.job import MemberConfig
from pab.scoring.rerank import score_candidates

if TYPE_CHECKING:
    from pab.encoders.st.encoder import Embedder

CLASSES = {"dense": "SentenceTransformer", "late": "MultiVectorEncoder"}


@dataclass(frozen=True)
class InferConfig(MemberConfig):
    """Settings of scoring with an embedder; each field is a flag of `scripts/embed_infer.py`."""

    scoring_only: ClassVar[tuple[str, ...]] = ("candidates", "k_test")
    auto_dtype: ClassVar[str] = "bf16"

    model: str = flag(
        "Qwen/Qwen3-VL-Embedding-2B", "folder of the model, or its name on the Hugging Face hub"
    )
    kind: Literal["auto", "dense", "late"] = flag(
        "auto", "dense: one vector per caption and image; late: one per token (late interaction); "
        "auto: according to the model's files"
    )  # fmt: skip
    prompt: str | None = flag(None, "instruction for captions (default: the model's own)")
    image_prompt: str | None = flag(None, "instruction for images (default: the model's own)")
    dims: int | None = flag(
        None, "dense: truncate vectors to this width, for models trained for it (Matryoshka)", ge=1
    )
    candidates: str | None = data_flag(
        None, "score file or ranked list; only its best images per query are scored (none: all)"
    )
    k_test: int = flag(200, "with --candidates: images per query that are scored", ge=1)
    batch_size: int = speed_flag(8, "images (or captions) per batch", ge=1)
    dtype: Literal["auto", "fp32", "bf16", "fp16", "fastest"] = flag(  # type: ignore[assignment]
        "auto", f"dtype of the model; auto: bf16 on a CUDA GPU, else fp32; {FASTEST_HELP}"
    )
    vector_dtype: Literal["fp16", "fp32"] = speed_flag(
        "fp16", "late: dtype in which the vectors of images are stored"
    )
    cache_dir: str | None = speed_flag(
        None, "late: folder for temporary files of image vectors (default: the system's)"
    )
    save_score: str | None = flag("sims_score/score_embed_reproduce.pt", "score file to write")
    output_file: str | None = flag("predictions/score_embed_reproduce.txt", "ranked list to write")

    @classmethod
    def of_checkpoint(cls, path: str) -> dict[str, str]:
        """Map a folder to settings."""
        return {"model": path}

    def open(self) -> Embedder:
        """Load the model; see :meth:`pab.scoring.job.MemberConfig.open`."""
        from pab.encoders.st.encoder import DenseEncoder
        from pab.encoders.st.folders import folder_hash, model_folder
        from pab.encoders.st.late import LateEncoder
        from pab.encoders.st.loading import kind_of, load_model

        library = sentence_transformers()
        compute = self.compute()
        folder = model_folder(self.model)
        kind = self.checked_kind(kind_of(folder), folder)
        sha256 = folder_hash(folder)
        model = load_model(CLASSES[kind], folder, compute.device, compute.dtype)
        facts = compute.fingerprint(
            model=sha256, kind=kind, prompt=[self.prompt, self.image_prompt],
            dims=self.dims, vectors=self.vector_dtype, sentence_transformers=library.__version__,
        )  # fmt: skip
        origin = compute.origin(
            self.model, str(folder), sha256, kind=kind, similarity=model.similarity_fn_name,
            prompt=self.prompt or "", image_prompt=self.image_prompt or "",
        )  # fmt: skip
        compute = compute.with_cache(facts)
        prompts = self.prompt, self.image_prompt
        if kind == "dense":
            return DenseEncoder(compute, model, origin, facts, *prompts, dims=self._dims(model))
        with compute.running("encoding a caption"):
            width = model.encode_query([{"text": "a person"}], show_progress_bar=False)[0].shape[1]
        return LateEncoder(
            compute, model, origin, facts, *prompts, width=width,
            stored=dtype_of(self.vector_dtype), folder=self.cache_dir,
        )  # fmt: skip

    def checked_kind(self, found: Kind, folder: Path) -> Literal["dense", "late"]:
        """Return the kind of embedder that a folder holds, if ``--kind`` allows it.

        Args:
            found: kind according to the folder's files.
            folder: folder of the model.

        Raises:
            InputError: the folder contains no embedder or one of another kind, its files do not
                specify the kind, or ``--dims`` is set for a late-interaction model.
        """
        if found == "bare":  # the library would average all tokens, or draw a projection at random
            if self.kind != "dense":
                raise InputError(
                    folder, "the files do not specify how the model makes vectors: modules.json is "
                    "missing",
                    todo="use a folder in the format of sentence-transformers, or --kind dense for "
                    "its default, the mean over all tokens",
                )  # fmt: skip
            notice(folder, "no modules.json: a vector is the mean over all tokens, by default")
            return "dense"
        if found not in ("dense", "late"):
            todo = "use scripts/rerank_infer.py" if found == "reranker" else "use another model"
            raise InputError(folder, f"expected an embedder, found {KIND_NAMES[found]}", todo=todo)
        if self.kind not in ("auto", found):
            raise InputError("--kind", f"expected {found}: {folder} holds {KIND_NAMES[found]}")
        if found == "late" and self.dims is not None:
            raise InputError("--dims", "late-interaction models have no shorter vectors")
        if self.kind == "auto":
            notice(folder, f"{KIND_NAMES[found]} (--kind {found})")
        return found

    def _dims(self, model: object) -> int | None:
        """Return ``--dims``; raise an error if the model has fewer dimensions."""
        width = model.get_embedding_dimension()  # type: ignore[attr-defined]
        if self.dims is not None and width is not None and self.dims > width:
            raise InputError("--dims", f"expected at most {width}, found {self.dims}")
        return self.dims

    def score(self) -> None:
        """Score the gallery, or each query's candidates; see :meth:`MemberConfig.score`."""
        sentence_transformers()  # before the data is read
        if self.cache_dir:
            check_output_folder("--cache_dir", self.cache_dir)
        if self.candidates is None:
            super().score()
            return
        from pab.encoders.st.candidates import CandidateScorer

        self.compute()  # rejects unsupported settings before the data is read
        score_candidates(
            self, lambda: CandidateScorer(self.open()), candidates=self.candidates, k=self.k_test
        )
