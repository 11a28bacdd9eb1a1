"""Encode parts of an index on workers; :func:`pab.search.build.build_index` combines them.

A part is a block of files, an archive, or a video. A worker writes each part as an index in a
separate folder. It writes the files first and then the manifest that lists them. The run then moves
the files into the index and lists them in the manifest of the index. A lost worker therefore loses
at most the parts that it was encoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from uuid import uuid4

import numpy as np

from pab.search.build import Run
from pab.search.jobs import Job, Part, Task, Work
from pab.search.members import Opened
from pab.search.previous import Previous


def encode_part(
    job: Job, number: int, task: Task, members: Sequence[Opened], old: Previous | None
) -> Part:
    """Encode a part of an index into a new folder.

    Each attempt at a part writes to a separate folder, because a worker that seems lost may still
    be writing.

    Args:
        job: the run.
        number: position of the task in the list of tasks.
        task: the images.
        members: the loaded members.
        old: the index before the run, whose vectors are reused; None for a new index.
            ``old.keep`` is overwritten.

    Raises:
        InputError: the part cannot be encoded or written, for example because a vector is not
            finite. Unreadable images and damaged containers are recorded in the part instead.
    """
    folder = job.folder / f"{number}_{uuid4().hex}"
    run = Run(folder, job.source, job.choices, lambda: members, job.settings)
    run.old, kept = old, np.empty(0, dtype=np.int64)
    if old is not None:
        old.keep[:] = False
    run.add(task, Work([task]))
    if old is not None:
        kept = np.flatnonzero(old.keep)
    return Part(number, folder, run.manifest, kept, run.report, run.unreadable, run.complete)
