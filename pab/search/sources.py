"""Sources of images to index: a folder, a table, WebDataset archives, or videos.

A source lists plain files at once. Archives and videos are containers: their images are listed when
the container is opened. The name of an image begins with the path of its file, relative to the
root of the source.
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from pab.core.counts import counted
from pab.core.errors import InputError
from pab.core.files import existing_file
from pab.core.notices import notice
from pab.data.bad_lines import BadLines
from pab.data.image_paths import PHOTO_ENDINGS
from pab.data.images import without_content
from pab.data.photos import PhotoFolder, decode_photo, list_photos, load_photo, photo_size
from pab.data.tables import TableColumns, listed_images
from pab.search.archives import packed_images, read_packed
from pab.search.index import Entry, FileState, Manifest
from pab.search.video import Frame, frame_at, sampled_frames

_LARGE = threading.Lock()  # only one thread at a time decodes a large image of an archive


@dataclass(frozen=True)
class Item:
    """Image of a container: its entry so far, and a function that reads the image.

    ``load`` returns the entry with its hash and its size in pixels, and the upright RGB image. It
    raises :class:`InputError` if the image cannot be read. ``size`` is the number of bytes of the
    container that this image accounts for (estimated for videos), for the progress display; 0 if
    unknown.
    """

    entry: Entry
    load: Callable[[], tuple[Entry, Image.Image]]
    size: int


@dataclass(frozen=True)
class Container(ABC):
    """Archive or video: its name, path and state. Its images are named ``NAME/...``."""

    name: str
    path: Path
    state: FileState

    @abstractmethod
    def items(self, unreadable: dict[str, str]) -> Iterator[Item]:
        """Yield the images.

        Args:
            unreadable: receives the problem of each image that cannot be used, by full name.

        Raises:
            InputError: the file cannot be read or is damaged; images before the damage are yielded
                first.
        """


@dataclass(frozen=True)
class Archive(Container):
    """WebDataset archive; an image is named ``ARCHIVE.tar/NAME``."""

    def items(self, unreadable: dict[str, str]) -> Iterator[Item]:
        """See :class:`Container`."""
        bad: dict[str, str] = {}
        try:
            for packed in packed_images(self.path, bad):
                entry = Entry(
                    f"{self.name}/{packed.name}", self.path, packed.size, self.state.mtime_ns,
                    offset=packed.offset, caption=packed.caption,
                )  # fmt: skip
                yield Item(entry, partial(_load_packed, entry), packed.size)
        finally:
            unreadable.update({f"{self.name}/{name}": why for name, why in bad.items()})


@dataclass(frozen=True)
class Video(Container):
    """Video; a frame is named ``VIDEO/HH:MM:SS.mmm``. See :func:`sampled_frames`."""

    every_s: float
    distinct: bool

    def items(self, unreadable: dict[str, str]) -> Iterator[Item]:
        """See :class:`Container`."""
        state, last, read = self.state, "", 0
        for frame in sampled_frames(self.path, self.every_s, distinct=self.distinct):
            name = f"{self.name}/{clock_time(frame.time_s)}"
            if name == last:  # of several frames within a millisecond, the first is used
                continue
            last = name
            entry = Entry(name, self.path, state.bytes, state.mtime_ns, time_s=frame.time_s)
            before, read = read, round(state.bytes * (frame.share or 0))
            yield Item(entry, partial(_load_frame, entry, frame), read - before)


@dataclass
class Listing:
    """Contents of a source.

    Attributes:
        images: plain files, sorted by name.
        containers: sorted by name.
        unreadable: name -> problem of files that cannot be opened.
    """

    images: list[Entry] = field(default_factory=list)
    containers: list[Container] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)


class Source(ABC):
    """Source of images.

    Attributes:
        root: absolute path of a folder that contains all the files, directly or in subfolders.
    """

    root: Path

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Return the settings as plain values; an index accepts only a source with equal values."""

    @abstractmethod
    def list(self) -> Listing:
        """List the files.

        Raises:
            InputError: the source has no files, or cannot be read.
        """


class FolderSource(Source):
    """Photographs of a folder."""

    def __init__(self, folder: Path, *, recursive: bool) -> None:
        self.folder, self.recursive, self.root = folder, recursive, absolute(folder)

    def facts(self) -> dict[str, Any]:
        """See :class:`Source`."""
        return {"kind": "folder", "recursive": self.recursive}

    def list(self) -> Listing:
        """See :class:`Source`; also prints notices about skipped files."""
        found = list_photos(self.root, recursive=self.recursive)
        warn_left_out(self.folder, found)
        listing = Listing(unreadable=dict(found.unreadable))
        for photo in found.photos:
            _add(listing, photo.gallery_id, photo.path, None)
        return listing


