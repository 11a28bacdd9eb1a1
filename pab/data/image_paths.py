"""Validate the image paths of annotations, and find their files.

An image path in an annotation must stay inside the data root. A symbolic link inside the root may
point to any file that the user can read, for instance in a hub cache or on another disk. All
readers of annotations and tables follow this rule.

Four variants of PAB's layout have the same meaning, and all are searched:

====================  ==========================================================================
spelling              ``wentwrong`` and ``wentrong`` are the same folder
part                  ``train/imgs_N`` may be in ``Part K`` (K = N // 8 + 1), as ``imgs_N`` or
                      ``train/imgs_N``, or in ``train/Part K``
extension             another image extension with the same stem (``0.webp`` for ``0.jpg``)
links                 files and folders may be symbolic links
====================  ==========================================================================

A file at the exact path takes precedence. If it does not exist, several variants are an error.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from pab.core.errors import InputError
from pab.core.files import existing_folder
from pab.core.notices import notice
from pab.core.progress import progress
from pab.data.json_lines import shortened

# Extensions that the benchmark commands read.
IMAGE_ENDINGS = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp"))
# Extensions that photo search reads; name matching ignores all of them.
PHOTO_ENDINGS = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".mpo", ".png", ".apng", ".webp"),
        *(".bmp", ".dib", ".gif", ".tif", ".tiff", ".heic", ".heif", ".hif", ".avif"),
    )
)
# Formats that photo search decodes, but training and the benchmark commands do not.
SEARCH_ONLY_ENDINGS = frozenset((".gif", ".tif", ".tiff", ".heic", ".heif", ".hif", ".avif"))
SHARDS_PER_PART = 8  # PAB's download has ten parts: imgs_0 to imgs_7 are in Part 1
_SPELLINGS = ("wentwrong", "wentrong")  # the folder's name differs between releases of PAB
_SHARD_FOLDER = re.compile(r"train/imgs_(\d+)(?:/.*)?")
_DRIVE = re.compile(r"[A-Za-z]:/")
_FOLDERS_LISTED = 64  # folder listings cached during a check; shards are read one after another


# ----------------------------------------------------------------------------------------- text


def checked_path(
    value: str, name: str, path: Path, item: str, *, below: str = "", root: Path | None = None
) -> str:
    """Check that an image path stays inside the data root, and return the relative path.

    Backslashes are read as ``/``, unless a file with exactly this path exists. An absolute path
    inside the data root is converted to one that is relative to the root or to ``below``.

    Args:
        value: the path, not empty.
        name: name of its field, for the error.
        path: the annotation file.
        item: the line, for the error.
        below: folder under the root that the path is relative to.
        root: the data root; if None, the parent of the ``annotation`` folder above ``path``.

    Raises:
        InputError: the path leaves the root, is absolute and outside it, or contains a NUL
            character.
    """
    if ".." not in value and value[0] != "/" and "\\" not in value and "\0" not in value:
        return value
    root = _root_above(path) if root is None else root
    text = with_slashes(value, path, None if root is None else root / below)
    found = None
    if "\0" in text:
        found = "a path with a NUL character"
    elif text[0] == "/" or _DRIVE.match(text):
        inside = inside_root(text, root)
        if inside is not None:
            notice(path, "absolute image paths under the data root are converted to relative paths")
            return posixpath.relpath(f"/{inside}", f"/{below}")
        found = "an absolute path outside it"
    elif _leaves(text, below):
        found = "a path that leaves it"
    if found is None:
        return text
    found = f"{found}: {shortened(value)}"
    problem = f"field {name!r}: expected a path inside the data root, found {found}"
    raise InputError(path, problem, item=item)


def _leaves(text: str, below: str) -> bool:
    depth = len(PurePosixPath(below).parts)
    for part in PurePosixPath(text).parts:
        depth += -1 if part == ".." else 1
        if depth < 0:
            return True
    return False


def with_slashes(value: str, path: Path, base: Path | None) -> str:
    """Replace backslashes with ``/`` in an image path of the annotation ``path``.

    Backslashes are kept if a file with exactly this path exists under ``base``.
    """
    if "\\" not in value or (base is not None and (base / value).is_file()):
        return value
    notice(path, "backslashes in image paths are read as '/'")
    return value.replace("\\", "/")


def inside_root(text: str, root: Path | None) -> str | None:
    """Make an absolute path relative to the root. Return None if the path is outside the root.

    The path is compared with the root as given and with its symlinks resolved.
    """
    if root is None:
        return None
    normal = "/" + posixpath.normpath(text).lstrip("/")
    for home in _names_of(root):
        if normal.startswith(f"{home}/"):
            return normal[len(home) + 1 :]
    return None


@lru_cache(maxsize=8)
def _names_of(root: Path) -> tuple[str, ...]:
    """Return the absolute paths of the root, as given and with its symlinks resolved."""
    return tuple(dict.fromkeys((os.path.abspath(root), os.path.realpath(root))))  # noqa: PTH100


def _root_above(annotation: Path) -> Path | None:
    for folder in annotation.absolute().parents:
        if folder.name == "annotation":
            return folder.parent
    return None


def data_root(annotation: str | Path) -> Path:
    """Return the folder that image paths of an annotation file are relative to.

    The data root is the parent of the innermost ``annotation`` folder that contains the file.

    Raises:
        InputError: no folder above the file is called ``annotation``.
    """
    root = _root_above(Path(annotation))
    if root is None:
        problem = "expected a file under ROOT/annotation/, found no folder 'annotation' above it"
        raise InputError(annotation, problem, todo="pass the image folder with --image_folder")
    return root


def spellings(image: str) -> tuple[str, ...]:
    """Return a path as written and, if a folder in it has another spelling, with that spelling."""
    for spelling, other in (_SPELLINGS, _SPELLINGS[::-1]):
        if f"/{spelling}/" in f"/{image}":
            return image, f"/{image}".replace(f"/{spelling}/", f"/{other}/")[1:]
    return (image,)


def written_variants(image: str) -> Iterator[str]:
    """Yield an image path, then its other spellings and image extensions."""
    image = posixpath.normpath(image)
    stem = _stem(image)
    for ending in (image.removeprefix(stem), *sorted(IMAGE_ENDINGS)):
        yield from spellings(stem + ending)


def part_of(shard: int) -> int:
    """Return the number of the download part that contains a shard's images."""
    return shard // SHARDS_PER_PART + 1


