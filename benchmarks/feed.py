"""Measure the data feed, from JPEG files to batches for the device: `python benchmarks/feed.py`.

Compares, for each model's preprocessing and synthetic photographs of two sizes, on one core:

- limit: decode and resize alone, in this process;
- feed: scoring's loader with one worker, which reads, hashes, decodes and resizes (uint8 batches);
- old: the feed of an early version of this project. Every file is opened three times: to check it
  (decoded at an eighth of its size), to hash it, and to load it. A worker normalizes to float32;
- plain: torchvision's pipeline in a worker, with its default loader, `ToTensor` and `Normalize`.

Prints images per second of processor time. Every repeat measures all four variants, and the best
time of each is used. The time of a worker includes the transfer of its batches, but not the start
of its process. "busy" is the share of the wall time in which the worker runs or waits for a core;
at 100 %, it never waits for a disk or for another process. The normalization on the device is not
included in "feed"; its time on this CPU is printed separately.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from machine import best_seconds, describe, flag_parser
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets.folder import default_loader
from torchvision.transforms import v2

from pab.core.files import sha256_of_file
from pab.data.image_loader import ImageLoader
from pab.data.images import ImageRecipe, recipe, verify_images
from pab.data.pixels import CPU, normalizer
from pab.data.records import GalleryImage

MODELS = {
    "LHP": ("beit3", 384),
    "UIT": ("uit", 224),
    "CLIP": ("clip", 336),
    "BLIP-2": ("blip2", 224),
}
BARS = {"old": 1.3, "limit": 0.85}  # variant -> required speed of the feed, relative to it
OCTAVES = 6  # of the synthetic photographs: detail at all scales, as in natural images
GRAIN = 3.0  # standard deviation of the sensor noise, 8-bit levels
QUALITY = 90  # of the JPEGs, with Pillow's default chroma subsampling


def photograph(side: int, draw: np.random.Generator) -> Image.Image:
    """Create an image with detail at all scales, and grain.

    The detail of each scale is half as strong as that of the next coarser scale.
    """
    pixels = np.full((side, side, 3), 128.0)
    for octave in range(OCTAVES):
        grid = draw.integers(0, 256, (4 * 2**octave, 4 * 2**octave, 3), dtype=np.uint8)
        layer = Image.fromarray(grid).resize((side, side), Image.Resampling.BICUBIC)
        pixels += (np.asarray(layer) - 128.0) / 2**octave
    pixels += draw.normal(0.0, GRAIN, (side, side, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


class Files(Dataset[Tensor]):
    """Dataset of files with a function from a path to pixels."""

    def __init__(self, paths: Sequence[Path], load: Callable[[Path], Tensor]) -> None:
        self.paths, self.load = paths, load

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, position: int) -> Tensor:
        return self.load(self.paths[position])


def worker_seconds(loader: Any) -> tuple[float, float]:
    """Read all batches with one worker; return its processor seconds and its busy fraction."""
    start = time.perf_counter()
    batches = iter(loader)
    (worker,) = batches._workers
    for _ in range(len(loader)):
        next(batches)
    wall = time.perf_counter() - start
    running, waiting, _ = Path(f"/proc/{worker.pid}/schedstat").read_text().split()
    return int(running) / 1e9, (int(running) + int(waiting)) / 1e9 / wall


def own_seconds(work: Callable[[], object]) -> float:
    """Run a function in this process; return its processor time in seconds."""
    start = time.process_time()
    work()
    return time.process_time() - start


def shape_of(found: ImageRecipe, library: Any) -> list[Any]:
    """Return the resizing of a recipe as transforms of `library`, torchvision's v1 or v2 API."""
    bicubic = transforms.InterpolationMode.BICUBIC
    if found.resize == "squash":
        return [library.Resize((found.size, found.size), interpolation=bicubic)]
    return [library.Resize(found.size, interpolation=bicubic), library.CenterCrop(found.size)]


