"""Measure the search server under load, on the loopback interface.

    python benchmarks/search_load.py --index output/index --clients 50 --seconds 60
    python benchmarks/search_load.py --rows 100000

The first form starts `python -m pab.search serve` on an index. Many clients at once send text
queries and upload photographs. A client that gets status 429 waits for the time in the answer's
Retry-After header. Prints the number of answers per status, the latency of the successful ones, and
the memory of the server and its decoding processes: after the first fifth of the time, at its
maximum, and at the end.

The second form makes an index of random vectors, and prints the time of a text query without the
time of encoding it: in the server, and for a client.
"""

from __future__ import annotations

import asyncio
import io
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
import uvicorn
from indexes import write_index
from machine import flag_parser
from PIL import Image

from pab.scoring.encoder import Encoder
from pab.search.index import SHARD_ROWS, Entry, Index, Manifest, Member
from pab.search.server.app import create_app
from pab.search.server.command import address, listen
from pab.search.server.connections import Connection
from pab.search.server.security import Access
from pab.search.server.service import Service

WORDS = ("man", "woman", "red", "coat", "falls", "runs", "street", "bicycle", "night", "fight")
IMAGE_SHARE = 0.3  # of all queries
WIDTH = 768  # of the random vectors


@dataclass
class Record:
    """Answers of all clients.

    Attributes:
        statuses: number of answers per HTTP status or name of a connection error.
        seconds: latencies of the successful answers, per kind of query.
    """

    statuses: Counter[int | str] = field(default_factory=Counter)
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"text": [], "image": []})


def photograph(seed: int) -> bytes:
    """Generate a JPEG like a photograph, 1,600 x 1,200 px: smooth colours with noise."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 255, (12, 16, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((1600, 1200), Image.Resampling.BICUBIC)
    noise = generator.normal(0, 6, (1200, 1600, 3))
    stream = io.BytesIO()
    pixels = (np.asarray(smooth) + noise).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(stream, "jpeg", quality=85)
    return stream.getvalue()


async def client(base: str, number: int, end: float, photos: Sequence[bytes], out: Record) -> None:
    """Send queries one after the other until the time ``end``."""
    chance = random.Random(number)
    async with httpx.AsyncClient(base_url=base, timeout=60) as http:
        while time.monotonic() < end:
            kind = "image" if chance.random() < IMAGE_SHARE else "text"
            query: dict[str, Any] = {"json": {"text": " ".join(chance.choices(WORDS, k=5))}}
            if kind == "image":
                query = {"files": {"image": chance.choice(photos)}}
            began = time.monotonic()
            try:
                answer = await http.post("/api/search", **query)
            except httpx.HTTPError as error:
                out.statuses[type(error).__name__] += 1
                continue
            out.statuses[answer.status_code] += 1
            if answer.status_code == 200:
                out.seconds[kind].append(time.monotonic() - began)
            elif answer.status_code == 429:
                await asyncio.sleep(float(answer.headers["retry-after"]))


def tree_mib(process: int) -> float:
    """Return the resident memory of a process and all its descendants, in MiB."""
    total, waiting = 0.0, [process]
    while waiting:
        one = waiting.pop()
        try:
            status = Path(f"/proc/{one}/status").read_text(encoding="ascii")
            children = Path(f"/proc/{one}/task/{one}/children").read_text(encoding="ascii")
            for thread in Path(f"/proc/{one}/task").iterdir():
                if thread.name != str(one):
                    children += " " + (thread / "children").read_text(encoding="ascii")
        except OSError:  # the process has just ended
            continue
        match = re.search(r"VmRSS:\s+(\d+)", status)
        total += int(match[1]) / 1024 if match else 0.0
        waiting += map(int, children.split())
    return total


@contextmanager
def command(index: Path) -> Iterator[tuple[str, int]]:
    """Start the server as a command; yield its address and process id."""
    words = [sys.executable, "-m", "pab.search", "serve", "--index", str(index), "--port", "0"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                found = re.search(r" at (http://\S+)/", line)
                if found:
                    break
                print(line, end="", file=sys.stderr)
            else:
                sys.exit("the server did not start")
            while True:  # the server answers shortly after it prints its address
                try:
                    httpx.get(f"{found[1]}/api/health", timeout=60).raise_for_status()
                    break
                except httpx.TransportError:
                    time.sleep(0.2)
            yield found[1], process.pid
        finally:
            process.terminate()


async def load(base: str, process: int, clients: int, seconds: float) -> tuple[Record, list[float]]:
    """Run the clients; return their record and the server's memory, one sample per second."""
    out, samples, photos = Record(), list[float](), [photograph(seed) for seed in range(8)]
    end = time.monotonic() + seconds
    tasks = [asyncio.create_task(client(base, n, end, photos, out)) for n in range(clients)]
    while time.monotonic() < end:
        await asyncio.sleep(1)
        samples.append(tree_mib(process))
    await asyncio.gather(*tasks)
    return out, samples


