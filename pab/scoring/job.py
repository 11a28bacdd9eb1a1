"""The procedure of all scoring commands: check the inputs, encode, write the outputs.

A member is a subclass of :class:`MemberConfig` with its settings and :meth:`~MemberConfig.open`.
:meth:`MemberConfig.score` runs the procedure. Data is checked before the model is loaded, except
that damaged images, and captions that the model does not accept, are detected by encoding.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from pab import __version__
from pab.core import processes
from pab.core.config import (
    advanced_flag,
    config_from_args,
    data_flag,
    output_flag,
    speed_flag,
)
from pab.core.counts import counted
from pab.core.device_errors import explaining_memory
from pab.core.devices import pick_device
from pab.core.errors import InputError
from pab.core.files import sha256_of_lines
from pab.core.outputs import check_output_folder, check_outputs
from pab.core.precision import (
    DETERMINISTIC_HELP,
    FASTEST_HELP,
    TF32_HELP,
    check_numerics,
    choose_dtype,
)
from pab.data.annotations import read_retrieval
from pab.data.id_lists import read_query_order
from pab.data.images import list_gallery, verify_images, without_content
from pab.data.label_config import LabelConfig
from pab.data.loader import resolve_workers
from pab.data.names import respelt
from pab.data.records import GalleryImage, Retrieval
from pab.evaluate import evaluate
from pab.ranking import order_queries, ranked_names, write_ranked_list
from pab.scores import ScoreFile, save_scores
from pab.scoring.encoder import Encoder, Origin, scores_of
from pab.scoring.encoding import Compute

GALLERY = "data/PAB/name-masked_test-set/gallery"
QUERIES = "data/PAB/name-masked_test-set/query.json"
# Scoring settings that concern the model or its speed. All others concern data and outputs.
SHARED = (
    "batch_size", "num_workers", "device", "dtype", "tf32", "deterministic", "feature_cache",
    "feature_cache_dir",
)  # fmt: skip


@dataclass(frozen=True)
class ScoringConfig(LabelConfig):
    """Settings shared by all scoring commands."""

    flag_group: ClassVar = "model"  # help group of the settings that a member adds

    image_folder: str | None = data_flag(
        None, f"folder of the gallery's images (default for name-masked sets: {GALLERY})"
    )
    annotation: str = data_flag(
        QUERIES, "query.json, pair.json, attr.json, training shard, table, or folder of captions"
    )
    answers: str | None = data_flag(None, "answer key of a name-masked set; prints metrics")
    query_order: str | None = data_flag(None, "file of query ids, one per line, in output order")
    save_score: str | None = output_flag(None, "score file to write")
    output_file: str | None = output_flag(
        None, "ranked list to write; NAME.zip writes it as answer.txt in a zip file"
    )
    top_k: int = output_flag(10, "names per line of the ranked list", ge=1)
    batch_size: int = speed_flag(32, "images (or captions) per batch", ge=1)
    num_workers: int | Literal["auto"] = speed_flag(
        "auto", "loader processes; 0 loads in the scoring process, auto uses the cores", ge=0
    )
    device: Literal["auto", "cuda", "mps", "cpu"] = speed_flag(
        "auto", "auto: CUDA, else MPS, else CPU"
    )
    dtype: Literal["fp32", "bf16", "fp16", "fastest"] = speed_flag(
        "fp32", f"dtype of the model; {FASTEST_HELP}"
    )
    tf32: bool = speed_flag(False, TF32_HELP)
    deterministic: bool = advanced_flag(False, DETERMINISTIC_HELP)
    feature_cache: bool = speed_flag(True, "cache vectors on disk for later runs")
    feature_cache_dir: str = speed_flag("output/features", "folder of the feature cache")

    def check(self) -> None:
        """Reject an invalid separator.

        Raises:
            InputError: the separator is invalid; the message names the flag.
        """
        self.columns()


class ScoringCommand(ScoringConfig, ABC):
    """Base class of the settings of all scoring commands.

    Attributes:
        auto_dtype: dtype of ``--dtype auto`` on a CUDA GPU; fp32 on other devices.
    """

    auto_dtype: ClassVar[str] = "fp16"

    def compute(self) -> Compute:
        """Select the device and the dtype, and combine them with the other settings for encoding.

        Raises:
            InputError: the device does not exist or does not support the dtype or TF32.
        """
        device, name = pick_device(self.device), str(self.dtype)
        if name == "auto":
            name = self.auto_dtype if device.type == "cuda" else "fp32"
        check_numerics(device, tf32=self.tf32, deterministic=self.deterministic)
        dtype = choose_dtype(name, device)
        folder = self.feature_cache_dir if self.feature_cache else None
        workers = resolve_workers(self.num_workers)
        return Compute(
            device, dtype, dtype, self.batch_size, workers, folder,
            tf32=self.tf32, deterministic=self.deterministic,
        )  # fmt: skip

    @abstractmethod
    def score(self) -> None:
        """Run the command.

        Raises:
            InputError: settings, data or weights are invalid, or an output cannot be written.
        """


class MemberConfig(ScoringCommand):
    """Base class of members' settings; subclasses add fields and implement :meth:`open`.

    Attributes:
        scoring_only: names of added fields that :meth:`open` ignores.
    """

    scoring_only: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def open(self) -> Encoder:
        """Load the model; ignore settings for data and outputs.

        Raises:
            InputError: settings or weights are invalid.
        """

    @classmethod
    def ignored(cls) -> list[str]:
        """List the settings that :meth:`open` ignores: data, outputs and :attr:`scoring_only`."""
        shared = [field.name for field in fields(ScoringConfig) if field.name not in SHARED]
        return [*shared, *cls.scoring_only]

    @classmethod
    def of_checkpoint(cls, path: str) -> dict[str, str]:
        """Map the ``checkpoint`` of :func:`pab.scoring.members.load_encoder` to settings."""
        return {"checkpoint": path}

    def score(self) -> None:
        """Score every image of the gallery against every caption.

        Raises:
            InputError: settings, data or weights are invalid, or an output cannot be written.
        """
        self.compute()  # rejects unsupported settings before the data is read
        job = prepare(self)
        encoder = self.open()
        check_same_model(encoder.origin)
        scores = scores_of(encoder, job.captions, job.gallery)
        finish(self, job, score_file_of(job, encoder.origin, scores))


@dataclass(frozen=True)
class ScoringJob:
    """Checked inputs of a scoring run.

    Attributes:
        retrieval: queries, and labels if the annotation or the answer key has them.
        gallery: gallery images, sorted by id.
        order: query ids in the order of the ranked list.
        data_sha256: SHA-256 of the gallery ids, query ids and captions; equal for score files made
            from the same ids and captions.
    """

    retrieval: Retrieval
    gallery: list[GalleryImage]
    order: list[str]
    data_sha256: str

    @property
    def query_ids(self) -> list[str]:
        """Ids of the queries, in row order."""
        return [query.query_id for query in self.retrieval.queries]

    @property
    def captions(self) -> list[str]:
        """Captions of the queries, in row order."""
        return [query.caption for query in self.retrieval.queries]

    @property
    def gallery_ids(self) -> list[str]:
        """Ids of the images, in column order."""
        return [image.gallery_id for image in self.gallery]

    def with_rows(self, rows: range) -> ScoringJob:
        """Select some of the queries; ``data_sha256`` stays that of all queries."""
        queries = [self.retrieval.queries[row] for row in rows]
        ids, relevant = {query.query_id for query in queries}, self.retrieval.relevant
        if relevant is not None:
            relevant = {one: right for one, right in relevant.items() if one in ids}
        twins = {one: twin for one, twin in self.retrieval.twins.items() if one in ids}
        retrieval = replace(self.retrieval, queries=queries, relevant=relevant, twins=twins)
        return replace(self, retrieval=retrieval, order=[one for one in self.order if one in ids])


def prepare(config: ScoringConfig) -> ScoringJob:
    """Read and check all inputs except the model.

    Raises:
        InputError: the first problem found; unreadable images are reported together.
    """
    check_outputs({"save_score": config.save_score, "output_file": config.output_file})
    if config.feature_cache:
        check_output_folder("--feature_cache_dir", config.feature_cache_dir)
    folder = Path(config.image_folder) if config.image_folder else None
    retrieval = read_retrieval(
        Path(config.annotation),
        image_folder=folder,
        answers=Path(config.answers) if config.answers else None,
        **config.reading(),
    )
    gallery = retrieval.gallery
    if gallery is None:
        gallery = list_gallery(folder or Path(GALLERY))
    if not gallery:
        raise InputError(config.annotation, "expected gallery images, found none")
    names = [image.gallery_id for image in gallery]
    where = folder or config.annotation
    for name in names:
        if name != name.strip():
            problem = "expected a name without blanks at its ends"
            raise InputError(where, problem, item=f"image {name!r}", todo="rename the image")
        if config.output_file and len(name.split()) != 1:
            raise InputError(
                where, "a name that contains a blank cannot be written in a ranked list",
                item=f"image {name!r}", todo="rename the image, or set --output_file none",
            )  # fmt: skip
    ids = [query.query_id for query in retrieval.queries]
    wanted = read_query_order(config.query_order) if config.query_order else None
    order = order_queries(ids, wanted, where=config.query_order or "--query_order")
    if retrieval.relevant is not None:
        known, where = set(names), config.answers or config.annotation
        spelt = respelt(frozenset().union(*retrieval.relevant.values()), names, where)
        relevant = {
            query_id: frozenset(spelt[name] for name in right)
            for query_id, right in retrieval.relevant.items()
        }
        retrieval = replace(retrieval, relevant=relevant)
        for query_id, right in relevant.items():
            missing = sorted(right - known)
            if missing:
                raise InputError(
                    where,
                    f"its image {missing[0]!r} is not in the gallery",
                    item=f"query {query_id!r}",
                )
    data_sha256 = sha256_of_lines(names + [f"{q.query_id}\t{q.caption}" for q in retrieval.queries])
    size = f"{counted(len(names), 'image')}, {counted(len(ids), 'query', 'queries')}"
    processes.check_equal(
        {"--annotation": f"{size} ({data_sha256[:12]})"},
        todo="use the same data on every machine",
    )
    check_files([image.path for image in gallery], resolve_workers(config.num_workers))
    return ScoringJob(retrieval, gallery, order, data_sha256)


def check_same_model(origin: Origin) -> None:
    """Check that all processes have loaded the same model; machines may have different files.

    Raises:
        InputError: the models differ; every process raises it. The message names the first
            difference and the hosts.
    """
    processes.check_equal(
        {
            "--model": origin.architecture,
            "--checkpoint": origin.checkpoint_sha256[:12] or origin.checkpoint,
            "--dtype": origin.dtype,
        },
        todo="use the same file and settings on every machine",
    )


def check_files(paths: list[Path], num_workers: int) -> None:
    """Reject a gallery with missing or empty files, before the model is loaded.

    The check does not open files, because encoding opens every file once and reports damaged
    images. If a file is missing or empty, all images are decoded, to report all bad ones at once.

    Args:
        paths: the images, the same in all processes.
        num_workers: see :func:`pab.data.images.verify_images`.

    Raises:
        InputError: a file is missing or empty; see :func:`pab.data.images.verify_images`.
    """
    share = [paths[i] for i in processes.share_of(len(paths))]
    if any(processes.gather_objects(any(map(without_content, share)))):
        verify_images(paths, num_workers)


def score_file_of(job: ScoringJob, origin: Origin, scores: Tensor, **more: Any) -> ScoreFile:
    """Combine a score matrix with the job's ids, and record its origin in ``meta``.

    Args:
        job: checked inputs of the run.
        origin: source of the scores.
        scores: float32 [queries, gallery], with rows as in ``job.query_ids`` and columns as in
            ``job.gallery_ids``.
        more: further entries of ``meta``.

    Raises:
        InputError: a score is NaN or infinite.
    """
    check_finite(scores, origin.checkpoint, job.query_ids)
    meta = {
        "model": origin.architecture,
        "checkpoint": origin.checkpoint,
        "checkpoint_sha256": origin.checkpoint_sha256,
        "dtype": origin.dtype,
        "data_sha256": job.data_sha256,
        **({} if job.retrieval.relevant is None else {"relevance": job.retrieval.relevance}),
        "project_version": __version__,
        **origin.more,
        **more,
    }
    return ScoreFile(scores.float().contiguous(), job.query_ids, job.gallery_ids, meta)


def check_finite(scores: Tensor, checkpoint: str, queries: Sequence[str]) -> None:
    """Reject scores that cannot be ranked.

    Args:
        scores: [queries, gallery].
        checkpoint: source of the weights, for the message.
        queries: name of each row, for the message.

    Raises:
        InputError: a score is NaN or infinite.
    """
    if bool(torch.isfinite(scores).all()):
        return
    bad = int((~torch.isfinite(scores)).any(dim=1).nonzero()[0])
    raise InputError(
        checkpoint,
        "the model's scores are not finite",
        item=f"query {queries[bad]!r}",
        todo="check the checkpoint, or use --dtype fp32",
    )


def finish(config: ScoringConfig, job: ScoringJob, score_file: ScoreFile) -> None:
    """Write the score file and the ranked list; print metrics if there are labels.

    With several processes, only rank 0 writes and prints.

    Raises:
        InputError: a file cannot be written.
    """
    if not processes.is_main():
        return
    ids, names = score_file.query_ids, score_file.gallery_ids
    ranked = dict(zip(ids, ranked_names(score_file.scores, names, config.top_k), strict=True))
    if config.save_score:
        save_scores(config.save_score, score_file)
    if config.output_file:
        write_ranked_list(config.output_file, [ranked[query_id] for query_id in job.order])
    written = ", ".join(f for f in (config.save_score, config.output_file) if f) or "no file"
    size = f"{counted(len(ids), 'query', 'queries')} x {counted(len(names), 'image')}"
    print(f"{size} -> {written}", file=sys.stderr)
    if job.retrieval.relevant is not None:
        print(evaluate(score_file, job.retrieval).table())


def scoring_command(cls: type[ScoringCommand], argv: list[str] | None, *, prog: str) -> None:
    """Parse the command line of a scoring command and run it, in each process of the group.

    Args:
        cls: settings of the command.
        argv: arguments without the program's name; None reads ``sys.argv[1:]``.
        prog: name of the command, for usage and messages.
    """
    config, _ = config_from_args(cls, argv, prog=prog)
    device = pick_device(config.device)
    remedy = f"lower --batch_size (now {config.batch_size}), or use --dtype bf16"
    with explaining_memory(device, "scoring", remedy), processes.joined(device):
        config.score()
