"""List gallery images, read and preprocess them, and check that they are readable.

Benchmark images are opened with Pillow and converted to RGB (16-bit values to 8-bit), without
further changes. EXIF orientation is not applied: the published pipelines do not apply it, and
scores would differ. Photo search decodes files differently (:mod:`pab.data.photos`), through an
:class:`ImageReader`. torch and torchvision are imported only in the functions that need them.

Loading in batches is in :mod:`pab.data.image_loader`.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import zlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
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

    from pab.data.pixels import Preprocessing, TwoParts

ImageTransform = Callable[[Image.Image], "Tensor"]
ImageFile = io.BytesIO | io.BufferedReader  # an opened file, at its beginning

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # benchmark images use no other decoder of Pillow
_NAMED_BAD_IMAGES = 20  # maximum number of images named in an error
_EXPECTED = "expected an image, found "  # begins the problem of an unreadable file
_IN_MEMORY = 1 << 24  # bytes; a larger file is read while it is decoded, to bound the memory

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

    def transform(self) -> Preprocessing:
        """Build the transform from an RGB image to float32 [3, size, size].

        Images are resized before they become tensors, as in the published pipelines, because
        torchvision's bicubic filter returns other values for tensors.
        """
        from torchvision.transforms import v2

        from pab.data.pixels import Normalization, Preprocessing, planes

        bicubic = v2.InterpolationMode.BICUBIC
        shape: list[Callable[[Image.Image], Image.Image]] = [partial(_squashed, self.size)]
        if self.resize == "short_side":
            shape = [v2.Resize(self.size, interpolation=bicubic), v2.CenterCrop(self.size)]
        return Preprocessing(v2.Compose([*shape, planes]), Normalization(self.mean, self.std))


def _squashed(size: int, image: Image.Image) -> Image.Image:
    """Resize to a square as torchvision's ``Resize`` does, without the overhead of its dispatch."""
    return image.resize((size, size), Image.Resampling.BICUBIC)


def recipe(name: str, size: int) -> ImageRecipe:
    """Return the preprocessing recipe of a model family at an input size in pixels.

    ========= =========================== =====================
    beit3     squash                      mean = std = 0.5
    clip      short side + centre crop    CLIP's mean and std
    blip2     squash                      CLIP's mean and std
    uit       squash                      UIT's mean and std
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


def in_two_parts(transform: ImageRecipe | ImageTransform) -> TwoParts:
    """Split a known transform into two parts: RGB image to pixels, and normalization.

    Known transforms are recipes, :class:`~pab.data.pixels.TwoParts`, and a torchvision ``Compose``
    that ends with ``ToTensor`` and ``Normalize``, such as OpenCLIP's. Any other transform becomes
    the first part, without a normalization.
    """
    from torchvision.transforms import Compose, Normalize, ToTensor

    from pab.data.pixels import Normalization, Preprocessing, TwoParts, planes

    if isinstance(transform, ImageRecipe):
        return transform.transform()
    if isinstance(transform, TwoParts):
        return transform
    if not isinstance(transform, Compose) or len(transform.transforms) < 2:
        return Preprocessing(transform, None)
    *shape, to_tensor, normalize = transform.transforms
    if not (isinstance(to_tensor, ToTensor) and isinstance(normalize, Normalize)):
        return Preprocessing(transform, None)
    mean, std = ((float(a), float(b), float(c)) for a, b, c in (normalize.mean, normalize.std))
    return Preprocessing(Compose([*shape, planes]), Normalization(mean, std, divides=True))


# ---------------------------------------------------------------------------------------- gallery


def list_gallery(folder: str | Path) -> list[GalleryImage]:
    """List the images of a folder, sorted by id; the id is the file name without its extension.

    Images are recognized by extension (jpg, jpeg, png, webp, bmp, in upper or lower case). Hidden
    files and other extensions are ignored, and subfolders are not searched. The folder and its
    files may be symbolic links.

    Raises:
        InputError: the folder is missing, cannot be listed or has no image, two images differ only
            in their extension, or the name of an image is not valid UTF-8.
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


def decode_image(file: ImageFile, path: Path) -> Image.Image:
    """Decode an opened image completely, as RGB.

    Args:
        file: contents of the image.
        path: its path, for messages.

    Raises:
        InputError: the file cannot be decoded.
    """
    try:
        with Image.open(file, formats=_FORMATS) as image:
            return as_rgb(image)
    except _DECODING_ERRORS as error:
        raise InputError(path, _EXPECTED + reason(path, error)) from error


def is_readable(path: Path) -> bool:
    """Return true if a file has a format of benchmark images, whatever its extension."""
    try:
        with Image.open(path, formats=_FORMATS):
            return True
    except _DECODING_ERRORS:
        return False


def load_image(path: str | Path) -> Image.Image:
    """Read and decode an image completely, as RGB.

    Raises:
        InputError: the file cannot be read or decoded.
    """
    return ImageReader().load(Path(path))


