"""List gallery images, check that images are readable, preprocess and load them.

Benchmark images are opened with Pillow and converted to RGB (16-bit values to 8), without further
changes. EXIF orientation is not applied: the published pipelines do not apply it, and scores would
differ. Photo search decodes files differently (:mod:`pab.data.photos`), through an
:class:`ImageReader`. torch and torchvision are imported only where tensors are made.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from struct import error as StructError
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

from pab.core.errors import InputError
from pab.core.files import existing_folder
from pab.core.progress import progress
from pab.data.fields import is_text
from pab.data.image_paths import IMAGE_ENDINGS, is_image_name
from pab.data.records import GalleryImage

if TYPE_CHECKING:
    from torch import Tensor

    Loadable = GalleryImage | Image.Image | Tensor  # a file, an RGB image, or its pixels

ImageTransform = Callable[[Image.Image], "Tensor"]

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # Pillow's other decoders are never used
_NAMED_BAD_IMAGES = 20  # maximum number of images named in an error

# Exceptions of Pillow's decoders for damaged or hostile files.
_DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    MemoryError,
    StructError,
    zlib.error,
    Image.DecompressionBombError,
)

_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # mean and standard deviation of R, G and B
# Radford et al., CLIP; BLIP-2 uses the same.
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
# Statistics of the person search data on which UIT was pretrained.
_UIT = ((0.38901278, 0.3651612, 0.34836376), (0.24344306, 0.23738699, 0.23368555))


# ---------------------------------------------------------------------------------------- recipes


@dataclass(frozen=True)
class ImageRecipe:
    """Preprocessing recipe of a model.

    Attributes:
        name: the recipe's name.
        size: height and width of the result, pixels.
        resize: "squash" resizes to size x size and ignores the aspect ratio; "short_side" resizes
            the short side to size and crops the centre. Both are bicubic.
        mean: subtracted from R, G and B (0 to 1).
        std: divisor after the subtraction.
    """

    name: str
    size: int
    resize: Literal["squash", "short_side"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def transform(self) -> ImageTransform:
        """Build the transform from an RGB image to float32 [3, size, size].

        Images are resized before they become tensors, as in the published pipelines, because
        torchvision's bicubic filter returns other values for tensors.
        """
        import torch
        from torchvision.transforms import v2

        bicubic = v2.InterpolationMode.BICUBIC
        if self.resize == "squash":
            shape = [v2.Resize((self.size, self.size), interpolation=bicubic)]
        else:
            shape = [v2.Resize(self.size, interpolation=bicubic), v2.CenterCrop(self.size)]
        to_float = v2.ToDtype(torch.float32, scale=True)
        normalize = v2.Normalize(list(self.mean), list(self.std))
        return v2.Compose([*shape, v2.PILToTensor(), to_float, normalize])


def recipe(name: str, size: int) -> ImageRecipe:
    """Return the preprocessing recipe of a model family at an input size in pixels.

    ========= =========================== =====================
    beit3     squash                      mean = std = 0.5
    clip      short side + centre crop    CLIP's mean and std
    blip2     squash                      CLIP's mean and std
    uit       squash                      UIT's own mean and std
    ========= =========================== =====================

    Raises:
        InputError: unknown recipe, or a size that is not positive.
    """
    if size < 1:
        raise InputError("image size", f"expected a positive number of pixels, found {size}")
    colours = {"beit3": _HALF, "clip": _CLIP, "blip2": _CLIP, "uit": _UIT}
    if name not in colours:
        raise InputError("image recipe", f"expected beit3, clip, blip2 or uit, found {name!r}")
    return ImageRecipe(name, size, "short_side" if name == "clip" else "squash", *colours[name])


# ---------------------------------------------------------------------------------------- gallery


def list_gallery(folder: str | Path) -> list[GalleryImage]:
    """List the images of a folder, sorted by id; the id is the file name without its extension.

    Images are recognized by extension (jpg, jpeg, png, webp, bmp, in any case). Hidden files, other
    extensions and subfolders are ignored. The folder and its files may be symbolic links.

    Raises:
        InputError: the folder is missing or has no image, two files differ only in their extension,
            or a name is not valid UTF-8.
    """
    folder = existing_folder(folder, "a folder of images")
    found: dict[str, Path] = {}
    try:
        names = sorted(entry.name for entry in os.scandir(folder))
    except OSError as error:
        raise InputError(folder, f"cannot be listed: {error.strerror or error}") from error
    for name in names:
        path = folder / name
        if not is_image_name(name):
            continue
        if not is_text(name):
            problem = f"expected file names in UTF-8, found {name!a}"
            raise InputError(folder, problem, todo="rename the file")
        if path.stem in found:
            two = f"{found[path.stem].name!r} and {name!r}"
            problem = f"expected names that differ in more than their extension, found {two}"
            raise InputError(folder, problem, todo="rename or remove one of them")
        found[path.stem] = path
    if not found:
        endings = ", ".join(sorted(IMAGE_ENDINGS))
        raise InputError(folder, f"expected images ({endings}), found none")
    return [GalleryImage(name, found[name]) for name in sorted(found)]


# ---------------------------------------------------------------------------------------- loading


def load_image(path: str | Path) -> Image.Image:
    """Decode an image completely, as RGB.

    Raises:
        InputError: the file is missing or cannot be decoded.
    """
    try:
        with Image.open(path, formats=_FORMATS) as image:
            return as_rgb(image)
    except _DECODING_ERRORS as error:
        raise InputError(path, f"expected an image, found {reason(path, error)}") from error


@dataclass(frozen=True)
class ImageReader:
    """Decoder of image files, with its cache key and the errors of unreadable files.

    Attributes:
        load: file -> RGB image; raises :class:`InputError`.
        cache_key: part of the cache key of vectors. Readers that decode the same file to different
            pixels must have different keys.
        unreadable: gallery id -> error, filled while images are loaded. None raises the first
            error.
    """

    load: Callable[[Path], Image.Image] = load_image
    cache_key: str = ""
    unreadable: dict[str, InputError] | None = None


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert an opened image to RGB; scale 16-bit values, which Pillow would clip at 255."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    return image.convert("RGB")


def verify_images(paths: list[Path], num_workers: int = 0) -> None:
    """Decode every image once, and report all failures.

    JPEGs are decoded at an eighth of their size: this reads every byte but skips most computation.
    Threads suffice, because Pillow's decoders run outside the interpreter lock.

    Args:
        paths: the images.
        num_workers: number of decoding threads; 0 means 1.

    Raises:
        InputError: images are missing or damaged; the message names up to twenty and counts all.
    """
    with ThreadPoolExecutor(max(num_workers, 1)) as pool:
        found = progress(pool.map(_problem_of, paths), "checking images", "images", len(paths))
        problems = [problem for problem in found if problem is not None]
    if not problems:
        return
    shown = "; ".join(problems[:_NAMED_BAD_IMAGES])
    if len(problems) > _NAMED_BAD_IMAGES:
        shown += f"; and {len(problems) - _NAMED_BAD_IMAGES} more"
    where = f"{len(problems)} of {len(paths)} images"
    raise InputError(where, f"cannot be read: {shown}", todo="replace or remove them")


def _problem_of(path: Path) -> str | None:
    try:
        with Image.open(path, formats=_FORMATS) as image:
            image.draft(None, (max(image.width // 8, 1), max(image.height // 8, 1)))
            image.convert("RGB")
    except _DECODING_ERRORS as error:
        return f"{path} ({reason(path, error)})"
    return None


def reason(path: str | Path, error: Exception, formats: str = "JPEG, PNG, WebP or BMP") -> str:
    """Describe in one clause why a file could not be decoded as one of ``formats``."""
    path = Path(path)
    if path.is_dir():
        return "a directory"
    if not path.exists():
        return "a link to a missing file" if path.is_symlink() else "no such file"
    if path.stat().st_size == 0:
        return "an empty file"
    if isinstance(error, Image.UnidentifiedImageError):
        return f"not a {formats} image"
    return str(error) or type(error).__name__


# ----------------------------------------------------------------------------------------- loader


class _Images:
    """Map-style dataset: position -> (pixels, position), or (error, position).

    Data loaders rewrite exceptions of worker processes, so errors are returned as values.
    """

    def __init__(
        self,
        images: Sequence[Loadable],
        transform: ImageTransform,
        load: Callable[[Path], Image.Image],
    ) -> None:
        self.images, self.transform, self.load = images, transform, load

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> tuple[Tensor | InputError, int]:
        image = self.images[position]
        if isinstance(image, GalleryImage):
            try:
                image = self.load(image.path)
            except InputError as error:
                return error, position
        return (self.transform(image) if isinstance(image, Image.Image) else image), position


def _collate(
    samples: list[tuple[Tensor | InputError, int]],
) -> tuple[Tensor, list[int], dict[int, InputError]]:
    """Batch the readable images: pixels [B, 3, H, W], positions, and errors by position."""
    import torch

    read = [(pixels, i) for pixels, i in samples if not isinstance(pixels, InputError)]
    failed = {i: error for error, i in samples if isinstance(error, InputError)}
    pixels = torch.stack([one for one, _ in read]) if read else torch.empty(0)
    return pixels, [i for _, i in read], failed


class ImageLoader:
    """Load images in batches, in the given order, decoded ahead by worker processes.

    Iteration yields ``(pixels, positions)``: float32 [B, 3, H, W] and the positions of the B images
    in the input list. Images that the reader collects as unreadable are skipped. ``len`` is the
    number of batches.

    Args:
        images: files, RGB images, or preprocessed tensors [3, H, W].
        transform: a recipe, or any function from an RGB image to a float32 [3, H, W].
        batch_size: images per batch; the last batch may be smaller.
        num_workers: number of worker processes; 0 loads in the main process.
        pin_memory: page-lock the batches, for fast copies to a CUDA device.
        reader: reader of the files; None uses the benchmark reader.

    Raises:
        InputError: (during iteration) an image is unreadable and the reader does not collect
            errors.
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
    ) -> None:
        from pab.data.loader import Loader

        reader = reader or ImageReader()
        if isinstance(transform, ImageRecipe):
            transform = transform.transform()
        self._images, self._unreadable = images, reader.unreadable
        self._loader = Loader(
            _Images(images, transform, reader.load),  # type: ignore[arg-type]  # not a Dataset
            batch_size=batch_size,
            num_workers=num_workers,
            collate_fn=_collate,
            pin_memory=pin_memory,
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, list[int]]]:
        for pixels, positions, failed in self._loader:
            for position, error in failed.items():
                if self._unreadable is None:
                    raise error
                image = self._images[position]
                assert isinstance(image, GalleryImage), "only files are decoded"
                self._unreadable[image.gallery_id] = error
            if positions:
                yield pixels, positions
