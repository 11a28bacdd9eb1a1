"""List the photographs of a folder, and decode them to upright RGB images.

Photo search reads more formats than the benchmark commands, applies EXIF rotation, and continues
after a damaged file. Benchmark commands follow the published rules (:mod:`pab.data.images`).
"""

from __future__ import annotations

import heapq
import multiprocessing
import os
import stat
import threading
import warnings
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pillow_heif
from PIL import Image

from pab.core.counts import counted
from pab.core.errors import InputError
from pab.core.files import existing_folder
from pab.core.progress import Progress
from pab.data.image_paths import PHOTO_ENDINGS, is_photo_name
from pab.data.images import ImageFile, ImageReader, as_rgb, reason
from pab.data.records import GalleryImage

# Pillow's decoders for photographs; the JPEG decoder also opens MPO.
PHOTO_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "HEIF", "AVIF")
FORMAT_NAMES = "JPEG, PNG, WebP, BMP, GIF, TIFF, HEIC or AVIF"

MAX_PIXELS = 1 << 28  # 268 megapixels: 1 GiB decoded, enough for 200-megapixel cameras
MIN_SIDE = 1024  # px; minimum short side after reduction, twice the largest model input
ONE_AT_A_TIME = 1 << 25  # 33 megapixels; larger images are decoded one at a time across processes
MAX_RATIO = 100  # largest ratio of the sides; bounds the long side after the short side is resized
BAND_ROWS = 16  # rows of the reduced photograph that are converted together
_NAMED = 5  # maximum number of items of each kind named in a message

ORIENTATION = 0x0112  # EXIF tag
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
LYING = frozenset((5, 6, 7, 8))  # orientations that exchange width and height

pillow_heif.register_heif_opener()  # no effect on benchmark readers, which list their formats


# ---------------------------------------------------------------------------------------- listing


@dataclass
class PhotoFolder:
    """Contents of a folder to search.

    Attributes:
        photos: the images, sorted by name. A name is the path relative to the folder, with ``/`` as
            the separator and with the extension.
        unreadable: name -> problem, for entries that cannot be opened.
        nested: number of images per subfolder, if subfolders are not searched.
        other: number of skipped files, by extension.
        hidden: number of skipped hidden images.
        linked: names of links to folders that are already searched.
    """

    photos: list[GalleryImage] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    nested: Counter[str] = field(default_factory=Counter)
    other: Counter[str] = field(default_factory=Counter)
    hidden: int = 0
    linked: list[str] = field(default_factory=list)

    def left_out(self) -> str:
        """Describe the skipped files and links in one clause; empty if there are none."""
        parts = []
        if self.hidden:
            parts.append(counted(self.hidden, "hidden image"))
        if self.other:
            endings = ", ".join(f"{ending} {n}" for ending, n in self.other.most_common(_NAMED))
            if len(self.other) > _NAMED:
                endings += ", ..."
            files = counted(self.other.total(), "file")
            parts.append(f"{files} with other extensions ({endings})")
        if self.linked:
            shown = ", ".join(self.linked[:_NAMED]) + (", ..." if len(self.linked) > _NAMED else "")
            links = counted(len(self.linked), "link")
            parts.append(f"{links} to already searched folders ({shown})")
        return " and ".join(parts)


def list_photos(folder: str | Path, *, recursive: bool = False) -> PhotoFolder:
    """List the photographs of a folder.

    Photographs are recognized by extension (:data:`PHOTO_ENDINGS`, in upper or lower case). Hidden
    files and folders are skipped. Symbolic links are followed, but no folder is listed twice.

    Args:
        folder: the folder.
        recursive: also list subfolders; otherwise, their images are only counted.

    Raises:
        InputError: the folder is missing or cannot be listed.
    """
    folder = existing_folder(folder, "a folder of images")
    found = PhotoFolder()
    seen: set[tuple[int, int]] = set()
    waiting = [(False, "")]  # (is a link, relative path): real folders before links
    shown = Progress(None, "listing photographs", "files")
    while waiting:
        _, relative = heapq.heappop(waiting)
        try:
            status = (folder / relative).stat()
            if (status.st_dev, status.st_ino) in seen:
                found.linked.append(_shown(relative))
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(folder / relative), key=lambda entry: entry.name)
        except OSError as error:
            problem = f"cannot be listed: {error.strerror or error}"
            if not relative:
                raise InputError(folder, problem) from error
            found.unreadable[_shown(relative)] = problem
            continue
        shown.update(len(entries))
        for entry in entries:
            name = f"{relative}/{entry.name}" if relative else entry.name
            if _is_folder(entry):
                if not entry.name.startswith("."):
                    heapq.heappush(waiting, (entry.is_symlink(), name))
            elif recursive or not relative:
                _take(found, name, Path(entry.path))
            elif is_photo_name(entry.name):
                found.nested[_shown(relative)] += 1
    shown.close()
    found.photos.sort(key=lambda image: image.gallery_id)
    return found