def measure(paths: Sequence[Path], found: ImageRecipe, batch: int) -> dict[str, float]:
    """Return the seconds of each variant and of a worker's start, and the feed's busy fraction."""
    resize, colours = shape_of(found, v2), (list(found.mean), list(found.std))
    to_float = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(*colours)]
    old = v2.Compose([*resize, v2.PILToTensor(), *to_float])
    tensor = [transforms.ToTensor(), transforms.Normalize(*colours)]
    plain = transforms.Compose([*shape_of(found, transforms), *tensor])

    def load(path: Path) -> Tensor:
        with Image.open(path) as image:
            return old(image.convert("RGB"))

    def decode_and_resize(path: Path) -> None:
        with Image.open(path) as image:
            image.load()
            for step in resize:
                image = step(image)

    def in_worker(one: Callable[[Path], Tensor], collate: Any = None) -> float:
        loader: Any = DataLoader(Files(paths, one), batch, num_workers=1, collate_fn=collate)
        return worker_seconds(loader)[0] - started

    nothing: Any = DataLoader(Files(paths[:2], lambda path: torch.zeros(1)), 1, num_workers=1)
    started = worker_seconds(nothing)[0]
    gallery = [GalleryImage(path.stem, path) for path in paths]
    feed, busy = worker_seconds(
        ImageLoader(gallery, found, batch, num_workers=1, known=frozenset())._loader
    )
    checked = own_seconds(lambda: verify_images(list(paths)))
    hashed = own_seconds(lambda: [sha256_of_file(path) for path in paths])
    return {
        "limit": own_seconds(lambda: [decode_and_resize(path) for path in paths]),
        "feed": feed - started,
        "old": checked + hashed + in_worker(load, torch.stack),
        "plain": in_worker(lambda path: plain(default_loader(str(path)))),
        "started": started,
        "busy": busy,
    }


def main() -> None:
    parser = flag_parser(
        __doc__,
        images=(32, "number of images per size"),
        rounds=(4, "times that a measurement reads each image"),
        repeats=(3, "measurements per model and size"),
        batch=(16, "images per batch"),
        sides=([512, 1024], "sides of the photographs, pixels"),
        models=(list(MODELS), "models to measure"),
    )
    args = parser.parse_args()
    if args.images * args.rounds <= args.batch:
        parser.error("--batch: expected less than --images x --rounds; one batch uses no worker")
    torch.set_num_threads(1)
    print(describe(), json.dumps(vars(args)))
    print(f"required: feed at least {BARS['old']}x old and {BARS['limit']:.0%} of limit")
    draw = np.random.default_rng(0)
    missed = []
    for side in args.sides:
        with TemporaryDirectory() as name:
            paths = [Path(name) / f"{number:04}.jpg" for number in range(args.images)]
            for path in paths:
                photograph(side, draw).save(path, quality=QUALITY)
            size = sum(path.stat().st_size for path in paths) / len(paths) / 1024
            print(f"{side} px, {size:.0f} KB: images per second of one core")
            for model in args.models:
                found = recipe(*MODELS[model])
                files = paths * args.rounds
                runs = [measure(files, found, args.batch) for _ in range(args.repeats)]
                least = {way: min(run[way] for run in runs) for way in runs[0]}
                rates = {way: len(files) / least[way] for way in ("limit", "feed", "old", "plain")}
                shown = ", ".join(f"{way} {rate:.1f}" for way, rate in rates.items())
                ratios = {way: rates["feed"] / rates[way] for way in ("limit", "old", "plain")}
                busy = max(run["busy"] for run in runs)
                print(
                    f"  {model:<7}{found.size} px: {shown}; feed: {ratios['limit']:.0%} of limit, "
                    f"{ratios['old']:.2f}x old (limit {rates['limit'] / rates['old']:.2f}x), "
                    f"{ratios['plain']:.2f}x plain, busy {busy:.0%}",
                    flush=True,
                )
                missed += [
                    f"{model} at {side} px against {way}"
                    for way, bar in BARS.items()
                    if ratios[way] < bar
                ]
    for model in args.models:
        found = recipe(*MODELS[model])
        pixels = torch.zeros(args.batch, 3, found.size, found.size, dtype=torch.uint8)
        on_cpu = normalizer(found.transform().normalization, CPU)
        seconds = best_seconds(lambda on=on_cpu, x=pixels: on(x), args.repeats)  # type: ignore[misc]
        print(f"normalization on this CPU, {model}: {1000 * seconds / args.batch:.2f} ms per image")
    print(f"too slow: {', '.join(missed)}" if missed else "all requirements met")


if __name__ == "__main__":
    main()
