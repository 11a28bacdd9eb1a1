"""Load images in batches, ahead of the model, with worker processes.

Every file is opened once: a worker reads it, hashes it for the feature cache (if there is one), and
decodes it unless its vector is cached. For known transforms, workers return uint8 pixels, which the
device normalizes (:mod:`pab.data.pixels`).

Shape letters: `B` images of a batch, `H` and `W` height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

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

Loadable = GalleryImage | Image.Image | Tensor  # a file, an RGB image, or pixels


# Contents of a batch: one tensor with the pixels of all images, or a list of decoded images.
P = TypeVar("P", bound=Tensor | list[Image.Image])


class _Sample(NamedTuple):
    """Loaded image: its content, an error, or neither if the vector of ``key`` is known.

    Data loaders rewrite exceptions of worker processes, so errors are returned as values.
    """

    position: int
    content: Any = None  # pixels [3, H, W] or an image
    key: bytes = b""
    error: InputError | None = None


class _Images:
    """Map-style dataset: position -> :class:`_Sample`."""

    def __init__(
        self,
        images: Sequence[Loadable],
        convert: Callable[[Image.Image], Any],
        reader: ImageReader,
        known: Container[bytes] | None,
    ) -> None:
        self.images, self.convert, self.reader, self.known = images, convert, reader, known

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> _Sample:
        image, key = self.images[position], b""
        found: Image.Image | Tensor | None = None
        try:
            if not isinstance(image, GalleryImage):
                found = image
            elif self.known is None:
                found = self.reader.load(image.path)
            else:
                key, found = self.reader.load_unless_known(image.path, self.known)
            content = self.convert(found) if isinstance(found, Image.Image) else found
        except InputError as error:
            return _Sample(position, error=error)
        except MemoryError:
            if not (isinstance(image, GalleryImage) and isinstance(found, Image.Image)):
                raise
            size = f"{found.width} x {found.height} pixels"
            problem = f"expected an image that can be resized in memory, found {size}"
            return _Sample(position, error=InputError(image.path, problem))
        return _Sample(position, content, key)


class ImageBatch(NamedTuple, Generic[P]):
    """Batch of images: B images to encode, and the images with a known vector or an error.

    Attributes:
        pixels: [B, 3, H, W]: uint8, for the loader's ``normalization``, or floating-point numbers
            that need none. :class:`~pab.encoders.st.pictures.PictureLoader` yields a list of B RGB
            images instead.
        positions: positions of the B images in the input list.
        keys: cache keys of the B images; empty if the loader hashes no file.
        known: position -> cache key, of images whose vectors are known.
        errors: position -> error, of images that cannot be read.
    """

    pixels: P
    positions: list[int]
    keys: list[bytes]
    known: dict[int, bytes]
    errors: dict[int, InputError]

    def size(self) -> int:
        """Count all images of the batch, including those that are not encoded."""
        return len(self.positions) + len(self.known) + len(self.errors)

    def part(self, rows: slice) -> ImageBatch[P]:
        """Select some of the images to encode."""
        pixels: Any = self.pixels
        return ImageBatch(pixels[rows], self.positions[rows], self.keys[rows], {}, {})


class _Collate(Generic[P]):
    """Batch samples; ``gather`` combines the contents of B images in one object."""

    def __init__(self, gather: Callable[[list[Any]], P]) -> None:
        self.gather = gather

    def __call__(self, samples: list[_Sample]) -> ImageBatch[P]:
        read = [sample for sample in samples if sample.content is not None]
        return ImageBatch(
            self.gather([sample.content for sample in read]),
            [sample.position for sample in read],
            [sample.key for sample in read if sample.key],
            {s.position: s.key for s in samples if s.content is None and s.error is None},
            {sample.position: sample.error for sample in samples if sample.error is not None},
        )


class BatchLoader(Generic[P]):
    """Load images in batches, in the given order, decoded ahead by worker processes.

    Iteration yields :class:`ImageBatch`; ``len`` is the number of batches. The reader may collect
    the errors of unreadable images; otherwise, the first error is raised.

    Args:
        images: files, RGB images, or preprocessed tensors [3, H, W].
        convert: function from an RGB image to its content in a batch; not applied to tensors.
        gather: contents of B images -> the batch's ``pixels``.
        batch_size: images per batch; the last batch may be smaller.
        num_workers: maximum number of worker processes; 0 loads in the main process, as does a
            single batch.
        pin_memory: page-lock the batches, for fast copies to a CUDA device.
        reader: reader of the files; None uses the benchmark reader.
        known: cache keys of files that need no decoding; None hashes no file.

    Raises:
        InputError: during iteration: an image is unreadable and the reader does not collect errors.
    """

    def __init__(
        self,
        images: Sequence[Loadable],
        convert: Callable[[Image.Image], Any],
        gather: Callable[[list[Any]], P],
        batch_size: int,
        num_workers: int = 0,
        *,
        pin_memory: bool = False,
        reader: ImageReader | None = None,
        known: Container[bytes] | None = None,
    ) -> None:
        reader = reader or ImageReader()
        self._images, self._unreadable = images, reader.unreadable
        self._loader = Loader(
            _Images(images, convert, reader, known),  # type: ignore[arg-type]  # not a Dataset
            batch_size=batch_size,
            num_workers=needed_workers(num_workers, -(-len(images) // batch_size)),
            collate_fn=_Collate(gather),
            pin_memory=pin_memory,
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[ImageBatch[P]]:
        for batch in self._loader:
            for position, error in batch.errors.items():
                if self._unreadable is None:
                    raise error
                image = self._images[position]
                assert isinstance(image, GalleryImage), "only files are decoded"
                self._unreadable[image.gallery_id] = error
            yield batch


class _Stack:
    """Stack pixels; normalize them here if only some of them are normalized already."""

    def __init__(self, normalization: Normalization | None) -> None:
        self.normalization = normalization

    def __call__(self, pixels: list[Any]) -> Tensor:
        if self.normalization and len({one.is_floating_point() for one in pixels}) == 2:
            pixels = [*map(self.normalization.on(CPU), pixels)]
        # default_collate writes a worker's batch directly into shared memory
        stacked: Tensor = default_collate(pixels) if pixels else torch.empty(0)
        return stacked


class ImageLoader(BatchLoader[Tensor]):
    """Load the pixels of images; see :class:`BatchLoader` for the arguments.

    The attribute ``normalization`` is the second part of the transform, for the device, or None.

    Args:
        transform: a recipe, or any function from an RGB image to float32 [3, H, W]. The
            normalization of a known transform (:func:`in_two_parts`) is left to the device.

    Raises:
        InputError: see :func:`pab.core.device_errors.check_shared_memory` and
            :class:`BatchLoader`.
    """

    def __init__(
        self,
        images: Sequence[Loadable],
        transform: ImageRecipe | ImageTransform,
        batch_size: int,
        num_workers: int = 0,
        **options: Any,
    ) -> None:
        parts = in_two_parts(transform)
        self.normalization = parts.normalization
        gather = _Stack(self.normalization)
        super().__init__(images, parts.pixels, gather, batch_size, num_workers, **options)
        if self._loader.num_workers:
            size = parts.pixels(Image.new("RGB", (8, 8))).nbytes
            check_shared_memory(self._loader.num_workers, size, batch_size, len(images))
