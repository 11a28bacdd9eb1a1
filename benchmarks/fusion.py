"""Speed and memory of the fusion at the challenge's size: `python benchmarks/fusion.py`.

Fuses four members of 1,978 queries x 36,773 images with `ensemble.run` (load, scale, fuse, rank,
write). The baseline loads all, scales each, sums with weights, applies `torch.argsort` to the whole
matrix, and writes. Each runs in its own process, and both lists must be equal. `--assignment` adds
one assignment of that matrix. `--wide` adds 200 x 100,000 and 200 x 1,000,000: time should grow
tenfold, and anonymous memory should not grow.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from machine import describe

from ensemble.run import main as fuse
from pab.scores import ScoreFile, save_scores

FLAGS = ("beit3", "uit", "blip2", "clip")
KEEPS = {"uit": 0.925, "blip2": 0.9, "clip": 0.9}


def make_members(folder: Path, queries: int, images: int) -> list[Path]:
    """Write synthetic score files that correlate as models of a task do: common part and noise."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}_{queries}x{images}.pt" for name in FLAGS]
    if all(path.is_file() for path in paths):
        return paths
    query_ids = [f"q{i:06d}" for i in range(queries)]
    gallery_ids = [f"g{i:07d}" for i in range(images)]
    for number, path in enumerate(paths):
        scores = torch.empty(queries, images)
        for row in range(queries):
            common = torch.randn(images, generator=torch.Generator().manual_seed(row))
            own = torch.randn(
                images, generator=torch.Generator().manual_seed(1_000_003 * (number + 1) + row)
            )
            scores[row] = (common + own) * (number + 1)
        save_scores(path, ScoreFile(scores, query_ids, gallery_ids, {}))
    return paths


def plain(paths: list[Path], out: Path) -> None:
    """Baseline."""
    fused: torch.Tensor | None = None
    loaded = [torch.load(path, weights_only=True) for path in paths]
    scaled = [(f["scores"] - f["scores"].min()) / (f["scores"].max() - f["scores"].min())
              for f in loaded]  # fmt: skip
    for name, scores in zip(FLAGS, scaled, strict=True):
        fused = scores if fused is None else KEEPS[name] * fused + (1 - KEEPS[name]) * scores
    assert fused is not None
    best = torch.argsort(fused, dim=1, descending=True, stable=True)[:, :10].tolist()
    names = loaded[0]["gallery_ids"]
    out.write_text("".join(" ".join(names[i] for i in row) + "\n" for row in best))


def ours(paths: list[Path], out: Path, *flags: str) -> None:
    """Run `python -m ensemble.run` with the published weights."""
    members = [
        word
        for name, path in zip(FLAGS, paths, strict=True)
        for word in (f"--{name}_score", str(path))
    ]
    fuse([*members, "--output_file", str(out), *flags])


class Watch(threading.Thread):
    """Thread that samples this process's anonymous memory, MiB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.stop = 0.0, False

    def run(self) -> None:
        while not self.stop:
            lines = Path("/proc/self/status").read_text().splitlines()
            anonymous = next(line for line in lines if line.startswith("RssAnon")).split()[1]
            self.most = max(self.most, int(anonymous) / 1024)
            time.sleep(0.01)


def child(way: str, paths: list[Path], out: Path) -> None:
    """Run one variant in this process; print seconds and memory as JSON."""
    watch = Watch()
    watch.start()
    start = time.perf_counter()
    if way == "plain":
        plain(paths, out)
    else:
        ours(paths, out, *(("--decode", "assignment") if way == "assignment" else ()))
    seconds = time.perf_counter() - start
    watch.stop = True
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "peak_mib": peak, "anonymous_mib": watch.most}))


def measured(way: str, paths: list[Path], out: Path, repeats: int) -> dict[str, float]:
    """Fastest of several processes."""
    command = [sys.executable, __file__, "--child", way, "--out", str(out), *map(str, paths)]
    found = []
    for _ in range(repeats):
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True
        )
        found.append(json.loads(done.stdout))
    best: dict[str, float] = min(found, key=lambda one: one["seconds"])
    print(
        f"  {way}: {best['seconds']:.2f} s, peak RSS {best['peak_mib']:.0f} MiB, "
        f"anonymous {best['anonymous_mib']:.0f} MiB",
        flush=True,
    )
    return best


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--folder", type=Path, default=Path("output/benchmarks/fusion"))
    parser.add_argument("--queries", type=int, default=1978)
    parser.add_argument("--images", type=int, default=36773)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--assignment", action="store_true", help="also time one assignment")
    parser.add_argument("--wide", action="store_true", help="also 200 x 100,000 and 1,000,000")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("paths", nargs="*", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.paths, args.out)
        return
    print(describe())
    paths = make_members(args.folder, args.queries, args.images)
    print(f"four members of {args.queries} x {args.images}")
    slow = measured("plain", paths, args.folder / "plain.txt", args.repeats)
    fast = measured("ours", paths, args.folder / "ours.txt", args.repeats)
    equal = (args.folder / "plain.txt").read_bytes() == (args.folder / "ours.txt").read_bytes()
    print(
        f"  {slow['seconds'] / fast['seconds']:.1f} times as fast, "
        f"{slow['peak_mib'] / fast['peak_mib']:.1f} times less memory; "
        f"lists {'equal' if equal else 'NOT EQUAL'}"
    )
    if args.assignment:
        measured("assignment", paths, args.folder / "assignment.txt", 1)
    if args.wide:
        for images in (100_000, 1_000_000):
            print(f"four members of 200 x {images}")
            wide = make_members(args.folder, 200, images)
            measured("ours", wide, args.folder / "wide.txt", args.repeats)


if __name__ == "__main__":
    main()