# ---------------------------------------------------------------------------------------- files


class _Place(NamedTuple):
    """The files of one folder."""

    folder: str  # relative to the root
    names: frozenset[str]
    endings: tuple[str, ...]  # image extensions among the names, as spelled
    only_images: bool  # every name has an image extension, except hidden files


class ImageFinder:
    """Find image files under a data root, in any layout that the module docstring lists.

    A folder is listed when an image is first missing at its exact path. The result is cached, so
    that later look-ups in this folder do not read the disk. Pickling keeps the cache.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self._listed: dict[str, list[_Place]] = {}
        # Folder as written -> (folder, extension) shared by all its images.
        self._uniform: dict[str, tuple[str, str]] = {}

    def find(self, image: str) -> Path:
        """Return the file of an image path relative to the root.

        ``..`` is resolved before symbolic links. If no variant exists, the path of a missing file
        is returned, and opening it reports the problem.

        Raises:
            InputError: the exact path is missing and several variants exist, or a folder cannot be
                listed.
        """
        folder, name = _split(image)
        known = self._uniform.get(folder)
        if known is not None:
            return Path(self.root, known[0], _stem(name) + known[1])
        written = Path(self.root, folder, name)
        if folder not in self._listed:
            if written.exists():
                return written
            self._listed[folder] = self._learnt(folder)
        found = self._choose(self._listed[folder], folder, name)
        return written if found is None else Path(self.root, *found)

    def absent(self, images: Iterable[str]) -> list[str]:
        """Return the images without a file, in order; the latest folder listings are cached.

        Raises:
            InputError: the exact path of an image is missing and several variants exist, or a
                folder cannot be listed.
        """
        listed = lru_cache(maxsize=_FOLDERS_LISTED)(self._learnt)
        missing = []
        for image in progress(images, "looking for images", "images"):
            folder, name = _split(image)
            if self._choose(listed(folder), folder, name) is None:
                missing.append(image)
        return missing

    def _learnt(self, folder: str) -> list[_Place]:
        """List the places of a folder; cache place and extension if all its files share both."""
        places = [place for place in map(self._place, _places(folder)) if place.names]
        if len(places) == 1 and len(places[0].endings) == 1 and places[0].only_images:
            self._uniform[folder] = (places[0].folder, places[0].endings[0])
        return places

    def _place(self, folder: str) -> _Place:
        path = self.root / folder
        names = file_names(path) if path.is_dir() else []
        images = [name for name in names if is_image_name(name)]
        endings = {posixpath.splitext(name)[1] for name in images}
        only_images = len(images) == sum(name[0] != "." for name in names)
        return _Place(folder, frozenset(names), tuple(sorted(endings)), only_images)

    def _choose(self, places: list[_Place], folder: str, name: str) -> tuple[str, str] | None:
        """Return folder and name of the exact path or its only variant; None if neither exists."""
        if places and places[0].folder == folder and name in places[0].names:
            return folder, name
        stem = _stem(name)
        found = [
            (place.folder, stem + ending)
            for place in places
            for ending in place.endings
            if stem + ending in place.names
        ]
        if not found:
            return None
        if len(found) > 1:
            shown = " and ".join(repr(posixpath.join(*file)) for file in found)
            problem = f"expected one file for this path, found several: {shown}"
            item = f"image {posixpath.join(folder, name)!r}"
            raise InputError(self.root, problem, item=item, todo="keep one of them")
        self._warn(folder, name, *found[0])
        return found[0]

    def _warn(self, folder: str, name: str, found_folder: str, found_name: str) -> None:
        """Print a notice if the path of a file differs from the written path."""
        if name != found_name:
            written, read = name[len(_stem(name)) :], found_name[len(_stem(found_name)) :]
            end = f"that end in {written}" if written else "without an image extension"
            notice(self.root, f"image paths {end} are read from {read} files with the same stem")
        if folder != found_folder and "Part " in found_folder:
            place = re.sub(r"Part \d+", "Part K", found_folder)
            place = re.sub(r"(imgs_)\d+.*", r"\1N", place)
            notice(self.root, f"images of train/imgs_N are read from {place!r}")
        if posixpath.basename(folder) != posixpath.basename(found_folder):
            notice(self.root, "'wentwrong' and 'wentrong' are treated as the same folder")


def is_image_name(name: str) -> bool:
    """Return true if a file name is not hidden and has an image extension."""
    return name[0] != "." and posixpath.splitext(name)[1].lower() in IMAGE_ENDINGS


def is_photo_name(name: str) -> bool:
    """Return true if a file name is not hidden and has an extension that photo search reads."""
    return name[0] != "." and Path(name).suffix.lower() in PHOTO_ENDINGS


def file_names(folder: Path) -> list[str]:
    """List the names of the files in a folder, including links to files, unordered.

    Raises:
        InputError: the folder cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if _is_file(entry)]
    except OSError as error:
        raise InputError(folder, f"cannot be listed: {error.strerror or error}") from error


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a circular link, or one without permission
        return False


