"""Inputs of every fine-tuning recipe: training pairs, validation split, batches."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset

from pab.core import processes
from pab.core.counts import counted
from pab.core.device_errors import check_shared_memory
from pab.core.errors import InputError
from pab.data.annotations import retrieval_of_pairs
from pab.data.images import load_image, verify_images
from pab.data.loader import Loader, needed_workers, resolve_workers
from pab.data.records import Retrieval, TrainPair
from pab.data.splits import validation_split
from pab.data.tables import is_own_data, is_table
from pab.data.training_set import TrainingSet
from pab.data.tree import find_shards, shard_number
from pab.metrics import evaluate_scores
from pab.scores import ScoreFile
from pab.training.config import TrainingConfig
from pab.training.preflight import check_run_folders
from pab.training.sampling import EpochBatches, SampleKey, sample_seed

Batch = TypeVar("Batch")

_NUMBERS = re.compile(r"(\d+)(?:\.\.(\d+))?")  # "3" or "0..7"
_NAMED_IMAGES = 20  # maximum number of names in an error message


class TrainingData(NamedTuple):
    """Training set, and the indices of the training and of the validation pairs."""

    pairs: TrainingSet
    train_rows: np.ndarray
    val_rows: np.ndarray


def open_training_data(config: TrainingConfig) -> TrainingData:
    """Open the pairs, split off the validation pairs, and check the run's inputs.

    All training images must exist on every machine. Only validation images are decoded, because
    decoding a million images would take hours.

    Raises:
        InputError: an output folder or the data cannot be used, images are missing or unreadable,
            or machines have different pairs.
    """
    processes.on_main(partial(check_run_folders, config))
    pairs = processes.on_all(partial(_open_pairs, config))
    processes.check_equal(
        {"--data_path": f"{counted(len(pairs), 'pair', spec=',')} ({pairs.fingerprint()[:12]})"},
        todo="use the same annotation files on every machine",
    )
    train_rows, val_rows = validation_split(pairs, config.val_pairs, config.val_seed)
    start = config.twin_batches_from
    if start is not None and start < config.epochs:
        check_twins_exist(pairs, train_rows)
    images = processes.on_all(partial(_training_images, pairs, val_rows))
    verify_images(images, resolve_workers(config.num_workers))
    return TrainingData(pairs, train_rows, val_rows)


def check_twins_exist(pairs: TrainingSet, rows: np.ndarray) -> None:
    """Check that a video of the training pairs has several images, as twin batches need.

    Raises:
        InputError: every video has one image only.
    """
    # Pairs of one image share a video, so equal numbers mean one image per video.
    if len(np.unique(pairs.identities[rows])) == len(np.unique(pairs.videos[rows])):
        raise InputError(
            "--twin_batches_from",
            "expected source videos with several images, found none: captions of one image are "
            "not negatives of each other",
            todo="use --twin_batches_from none, or training shards with source_id or hard_i",
        )


def _open_pairs(config: TrainingConfig) -> TrainingSet:
    return TrainingSet.open(
        Path(config.data_path),
        training_sources(config),
        Path(config.cache_dir) if config.cache_dir else None,
        skip_bad_lines=config.skip_bad_lines,
        columns=config.columns(),
    )


def _training_images(pairs: TrainingSet, val_rows: np.ndarray) -> list[Path]:
    """Check, once per machine, that all images exist; return the paths of validation images."""
    if processes.first_on_machine():
        check_images_are_there(pairs)
    return [pairs.image_path(pairs[int(i)]) for i in val_rows]


def training_sources(config: TrainingConfig) -> list[Path] | None:
    """List the annotation files to train on; None if ``data_path`` itself holds the pairs.

    Raises:
        InputError: see :func:`training_shards`; or ``train_shards`` is set for a table.
    """
    if not is_own_data(config.data_path):
        return training_shards(config)
    if config.train_shards is None:
        return None
    if is_table(config.data_path):
        raise InputError(
            "--train_shards", f"contradicts --data_path {config.data_path}, a table",
            todo="use --train_shards none, or set --data_path to the folder of the table",
        )  # fmt: skip
    return training_shards(config)  # for example a table in a folder of captioned images


def check_images_are_there(pairs: TrainingSet) -> None:
    """Check that the image file of every pair exists, by listing the folders.

    Raises:
        InputError: images are missing (the message counts them and names up to twenty), or cannot
            be searched; see :meth:`pab.data.training_set.TrainingSet.missing_images`.
    """
    missing = pairs.missing_images()
    if not missing:
        return
    shown = "; ".join(missing[:_NAMED_IMAGES])
    if len(missing) > _NAMED_IMAGES:
        shown += f"; and {len(missing) - _NAMED_IMAGES:,} more"
    raise InputError(
        pairs.root,
        f"missing training images ({len(missing):,} of {len(pairs):,}): {shown}",
        todo="download them, or set --train_shards to shards with all their images",
    )


def training_shards(config: TrainingConfig) -> list[Path]:
    """List the annotation files of ``train_shards``, or of all shards.

    Raises:
        InputError: the data root is missing or has no shards, or ``train_shards`` is invalid.
    """
    root = Path(config.data_path)
    if not root.is_dir():
        problem = f"expected the root folder of the data, found no folder {root}"
        raise InputError("--data_path", problem)
    if config.train_shards is None:
        return find_shards(root)
    if not config.train_shards:
        raise InputError("--train_shards", "expected patterns or shard numbers, found none")
    named = (path for entry in config.train_shards for path in _shards_of(root, entry))
    return list(dict.fromkeys(named))  # a shard matched by two patterns is read once


def _shards_of(root: Path, entry: str) -> list[Path]:
    """List the shards of one ``--train_shards`` entry: a number, a range or a pattern."""
    numbers = _NUMBERS.fullmatch(entry)
    if numbers is not None:
        wanted = range(int(numbers[1]), int(numbers[2] or numbers[1]) + 1)
        shards = {shard_number(path): path for path in find_shards(root)}
        missing = [str(number) for number in wanted if number not in shards]
        if missing or not wanted:
            raise InputError(
                "--train_shards",
                f"no such shards under {root}: {', '.join(missing) or entry}",
                todo=f"use existing shards ({len(shards)}, from {min(shards)} to {max(shards)})",
            )
        return [shards[number] for number in wanted]
    if (root / entry).is_file():  # a name may contain pattern characters: "pairs [1].csv"
        return [root / entry]
    try:
        found = sorted(root.glob(entry))
    except (ValueError, NotImplementedError) as error:  # pathlib: empty or absolute pattern
        raise InputError(
            "--train_shards", f"expected a pattern under {root}, found {entry!r}"
        ) from error
    if not found:
        raise InputError(
            "--train_shards", f"no file under {root} matches {entry!r}",
            todo="check the data with: python -m pab.layout check " + str(root),
        )  # fmt: skip
    return found


class TrainingSamples(Dataset[Any], ABC):
    """Dataset of training pairs; each recipe builds its samples in :meth:`sample`.

    Args:
        pairs: training and validation pairs.
        indices: positions of the training pairs in ``pairs``.
        seed: seed of the random draws, combined with the epoch and the index in ``pairs``.
    """

    def __init__(self, pairs: TrainingSet, indices: np.ndarray, seed: int) -> None:
        self.pairs, self.indices, self.seed = pairs, indices, seed

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: SampleKey) -> Any:
        """Load a sample by (position in ``indices``, epoch).

        If the line or the image cannot be read, the :class:`InputError` is returned, not raised: a
        data loader would re-raise it with the worker's traceback in the message.
        """
        position, epoch = key
        index = int(self.indices[position])
        try:
            pair = self.pairs[index]
            image = load_image(self.pairs.image_path(pair))
        except InputError as error:
            return error
        with sample_seed(self.seed, epoch, index):
            return self.sample(index, pair, image)

    @abstractmethod
    def sample(self, index: int, pair: TrainPair, image: Image.Image) -> Any:
        """Build the sample of one pair; torch's generator is seeded per sample."""


