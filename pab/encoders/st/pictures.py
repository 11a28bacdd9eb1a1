"""Decode gallery images ahead of a model whose own processor resizes them.

Some processors read images with transformers' `load_image`, which rotates an image by its EXIF
orientation. The images here have no EXIF data, so that benchmark images are not rotated (as
published), and photo search rotates only once.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

import numpy as np
from PIL import Image

from pab.data.image_loader import BatchLoader
from pab.data.images import ImageReader
from pab.data.records import GalleryImage

# Errors of image processors: a size that they do not accept, or a side that resizing reduces to 0.
REJECTIONS = (ValueError, ZeroDivisionError)


def pixels_only(image: Image.Image) -> Image.Image:
    """Copy an RGB image without its metadata (EXIF, colour profile)."""
    return Image.fromarray(np.asarray(image))


class PictureLoader(BatchLoader[list[Image.Image]]):
    """Load decoded RGB images of any size in batches, ahead of the model.

    Iteration yields :class:`~pab.data.image_loader.ImageBatch` with a list of PIL images as
    ``pixels``. The list excludes unreadable images and those whose key is in ``known``, so it may
    be shorter than ``batch_size``. :func:`pab.scoring.batches.refilled` merges such batches.

    Args:
        images: files or RGB images.
        batch_size: images per batch; the last batch may be smaller.
        num_workers: number of worker processes; 0 decodes in the main process.
        reader: reader of the files; None uses the benchmark reader.
        known: cache keys of files that need no decoding; None hashes no file.

    Raises:
        InputError: during iteration: a file cannot be decoded, and the reader does not collect
            errors.
    """

    def __init__(
        self,
        images: Sequence[GalleryImage | Image.Image],
        batch_size: int,
        num_workers: int = 0,
        *,
        reader: ImageReader | None = None,
        known: Container[bytes] | None = None,
    ) -> None:
        super().__init__(
            images, pixels_only, list, batch_size, num_workers, reader=reader, known=known
        )
