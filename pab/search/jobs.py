"""Settings and results of index runs, and the parts of a run that workers encode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pab.search.index import Dtype, Entry, FileState, Manifest, Unreadable
from pab.search.members import MemberChoice
from pab.search.sources import Container, Source

BLOCK_ROWS = 1_000  # rows that a stopped run may lose


@dataclass
class Report:
    """Counts of a run.

    Attributes:
        rows: images in the index at the end.
        kept: unchanged images.
        reused: images whose content the index had under another name or time.
        encoded: images that were decoded and encoded.
        removed: rows of removed and changed images.
        unreadable: name -> problem.
    """

    rows: int = 0
    kept: int = 0
    reused: int = 0
    encoded: int = 0
    removed: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)

    def add(self, part: Report) -> None:
        """Add the counts of images of a part of the run."""
        self.kept += part.kept
        self.reused += part.reused
        self.encoded += part.encoded


@dataclass(frozen=True)
class BuildSettings:
    """Settings of a run.

    Attributes:
        dtype: type of the stored vectors of a new index.
        block: rows per shard until the end of the run, when small shards are merged.
        check_content: hash every file, even if its size and time are unchanged.
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
    """Encoded part of a run, an index in a folder of its own.

    Attributes:
        number: position of its task.
        folder: folder of its files.
        manifest: its contents; None if no image had to be added, or none can be read.
        kept: rows of the index before the run that remain, int64.
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


Engine = Callable[[Job, Sequence[Task]], Iterator[Part]]  # yields one part per task, in any order
