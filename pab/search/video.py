"""Read frames of videos with PyAV, with exact time stamps.

A time stamp is the presentation time of a frame, in seconds from the first frame of the video. It
comes from the file, so it is right even for a variable frame rate. If a frame has none, its time is
computed from the average frame rate, with a notice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pab.core.errors import InputError
from pab.core.notices import notice
from pab.search.libraries import library

# In a frame of 1024 x 1024 px, a cell is the average of 16 x 16 px: small enough to show a person
# who moves, and large enough to average out the noise of a camera.
CELLS = 64  # side of the reduced grey frame, cells
LARGEST_DIFFERENCE = 12  # of any cell of nearly identical frames; grey levels, 0 to 255
# Playlists make the decoder open other files or addresses.
PLAYLISTS = frozenset(("concat", "hls", "applehttp", "dash", "sdp", "rtsp", "imf"))
_NEAR = Fraction(1, 10**7)  # s; tolerance for exact fractions that are stored as float64


@dataclass(frozen=True)
class Frame:
    """Decoded frame.

    Attributes:
        time_s: time stamp, seconds.
        decoded: PyAV's frame.
        share: fraction of the video that is read before the next frame is due, 0 to 1; None if the
            length of the video is unknown.
    """

    time_s: float
    decoded: Any
    share: float | None = None

    def picture(self) -> Image.Image:
        """Convert to an upright RGB image."""
        image: Image.Image = self.decoded.to_image()
        turn = self.decoded.rotation  # degrees, counterclockwise, as stored by phones
        return image.rotate(turn, expand=True) if turn else image


def sampled_frames(path: Path, every_s: float, *, distinct: bool = False) -> Iterator[Frame]:
    """Yield the first frame at or after each multiple of an interval.

    Args:
        path: the video.
        every_s: interval, seconds; 0 yields every frame.
        distinct: skip a frame that is nearly identical to the last one that was yielded.

    Raises:
        InputError: PyAV is not installed, or the file is not a video or is damaged; frames before
            the damage are yielded first.
    """
    interval, due = Fraction(str(every_s)), Fraction(0)
    last: np.ndarray | None = None
    with _opened(path) as (container, stream):
        length = _length(container, stream)
        for time, frame in _times(container, stream, path):
            if time < due:
                continue
            if interval:
                due = (time // interval + 1) * interval
            if distinct:
                cells = _cells(frame)
                if last is not None and np.abs(cells - last).max() <= LARGEST_DIFFERENCE:
                    continue
                last = cells
            end = due if interval else time
            yield Frame(float(time), frame, min(1.0, float(end / length)) if length else None)


def frame_at(path: Path, time_s: float) -> Image.Image:
    """Decode the frame at a time stamp, as an upright RGB image.

    Raises:
        InputError: PyAV is not installed, or the file cannot be decoded or has no such frame.
    """
    target = Fraction(time_s)
    for frames in (_frames_near(path, target), _decoded(path)):  # some files are not seekable
        for time, frame in frames:
            if abs(time - target) <= _NEAR:
                return Frame(time_s, frame).picture()
            if time > target:
                break
    raise InputError(path, f"expected a frame at {time_s:.3f} s, found none; the file has changed")


def _frames_near(path: Path, target: Fraction) -> Iterator[tuple[Fraction, Any]]:
    """Yield the frames from the last seek point before a time; nothing if seeking fails."""
    av = library("av", "videos")
    with _opened(path) as (container, stream):
        first = next(_times(container, stream, path), None)
        if first is None or first[1].pts is None:
            return
        start = first[1].pts
        try:
            container.seek(start + math.floor(target / stream.time_base), stream=stream)
        except (av.FFmpegError, OverflowError):
            return
        yield from _times(container, stream, path, start)


def _decoded(path: Path) -> Iterator[tuple[Fraction, Any]]:
    with _opened(path) as (container, stream):
        yield from _times(container, stream, path)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    av = library("av", "videos")
    # The decoder may open only files, so that a playlist cannot reach the network.
    with _explained(path):
        container = av.open(str(path), options={"protocol_whitelist": "file"})
    with container:
        names = set(container.format.name.split(","))
        if names & PLAYLISTS:
            problem = f"expected a video, found a playlist ({container.format.name})"
            raise InputError(path, problem, todo="pass the video files")
        if not container.streams.video:
            raise InputError(path, "expected a video, found no video stream")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        yield container, stream


def _length(container: Any, stream: Any) -> Fraction | None:
    """Return the length of a video in seconds, from its header; None if the header has none."""
    if stream.duration is not None:
        length = stream.duration * stream.time_base
    elif container.duration is not None:
        length = Fraction(container.duration, 1_000_000)  # microseconds
    else:
        return None
    return length if length > 0 else None


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Convert the decoder's errors to :class:`InputError`."""
    av = library("av", "videos")
    try:
        yield
    except (av.FFmpegError, OSError, ValueError) as error:
        words = getattr(error, "strerror", None) or str(error)
        raise InputError(path, f"cannot be decoded: {words}") from error


def _times(
    container: Any, stream: Any, path: Path, start: int | None = None
) -> Iterator[tuple[Fraction, Any]]:
    """Yield frames in order of time; the first frame, or the pts ``start``, has time 0."""
    frames, number, last = iter(container.decode(stream)), 0, Fraction(-1)
    while True:
        with _explained(path):
            frame = next(frames, None)
        if frame is None:
            return
        if frame.pts is not None:
            start = frame.pts if start is None else start
            time = (frame.pts - start) * stream.time_base
        elif stream.average_rate:
            notice(path, "frames without a time stamp get their time from the frame rate")
            time = number / stream.average_rate
        else:
            raise InputError(path, "expected frames with time stamps, found none")
        number += 1
        if time > last:  # damaged files may repeat time stamps
            last = time
            yield time, frame


def _cells(frame: Any) -> np.ndarray:
    """Reduce a frame to grey cells, int16 [CELLS, CELLS]."""
    grey = Image.fromarray(frame.to_ndarray(format="gray"))
    return np.asarray(grey.resize((CELLS, CELLS), Image.Resampling.BOX), dtype=np.int16)