@dataclass(frozen=True)
class ImageReader:
    """Decoder of image files, with its cache key and the errors of unreadable files.

    Attributes:
        decode: opened file and its path -> RGB image; raises :class:`InputError`.
        cache_key: part of the cache key of vectors. Readers that decode the same file to different
            pixels must have different keys.
        unreadable: gallery id -> error, filled by the loaders of :mod:`pab.data.image_loader`. If
            None, they raise the first error.
    """

    decode: Callable[[ImageFile, Path], Image.Image] = decode_image
    cache_key: str = ""
    unreadable: dict[str, InputError] | None = None

    def load(self, path: Path) -> Image.Image:
        """Read and decode a file.

        Raises:
            InputError: the file cannot be read or decoded.
        """
        with _readable(path) as file:
            return self.decode(file, path)

    def load_unless_known(
        self, path: Path, known: Container[bytes]
    ) -> tuple[bytes, Image.Image | None]:
        """Read and hash a file; decode it unless its key is known. The file is opened once.

        Returns:
            The cache key of the file's vector, and the image or None.

        Raises:
            InputError: the file cannot be read or decoded.
        """
        with _readable(path) as file:
            key = hashlib.file_digest(file, "sha256").digest()
            if self.cache_key:  # benchmark images have the hash of the file as their key
                key = hashlib.sha256(f"{self.cache_key} ".encode() + key).digest()
            if key in known:
                return key, None
            file.seek(0)
            return key, self.decode(file, path)


@contextmanager
def _readable(path: Path) -> Iterator[ImageFile]:
    """Open a file; unless it is large, read it at once, so that later reads need no disk.

    Raises:
        InputError: the file cannot be opened or read.
    """
    try:
        with path.open("rb") as file:
            small = os.fstat(file.fileno()).st_size <= _IN_MEMORY
            yield io.BytesIO(file.read()) if small else file
    except (OSError, ValueError) as error:
        raise InputError(path, _EXPECTED + reason(path, error)) from error


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert an opened image to RGB; scale 16-bit values, which Pillow would clip at 255."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.mode == "RGB":
        image.load()  # `convert` would copy the pixels
        return image
    return image.convert("RGB")


def reason(path: str | Path, error: Exception, formats: str = "JPEG, PNG, WebP or BMP") -> str:
    """Describe in one clause why a file could not be decoded as one of ``formats``.

    A ``path`` that is a string only names contents that come from no file, so it is not looked up.
    """
    problem = without_content(path) if isinstance(path, Path) else None
    if problem is not None:
        return problem
    if isinstance(error, Image.UnidentifiedImageError):
        return f"not a {formats} image"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def without_content(path: Path) -> str | None:
    """Return why a path cannot hold an image, or None; the file is not opened."""
    try:
        status = path.stat()
    except (FileNotFoundError, ValueError):  # ValueError: a name with a zero byte
        return "a link to a missing file" if path.is_symlink() else "no such file"
    except OSError as error:
        return str(error.strerror or error)
    if stat.S_ISDIR(status.st_mode):
        return "a directory"
    if not stat.S_ISREG(status.st_mode):
        return "not a regular file"
    return "an empty file" if status.st_size == 0 else None


# --------------------------------------------------------------------------------------- checking


def verify_images(paths: list[Path], num_workers: int = 0) -> None:
    """Decode every image once, and report all failures; each process checks its share.

    JPEGs are decoded at an eighth of their size: this reads every byte but skips most computation.
    Threads suffice, because Pillow's decoders run outside the interpreter lock.

    Args:
        paths: the images, the same in all processes.
        num_workers: number of decoding threads per process; 0 means 1.

    Raises:
        InputError: images are missing or damaged; the message counts all and names up to twenty.
            The error is raised in every process.
    """
    from pab.core import processes  # imports torch

    share = [paths[i] for i in processes.share_of(len(paths))]
    with ThreadPoolExecutor(max(num_workers, 1)) as pool:
        found = progress(pool.map(_problem_of, share), "checking images", "images", len(share))
        bad = {path: why for path, why in zip(share, found, strict=True) if why is not None}
    refuse_unreadable(bad, paths)


def refuse_unreadable(problems: Mapping[Path, str], paths: Sequence[Path]) -> None:
    """Raise one error about the unreadable images of all processes; return if there are none.

    Args:
        problems: path -> problem, of this process's share.
        paths: all images, the same in all processes.

    Raises:
        InputError: an image of any process is unreadable. The error is raised in every process.
    """
    from pab.core import processes  # imports torch

    every: dict[Path, str] = {}
    for part in processes.gather_objects(dict(problems)):
        every |= part
    if not every:
        return
    if len(paths) == 1:
        raise InputError(paths[0], _EXPECTED + every[paths[0]])
    named = [f"{path} ({every[path]})" for path in paths if path in every]
    shown = "; ".join(named[:_NAMED_BAD_IMAGES])
    if len(named) > _NAMED_BAD_IMAGES:
        shown += f"; and {len(named) - _NAMED_BAD_IMAGES} more"
    where = f"{len(named)} of {len(paths)} images"
    raise InputError(where, f"cannot be read: {shown}", todo="replace or remove unreadable images")


def _problem_of(path: Path) -> str | None:
    problem = without_content(path)
    if problem is not None:
        return problem
    try:
        with Image.open(path, formats=_FORMATS) as image:
            image.draft(None, (max(image.width // 8, 1), max(image.height // 8, 1)))
            image.convert("RGB")
    except _DECODING_ERRORS as error:
        return reason(path, error)
    return None


def problem_of(error: InputError) -> str:
    """Return the problem of an unreadable image, without the words ``expected an image, found``."""
    return error.problem.removeprefix(_EXPECTED)
