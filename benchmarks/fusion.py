"""Measure speed and memory of the fusion at the challenge's size: `python benchmarks/fusion.py`.

Fuses four members of 1,978 queries x 36,773 images with `ensemble.run` (load, scale, fuse, rank,
write). The baseline loads and scales all members, sums them with weights, and applies
`torch.argsort` to the whole matrix. Each variant runs in its own process; both lists must be equal.
`--assignment` also measures a fusion with assignment decoding. `--wide` also measures matrices of
200 x 100,000 and 200 x 1,000,000: the second should need ten times the time of the first, and no
more anonymous memory.
"""

from __future__ import annotations

import io
import time
from contextlib import redirect_stderr
from pathlib import Path

import torch
from machine import AnonymousPeak, describe, flag_parser, in_fresh_process, peak_mib

from ensemble.run import main as fuse
from pab.scores import ScoreFile, save_scores

FLAGS = ("beit3", "uit", "blip2", "clip")
# Weights kept by the running sum when a member is added, as published.
RUNNING_WEIGHTS = {"uit": 0.925, "blip2": 0.9, "clip": 0.9}


def make_members(folder: Path, queries: int, images: int) -> list[Path]:
    """Write correlated score files, the sums of common and individual noise, unless they exist."""
    print(f"four members of {queries} x {images}")
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}_{queries}x{images}.pt" for name in FLAGS]
    if all(path.is_file() for path in paths):
        return paths
    query_ids = [f"q{i:06d}" for i in range(queries)]
    gallery_ids = [f"g{i:07d}" for i in range(images)]

    def noise(seed: int) -> torch.Tensor:
        return torch.randn(images, generator=torch.Generator().manual_seed(seed))

    for number, path in enumerate(paths, 1):
        rows = [(noise(q) + noise(1_000_003 * number + q)) * number for q in range(queries)]
        save_scores(path, ScoreFile(torch.stack(rows), query_ids, gallery_ids, {}))
    return paths


def plain(paths: list[Path], out: Path) -> None:
    """Run the baseline."""
    loaded = [torch.load(path, weights_only=True) for path in paths]
    scaled = [(f["scores"] - f["scores"].min()) / (f["scores"].max() - f["scores"].min())
              for f in loaded]  # fmt: skip
    fused = scaled[0]
    for weight, scores in zip(RUNNING_WEIGHTS.values(), scaled[1:], strict=True):
        fused = weight * fused + (1 - weight) * scores
    best = torch.argsort(fused, dim=1, descending=True, stable=True)[:, :10].tolist()
    names = loaded[0]["gallery_ids"]
    out.write_text("".join(" ".join(names[i] for i in row) + "\n" for row in best))


def ours(paths: list[Path], out: Path, *flags: str) -> None:
    """Run `python -m ensemble.run` with the published weights."""
    members = zip((f"--{name}_score" for name in FLAGS), map(str, paths), strict=True)
    fuse([word for pair in members for word in pair] + ["--output_file", str(out), *flags])


def one_run(way: str, paths: list[Path], out: Path) -> tuple[float, float, float]:
    """Run one variant in this process; return seconds, peak and anonymous memory in MiB."""
    start = time.perf_counter()
    with AnonymousPeak() as anonymous, redirect_stderr(io.StringIO()):
        if way == "plain":
            plain(paths, out)
        else:
            ours(paths, out, *(("--decode", "assignment") if way == "assignment" else ()))
    return time.perf_counter() - start, peak_mib(), anonymous.most


def measured(way: str, paths: list[Path], out: Path, repeats: int) -> tuple[float, float]:
    """Return seconds and peak memory of the fastest of several processes."""
    found = [in_fresh_process(one_run, way, paths, out) for _ in range(repeats)]
    seconds, peak, anonymous = min(found)
    print(
        f"  {way}: {seconds:.2f} s, peak RSS {peak:.0f} MiB, anonymous {anonymous:.0f} MiB",
        flush=True,
    )
    return seconds, peak


def main() -> None:
    args = flag_parser(
        __doc__,
        folder=Path("output/benchmarks/fusion"),
        queries=1978,
        images=36773,
        repeats=3,
        assignment=(False, "also measure a fusion with assignment decoding"),
        wide=(False, "also measure 200 x 100,000 and 200 x 1,000,000 scores"),
    ).parse_args()
    print(describe())
    paths = make_members(args.folder, args.queries, args.images)
    by_plain, by_ours = args.folder / "plain.txt", args.folder / "ours.txt"
    slow, much = measured("plain", paths, by_plain, args.repeats)
    fast, little = measured("ours", paths, by_ours, args.repeats)
    equal = by_plain.read_bytes() == by_ours.read_bytes()
    print(
        f"  {slow / fast:.1f} times as fast, {much / little:.1f} times less memory; "
        f"lists {'equal' if equal else 'NOT EQUAL'}"
    )
    if args.assignment:
        measured("assignment", paths, args.folder / "assignment.txt", 1)
    for images in (100_000, 1_000_000) if args.wide else ():
        paths = make_members(args.folder, 200, images)
        measured("ours", paths, args.folder / "wide.txt", args.repeats)


if __name__ == "__main__":
    main()
