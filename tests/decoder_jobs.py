"""Jobs for a decoding process of the search server: three act like hostile files, one succeeds."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from pab.search.server.pictures import Job


@dataclass(frozen=True)
class Endless(Job):
    """Decoding that never ends."""

    def run(self) -> None:
        while True:
            time.sleep(1)


@dataclass(frozen=True)
class Greedy(Job):
    """Decoding that allocates 8 GiB."""

    def run(self) -> int:
        return len(bytearray(8 << 30))


@dataclass(frozen=True)
class Crash(Job):
    """Decoding that crashes."""

    def run(self) -> None:
        os.abort()


@dataclass(frozen=True)
class Works(Job):
    """Decoding that succeeds."""

    def run(self) -> int:
        return 42
