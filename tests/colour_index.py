"""Helpers for tests of the search: coloured pictures, their index, models and a running server."""

from __future__ import annotations

import contextlib
import io
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from PIL import Image
from starlette.types import ASGIApp

from pab.core.errors import InputError
from pab.data.images import load_image
from pab.data.records import GalleryImage
from pab.scoring.encoder import Encoder, Origin
from pab.scoring.rerank import Reranker
from pab.search.build import BuildSettings, build_index
from pab.search.index import Index
from pab.search.members import MemberChoice, Opened
from pab.search.server.app import create_app
from pab.search.server.command import address, listen
from pab.search.server.connections import Connection
from pab.search.server.security import Access
from pab.search.server.service import Service
from pab.search.sources import FolderSource, Source

COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0)}
CHOICES = [MemberChoice("mean", "mean", ()), MemberChoice("centre", "centre", ())]
TOKEN = "a-long-secret-token"
SCRIPT = "<img src=x onerror=alert(1)>.png"  # name of a picture


class Colours(Encoder):
    """Encode the mean colour of a picture, or of its centre, and the colours that a text names."""

    origin = Origin("colours", "colours.pth")

    def __init__(self, centre: bool) -> None:
        self.centre = centre

    def encode_images(self, images: Sequence[Any], *, reader: Any = None) -> torch.Tensor:
        rows = []
        for image in images:
            picture = image if isinstance(image, Image.Image) else reader.load(image.path)
            pixels = np.asarray(picture, dtype=np.float32) / 255
            if self.centre:
                high, wide = pixels.shape[0] // 3, pixels.shape[1] // 3
                pixels = pixels[high : -high or None, wide : -wide or None]
            rows.append(unit(pixels.mean((0, 1))))
        return torch.from_numpy(np.stack(rows)).float()

    def encode_texts(self, captions: Sequence[str]) -> torch.Tensor:
        rows = [
            unit(np.sum([COLOURS.get(word, (0, 0, 0)) for word in text.lower().split()], axis=0))
            for text in captions
        ]
        return torch.from_numpy(np.stack(rows)).float()


class Darkness(Reranker):
    """Reranker that prefers dark pictures, whatever the text.

    It fails if two threads use it at the same time.

    Attributes:
        asked: each scored caption, with its number of candidates.
        wait: called before the pictures are scored.
    """

    origin = Origin("darkness", "darkness.pth")

    def __init__(self, wait: Callable[[], object] = lambda: None) -> None:
        self.asked: list[tuple[str, int]] = []
        self.wait = wait
        self._working = threading.Lock()

    def rerank(
        self, captions: Sequence[str], images: Sequence[GalleryImage], candidates: torch.Tensor
    ) -> torch.Tensor:
        assert self._working.acquire(blocking=False), "used by two threads"
        try:
            if "forbidden" in captions[0]:
                raise InputError("/home/of/the/model", f"contains {captions[0]!r}")
            self.asked += [(caption, candidates.shape[1]) for caption in captions]
            self.wait()
            dark = torch.tensor([-np.asarray(load_image(one.path)).mean() for one in images])
            return dark[candidates].float()
        finally:
            self._working.release()


def unit(vector: np.ndarray) -> np.ndarray:
    """Scale a vector to unit length; replace a zero vector with grey."""
    length = np.linalg.norm(vector)
    return vector / length if length else np.full(3, 3**-0.5)


def png(colour: tuple[int, int, int], size: tuple[int, int] = (40, 30)) -> bytes:
    """Encode a picture of one colour as PNG."""
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, "png")
    return stream.getvalue()


def draw_pictures(folder: Path, count: int) -> None:
    """Draw pictures of four colours in two folders, and one picture with a hostile name."""
    for number in range(count):
        name = list(COLOURS)[number % 4]
        path = folder / ("park/day" if number % 2 else "street") / f"{name}_{number:03}.png"
        paint(path, name, number)
    paint(folder / SCRIPT, "red", count)


def paint(path: Path, colour: str, number: int) -> None:
    """Draw a disc of the colour on noise; the width of the picture is random."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(number)
    high, wide = 90, int(random.integers(60, 180))
    pixels = random.integers(0, 110, (high, wide, 3))
    rows, columns = np.ogrid[:high, :wide]
    disc = (rows - high / 2) ** 2 + (columns - wide / 2) ** 2 < 35**2
    pixels[disc] = np.array(COLOURS[colour]) * 200 + random.integers(0, 55, 3)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def make_index(root: Path, count: int = 60, members: int = 2) -> Index:
    """Draw pictures below a folder and index them there."""
    draw_pictures(root / "photos", count)
    return index_pictures(root, members)


def index_pictures(root: Path, members: int = 2, source: Source | None = None) -> Index:
    """Index the pictures of ``source``, by default ``root/photos``, or update their index."""
    opened = [Opened(choice, Colours(choice.name == "centre")) for choice in CHOICES[:members]]
    source = source or FolderSource(root / "photos", recursive=True)
    choices = CHOICES[:members]
    build_index(root / "index", source, choices, lambda: opened, BuildSettings("float32"))
    return Index.open(root / "index")


def service_of(index: Index, **more: Any) -> Service:
    """Create the search service of an index, with the encoders of this module."""
    encoders = {one.name: Colours(one.name == "centre") for one in index.members}
    return Service(index, encoders, **more)


@contextlib.contextmanager
def serving(app: ASGIApp, connection: type[Connection] = Connection) -> Iterator[str]:
    """Run a server in a thread; yield its address."""
    listening = listen("127.0.0.1", 0)
    config = uvicorn.Config(
        app, http=connection, ws="none", access_log=False, log_level="error", server_header=False
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield address(listening).rstrip("/")
    finally:
        server.should_exit = True
        thread.join(30)


@contextlib.contextmanager
def served(index: Index, token: str | None = None, parallel: int = 2, **more: Any) -> Iterator[str]:
    """Serve an index in a thread; yield the address."""
    service, access = service_of(index, **more), Access.create("127.0.0.1", token)
    with serving(create_app(service, access, parallel)) as at:
        yield at
