"""Settings and results of index runs, and the parts of a run that workers encode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pab.core.progress import Progress
from pab.search.index import Dtype, Entry, FileState, Manifest, Unreadable
from pab.search.members import MemberChoice
from pab.search.sources import Container, Source

BLOCK_ROWS = 1_000  # rows per block


@dataclass
class Report:
    """Counts of a run.

    Attributes:
        rows: images in the index at the end.
        kept: unchanged images.
        reused: new or changed images whose content was already in the index; their vectors are
            reused.
        encoded: images that were encoded.
        removed: rows that the run dropped, such as those of removed and changed images.
        unreadable: name -> problem.
    """

    rows: int = 0
    kept: int = 0
    reused: int = 0
    encoded: int = 0
    removed: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)

    def add(self, part: Report) -> None:
        """Add the counts of kept, reused and encoded images of one part of the run."""
        self.kept += part.kept
        self.reused += part.reused
        self.encoded += part.encoded


@dataclass(frozen=True)
class BuildSettings:
    """Settings of a run.

    Attributes:
        dtype: type of the stored vectors of a new index.
        block: rows after which a shard is written; small shards are merged at the end of the run.
        check_content: hash every image, even if its size and modification time are unchanged.
    """

    dtype: Dtype = "float16"
    block: int = BLOCK_ROWS
    check_content: bool = False


Task = Sequence[Entry] | Container  # a block of plain files, or a container


@dataclass(frozen=True)
class Job:
    """Description of a run for its workers.

    Attributes:
        folder: folder for the parts, on the file system of the index.
        source, choices, settings: see :func:`pab.search.build.build_index`.
        index: folder of the index.
        manifest: contents of the index before the run; None for a new one.
    """

    folder: Path
    source: Source
    choices: Sequence[MemberChoice]
    settings: BuildSettings
    index: Path
    manifest: Manifest | None


@dataclass(frozen=True)
class Part:
    """Encoded part of a run: an index in a separate folder.

    Attributes:
        number: position of the part's task in the list of tasks.
        folder: folder of the part's files.
        manifest: contents of the part; None if it has no rows.
        kept: rows of the previous index that this part keeps, int64.
        report: counts of the part.
        unreadable, complete: see :class:`pab.search.index.Manifest`.
    """

    number: int
    folder: Path
    manifest: Manifest | None
    kept: np.ndarray
    report: Report
    unreadable: dict[str, Unreadable]
    complete: dict[str, FileState]


class Work:
    """Progress of a run, in images.

    The number of images in an archive or a video is unknown until the file is read. The number of
    remaining images is therefore estimated: the remaining bytes, times the images per byte so far.

    Args:
        tasks: the tasks of the run.
        shown: displays the progress; None displays nothing.
    """

    def __init__(self, tasks: Sequence[Task], shown: Progress | None = None) -> None:
        self._shown = shown
        # Bytes of containers whose images are encoded, and bytes that remain.
        self._encoded = 0
        self._left = sum(task.state.bytes for task in tasks if isinstance(task, Container))

    def add(self, images: int, size: int = 0) -> None:
        """Count images that take up ``size`` bytes of a container (0 for plain files)."""
        self._left -= size
        self._encoded += size
        if self._shown is None:
            return
        done = self._shown.done + images
        if self._encoded:
            self._shown.estimate(round(done * (1 + max(0, self._left) / self._encoded)))
        self._shown.update(images)

    def skip(self, size: int) -> None:
        """Count bytes of a container that need no encoding."""
        self._left -= size


Engine = Callable[[Job, Sequence[Task]], Iterator[Part]]  # yields one part per task, in any order