def _take(found: PhotoFolder, name: str, path: Path) -> None:
    """Add a file to the matching field of ``found``."""
    ending = path.suffix.lower()
    if ending not in PHOTO_ENDINGS:
        if not path.name.startswith("."):
            found.other[ending or "none"] += 1
    elif path.name.startswith("."):
        found.hidden += 1
    else:
        problem = _cannot_be_opened(path)
        if problem is None:
            found.photos.append(GalleryImage(_shown(name), path))
        else:
            found.unreadable[_shown(name)] = problem


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: opening it reports the problem
        return False


def _cannot_be_opened(path: Path) -> str | None:
    """Return why a file cannot hold a photograph, or None; the file is not opened."""
    try:
        status = path.stat()
    except OSError as error:
        if path.is_symlink():
            return f"a broken link ({error.strerror or error})"
        return error.strerror or str(error)
    if not stat.S_ISREG(status.st_mode):
        return "not a regular file"
    if status.st_size == 0:
        return "an empty file"
    return None if os.access(path, os.R_OK) else "a file without read permission"


def _shown(name: str) -> str:
    r"""Convert a name to text; bytes that are not UTF-8 become ``\xNN``."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


# ---------------------------------------------------------------------------------------- loading


def photo_reader() -> ImageReader:
    """Create a reader of photographs; it collects the errors of unreadable files."""
    decode = partial(decode_photo, large=multiprocessing.Lock())
    return ImageReader(decode, cache_key="photo", unreadable={})


def load_photo(path: str | Path) -> Image.Image:
    """Read and decode a photograph; see :func:`decode_photo`.

    Raises:
        InputError: the file cannot be read or decoded, or its size is not accepted.
    """
    return ImageReader(decode_photo).load(Path(path))


def decode_photo(
    file: ImageFile, path: Path | str, *, large: AbstractContextManager[object] | None = None
) -> Image.Image:
    """Decode an opened photograph as RGB, upright.

    Only the first frame is used (HEIC: the primary image). Transparent areas become white. If the
    short side is at least twice :data:`MIN_SIDE`, the photograph is reduced by an integer factor.
    JPEGs are reduced during decoding, by a factor of at most 8. Any other reduction follows
    decoding, in bands, so that memory for the full size is needed only once (4 bytes per pixel).

    Args:
        file: contents of the photograph.
        path: its path, for messages; a string names contents that come from no file.
        large: lock held while a photograph of more than :data:`ONE_AT_A_TIME` pixels is decoded
            (for JPEGs, pixels of the reduced image), so that only one process at a time decodes
            such a photograph. None uses no lock.

    Raises:
        InputError: the file has more than :data:`MAX_PIXELS` pixels or an aspect ratio above
            :data:`MAX_RATIO`, or cannot be decoded.
    """
    try:
        with warnings.catch_warnings(), _no_limit:
            warnings.simplefilter("ignore")  # warnings about metadata; only pixels are used
            with Image.open(file, formats=PHOTO_FORMATS) as image:
                _check_size(path, image)
                width, height = image.size
                side = min(width, height)
                if image.format in ("JPEG", "MPO") and side > MIN_SIDE:
                    scale = MIN_SIDE / side
                    image.draft(None, (round(width * scale), round(height * scale)))
                if image.width * image.height <= ONE_AT_A_TIME:
                    return _upright_rgb(image)
                with large or nullcontext():
                    return _large(image)
    except InputError:
        raise
    except Exception as error:  # the decoders do not document their exceptions
        words = reason(path, error, FORMAT_NAMES)
        raise InputError(path, f"cannot be read: {words}") from error


def photo_size(file: ImageFile) -> tuple[int, int] | None:
    """Read the upright width and height of an opened photograph, in pixels, from its header.

    Return None if the header cannot be read; decoding reports the reason.
    """
    try:
        with warnings.catch_warnings(), _no_limit:
            warnings.simplefilter("ignore")
            with Image.open(file, formats=PHOTO_FORMATS) as image:
                width, height = image.size
                turn = _container_orientation(image)
                if image.format == "TIFF":  # Pillow gives the upright size
                    turn = None
                # Pillow decodes a PNG completely to look for EXIF data after its pixels.
                elif turn is None and (image.format != "PNG" or "exif" in image.info):
                    turn = _exif_orientation(image)
    except Exception:  # noqa: BLE001 - the decoders do not document their exceptions
        return None
    return (height, width) if turn in LYING else (width, height)


class _NoLimit(AbstractContextManager[None]):
    """Disable Pillow's pixel limit, a process-wide global, while photographs are decoded.

    :func:`_check_size` replaces this limit. Threads may decode concurrently: the first to enter
    disables the limit, and the last to leave restores it.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._limit: int | None = None

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                Image.MAX_IMAGE_PIXELS = self._limit


