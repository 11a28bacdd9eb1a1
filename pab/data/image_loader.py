"""Load images in batches, ahead of the model, with worker processes.

Every file is opened once: a worker reads it, hashes it for the feature cache, and decodes it unless
its vector is cached. Workers return uint8 pixels; the device normalizes them
(:mod:`pab.data.pixels`).

Shape letters: `B` images of a batch, `H` and `W` height and width.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from pab.core.device_errors import check_shared_memory
from pab.core.errors import InputError
from pab.data.images import ImageReader, ImageRecipe, ImageTransform, in_two_parts
from pab.data.loader import Loader, needed_workers
from pab.data.pixels import CPU, Normalization
from pab.data.records import GalleryImage

Loadable = GalleryImage | Image.Image | Tensor  # a file, an RGB image, or its pixels


class _Sample(NamedTuple):
    """Loaded image: pixels [3, H, W], an error, or neither if the vector of ``key`` is known.

    Data loaders rewrite exceptions of worker processes, so errors are returned as values.
    """

    position: int
    pixels: Tensor | None = None
    key: bytes = b""
    error: InputError | None = None


class _Images:
    """Map-style dataset: position -> :class:`_Sample`."""

    def __init__(
        self,
        images: Sequence[Loadable],
        pixels: ImageTransform,
        reader: ImageReader,
        known: Container[bytes] | None,
    ) -> None:
        self.images, self.pixels, self.reader, self.known = images, pixels, reader, known

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> _Sample:
        image, key = self.images[position], b""
        found: Image.Image | Tensor | None
        try:
            if not isinstance(image, GalleryImage):
                found = image
            elif self.known is None:
                found = self.reader.load(image.path)
            else:
                key, found = self.reader.load_unless_known(image.path, self.known)
        except InputError as error:
            return _Sample(position, error=error)
        if isinstance(found, Image.Image):
            found = self.pixels(found)
        return _Sample(position, found, key)


class ImageBatch(NamedTuple):
    """Batch of B images to encode, and what became of the others.

    Attributes:
        pixels: [B, 3, H, W]: uint8, for the loader's ``normalization``, or floating-point numbers
            that need none.
        positions: positions of the B images in the input list.
        keys: cache keys of the B images; empty without ``known``.
        known: position -> cache key, of images whose vectors are known.
        errors: position -> error, of images that cannot be read.
    """

    pixels: Tensor
    positions: list[int]
    keys: list[bytes]
    known: dict[int, bytes]
    errors: dict[int, InputError]

    def size(self) -> int:
        """Count all images of the batch, with those that are not to be encoded."""
        return len(self.positions) + len(self.known) + len(self.errors)

    def part(self, rows: slice) -> ImageBatch:
        """Select some of the images to encode."""
        return ImageBatch(self.pixels[rows], self.positions[rows], self.keys[rows], {}, {})


class _Collate:
    """Batch samples; normalize here only if some pixels of the batch are normalized already."""

    def __init__(self, normalization: Normalization | None) -> None:
        self.normalization = normalization

    def __call__(self, samples: list[_Sample]) -> ImageBatch:
        read = [sample for sample in samples if sample.pixels is not None]
        pixels = [sample.pixels for sample in read if sample.pixels is not None]
        if self.normalization and len({one.is_floating_point() for one in pixels}) == 2:
            pixels = [*map(self.normalization.on(CPU), pixels)]
        return ImageBatch(
            # default_collate writes a worker's batch directly into shared memory
            default_collate(pixels) if pixels else torch.empty(0),
            [sample.position for sample in read],
            [sample.key for sample in read if sample.key],
            {s.position: s.key for s in samples if s.pixels is None and s.error is None},
            {sample.position: sample.error for sample in samples if sample.error is not None},
        )


class ImageLoader:
    """Load images in batches, in the given order, decoded ahead by worker processes.

    Iteration yields :class:`ImageBatch`; ``len`` is the number of batches. Errors are collected by
    the reader, or the first is raised. ``normalization`` is the second part of the transform, for
    the device, or None.

    Args:
        images: files, RGB images, or preprocessed tensors [3, H, W].
        transform: a recipe, or any function from an RGB image to a float32 [3, H, W]. The
            normalization of a known transform (:func:`in_two_parts`) is left to the device.
        batch_size: images per batch; the last batch may be smaller.
        num_workers: number of worker processes; 0 loads in the main process.
        pin_memory: page-lock the batches, for fast copies to a CUDA device.
        reader: reader of the files; None uses the benchmark reader.
        known: cache keys of files that need no decoding; None hashes no file.

    Raises:
        InputError: ``/dev/shm`` is too small for the batches. During iteration: an image is
            unreadable and the reader does not collect errors.
    """

    def __init__(
        self,
        images: Sequence[Loadable],
        transform: ImageRecipe | ImageTransform,
        batch_size: int,
        num_workers: int = 0,
        *,
        pin_memory: bool = False,
        reader: ImageReader | None = None,
        known: Container[bytes] | None = None,
    ) -> None:
        reader = reader or ImageReader()
        parts = in_two_parts(transform)
        self.normalization = parts.normalization
        self._images, self._unreadable = images, reader.unreadable
        dataset = _Images(images, parts.pixels, reader, known)
        self._loader = Loader(
            dataset,  # type: ignore[arg-type]  # not a Dataset
            batch_size=batch_size,
            num_workers=needed_workers(num_workers, -(-len(images) // batch_size)),
            collate_fn=_Collate(self.normalization),
            pin_memory=pin_memory,
        )
        if self._loader.num_workers:
            size = parts.pixels(Image.new("RGB", (8, 8))).nbytes
            check_shared_memory(self._loader.num_workers, size, batch_size, len(images))

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[ImageBatch]:
        for batch in self._loader:
            for position, error in batch.errors.items():
                if self._unreadable is None:
                    raise error
                image = self._images[position]
                assert isinstance(image, GalleryImage), "only files are decoded"
                self._unreadable[image.gallery_id] = error
            yield batch
