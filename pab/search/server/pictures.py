"""Decode pictures in other processes, with limits of time and memory.

A damaged or hostile file can then neither stop the server nor exhaust its memory. A process that
exceeds the time limit or fails is ended, and a later picture gets a new process.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import queue
import resource
import signal
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from PIL import Image

from pab.core.errors import InputError
from pab.data.photos import decode_photo, photo_size
from pab.search.index import Entry
from pab.search.sources import load_picture

LIMIT_S = 20.0  # seconds per picture; one of 200 megapixels takes about 6 on one core
START_S = 60.0  # seconds for a new process to import its modules
MEMORY = 4 << 30  # bytes per process; 200 megapixels need 0.8 GB, and conversions as much again
UPLOAD_MEGAPIXELS = 200
JPEG_QUALITY = 88
UPLOAD = "image"  # subject of messages, instead of a path
_READY = "ready"


class Job(ABC):
    """Work for a decoding process; a job is pickled."""

    @abstractmethod
    def run(self) -> Any:
        """Return a picklable result.

        Raises:
            InputError: the picture cannot be decoded.
        """


@dataclass(frozen=True)
class DecodeUpload(Job):
    """Decode a file that a client sent, to an upright RGB image."""

    content: bytes

    def run(self) -> Image.Image:
        """See :class:`Job`; the header is checked before anything is decoded."""
        if not self.content:
            raise InputError(UPLOAD, "cannot be read: an empty file")
        size = photo_size(io.BytesIO(self.content))
        if size is not None and size[0] * size[1] > UPLOAD_MEGAPIXELS * 1_000_000:
            words = f"{size[0]} x {size[1]}"
            problem = f"expected at most {UPLOAD_MEGAPIXELS} megapixels, found {words}"
            raise InputError(UPLOAD, problem)
        return decode_photo(io.BytesIO(self.content), UPLOAD)


@dataclass(frozen=True)
class MakeJpeg(Job):
    """Read an image of the index, reduce its sides to at most ``side`` px, and encode a JPEG."""

    entry: Entry
    side: int

    def run(self) -> bytes:
        """See :class:`Job`."""
        image = load_picture(self.entry)
        image.thumbnail((self.side, self.side))
        stream = io.BytesIO()
        image.save(stream, "jpeg", quality=JPEG_QUALITY, optimize=True, progressive=True)
        return stream.getvalue()


@dataclass(frozen=True)
class LoadPicture(Job):
    """Read an image of the index as an upright RGB image."""

    entry: Entry

    def run(self) -> Image.Image:
        """See :class:`Job`."""
        return load_picture(self.entry)


class Decoders:
    """Pool of decoding processes; they start when they are needed and end with the server.

    Args:
        limit_s: seconds per picture.
    """

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        self.limit_s = limit_s
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()

    def run(self, job: Job) -> Any:
        """Run a job in a process; the caller limits the number of jobs that run at a time.

        Raises:
            InputError: the picture cannot be decoded, or not within the limits.
            RuntimeError: a new process does not start.
        """
        try:
            worker = self._idle.get_nowait()
        except queue.Empty:
            worker = _Worker()
        if not worker.process.is_alive():  # ended by the system while it was idle
            worker.end()
            worker = _Worker()
        try:
            result = worker.run(job, self.limit_s)
        except BaseException:
            worker.end()
            raise
        self._idle.put(worker)
        if isinstance(result, InputError):
            raise result
        return result

    def close(self) -> None:
        """End all idle processes."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._idle.get_nowait().end()


class _Worker:
    """One process and the connection to it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        try:
            started = self.connection.poll(START_S) and self.connection.recv() == _READY
        except EOFError:  # the process has ended
            started = False
        if not started:
            self.end()
            raise RuntimeError(f"a decoding process ended, or did not start in {START_S:.0f} s")

    def run(self, job: Job, limit_s: float) -> Any:
        """Send a job and wait for its result, which may be an :class:`InputError`.

        Raises:
            InputError: the time is over, or the process has ended.
        """
        try:
            self.connection.send(job)
            if not self.connection.poll(limit_s):
                problem = f"cannot be decoded within {limit_s:g} s"
                raise InputError(UPLOAD, problem)
            return self.connection.recv()
        except (EOFError, OSError) as error:
            problem = "cannot be decoded: the process ended, perhaps at the memory limit"
            raise InputError(UPLOAD, problem) from error

    def end(self) -> None:
        """End the process at once."""
        self.connection.close()
        self.process.kill()
        self.process.join()


def _serve(connection: Connection) -> None:
    """Run jobs until the server closes the connection."""
    # Ctrl-C is for the server, which then ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")  # warnings would quote contents of the files
    connection.send(_READY)
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            result = job.run()
        except InputError as error:
            result = error
        except MemoryError:
            result = InputError(UPLOAD, "cannot be decoded within the memory limit")
        connection.send(result)
