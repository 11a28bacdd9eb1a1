"""Prepare pairs of captions and images ahead of a vision-language model, in worker processes.

Shape letters: `G` gallery images, `B` pairs of a batch.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from pab.core import processes
from pab.core.device_errors import check_shared_memory
from pab.core.errors import InputError, first_line
from pab.core.progress import progress
from pab.data.image_loader import BatchLoader, ImageBatch
from pab.data.images import ImageReader, problem_of, refuse_unreadable
from pab.data.loader import Loader, needed_workers
from pab.data.records import GalleryImage
from pab.encoders.st.pair_inputs import PairModel
from pab.encoders.st.pictures import REJECTIONS

CHECKED = 16  # images per batch of the check, whose batches contain no pixels
# No model runs in loader processes, so a RuntimeError there also comes from the processor.
ERRORS = (*REJECTIONS, RuntimeError)


class ImageFacts(NamedTuple):
    """Facts about an image that the cache key and the order of its pairs depend on.

    Attributes:
        key: SHA-256 of the file.
        tokens: number of tokens of a pair with this image and a short caption.
    """

    key: bytes
    tokens: int


class _Length:
    """Map an image to a pair's number of tokens, or to the reason why the processor rejects it."""

    def __init__(self, model: PairModel) -> None:
        self.model, self._known = model, dict[tuple[int, int], int | str]()

    def __call__(self, image: Image.Image) -> int | str:
        if image.size not in self._known:
            try:
                inputs = PairModel.inputs(self.model, ["-"], [image])
                self._known[image.size] = inputs["input_ids"].shape[1]
            except ERRORS as error:
                width, height = image.size
                self._known[image.size] = (
                    f"{width} x {height} pixels, which the model's processor rejects: "
                    f"{first_line(error)}"
                )
        return self._known[image.size]


def check_images(
    model: PairModel, images: Sequence[GalleryImage], used: Sequence[int], num_workers: int
) -> dict[int, ImageFacts]:
    """Decode and hash the used images before the first pair is scored; processes share the work.

    Args:
        model: model whose processor must accept the images.
        images: G gallery images.
        used: positions of the images to check.
        num_workers: number of loader processes.

    Returns:
        Position -> facts, in every process.

    Raises:
        InputError: images cannot be decoded, or the processor rejects them. The error covers all
            processes, and is raised in every process.
    """
    mine = [used[number] for number in processes.share_of(len(used))]
    reader = replace(ImageReader(), unreadable={})
    loader = BatchLoader(
        [images[column] for column in mine], _Length(model), list, CHECKED, forked(num_workers),
        reader=reader, known=frozenset(),
    )  # fmt: skip
    facts: dict[int, ImageFacts] = {}
    problems: dict[Path, str] = {}
    for batch in progress(loader, "checking images", "images", len(mine), ImageBatch.size):
        lengths: list[Any] = batch.pixels
        for position, key, found in zip(batch.positions, batch.keys, lengths, strict=True):
            if isinstance(found, str):
                problems[images[mine[position]].path] = found
            else:
                facts[mine[position]] = ImageFacts(key, found)
    assert reader.unreadable is not None
    problems |= {Path(error.where): problem_of(error) for error in reader.unreadable.values()}
    refuse_unreadable(problems, [images[column].path for column in used])
    return {
        column: found for part in processes.gather_objects(facts) for column, found in part.items()
    }


def forked(num_workers: int) -> int:
    """Return the number of loader processes, or 0 where processes are not forked.

    Other start methods would copy the model to every process.
    """
    return num_workers if multiprocessing.get_start_method() == "fork" else 0


class Pairs(NamedTuple):
    """Pairs of a batch: positions of B captions and of B images."""

    captions: np.ndarray
    images: np.ndarray


@dataclass(frozen=True)
class PairBatches:
    """Map-style dataset: number of a batch -> inputs of the model, or the error that prevents them.

    Data loaders rewrite exceptions of worker processes, so errors are returned as values.
    """

    model: PairModel
    captions: Sequence[str]
    images: Sequence[GalleryImage]
    batches: Sequence[Pairs]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> dict[str, Any] | InputError:
        batch, reader = self.batches[number], ImageReader()
        captions = [self.captions[position] for position in batch.captions]
        try:
            decoded = {
                int(column): reader.load(self.images[column].path)
                for column in np.unique(batch.images)
            }
        except InputError as error:
            return error
        pictures = [decoded[int(column)] for column in batch.images]
        try:
            return self.model.inputs(captions, pictures)
        except ERRORS as error:
            names = ", ".join(sorted({str(self.images[column].path) for column in batch.images}))
            return InputError(
                "images", f"the model's processor rejects a batch: {first_line(error)}", item=names,
                todo="remove the images, or use --batch_size 1 to find the rejected one",
            )  # fmt: skip


def prepared(dataset: PairBatches, num_workers: int) -> Iterator[tuple[Pairs, dict[str, Any]]]:
    """Yield each batch of pairs with the model's inputs, in order.

    Args:
        dataset: the batches; the first needs the most memory.
        num_workers: number of loader processes.

    Raises:
        InputError: an image can no longer be read, the model's processor rejects a batch, or the
            shared memory is too small.
    """
    workers = needed_workers(forked(num_workers), len(dataset))
    if workers:
        first = dataset[0]
        if isinstance(first, InputError):
            raise first
        size = sum(value.nbytes for value in first.values() if isinstance(value, Tensor))
        check_shared_memory(workers, size, 1, len(dataset))
    loader = Loader(dataset, batch_size=None, num_workers=workers)  # type: ignore[arg-type]
    for batch, inputs in zip(dataset.batches, loader, strict=True):
        if isinstance(inputs, InputError):
            raise inputs
        yield batch, inputs