class TableSource(Source):
    """Images listed in a CSV or TSV table.

    Image names are relative to ``folder``, or to the table's folder if ``folder`` is None.
    """

    def __init__(self, table: Path, columns: TableColumns, folder: Path | None) -> None:
        self.table, self.columns = existing_file(table, "a table"), columns
        self.root = absolute(folder or table.parent)

    def facts(self) -> dict[str, Any]:
        """See :class:`Source`."""
        keys = {"image": self.columns.image, "caption": self.columns.caption}
        return {"kind": "table", "table": self.table.name, **keys}

    def list(self) -> Listing:
        """See :class:`Source`; several captions of an image are joined, one per line.

        Unlike for scoring and training, captions may be empty or missing.

        Raises:
            InputError: the table cannot be read or has no images, or some rows are invalid, for
                example because a path leaves the folder; the error counts such rows.
        """
        bad, captions = BadLines(), dict[str, list[str]]()
        for image, caption in listed_images(absolute(self.table), self.root, self.columns, bad):
            captions.setdefault(image, []).extend([caption] if caption else [])
        bad.check(self.table)
        if not captions:
            raise InputError(self.table, "expected rows with images, found none")
        listing = Listing()
        for name in sorted(captions):
            _add(listing, name, self.root / name, "\n".join(captions[name]) or None)
        return listing


class ContainerSource(Source):
    """Archives or videos; names are relative to the common folder of the files."""

    def __init__(self, files: Sequence[Path]) -> None:
        paths = sorted({absolute(path) for path in files})
        self.files = paths
        self.root = Path(os.path.commonpath([path.parent for path in paths]))

    def list(self) -> Listing:
        """See :class:`Source`."""
        listing = Listing()
        for path in self.files:
            name = path.relative_to(self.root).as_posix()
            shown = os.fsencode(name).decode("utf-8", "backslashreplace")
            problem = without_content(path)
            if problem is None:
                listing.containers.append(self._container(shown, path, state_of(path)))
            else:
                listing.unreadable[shown] = problem
        return listing

    @abstractmethod
    def _container(self, name: str, path: Path, state: FileState) -> Container:
        """Create the container of a file."""


class ArchiveSource(ContainerSource):
    """WebDataset archives."""

    def __init__(self, paths: Sequence[Path]) -> None:
        files = [file for path in paths for file in _archives_of(path)]
        super().__init__(files)

    def facts(self) -> dict[str, Any]:
        """See :class:`Source`."""
        return {"kind": "archives"}

    def _container(self, name: str, path: Path, state: FileState) -> Archive:
        return Archive(name, path, state)


class VideoSource(ContainerSource):
    """Frames of videos."""

    def __init__(self, paths: Sequence[Path], every_s: float, *, distinct: bool) -> None:
        for path in paths:
            existing_file(path, "a video")
        super().__init__(paths)
        self.every_s, self.distinct = every_s, distinct

    def facts(self) -> dict[str, Any]:
        """See :class:`Source`."""
        return {"kind": "videos", "every_s": self.every_s, "distinct": self.distinct}

    def _container(self, name: str, path: Path, state: FileState) -> Video:
        return Video(name, path, state, self.every_s, self.distinct)


def check_source(folder: Path, manifest: Manifest, source: Source) -> None:
    """Reject a source other than that of an index; an image folder that has moved is accepted.

    The common folder of archives or videos may be above or below that of the index. All names then
    change, and images are recognized by content.

    Raises:
        InputError: the settings differ, or the image folder of the index still exists but is not
            that of the source.
    """
    facts = source.facts()
    if facts != manifest.source:
        name = next(
            key
            for key in {**manifest.source, **facts}
            if facts.get(key) != manifest.source.get(key)
        )
        known = f"{name} {manifest.source.get(name)}"
        problem = f"expected {known}, as in the index, found {facts.get(name)}"
        raise InputError(folder, problem, todo="use another --out")
    root, now = old_root(manifest, source), source.root.resolve()
    nested = isinstance(source, ContainerSource) and (root in now.parents or now in root.parents)
    if root != now and not nested:
        raise InputError(
            folder, f"expected images of {root}, found {source.root}", todo="use another --out"
        )


def old_root(manifest: Manifest, source: Source) -> Path:
    """Return the resolved folder of an index's names: that of the source if its own has moved."""
    root = Path(manifest.root)
    return (root if root.is_dir() else source.root).resolve()


