"""Peak memory of scoring: one batch of images and the vectors, whatever the gallery's size.

Creates galleries of two sizes in a temporary folder (hard links to a few hundred small images), a
random debug-size model in released format, and a tokenizer. Runs ``python -m lhp.infer`` on each
gallery in its own process. Prints the peak memory of that process, of its loader workers and of all
together, beside the sizes of score matrix and vectors. The tiny model keeps weights from hiding
growth with the gallery. The folder is removed. Linux only (``/proc``).

    python benchmarks/lhp_memory.py [--sizes 2000 40000] [--queries 50] [--folder /tmp]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from machine import describe
from PIL import Image

from lhp.beit3 import Beit3Config, Beit3Retrieval, model_config
from lhp.tokenizer import Tokenizer
from lhp.train_tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[1]
MODEL = "beit3_debug_patch16_64"
SIZES = [2_000, 40_000]
QUERIES = 50
PICTURES, SIDE = 300, 64  # distinct images, and their sides in pixels
VOCABULARY = 96
SECONDS_BETWEEN_LOOKS = 0.25  # interval of sampling the processes' memory
TEXT = (
    "a person in red green blue white black jacket coat dress walks runs falls lies sits along "
    "across beside the road park street station bench wall while holding umbrella bag phone"
)


@dataclass
class Held:
    """Peak memory of one run, MiB.

    Attributes:
        main: resident memory of the scoring process.
        workers: process id -> resident memory of a loader worker; pages shared with the scoring
            process count in both.
        together: memory of all processes, with each page divided among its users (so libraries that
            other programs have loaded count less); sampled, so a short peak may be missed.
        seconds: total time.
    """

    main: float = 0.0
    workers: dict[int, float] = field(default_factory=dict)
    together: float = 0.0
    seconds: float = 0.0


def make_inputs(root: Path, queries: int) -> Beit3Config:
    """Write pictures, queries, tokenizer and checkpoint; return the model's sizes."""
    rng = np.random.default_rng(0)
    (root / "pictures").mkdir()
    for number, colour in enumerate(rng.integers(0, 256, (PICTURES, 3))):
        picture = Image.new("RGB", (SIDE, SIDE), tuple(map(int, colour)))
        picture.save(root / f"pictures/{number}.jpg")
    captions = [" ".join(rng.choice(TEXT.split(), 40)) for _ in range(max(queries, 500))]
    lines = [
        json.dumps({"query_index": f"q{number:04d}", "caption": caption})
        for number, caption in enumerate(captions[:queries])
    ]
    (root / "query.json").write_text("\n".join(lines) + "\n", encoding="utf-8")
    train_tokenizer(captions, root / "words.spm", VOCABULARY)
    torch.manual_seed(0)
    vocabulary = Tokenizer(root / "words.spm").vocab_size
    model = Beit3Retrieval(model_config(MODEL, vocab_size=vocabulary))
    torch.save({"model": model.state_dict(), "epoch": 0}, root / "model.pth")
    return model.config


def make_gallery(root: Path, size: int) -> Path:
    """Create a folder with ``size`` names for the pictures."""
    folder = root / f"gallery_{size}"
    folder.mkdir()
    for number in range(size):
        os.link(root / f"pictures/{number % PICTURES}.jpg", folder / f"image_{number:06d}.jpg")
    return folder


def status_mib(pid: int, name: str, key: str) -> float:
    """Read a figure of ``/proc/PID/NAME`` in MiB; 0 if the process has just ended."""
    try:
        text = Path(f"/proc/{pid}/{name}").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    found = [line.split()[1] for line in text.splitlines() if line.startswith(f"{key}:")]
    return int(found[0]) / 1024 if found else 0.0


def children(pid: int) -> list[int]:
    """List the child processes of all threads of ``pid``."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += map(int, task.read_text(encoding="ascii").split())
        except (FileNotFoundError, ProcessLookupError):
            continue  # the thread has just ended
    return found


def score(root: Path, gallery: Path, batch_size: int, num_workers: int) -> Held:
    """Run the command and sample its memory.

    Raises:
        subprocess.CalledProcessError: the command failed.
    """
    command = [
        sys.executable, "-m", "lhp.infer", "--model", MODEL, "--checkpoint", root / "model.pth",
        "--tokenizer", root / "words.spm", "--image_folder", gallery,
        "--annotation", root / "query.json", "--save_score", root / f"{gallery.name}.pt",
        "--output_file", root / f"{gallery.name}.txt", "--batch_size", batch_size,
        "--num_workers", num_workers, "--device", "cpu", "--no_feature_cache",
    ]  # fmt: skip
    argv = [str(word) for word in command]
    held = Held()
    start = time.perf_counter()
    process = subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.DEVNULL)
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        workers = children(process.pid)
        for worker in workers:
            peak = status_mib(worker, "status", "VmHWM")
            held.workers[worker] = max(peak, held.workers.get(worker, 0.0))
        now = sum(status_mib(one, "smaps_rollup", "Pss") for one in (process.pid, *workers))
        held.together = max(held.together, now)
        time.sleep(SECONDS_BETWEEN_LOOKS)
    held.seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, argv)
    held.main = usage.ru_maxrss / 1024  # maximum over the process and its finished children
    return held


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--sizes", type=int, nargs=2, default=SIZES, help="images of the galleries")
    parser.add_argument("--queries", type=int, default=QUERIES)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--folder", default=None, help="where to make the temporary folder")
    args = parser.parse_args(argv)
    print(f"{describe()}; {MODEL}, fp32, batch {args.batch_size}, {args.num_workers} workers")
    print(f"{args.queries} queries, images of {SIDE} x {SIDE} px; peak memory in MiB")
    print(
        "  images  scoring  each worker        together  score matrix  vectors  seconds  images/s"
    )
    runs: list[Held] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        root = Path(name)
        sizes = make_inputs(root, args.queries)
        column = 4 / 2**20  # MiB of one float32 per image
        for count in args.sizes:
            held = score(root, make_gallery(root, count), args.batch_size, args.num_workers)
            runs.append(held)
            workers = ", ".join(f"{value:.0f}" for value in held.workers.values()) or "-"
            print(  # images/s include program start and the check of every file
                f"{count:>8,}  {held.main:7.1f}  {workers:<17}  {held.together:8.1f}"
                f"  {count * args.queries * column:12.1f}  {count * sizes.embed_dim * column:7.1f}"
                f"  {held.seconds:7.1f}  {count / held.seconds:8.0f}",
                flush=True,
            )
    small, large = runs
    more = args.sizes[1] - args.sizes[0]
    grown = large.main - small.main
    kept = more * (args.queries + sizes.embed_dim) * column
    pixels = more * 3 * sizes.img_size**2 * column
    print(
        f"{more:,} images more: {grown:.1f} MiB more in the scoring process, {kept:.1f} of them "
        f"the score matrix and the vectors; their pixels would be {pixels:.0f}"
    )


if __name__ == "__main__":
    main()