def under_load(index: Path, clients: int, seconds: float) -> None:
    """Measure the server with many clients, and print the figures."""
    with command(index) as (base, process):
        out, samples = asyncio.run(load(base, process, clients, seconds))
    print(f"{clients} clients, {seconds:g} s, answers: {dict(out.statuses)}")
    for kind, taken in out.seconds.items():
        if taken:
            shares = (50, 95, 99, 100)
            shown = ", ".join(f"p{p} {np.percentile(taken, p):.2f} s" for p in shares)
            print(f"{kind}: {len(taken)} answers, {len(taken) / seconds:.1f} per s, {shown}")
    settled = samples[len(samples) // 5]
    print(
        f"memory: {settled:.0f} MiB after {len(samples) // 5 + 1} s, at most {max(samples):.0f}, "
        f"at the end {samples[-1]:.0f}; growth {max(samples) - settled:.0f} MiB"
    )


class Fixed(Encoder):
    """Encoder that takes almost no time: it returns random unit vectors."""

    def encode_texts(self, captions: Sequence[str]) -> torch.Tensor:
        """Return random unit vectors."""
        found = torch.randn(len(captions), WIDTH)
        return found / found.norm(dim=1, keepdim=True)


def random_index(folder: Path, rows: int) -> Index:
    """Write an index of random unit vectors in float16."""
    member = Member("fixed", "fixed", (), {}, {}, WIDTH)
    manifest = Manifest({"kind": "folder", "recursive": True}, str(folder), [member])
    generator = np.random.default_rng(0)

    def entry(number: int) -> Entry:
        name = f"camera_{number // SHARD_ROWS}/{number:09}.jpg"
        return Entry(name, folder / name, 100_000, 1, "0" * 64, 640, 480)

    def vectors(part: range) -> np.ndarray:
        found = generator.standard_normal((len(part), WIDTH), dtype=np.float32)
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    write_index(folder, manifest, rows, entry, vectors)
    return Index.open(folder)


def one_client(rows: int, queries: int) -> None:
    """Measure text queries of one client over random vectors, and print the figures."""
    with tempfile.TemporaryDirectory() as folder:
        service = Service(random_index(Path(folder), rows), {"fixed": Fixed()})
        app, listening = create_app(service, Access.create("127.0.0.1", None)), listen("::1", 0)
        server = uvicorn.Server(uvicorn.Config(app, http=Connection, log_level="error"))
        threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True).start()
        while not server.started:
            time.sleep(0.01)
        inside, outside = [], []
        with httpx.Client(base_url=address(listening), timeout=60) as http:
            for number in range(queries):
                began = time.monotonic()
                answer = http.post("/api/search", json={"text": f"query {number}"}).json()
                outside.append(time.monotonic() - began)
                inside.append(answer["milliseconds"] / 1000)
        server.should_exit = True
    for name, taken in (("in the server", inside), ("for the client", outside)):
        first, rest = taken[0], taken[1:]
        print(
            f"{rows:,} images, {name}: first query {first:.3f} s, then median "
            f"{np.median(rest):.3f} s, p95 {np.percentile(rest, 95):.3f} s"
        )


def main() -> None:
    """Run the measurements that the flags select."""
    args = flag_parser(
        __doc__, index=(None, "folder of an index to serve"), clients=50, seconds=60.0,
        rows=(0, "number of random vectors to index"), queries=(40, "text queries with --rows"),
    ).parse_args()  # fmt: skip
    if args.rows:
        one_client(args.rows, args.queries)
    if args.index is not None:
        under_load(args.index, args.clients, args.seconds)


if __name__ == "__main__":
    main()