def check_containers(
    folder: Path, root: Path, manifest: Manifest, source: Source, listing: Listing
) -> None:
    """Refuse to remove the images of a container that exists but was not passed or is unreadable.

    Args:
        folder: folder of the index.
        root: see :func:`old_root`.
        manifest: contents of the index.
        source: the containers that were passed.
        listing: contents of the source.

    Raises:
        InputError: see above.
    """
    listed = {source.root.resolve() / one.name for one in listing.containers}
    problems = {source.root.resolve() / name: why for name, why in listing.unreadable.items()}
    for name in manifest.complete:
        path = root / name
        if path in problems:
            raise InputError(
                folder, f"expected every archive or video of the index to be readable: "
                f"{problems[path]}", item=f"file {name!r}",
                todo="restore the file, or delete it to remove its images",
            )  # fmt: skip
        if path not in listed and path.is_file():
            raise InputError(
                folder, "expected every archive or video of the index",
                item=f"file {name!r}", todo="pass this file too, or use another --out",
            )  # fmt: skip


def load_picture(entry: Entry) -> Image.Image:
    """Read an image of an index, upright and in RGB, from its file, archive or video.

    Raises:
        InputError: the image cannot be read.
    """
    if entry.time_s is not None:
        return frame_at(entry.path, entry.time_s)
    if entry.offset is not None:
        return _load_packed(entry)[1]
    return load_photo(entry.path)


def with_content(entry: Entry) -> Entry:
    """Return the entry of a plain file with its SHA-256, and its size in pixels if known.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        with entry.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            size = photo_size(file) or (None, None)
    except OSError as error:
        raise InputError(entry.path, f"cannot be read: {error.strerror or error}") from error
    return replace(entry, sha256=digest, width=size[0], height=size[1])


def state_of(path: Path) -> FileState:
    """Return the size and modification time of a file."""
    status = path.stat()
    return FileState(status.st_size, status.st_mtime_ns)


def clock_time(seconds: float) -> str:
    """Format a time as ``HH:MM:SS.mmm``; names of frames then sort by time up to 100 hours."""
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}.{rest % 1000:03}"


def absolute(path: Path) -> Path:
    """Make a path absolute; resolve ``..``, but not symbolic links."""
    return Path(os.path.abspath(path))  # noqa: PTH100 - Path.absolute keeps ".."


def warn_left_out(where: Path, folder: PhotoFolder) -> None:
    """Print a notice about images in nested folders, and one about other skipped files.

    Raises:
        InputError: the folder has no image to search.
    """
    nested = ""
    if folder.nested:
        images = counted(folder.nested.total(), "image")
        nested = f"not searched: {images} in {counted(len(folder.nested), 'nested folder')}"
    if not folder.photos and not folder.unreadable:
        endings = ", ".join(sorted(PHOTO_ENDINGS))
        raise InputError(
            where,
            f"expected images ({endings}), found none" + (f"; {nested}" if nested else ""),
            todo="add --recursive" if nested else None,
        )
    if nested:
        notice(where, f"{nested}; --recursive also searches nested folders")
    if folder.left_out():
        notice(where, f"left out: {folder.left_out()}")


def _add(listing: Listing, name: str, path: Path, caption: str | None) -> None:
    try:
        state = state_of(path)
    except (OSError, ValueError):
        state = FileState(0, 0)
    problem = without_content(path) if state.bytes == 0 else None
    if problem is None:
        entry = Entry(name, path, state.bytes, state.mtime_ns, caption=caption)
        listing.images.append(entry)
    else:
        listing.unreadable[name] = problem


def _archives_of(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(path.glob("*.tar"))
        if not found:
            raise InputError(path, "expected a folder with .tar files, found none")
        return found
    return [existing_file(path, "a .tar file or a folder of them")]


def _load_packed(entry: Entry) -> tuple[Entry, Image.Image]:
    assert entry.offset is not None
    content = read_packed(entry.path, entry.offset, entry.bytes)
    image = decode_photo(io.BytesIO(content), entry.path, large=_LARGE)
    size = photo_size(io.BytesIO(content)) or image.size
    digest = hashlib.sha256(content).hexdigest()
    return replace(entry, sha256=digest, width=size[0], height=size[1]), image


def _load_frame(entry: Entry, frame: Frame) -> tuple[Entry, Image.Image]:
    image = frame.picture()
    digest = hashlib.sha256(image.tobytes()).hexdigest()
    return replace(entry, sha256=digest, width=image.width, height=image.height), image