_no_limit = _NoLimit()


def _check_size(path: str | Path, image: Image.Image) -> None:
    pixels, found = image.width * image.height, f"{image.width} x {image.height}"
    if pixels > MAX_PIXELS:
        most, there = f"{MAX_PIXELS / 1e6:.0f}", f"{pixels / 1e6:.0f} megapixels"
        raise InputError(path, f"expected at most {most} megapixels, found {found} ({there})")
    if max(image.size) > MAX_RATIO * min(image.size):
        problem = f"expected sides with a ratio of at most {MAX_RATIO}, found {found}"
        raise InputError(path, problem)


def _large(image: Image.Image) -> Image.Image:
    """Apply :func:`_upright_rgb` to a large image, and return the freed memory to the system."""
    from pab.core.devices import return_freed_memory  # imports torch

    result = _upright_rgb(image)
    if result is not image:
        image.close()
    return_freed_memory()
    return result


def _upright_rgb(image: Image.Image) -> Image.Image:
    """Decode an opened image, reduce it, and rotate it upright."""
    container = _container_orientation(image)  # pillow-heif discards it during decoding
    image.load()
    turn = UPRIGHT.get(_exif_orientation(image) if container is None else container)
    scale = _range_of(image)
    factor = max(min(image.size) // MIN_SIDE, 1)
    if factor == 1:
        result = _as_rgb(image, scale)
    else:
        rows = factor * BAND_ROWS
        result = Image.new("RGB", (-(-image.width // factor), -(-image.height // factor)))
        for top in range(0, image.height, rows):
            band = image.crop((0, top, image.width, min(top + rows, image.height)))
            result.paste(_as_rgb(band, scale).reduce(factor), (0, top // factor))
    return result if turn is None else result.transpose(turn)


def _container_orientation(image: Image.Image) -> int | None:
    """Return the EXIF orientation that a decoded HEIC needs; None for other formats.

    The decoder applies the rotation that the container stores. EXIF usually repeats this rotation,
    but some writers store it only in EXIF.
    """
    if image.format != "HEIF":
        return None
    primary = image._heif_file[image.tell()]._c_image  # type: ignore[attr-defined]
    if any(kind in ("irot", "imir") for kind, *_ in primary.transformations):
        return 1
    return image.info.get("original_orientation") or 1


def _exif_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an opened image; 1 if it is absent or unreadable."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # noqa: BLE001 - damaged metadata does not make the pixels unreadable
        return 1


def _range_of(image: Image.Image) -> tuple[float, float] | None:
    """Return the extreme values of an image if its mode has no fixed value range, else None."""
    if image.mode not in ("I", "F"):
        return None
    low, high = image.getextrema()
    return float(low), float(high)  # type: ignore[arg-type]


def _as_rgb(image: Image.Image, scale: tuple[float, float] | None) -> Image.Image:
    """Convert a decoded image to RGB, with transparent areas on white.

    The values from the first to the second number of ``scale`` are mapped to 0 to 255.
    """
    if scale is not None:
        low, high = scale
        values = (np.asarray(image, dtype=np.float64) - low) * (255 / ((high - low) or 1.0))
        image = Image.fromarray(values.round().astype(np.uint8))
    elif image.has_transparency_data and not image.mode.startswith("I;16"):
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return as_rgb(image)
