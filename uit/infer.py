"""Score a gallery with UIT: `python -m uit.infer` writes a score file and a ranked list.

Each query's candidates come from a score file (`--candidates`; LHP's as published) or from UIT's
own ITC similarity. The cross encoder then scores them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pab.core import processes
from pab.core.config import data_flag, flag, output_flag, speed_flag
from pab.core.devices import pick_device
from pab.core.errors import InputError, run_cli
from pab.core.outputs import check_output_folder, check_outputs
from pab.formats.contents import Listing
from pab.formats.forms import read_form
from pab.scores import (
    ScoreFile,
    align,
    respell,
    save_scores,
    tell_other_data,
    to_score_file,
    with_all_images,
)
from pab.scoring.job import (
    ScoringConfig,
    ScoringJob,
    features_of,
    finish,
    prepare,
    score_file_of,
    scoring_command,
)

PUBLISHED_K = 10  # candidates per query in the only scoring configuration of the release
# Default outputs; k is empty for the published number of candidates, otherwise _kN.
SCORES, LIST = "sims_score/score_uit{k}_reproduce.pt", "predictions/score_uit{k}_reproduce.txt"
AUTO = "auto"


def name_part(k: int) -> str:
    """Part of a default file name that identifies another number of candidates."""
    return "" if k == PUBLISHED_K else f"_k{k}"


@dataclass(frozen=True)
class InferConfig(ScoringConfig):
    """Settings of scoring with UIT; each field is a flag of `python -m uit.infer`."""

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
        """See :class:`ScoringConfig`.

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


def infer(config: InferConfig) -> None:
    """Score each query's candidates.

    Raises:
        InputError: settings, data, candidates or checkpoint are invalid; nothing is written.
    """
    from pab.core.checkpoints import checkpoint_hash
    from pab.core.devices import autocast, dtype_of
    from pab.data.wordpiece import Tokenizer
    from uit.encode import encode_captions, encode_gallery, load_model
    from uit.rerank import choose_candidates, fill, match_scores

    config = config.with_outputs()
    device, dtype = pick_device(config.device), dtype_of(config.dtype)
    autocast(device, dtype)  # rejects a format that this device cannot run
    check_outputs({"save_itc": config.save_itc})
    if config.cache_dir:
        check_output_folder("--cache_dir", config.cache_dir)
    job = prepare(config)
    chosen = None
    if config.candidates:
        chosen = read_candidates(config.candidates, job, config.k_test)
    tokenizer = Tokenizer(config.text_encoder, config.max_words, config.max_text_length)
    rows = [tokenizer.encode(query.caption) for query in job.retrieval.queries]
    tokenizer.check_known(rows)
    model = load_model(
        config.model, config.input_size, config.window, config.checkpoint, tokenizer
    ).to(device, dtype)
    on: dict[str, Any] = {"device": device, "dtype": dtype}
    weights_sha256 = checkpoint_hash(config.checkpoint)
    sizes = f"{config.model}, {config.input_size} px, windows of {config.window}"
    with features_of(
        config, device=device, dtype=config.dtype, weights=weights_sha256, model=sizes
    ) as cache:
        features = encode_gallery(
            model, job.gallery, batch_size=config.batch_size, num_workers=config.num_workers,
            cache_dtype=dtype_of(config.cache_dtype), cache_dir=config.cache_dir, cache=cache, **on,
        )  # fmt: skip
    made = partial(
        score_file_of,
        config,
        job,
        model=config.model,
        checkpoint=config.checkpoint,
        checkpoint_sha256=weights_sha256,
    )
    if chosen is None:
        texts = encode_captions(model, tokenizer, rows, batch_size=config.batch_size, **on)
        itc = made(scores=texts @ features.vectors.T, kind="itc")
        if config.save_itc and processes.is_main():
            save_scores(config.save_itc, itc)
        chosen = itc.scores
    candidates = choose_candidates(chosen, config.k_test)
    match = match_scores(model, tokenizer, rows, features.tokens, candidates, **on)
    scores = fill(match, candidates, len(job.gallery))
    facts: dict[str, Any] = {"k_test": config.k_test, "candidates": config.candidates or "itc"}
    finish(config, job, made(scores=scores, kind="itm", **facts))


def read_candidates(path: str, job: ScoringJob, k: int) -> Tensor:
    """Read the scores that select candidates, with the job's rows and columns.

    All forms of scores and lists are accepted. The lines of a ranked list must have the order of
    this run's own ranked list.

    Args:
        path: the file.
        job: scoring job whose queries and images the file must contain.
        k: candidates per query.

    Raises:
        InputError: no scores, ids that differ from the job's, or fewer than ``k`` listed images.
    """
    found = read_form(path)
    lists = isinstance(found, Listing)
    file = to_score_file(
        found,
        path,
        query_ids=job.order if lists else None,
        gallery_ids=job.gallery_ids if lists else None,
        id_flags=False,
    )
    if processes.is_main():
        tell_other_data({"the annotation": {"data_sha256": job.data_sha256}, path: file.meta})
    if file.listed is not None:
        few = min(file.listed, key=file.listed.__getitem__)
        if file.listed[few] < min(k, len(job.gallery_ids)):
            raise InputError(
                path,
                f"expected at least {k} images for every query (--k_test), found "
                f"{file.listed[few]}",
                item=f"query {few!r}",
                todo=f"give --k_test {file.listed[few]}, or a file that lists more",
            )
        file = respell(file, job.query_ids, job.gallery_ids, where=path)
        file = with_all_images(file, job.gallery_ids)
    ids = ScoreFile(torch.empty(0, 0), job.query_ids, job.gallery_ids)
    return align(file, ids, where=path, reference_name="the annotation").scores


def main(argv: list[str] | None = None) -> None:
    """Read the command line and score."""
    scoring_command(
        InferConfig,
        infer,
        argv,
        prog="python -m uit.infer",
    )


if __name__ == "__main__":
    run_cli(main)