def _split(image: str) -> tuple[str, str]:
    """Split a path into folder and name, with ``..`` resolved; fast enough for a million paths."""
    folder, _, name = image.rpartition("/")
    if name in ("", ".", ".."):
        return posixpath.split(posixpath.normpath(image))
    return _normal_folder(folder), name


@lru_cache(maxsize=4096)
def _normal_folder(folder: str) -> str:
    return posixpath.normpath(folder) if folder else ""


def _stem(name: str) -> str:
    """Remove the image extension from a name; other extensions are kept."""
    stem, ending = posixpath.splitext(name)
    return stem if ending.lower() in IMAGE_ENDINGS else name


def _places(folder: str) -> list[str]:
    """Return the folders that may contain the images of ``folder``; the exact path comes first."""
    places = [folder]
    shard = _SHARD_FOLDER.fullmatch(folder)
    if shard is not None:
        part, short = f"Part {part_of(int(shard[1]))}", folder.removeprefix("train/")
        places += [f"{part}/{short}", f"{part}/{folder}", f"train/{part}/{short}"]
    return [spelling[:-1] for place in places for spelling in spellings(f"{place}/")]


class Locator:
    """Locate the images of a labelled annotation file.

    By default, images are under the data root. With an image folder, leading folders of the paths
    are dropped one at a time until a file exists; the number dropped for the first image found is
    used for all images.
    """

    def __init__(self, source: Path, image_folder: str | Path | None, images: list[str]) -> None:
        self.source = source
        self.used: dict[Path, str] = {}
        self.drop = 0
        if image_folder is None:
            self.finder = ImageFinder(data_root(source))
        else:
            self.finder = ImageFinder(existing_folder(image_folder, "the folder of the images"))
            self.drop = self._leading_folders_to_drop(images)

    def _leading_folders_to_drop(self, images: list[str]) -> int:
        for image in images:
            parts = PurePosixPath(posixpath.normpath(image)).parts
            for drop in range(len(parts)):
                if self.finder.find("/".join(parts[drop:])).exists():
                    return drop
        return 0

    def __call__(self, image: str) -> Path:
        """Return the file of an image path.

        Raises:
            InputError: two images would share a file, an image has several variants, or a folder
                cannot be listed.
        """
        name = image
        if self.drop:
            parts = PurePosixPath(posixpath.normpath(image)).parts
            name = "/".join(parts[min(self.drop, len(parts) - 1) :])
        path = self.finder.find(name)
        if self.drop and self.used.setdefault(path, image) != image:
            problem = f"images {self.used[path]!r} and {image!r} would both be read from {path}"
            todo = "set --image_folder to the folder that the image paths are relative to"
            raise InputError(self.source, problem, todo=todo)
        return path