def checked(batches: Iterable[Batch | InputError]) -> Iterator[Batch]:
    """Yield the batches of a loader; raise an :class:`InputError` found in place of a batch.

    Raises:
        InputError: a pair's line or image cannot be read.
    """
    for batch in batches:
        if isinstance(batch, InputError):
            raise batch
        yield batch


def validation_retrieval(data: TrainingData) -> Retrieval:
    """Return the validation pairs as queries, gallery and labels."""
    return retrieval_of_pairs((data.pairs[int(i)] for i in data.val_rows), data.pairs.root)


def retrieval_metrics(retrieval: Retrieval, scores: Tensor) -> dict[str, float]:
    """Compute the metrics of a labelled retrieval, in percent.

    Args:
        retrieval: queries with a gallery and labels.
        scores: [queries, gallery].
    """
    assert retrieval.gallery is not None
    assert retrieval.relevant is not None
    queries = [query.query_id for query in retrieval.queries]
    gallery = [image.gallery_id for image in retrieval.gallery]
    return evaluate_scores(ScoreFile(scores, queries, gallery, {}), retrieval.relevant).mean()


def epoch_batches(config: TrainingConfig, pairs: int) -> EpochBatches:
    """Create the sampler of this process's batches."""
    return EpochBatches(
        pairs, config.batch_size, config.seed, processes.rank(), processes.world_size()
    )


def training_loader(
    dataset: Dataset[Any],
    batches: EpochBatches,
    collate: Callable[[list[Any]], Any],
    config: TrainingConfig,
    device: torch.device,
) -> Loader:
    """Create the data loader of ``batches``; torch's global generator stays unchanged.

    Raises:
        InputError: the workers' batches do not fit in ``/dev/shm``.
    """
    workers = needed_workers(resolve_workers(config.num_workers), batches.batches_per_epoch)
    if workers:
        first = tree_leaves(dataset[(0, 0)])  # no tensors if the image cannot be read
        size = sum(part.nbytes for part in first if isinstance(part, Tensor))
        samples = batches.batches_per_epoch * batches.batch_size
        check_shared_memory(workers, size, batches.batch_size, samples)
    return Loader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),
    )
