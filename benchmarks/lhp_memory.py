"""Measure the peak memory of scoring at two or more gallery sizes.

Only the score matrix and the vectors should grow. Creates a temporary folder with the galleries
(hard links to 300 small images), a tokenizer and a debug-size model. The model has random weights
in the released format. It is tiny, so that its weights do not hide the growth with gallery size.
Runs ``python -m lhp.infer`` on each gallery in a new process. Prints the peak memory of that
process, of its loader workers, and of all these processes together. Also prints the sizes of the
score matrix and the vectors. Linux only (``/proc``).

    python benchmarks/lhp_memory.py [--sizes 2000 40000] [--queries 50] [--folder /tmp]
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from machine import describe, flag_parser, memory_mib
from models import write_lhp, write_queries
from PIL import Image

from lhp.beit3 import Beit3Config, model_config
from lhp.tokenizer import Tokenizer

MODEL = "beit3_debug_patch16_64"
PICTURES, SIDE = 300, 64  # number of distinct images; side of each, pixels
SAMPLING_INTERVAL = 0.25  # seconds between two memory samples


@dataclass
class PeakMemory:
    """Peak memory (MiB) and duration (seconds) of one run."""

    main: float = 0.0  # peak resident memory of the scoring process
    # Process id of a loader worker -> its peak resident memory, which includes pages shared with
    # the scoring process.
    workers: dict[int, float] = field(default_factory=dict)
    # All processes, with each page divided among the processes that use it, including other
    # programs; sampled, so a short peak may be missed.
    together: float = 0.0
    seconds: float = 0.0


def make_inputs(root: Path, queries: int) -> tuple[list[str], Beit3Config]:
    """Write images, queries, tokenizer and checkpoint; return flags and the model's config."""
    (root / "pictures").mkdir()
    for number, colour in enumerate(np.random.default_rng(0).integers(0, 256, (PICTURES, 3))):
        picture = Image.new("RGB", (SIDE, SIDE), tuple(map(int, colour)))
        picture.save(root / f"pictures/{number}.jpg")
    flags = write_queries(root, queries)
    config = model_config(MODEL, vocab_size=Tokenizer(root / "words.spm").vocab_size)
    return flags + write_lhp(root, MODEL, config), config


def make_gallery(root: Path, size: int) -> Path:
    """Create a folder with ``size`` hard links to the images."""
    folder = root / f"gallery_{size}"
    folder.mkdir()
    for number in range(size):
        os.link(root / f"pictures/{number % PICTURES}.jpg", folder / f"image_{number:06d}.jpg")
    return folder


def children(pid: int) -> list[int]:
    """List the child processes of all threads of ``pid``."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += map(int, task.read_text(encoding="ascii").split())
        except (FileNotFoundError, ProcessLookupError):
            continue  # the thread has ended
    return found


def score(gallery: Path, flags: list[str]) -> PeakMemory:
    """Run the command and measure its memory.

    Raises:
        CalledProcessError: the command failed.
    """
    out = gallery.parent
    argv = [
        *(sys.executable, "-m", "lhp.infer", "--image_folder", str(gallery), "--no_feature_cache"),
        *("--save_score", str(out / "scores.pt"), "--output_file", str(out / "list.txt"), *flags),
    ]
    held = PeakMemory()
    start = time.perf_counter()
    process = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        workers = children(process.pid)
        for worker in workers:
            peak = memory_mib("VmHWM", worker)
            held.workers[worker] = max(peak, held.workers.get(worker, 0.0))
        now = sum(memory_mib("Pss", one, "smaps_rollup") for one in (process.pid, *workers))
        held.together = max(held.together, now)
        time.sleep(SAMPLING_INTERVAL)
    held.seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, argv)
    held.main = usage.ru_maxrss / 1024  # maximum over the process and its finished children
    return held


def main() -> None:
    args = flag_parser(
        __doc__,
        sizes=([2_000, 40_000], "images per gallery"),
        queries=50,
        batch_size=32,
        num_workers=2,
        folder=(None, "parent of the temporary folder"),
    ).parse_args()
    print(f"{describe()}; {MODEL}, fp32, batch {args.batch_size}, {args.num_workers} workers")
    print(f"{args.queries} queries, images of {SIDE} x {SIDE} px; peak memory in MiB")
    print(
        "  images  scoring  each worker        together  score matrix  vectors  seconds  images/s"
    )
    runs: list[PeakMemory] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        root = Path(name)
        flags, sizes = make_inputs(root, args.queries)
        flags += ["--batch_size", str(args.batch_size), "--num_workers", str(args.num_workers)]
        column = 4 / 2**20  # MiB of one float32 per image
        for count in args.sizes:
            held = score(make_gallery(root, count), flags)
            runs.append(held)
            workers = ", ".join(f"{value:.0f}" for value in held.workers.values()) or "-"
            print(  # images/s include program start and the check of every file
                f"{count:>8,}  {held.main:7.1f}  {workers:<17}  {held.together:8.1f}"
                f"  {count * args.queries * column:12.1f}  {count * sizes.embed_dim * column:7.1f}"
                f"  {held.seconds:7.1f}  {count / held.seconds:8.0f}",
                flush=True,
            )
    more = args.sizes[-1] - args.sizes[0]
    grown = runs[-1].main - runs[0].main
    kept = more * (args.queries + sizes.embed_dim) * column
    pixels = more * 3 * sizes.img_size**2 * column
    print(
        f"{more:,} additional images: the scoring process grew by {grown:.1f} MiB (score matrix "
        f"and vectors: {kept:.1f} MiB; decoded pixels would need {pixels:.0f} MiB)"
    )


if __name__ == "__main__":
    main()
