"""Rows of a gallery in a memory-mapped file that the processes of a node share.

Every node has its own file, because machines that map one file in a shared folder do not always see
the same data. Each process writes a share of the rows, and :meth:`MappedRows.complete` sends them
to the other nodes.
"""

from __future__ import annotations

import math
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pab.core import processes
from pab.core.errors import InputError

ROWS_A_BLOCK = 256  # rows per exchange between nodes: 52 MB of image tokens at full size, fp32
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # Linux: drawn at each start of the machine


class MappedRows(NamedTuple):
    """Rows in an unlinked file; deleting the tensor frees the disk space.

    Attributes:
        rows: [G, ...] for G images, shared by all processes that map the same file.
        files: for each rank, the rank that created its file; the same list in all processes.
    """

    rows: Tensor
    files: list[int]

    def complete(self, device: torch.device) -> None:
        """Send every process's rows (:func:`pab.core.processes.share_of`) to the other nodes.

        Args:
            device: device of the group, on which rows are exchanged.
        """
        own = self.files[processes.rank()]
        writes = self.files.index(own) == processes.rank()  # one process per file
        if len(set(self.files)) > 1:
            for source, file in enumerate(self.files):
                share = range(source, len(self.rows), len(self.files))
                for start in range(0, len(share), ROWS_A_BLOCK):
                    places = list(share[start : start + ROWS_A_BLOCK])
                    # Bytes, because a group does not exchange all dtypes.
                    block = self.rows[places].view(torch.uint8).to(device)
                    block = processes.broadcast(block, source)
                    if writes and file != own:
                        self.rows[places] = block.cpu().view(self.rows.dtype)
        processes.barrier()  # until every file is complete


def mapped_rows(
    shape: tuple[int, ...], dtype: torch.dtype, folder: str | Path | None
) -> MappedRows:
    """Create a file on every node, and map it in the processes of the node.

    Two processes share a file if they have the same :func:`machine_name` and see each other's
    files. The second condition separates containers on one machine.

    Args:
        shape: number of rows, and the shape of a row.
        dtype: dtype of the rows.
        folder: folder of the file, created if missing; None uses the system's temporary folder.

    Raises:
        InputError: a process cannot create a file, reserve its disk space, or map it; raised in
            all processes.
    """
    where = Path(tempfile.gettempdir() if folder is None else folder)
    created: list[Path] = []  # empty if the folder is not writable

    def create() -> Path:
        with errors_of(where):
            where.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=where, prefix=".features-")
            os.close(handle)
            created.append(Path(name))
        return created[0]

    try:
        own = processes.on_all(create)
        machine = machine_name()
        others = processes.gather_objects((machine, own.name))
        seen = [
            rank for rank, (other, name) in enumerate(others)
            if other == machine and (where / name).is_file()
        ]  # fmt: skip
        files = processes.gather_objects(min(seen))
        size = math.prod(shape) * dtype.itemsize if processes.rank() in files else 0
        processes.on_all(partial(_reserve, own, size))
        shared = where / others[files[processes.rank()]][1]
        rows = processes.on_all(partial(map_rows, shared, shape, dtype))
    finally:
        for path in created:
            path.unlink(missing_ok=True)
    return MappedRows(rows, files)


def map_rows(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Map an existing file as a tensor; other processes can map the same file.

    Raises:
        InputError: the file is missing, has another size, or cannot be mapped.
    """
    count = math.prod(shape)
    with errors_of(path.parent):
        found = path.stat().st_size
        if found != count * dtype.itemsize:  # torch would extend it, or create a missing one
            raise OSError(f"expected {count * dtype.itemsize} bytes in {path.name}, found {found}")
        try:
            return torch.from_file(str(path), shared=True, size=count, dtype=dtype).view(shape)
        except RuntimeError as error:  # raised by torch if the file cannot be mapped
            raise OSError(str(error)) from error


def machine_name() -> str:
    """Return a name of this node, which differs from the names of the other nodes of a run.

    Clones of a machine can have the same host name, so the boot id of Linux and torchrun's number
    of the node (``GROUP_RANK``) are parts of the name.
    """
    boot = BOOT_ID.read_text().strip() if BOOT_ID.is_file() else ""
    return f"{platform.node()} {boot} {os.environ.get('GROUP_RANK', '')}"


def _reserve(path: Path, size: int) -> None:
    """Set the size of a file, and reserve its disk space where the system supports this.

    If the disk filled up later, the process would die without a message.
    """
    with errors_of(path.parent), path.open("r+b") as file:
        if size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            os.truncate(file.fileno(), size)


@contextmanager
def errors_of(folder: Path) -> Iterator[None]:
    """Convert the system's errors to an :class:`InputError` that names the folder."""
    try:
        yield
    except OSError as error:
        raise InputError(
            folder, f"cannot hold the gallery's features: {error}",
            todo="choose another folder with --cache_dir",
        ) from error  # fmt: skip
