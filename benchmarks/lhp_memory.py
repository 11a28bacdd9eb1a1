"""Peak memory of scoring: one batch of images and the vectors, whatever the gallery's size.

Creates galleries of two sizes in a temporary folder (hard links to a few hundred small images), a
random debug-size model in released format, and a tokenizer. Runs ``python -m lhp.infer`` on each
gallery in its own process. Prints the peak memory of that process, of its loader workers and of all
together, beside the sizes of score matrix and vectors. The tiny model keeps weights from hiding
growth with the gallery. The folder is removed. Linux only (``/proc``).

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
PICTURES, SIDE = 300, 64  # distinct images, and their sides in pixels
SECONDS_BETWEEN_LOOKS = 0.25  # interval of sampling the processes' memory


@dataclass
class Held:
    """Peak memory of one run, MiB, and its seconds."""

    main: float = 0.0  # resident memory of the scoring process
    # Process id of a loader worker -> its resident memory; pages shared with the scoring process
    # count in both.
    workers: dict[int, float] = field(default_factory=dict)
    # All processes, with each page divided among its users (so libraries that other programs have
    # loaded count less); sampled, so a short peak may be missed.
    together: float = 0.0
    seconds: float = 0.0


def make_inputs(root: Path, queries: int) -> tuple[list[str], Beit3Config]:
    """Write pictures, queries, tokenizer and checkpoint; return flags and the model's sizes."""
    (root / "pictures").mkdir()
    for number, colour in enumerate(np.random.default_rng(0).integers(0, 256, (PICTURES, 3))):
        picture = Image.new("RGB", (SIDE, SIDE), tuple(map(int, colour)))
        picture.save(root / f"pictures/{number}.jpg")
    flags = write_queries(root, queries)
    config = model_config(MODEL, vocab_size=Tokenizer(root / "words.spm").vocab_size)
    return flags + write_lhp(root, MODEL, config), config


def make_gallery(root: Path, size: int) -> Path:
    """Create a folder with ``size`` names for the pictures."""
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
            continue  # the thread has just ended
    return found


def score(gallery: Path, flags: list[str]) -> Held:
    """Run the command and sample its memory."""
    out = gallery.parent
    argv = [
        *(sys.executable, "-m", "lhp.infer", "--image_folder", str(gallery), "--no_feature_cache"),
        *("--save_score", str(out / "scores.pt"), "--output_file", str(out / "list.txt"), *flags),
    ]
    held = Held()
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
        time.sleep(SECONDS_BETWEEN_LOOKS)
    held.seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, argv)
    held.main = usage.ru_maxrss / 1024  # maximum over the process and its finished children
    return held


def main() -> None:
    args = flag_parser(
        __doc__,
        sizes=([2_000, 40_000], "images of the galleries"),
        queries=50,
        batch_size=32,
        num_workers=2,
        folder=(None, "where to make the temporary folder"),
    ).parse_args()
    print(f"{describe()}; {MODEL}, fp32, batch {args.batch_size}, {args.num_workers} workers")
    print(f"{args.queries} queries, images of {SIDE} x {SIDE} px; peak memory in MiB")
    print(
        "  images  scoring  each worker        together  score matrix  vectors  seconds  images/s"
    )
    runs: list[Held] = []
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
        f"{more:,} images more: {grown:.1f} MiB more in the scoring process, {kept:.1f} of them "
        f"the score matrix and the vectors; their pixels would be {pixels:.0f}"
    )


if __name__ == "__main__":
    main()
