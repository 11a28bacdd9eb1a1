"""Measure indexing with and without Ray: `python benchmarks/index_scale.py --folder /tmp/scale`.

Draws photographs into --folder and keeps them for the next run. Indexes them with the shipped mini
CLIP, without loader processes: in one process, and with each number of Ray's workers, each time in
a fresh command. Compares the rows. Also measures a second run, and the bytes per image of the index
and its exports. The time of a command includes starting Ray and loading the model. The rate
excludes the start: it counts the images between the first and the last saved manifest. Finally,
writes an index of --rows entries, unless it exists, and measures the start of an update. This start
reads the names, sizes, modification times, captions and offsets of all images and, if images were
renamed, their hashes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from indexes import write_index
from machine import describe, flag_parser, in_fresh_process, peak_mib
from PIL import Image

from pab.search.export import export_index
from pab.search.index import Entry, Index, Manifest, Member
from pab.search.previous import Previous

ROOT = Path(__file__).resolve().parents[1]
MODEL = ["--model", "clip", "--arch", f"local-dir:{ROOT / 'checkpoints/mini/clip'}"]
SECONDS_BETWEEN_LOOKS = 0.02


def draw(folder: Path, count: int, side: int) -> None:
    """Draw photographs of smooth noise, as JPEG."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        path = folder / f"{number:07}.jpg"
        if not path.is_file():
            coarse = np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(path)


def run(photos: Path, out: Path, *flags: str) -> tuple[float, float]:
    """Index the photographs; return the seconds, and the images per second after the start.

    The rate is NaN if fewer than two numbers of saved images were seen. The benchmark ends if the
    command fails.
    """
    words = ["--image_folder", str(photos), "--out", str(out), *flags]
    command = [sys.executable, "-m", "pab.search", "index", *words, *MODEL, "--num_workers", "0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    start, seen = time.perf_counter(), list[tuple[float, int]]()
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE) as process:
        while process.poll() is None:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            if (out / "manifest.json").is_file():
                rows = Index.open(out).rows
                if not seen or rows != seen[-1][1]:
                    seen.append((time.perf_counter(), rows))
        assert process.stderr is not None
        if process.returncode:
            raise SystemExit(process.stderr.read().decode())
    seconds = time.perf_counter() - start
    if len(seen) < 2:
        return seconds, float("nan")
    (began, first), (ended, last) = seen[0], seen[-1]
    return seconds, (last - first) / (ended - began)


def write_large(folder: Path, rows: int) -> None:
    """Write an index of random vectors of 8 numbers."""
    manifest = Manifest({}, str(folder), [Member("clip", "clip", (), {}, {}, 8)])
    rng = np.random.default_rng(0)

    def entry(n: int) -> Entry:
        return Entry(f"{n:09}.jpg", folder / f"{n:09}.jpg", n, n, rng.bytes(32).hex(), 512, 512)

    def vectors(part: range) -> np.ndarray:
        return rng.standard_normal((len(part), 8), dtype=np.float32)

    write_index(folder, manifest, rows, entry, vectors)


def start_update(folder: Path) -> tuple[float, float, float, float]:
    """Return seconds and peak MiB of reading an index's state, without and then with hashes."""
    start = time.perf_counter()
    previous = Previous(Index.open(folder))
    seconds, peak = time.perf_counter() - start, peak_mib()
    assert previous.contents
    return seconds, peak, time.perf_counter() - start, peak_mib()


def size_of(*files: Path) -> int:
    return sum(path.stat().st_size for path in files)


def main() -> None:
    args = flag_parser(
        __doc__,
        folder=(Path, "folder of the photographs and the indexes"),
        images=(2_000, "photographs"),
        side=(512, "side of a photograph, pixels"),
        block=(100, "images per part"),
        workers=([1, 2], "numbers of Ray's workers"),
        rows=(1_000_000, "images of the large index"),
    ).parse_args()
    photos = args.folder / f"photos_{args.images}_{args.side}"
    draw(photos, args.images, args.side)
    print(f"{describe()}; {args.images} photographs of {args.side} px")
    block = ["--block", str(args.block)]
    ways = {"one process": block} | {
        f"Ray, workers: {n}": [*block, "--engine", "ray", "--ray_workers", str(n)]
        for n in args.workers
    }
    names, expected = list[str](), np.empty(0)
    for name, flags in ways.items():
        out = args.folder / "index"
        shutil.rmtree(out, ignore_errors=True)
        seconds, rate = run(photos, out, *flags)
        again, _ = run(photos, out, *flags)
        index = Index.open(out)
        rows = index.vectors("clip", range(index.rows)).astype(np.float32)
        print(
            f"{name}: {seconds:.1f} s, {rate:.0f} images/s without the start; "
            f"second run {again:.1f} s", flush=True,
        )  # fmt: skip
        if not names:
            names, expected = list(index.names), rows
            shutil.rmtree(args.folder / "first", ignore_errors=True)
            shutil.copytree(out, args.folder / "first")
        else:
            same, difference = list(index.names) == names, np.abs(rows - expected).max()
            print(f"  same rows: {same}; largest difference of a number: {difference:.1e}")
    index = Index.open(args.folder / "first")
    vectors = size_of(*index.folder.glob("img_emb/*")) / index.rows
    metadata = size_of(*index.folder.glob("metadata/*")) / index.rows
    print(f"bytes per image: {vectors:.0f} of vectors, {metadata:.0f} of metadata")
    for kind in ("lancedb", "qdrant"):
        out = args.folder / kind
        shutil.rmtree(out, ignore_errors=True)
        export_index(index, out, kind)
        print(f"{kind}: {size_of(*out.iterdir()) / index.rows:,.0f} bytes per image")
    large = args.folder / f"large_{args.rows}"
    if not (large / "manifest.json").is_file():
        write_large(large, args.rows)
    seconds, peak, with_hashes, most = in_fresh_process(start_update, large)
    print(
        f"update of {args.rows:,} images: {seconds:.1f} s and {peak:.0f} MiB to read the state, "
        f"{with_hashes:.1f} s and {most:.0f} MiB with the hashes"
    )


if __name__ == "__main__":
    main()
